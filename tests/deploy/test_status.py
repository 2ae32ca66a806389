"""What `metisfl status` says follows from what controller and broker told."""

from __future__ import annotations

from dataclasses import replace

from metisfl.broker.client import BrokerStatus
from metisfl.deploy.insecure import INSECURE
from metisfl.deploy.status import Status, lines
from metisfl.proto import events_pb2 as pb

NOON_S = 1_700_000_000.0
BROKER = BrokerStatus(
    incarnation=1,
    head=1234,
    floor=0,
    log_bytes=2_000_000,
    log_limit_bytes=4_000_000_000,
    disk_free_bytes=9_000_000_000,
    events_stored=7,
    events_refused={},
    full_since_unix_ns=0,
    full_reason="",
    connections={},
    messages_dropped=0,
    insecure=False,
    requests_refused={},
    offenders={},
)
TRAINING = pb.ControllerStatus(
    run_id="r1",
    phase="training",
    round=3,
    rounds=20,
    quorum=2,
    counted=1,
    invited=3,
    waits_for="2 learners",
    awaited=[
        pb.Awaited(
            learner="bob",
            task_id="r1.3.train.bob",
            since_unix_ns=int((NOON_S - 12) * 1e9),
            lease_left_s=48.2,
        ),
        pb.Awaited(learner="cyd", since_unix_ns=int(NOON_S * 1e9), lease_left_s=60.0),
    ],
    awaited_total=5,
)


def test_every_wait_says_who_since_when_and_until_when() -> None:
    assert lines(Status("hearts", BROKER, TRAINING), NOON_S) == [
        "hearts: run r1, round 3 of 20, training, 1 of 3 updates (quorum 2)",
        "waiting for 2 learners",
        "  bob  silent for 12 s, lease ends in 48 s  (r1.3.train.bob)",
        "  cyd  silent for 0 s, lease ends in 60 s  (has yet to join)",
        "  and 3 more, whose leases end later",
        "broker: 1234 events, 2.0 MB of 4.0 GB, 9.0 GB free on its disk",
    ]


def test_an_insecure_federation_says_so_before_all_else() -> None:
    usual = lines(Status("hearts", BROKER, TRAINING), NOON_S)
    insecure = lines(Status("hearts", replace(BROKER, insecure=True), TRAINING), NOON_S)
    assert insecure == [INSECURE.upper(), *usual]
    assert insecure[0].startswith("INSECURE: NOTHING IS ENCRYPTED AND NOBODY IS AUTHENTICATED")


def test_a_silent_controller_and_one_without_a_run_are_told_apart() -> None:
    silent = lines(Status("hearts", BROKER, None), NOON_S)
    assert silent[0] == "hearts: the controller is silent; does it run, for this federation?"
    idle = pb.ControllerStatus(phase="idle", waits_for="a driver that asks for a run")
    waiting = lines(Status("hearts", BROKER, idle), NOON_S)
    assert waiting[0] == "hearts: no run yet; waiting for a driver that asks for a run"


def test_a_broker_that_takes_no_events_says_since_when_and_why() -> None:
    full = replace(
        BROKER, floor=99, full_since_unix_ns=int((NOON_S - 30) * 1e9), full_reason="disk full"
    )
    assert lines(Status("hearts", full, TRAINING), NOON_S)[-2:] == [
        "broker: 1234 events, 2.0 MB of 4.0 GB, 9.0 GB free on its disk, trimmed up to 99",
        "  takes no events since 30 s: disk full",
    ]
