"""A federation finishes its run, with the same model and about as quickly, whatever is done to it.

How it is measured: in one run, attacks go on for some rounds, are paused for as many, and so on, so
that both kinds of rounds see the same machine. A round lasts from its opening to the next one's, by
the broker's clock; the first of each kind in a row is left out. The attackers run at nice 19, since
their machines are not ours to slow down. Whatever else wants the two cores can only make attacked
rounds, which leave none idle, look longer: so a run that looks long is measured again, twice at
most, and the quickest says what the attack costs.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from daemons import DEADLINE_S, Daemons
from watched import digest_of, said_by

from metisfl.deploy.memory import PeakMemory

pytestmark = pytest.mark.chaos

ROUNDS, IN_A_ROW, FEW_ROUNDS = 16, 4, 8
LONGER_AT_MOST, MEASURED_AT_MOST = 1.2, 3
SPARE_BYTES = 96 << 20
MEMORY_LIMIT_BYTES = 448 << 20
A_LOOK_BYTES = 128 << 20  # what may come between two looks at the memory, each 0.1 s

STRANGERS = ("half-greeting", "garbage", "announced-frame", "wrong-mechanism", "wrong-key")
PUBLISHERS = ("others-topics", "forged", "replayed", "bombs", "mutated", "oversized")
HONEST = ("ada", "bob", "cyd")
READERS = ("others-lanes", "hellos", "reconnects", "unread", "subscriptions", "beats")
SENDERS = ("others-tasks", "wild-chunks", "bulk-garbage", "models")
GROUPS = (("half-open",), STRANGERS, PUBLISHERS, READERS, SENDERS)

TOLD = {
    # attack: (whose log, a pattern of the line that names it)
    "others-topics": ("broker", "may not publish under"),
    "forged": ("broker", "a principal publishes in its own name only"),
    "replayed": ("broker", "is over: learner:replayed has epoch"),
    "bombs": ("controller", "that are not protobuf|allowed are"),
    "mutated": ("broker", "not protobuf|unknown message|not a lane|parts"),
    "others-lanes": ("broker", "may not read|may not ask"),
    "hellos": ("broker", "is not spoken here|too often"),
    "reconnects": ("broker", "connects too often"),
    "unread": ("broker", "not acknowledged|fetches wait"),
    "subscriptions": ("broker", "may not read|subscriptions; at most"),
    "others-tasks": ("controller", "NOT_YOURS|UNKNOWN_TASK"),
    "liar": ("controller", "more than the 32 that it may weigh"),
}
KEYLESS = ("half-open", *(one for one in STRANGERS if one != "wrong-key"))
"""Who shows no key has no name but its address."""
NO_KEY = {
    "broker": ("'handshake refused'", "'127.0.0.1'"),
    "controller": ("'handshake failed'", "'127.0.0.1'"),
}


def until_named(daemons: Daemons, attacks: Iterable[str]) -> None:
    """Wait until the log names the offender of each of these attacks, which go on."""
    deadline = time.monotonic() + DEADLINE_S
    while unnamed := [attack for attack in attacks if not names_it(daemons, attack)]:
        assert time.monotonic() < deadline, f"no line names the offender of {unnamed}"
        time.sleep(0.2)


def names_it(daemons: Daemons, attack: str) -> bool:
    """Whether a daemon's log says what this attack was refused for."""
    name, pattern = TOLD[attack]
    lines = (str(line) for line in said_by(daemons, name))
    return any(attack in line and re.search(pattern, line) for line in lines)


@pytest.mark.parametrize("attack", KEYLESS)
def test_who_shows_no_key_is_named_by_address_at_each_door(
    field: Any, attackers: Any, attack: str
) -> None:
    daemons: Daemons = field("nobody")
    crowd = attackers(daemons).start(attack, nice=0, keys=False)
    deadline = time.monotonic() + DEADLINE_S
    unnamed = dict(NO_KEY)
    while unnamed:
        assert time.monotonic() < deadline, f"{attack} is not named by {list(unnamed)}"
        for name, words in list(unnamed.items()):
            lines = [str(line) for line in said_by(daemons, name)]
            if any(all(word in line for word in words) for line in lines):
                del unnamed[name]
        time.sleep(0.2)
    crowd.end()
    for home in (daemons.homes.broker, daemons.homes.controller):
        told = (home / "audit.jsonl").read_text()
        assert '"who":"127.0.0.1"' in told.replace(": ", ":"), f"{home} has no line of it"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("privacy", ["plain", "ckks"])
