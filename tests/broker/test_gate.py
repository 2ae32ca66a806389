"""A real broker whose list of peers changes: it holds at once, and for those who are in, too."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from typing import Any

import pytest
import zmq
from raw_curve import RawCurve
from raw_ingress import answer, envelope, publish, still_serves
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy.admit_command import command as admit_command
from metisfl.deploy.expel_command import command as expel_command
from metisfl.proto import frames
from metisfl.proto.events_pb2 import PeerExpelled
from metisfl.proto.frames import Ack, Head

PATIENCE_S = 20.0  # never waited for in a test that passes


def facts(broker: Any) -> list[Any]:
    """The broker's audit log."""
    return [json.loads(line) for line in (broker.home / "audit.jsonl").read_text().splitlines()]


def until_said(broker: Any, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in broker.said():
        assert time.monotonic() < deadline, f"the broker never said {words!r}"


def refused(sockets: Any, site: Any) -> bool:
    """Whether the site's key opens nothing."""
    dealer = site.raw(sockets, zmq.DEALER)
    monitor = dealer.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )
    assert monitor.poll(int(PATIENCE_S * 1000)), "neither in nor out"
    event = parse_monitor_message(monitor.recv_multipart())["event"]
    dealer.disable_monitor()
    monitor.close(linger=0)
    return bool(event == zmq.EVENT_HANDSHAKE_FAILED_AUTH)


def test_who_is_expelled_is_cut_off_and_hears_nothing_any_more(
    broker: Any, site: Any, sockets: Any
) -> None:
    gone, other = site("learner:gone"), site("learner:other")
    broker.start()
    dealer, ears = gone.greeted(sockets), gone.raw(sockets, zmq.SUB)
    ears.subscribe(b"f/task/gone/")
    ears.subscribe(b"hb/")
    while not isinstance(frames.parse_live(ears.recv_multipart()), Head):
        pass
    dealer.send_multipart(publish(envelope("learner:gone", 1, "f/done/gone/")))
    assert answer(dealer) == Ack(1, 1)
    assert expel_command(["gone", "--home", str(broker.home)]) == 0
    until_said(broker, "all connections are cut")
    still_serves(other, "f/done/other/", sockets)
    with suppress(zmq.Again):
        dealer.send_multipart(publish(envelope("learner:gone", 2, "f/done/gone/")), zmq.NOBLOCK)
    assert refused(sockets, gone)
    still_serves(other, "f/done/other/", sockets, 2)
    assert broker.log("f").count(("learner:gone", 1)) == 1
    assert ("learner:gone", 2) not in broker.log("f")
    (expelled,) = [one for one in facts(broker) if one["what"] == "expelled"]
    assert expelled["facts"]["principal"] == "learner:gone"


def test_who_is_admitted_is_in_within_a_moment_and_disturbs_nobody(
    broker: Any, site: Any, sockets: Any
) -> None:
    here, new = site("learner:here"), site("learner:new", known=False)
    broker.start()
    dealer = here.greeted(sockets)
    assert refused(sockets, new)
    key = new.identity.public.decode()
    assert admit_command(["learner:new", key, "--home", str(broker.home)]) == 0
    until_said(broker, "list of peers read again")
    still_serves(new, "f/done/new/", sockets)
    dealer.send_multipart(publish(envelope("learner:here", 1, "f/done/here/")))
    assert answer(dealer) == Ack(1, 1)
    assert "all connections are cut" not in broker.said()


def test_admissions_are_events_also_when_the_list_was_edited_while_the_broker_was_away(
    broker: Any, site: Any, sockets: Any
) -> None:
    gone, other = site("learner:gone"), site("learner:other")
    broker.start()
    still_serves(other, "f/done/other/", sockets)
    broker.end(signal.SIGTERM)
    assert expel_command(["gone", "--home", str(broker.home)]) == 0
    for sequence in (2, 3):  # the second start finds nothing new
        broker.start()
        still_serves(other, "f/done/other/", sockets, sequence)
        until_announced(broker)
        broker.end(signal.SIGTERM)
    (event,) = (event for event in broker.events("f") if event.publisher == "broker")
    assert (event.topic, event.type) == ("f/access/all/", "PeerExpelled")
    expelled = PeerExpelled.FromString(event.payload)
    assert expelled.principal == "learner:gone"
    assert expelled.public == gone.identity.public.decode()


def until_announced(broker: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "broker" not in {event.publisher for event in broker.events("f")}:
        assert time.monotonic() < deadline, "the broker has announced nothing"


def test_a_message_without_an_end_costs_bounded_memory(
    broker: Any, site: Any, sockets: Any
) -> None:
    """libzmq holds the parts of a message until the last has come, without a limit of its own."""
    endless, other = site("learner:endless"), site("learner:other")
    broker.options += ["--memory-limit", "150MiB"]
    broker.start()
    wire = RawCurve(broker.ingress, endless.identity, broker.identity.public)
    part = bytes(200_000)

    def for_ever() -> None:
        while True:
            wire.part(part, more=True)

    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        for_ever()
    wire.close()
    until_said(broker, "over 157286400")
    still_serves(other, "f/done/other/", sockets)
    (line,) = [one for one in facts(broker) if one["what"] == "memory limit"]
    assert line["facts"]["who"] == "learner:endless", "who never completed a message is suspected"
    assert line["facts"]["held_bytes"] < (150 + 96) << 20, "the limit, and what comes in a look"


def test_a_second_message_without_an_end_is_cut_off_as_the_first_was(
    broker: Any, site: Any, sockets: Any
) -> None:
    """A cut that helped does not make the broker look away from who comes again at once."""
    endless, other = site("learner:endless"), site("learner:other")
    broker.options += ["--memory-limit", "150MiB"]
    broker.start()
    for _ in range(3):
        wire, sent = back_again(broker, endless), 0
        with suppress(OSError):
            while sent < 1 << 30:
                wire.part(bytes(200_000), more=True)
                sent += 200_000
        wire.close()
        assert sent < 400 << 20, f"{sent} bytes were taken"
    still_serves(other, "f/done/other/", sockets)


def back_again(broker: Any, who: Any) -> RawCurve:
    """Shake hands by hand, as soon as the broker listens again."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError, AssertionError):  # hung up in the middle of the handshake
            return RawCurve(broker.ingress, who.identity, broker.identity.public)
    raise AssertionError("the broker does not listen any more")