def test_a_run_goes_on_as_if_nothing_happened(
    field: Any, attackers: Any, run_of: Any, privacy: str
) -> None:
    attacks = [attack for group in GROUPS for attack in group]
    daemons: Daemons = field("liar", *attacks, encrypted=privacy == "ckks")
    quiet, _ = run_of(daemons, ROUNDS)
    undisturbed = digest_of(daemons, quiet)

    crowd = attackers(daemons)
    for group in GROUPS:
        crowd.start(*group)
    crowd.start("join", keys=False)
    liar = attackers(daemons).start("liar", nice=0)
    peaks = {name: PeakMemory(daemons.running[name].pid) for name in ("broker", "controller")}

    def turn(number: int) -> None:
        if number % IN_A_ROW == 0:
            (crowd.go_on if number // IN_A_ROW % 2 == 0 else crowd.pause)()

    ratios: list[float] = []
    while len(ratios) < MEASURED_AT_MOST and min(ratios, default=math.inf) > LONGER_AT_MOST:
        crowd.go_on()
        view, took = run_of(daemons, ROUNDS, sorted((*HONEST, "liar")), turn)
        ratios.append(attacked_over_paused(took))
        assert digest_of(daemons, view) == undisturbed, "the attack has changed the model"
        assert view.closed is not None
        assert [one.learner for one in view.closed.counted] == list(HONEST)
    crowd.go_on()
    until_named(daemons, TOLD)
    memory = {name: peak.over_idle_bytes() for name, peak in peaks.items()}
    told = crowd.end() | liar.end()

    print(f"over idle: {memory}; {told}")
    assert min(ratios) <= LONGER_AT_MOST, f"rounds take so many times as long: {ratios}"
    assert told["join"].get("welcomed", 0) == 0, told["join"]
    for attack, counts in told.items():
        assert "let in" not in counts or attack == "oversized", f"{attack}: {counts}"
        assert not [what for what in counts if "others'" in what], f"{attack}: {counts}"
    assert max(memory.values()) <= SPARE_BYTES, f"bytes over idle: {memory}"
    idle = [attack for attack, counts in told.items() if not any(map(bool, _numbers(counts)))]
    assert not idle, f"these attacks have done nothing: {idle}"


def attacked_over_paused(took: Mapping[int, float]) -> float:
    """How many times as long the attacked rounds of a run lasted."""
    kinds: tuple[list[float], list[float]] = ([], [])
    for number, seconds in took.items():
        if number % IN_A_ROW:
            kinds[number // IN_A_ROW % 2].append(seconds)
    attacked, paused = map(statistics.median, kinds)
    print(f"a round took {attacked:.3f} s under attack and {paused:.3f} s without: {kinds}")
    return attacked / paused


def _numbers(counts: dict[str, Any]) -> list[int]:
    return [value for value in counts.values() if isinstance(value, int)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("attack", "victim"), [("endless-event", "broker"), ("endless-update", "controller")]
)
def test_a_message_that_never_ends_is_cut_off_and_the_run_goes_on(
    field: Any, attackers: Any, run_of: Any, attack: str, victim: str
) -> None:
    daemons: Daemons = field(attack, METISFL_MEMORY_LIMIT=str(MEMORY_LIMIT_BYTES))
    quiet, _ = run_of(daemons, FEW_ROUNDS)
    peak = PeakMemory(daemons.running[victim].pid)
    crowd = attackers(daemons).start(attack, nice=0)
    view, _ = run_of(daemons, FEW_ROUNDS)
    deadline = time.monotonic() + DEADLINE_S
    audit = getattr(daemons.homes, victim) / "audit.jsonl"
    while not (lines := [one for one in audit.read_text().splitlines() if "memory limit" in one]):
        assert time.monotonic() < deadline, f"the {victim} has let it go on"
        time.sleep(0.2)
    taken = peak.over_idle_bytes()
    told = crowd.end()
    print(f"{taken} bytes over idle; the limit is {MEMORY_LIMIT_BYTES}; {told}")
    assert all(f"learner:{attack}" in line for line in lines), "another one is suspected"
    assert taken <= MEMORY_LIMIT_BYTES + A_LOOK_BYTES
    assert digest_of(daemons, view) == digest_of(daemons, quiet)
