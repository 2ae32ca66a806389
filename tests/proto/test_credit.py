"""Whatever a network does to the frames: equal bytes, never above the budget, always an end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.proto.bulk import Credit
from metisfl.proto.credit import (
    RECLAIM_S,
    Allocator,
    Arrival,
    Patience,
    Receiver,
    Sender,
)
from metisfl.proto.errors import PeerError

SUBJECT = bytes(16)


def test_a_sender_sends_what_is_allowed_and_nothing_twice() -> None:
    sender = Sender(5)
    assert not sender.ready, "nothing was allowed yet"
    assert sender.allow(Credit(SUBJECT, 1, 3)) == 1
    sent = []
    while sender.ready:
        sent.append(sender.next)
        sender.sent()
    assert sent == [1, 2], "chunk 0 has arrived and 3 is the limit"
    assert sender.allow(Credit(SUBJECT, 0, 2)) == 0, "an old word takes nothing back"
    assert (sender.acknowledged, sender.limit, sender.next) == (1, 3, 3)


def test_a_rewind_sends_again_from_the_first_missing_chunk() -> None:
    sender = Sender(5)
    sender.restart(limit=4)
    for _ in range(4):
        sender.sent()
    sender.allow(Credit(SUBJECT, 2, 4, rewind=True))
    assert sender.next == 2
    sender.allow(Credit(SUBJECT, 1, 4, rewind=True))
    assert sender.next == 2, "an old rewind is passed over"


def test_credit_beyond_the_payload_is_the_peers_error() -> None:
    with pytest.raises(PeerError, match="up to chunk 6 of 5"):
        Sender(5).allow(Credit(SUBJECT, 0, 6))


def test_a_receiver_takes_chunks_in_order_and_asks_back_once() -> None:
    receiver = Receiver(5)
    assert receiver.arrived(0) is Arrival.IGNORED, "nothing was promised"
    receiver.widen(4)
    assert receiver.arrived(0) is Arrival.NEXT
    receiver.taken()
    assert receiver.arrived(2) is Arrival.GAP
    assert receiver.arrived(3) is Arrival.IGNORED, "asked already"
    assert receiver.arrived(4) is Arrival.IGNORED, "beyond the limit"
    assert receiver.arrived(0) is Arrival.IGNORED, "had it"
    assert receiver.arrived(1) is Arrival.NEXT
    receiver.taken()
    assert receiver.arrived(3) is Arrival.GAP, "a new gap is a new question"


def test_what_comes_under_reclaimed_credit_is_still_taken() -> None:
    receiver = Receiver(5)
    receiver.widen(3)
    receiver.narrow()
    assert receiver.limit == 0
    assert receiver.arrived(0) is Arrival.NEXT
    receiver.taken()
    assert (receiver.received, receiver.limit) == (1, 1)


def test_patience_doubles_in_silence_and_recovers_with_a_word() -> None:
    patience, now, waits = Patience(0.0), 0.0, []
    for _ in range(8):
        waits.append(patience.deadline - now)
        now = patience.deadline
        patience.ask_again(now)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    patience.word(now + 0.1, progress=True)
    assert patience.deadline == now + 0.1 + 1


def test_patience_follows_a_link_that_needs_twelve_seconds_a_chunk() -> None:
    patience, now, arrived = Patience(0.0), 0.0, 0
    chunk_at = 12.0  # what is in transit is lost when the connection is thrown away
    for _ in range(100):
        deadline = patience.deadline
        if chunk_at <= deadline:
            now, arrived = chunk_at, arrived + 1
            patience.word(now, progress=True)
        else:
            now = deadline
            patience.ask_again(now)
        chunk_at = now + 12.0
    assert arrived > 90, f"only {arrived} of 100 attempts brought a chunk"


def test_words_without_progress_end_in_a_new_attempt() -> None:
    patience, now = Patience(0.0), 0.0
    while now < patience.deadline:
        now += 0.5
        patience.word(now, progress=False)
    assert now == 8.0


def test_one_upload_gets_its_window_and_two_share_the_budget() -> None:
    credit: Allocator[str] = Allocator(budget=8, window=6)
    credit.join("a", 100, 0.0)
    assert credit.deal() == [("a", 6)]
    credit.join("b", 100, 0.0)
    assert credit.deal() == [("b", 2)], "the rest of the budget"
    credit.give_back("a", 4)
    assert sorted(credit.deal()) == [("a", 2), ("b", 2)], "now four each"
    assert credit.outstanding == 8


def test_two_hundred_uploads_wait_their_turn_in_a_budget_of_sixty_four() -> None:
    credit: Allocator[int] = Allocator(budget=64, window=32)
    for key in range(200):
        credit.join(key, 3, 0.0)
    order: list[int] = []
    while dealt := credit.deal():
        assert credit.outstanding <= 64
        for key, chunks in dealt:
            assert chunks == 1
            order.append(key)
            credit.give_back(key, 1)
    assert order == list(range(200)) * 3, "somebody was served before another's turn"


def test_the_credit_of_the_silent_goes_to_those_who_wait() -> None:
    credit: Allocator[str] = Allocator(budget=2, window=2)
    credit.join("silent", 9, 0.0)
    credit.deal()
    credit.join("waiting", 9, 1.0)
    assert credit.deal() == []
    assert credit.silent(RECLAIM_S - 0.1) == []
    assert credit.silent(RECLAIM_S) == ["silent"]
    assert credit.reclaim("silent") == 2
    assert credit.deal() == [("waiting", 2)]
    credit.give_back("silent", 2)  # they come after all, and count for nothing
    assert credit.outstanding == 2
    credit.heard("silent", 20.0)
    credit.give_back("waiting", 2)
    assert sorted(credit.deal()) == [("silent", 1), ("waiting", 1)]


def test_who_asks_again_keeps_its_place_in_the_line() -> None:
    credit: Allocator[str] = Allocator(budget=1, window=1)
    for key in ("first", "second", "third"):
        credit.join(key, 1, 0.0)
    assert credit.deal() == [("first", 1)]
    credit.join("second", 1, 8.0)
    credit.leave("first")
    assert credit.deal() == [("second", 1)]


keys = st.integers(0, 5)
steps = st.one_of(
    st.tuples(st.just("join"), keys, st.integers(0, 20)),
    st.tuples(st.sampled_from(["leave", "reclaim", "heard"]), keys, st.just(0)),
    st.tuples(st.sampled_from(["give_back", "want"]), keys, st.integers(0, 9)),
)


@given(st.integers(1, 12), st.integers(1, 8), st.lists(steps, max_size=40))
def test_the_budget_holds_through_any_history(
    budget: int, window: int, history: list[tuple[str, int, int]]
) -> None:
    credit: Allocator[int] = Allocator(budget, window)
    members: set[int] = set()
    for what, key, number in history:
        if what == "join":
            credit.join(key, number, 0.0)
            members.add(key)
        elif what == "leave":
            credit.leave(key)
            members.discard(key)
        elif key in members:
            args = {"reclaim": (), "heard": (1.0,)}.get(what, (number,))
            getattr(credit, what)(key, *args)
        credit.deal()
        held = [credit.held(key) for key in members]
        assert credit.outstanding == sum(held) <= budget
        assert all(0 <= chunks <= window for chunks in held)
    for key in list(members):
        credit.leave(key)
    assert credit.outstanding == 0, "credit was lost"


# ---- Both ends over a network that loses, repeats, delays and crashes ----------------------


@dataclass
class Learner:
    """The asking end, as learner/transfer.py plays it."""

    data: list[int]
    sender: Sender
    patience: Patience
    connection: int = 0
    asked: bool = False
    done: bool = False


@dataclass
class Controller:
    """The answering end, as controller/uploads.py plays it; `disk` survives a crash."""

    disk: dict[int, list[int]] = field(default_factory=dict)
    receivers: dict[int, Receiver] = field(default_factory=dict)
    routes: dict[int, int] = field(default_factory=dict)
    credit: Allocator[int] = field(default_factory=lambda: Allocator(BUDGET, WINDOW))


BUDGET, WINDOW = 4, 3


class World:
    """Frames in the air are (learner, connection, to the controller?, what)."""

    def __init__(self, sizes: list[int], chance: random.Random) -> None:
        self.chance, self.now = chance, 0.0
        self.controller = Controller()
        self.learners = [
            Learner([chance.randrange(1000) for _ in range(n)], Sender(n), Patience(0.0))
            for n in sizes
        ]
        self.air: list[tuple[int, int, bool, object]] = []
        self.loss, self.repeat = 0.0, 0.0

    def send(self, who: int, connection: int, up: bool, what: object) -> None:
        for _ in range(1 + (self.chance.random() < self.repeat)):
            if self.chance.random() >= self.loss:
                self.air.append((who, connection, up, what))

    def learner_acts(self, who: int) -> None:
        me = self.learners[who]
        if me.done:
            return
        if self.now >= me.patience.deadline:
            me.patience.ask_again(self.now)
            me.connection += 1
            me.asked = False
        if not me.asked:
            me.sender.restart()
            me.asked = True
            self.send(who, me.connection, True, "OPEN")
        while me.sender.ready:
            index = me.sender.next
            self.send(who, me.connection, True, (index, me.data[index]))
            me.sender.sent()

    def deliver(self, place: int) -> None:
        who, connection, up, what = self.air.pop(place)
        if up:
            self.controller_takes(who, connection, what)
            self.controller_works()
            return
        me = self.learners[who]
        if connection != me.connection or me.done:
            return
        if what == "STORED":
            me.done = True
        else:
            assert isinstance(what, Credit)
            me.patience.word(self.now, progress=me.sender.allow(what) > 0)
        self.learner_acts(who)

    def controller_takes(self, who: int, connection: int, what: object) -> None:
        us, data = self.controller, self.learners[who].data
        us.routes[who] = connection
        disk = us.disk.setdefault(who, [])
        if len(disk) == len(data):
            self.send(who, connection, False, "STORED")
        elif what == "OPEN":
            receiver = us.receivers.setdefault(who, Receiver(len(data), len(disk)))
            receiver.restart()
            us.credit.join(who, len(data) - len(disk), self.now)
        elif who in us.receivers:
            assert isinstance(what, tuple)
            receiver = us.receivers[who]
            us.credit.heard(who, self.now)
            arrival = receiver.arrived(what[0])
            if arrival is Arrival.NEXT:
                disk.append(what[1])
                receiver.taken()
                us.credit.give_back(who, 1)
                us.credit.want(who, receiver.count - receiver.limit)
                self.send(who, connection, False, receiver.credit(SUBJECT))
            elif arrival is Arrival.GAP:
                self.send(who, connection, False, receiver.credit(SUBJECT, rewind=True))
            if receiver.complete:
                del us.receivers[who]
                us.credit.leave(who)
                self.send(who, connection, False, "STORED")

    def controller_works(self) -> None:
        us = self.controller
        for who, chunks in us.credit.deal():
            us.receivers[who].widen(chunks)
            self.send(who, us.routes[who], False, us.receivers[who].credit(SUBJECT))
        allowed = sum(r.limit - r.received for r in us.receivers.values())
        assert allowed == us.credit.outstanding <= BUDGET, f"{allowed} chunks of {BUDGET} allowed"

    def time_passes(self, seconds: float) -> None:
        us = self.controller
        self.now += seconds
        for who in us.credit.silent(self.now):
            us.credit.reclaim(who)
            us.receivers[who].narrow()
        for who, receiver in us.receivers.items():
            self.send(who, us.routes[who], False, receiver.credit(SUBJECT))
        self.controller_works()
        for who in range(len(self.learners)):
            self.learner_acts(who)

    def controller_crashes(self) -> None:
        """What was not synced may be gone; a complete update is not."""
        old = self.controller
        self.controller = Controller(disk=old.disk)
        for who, disk in old.disk.items():
            if len(disk) < len(self.learners[who].data):
                del disk[self.chance.randint(0, len(disk)) :]

    def learner_crashes(self, who: int) -> None:
        me = self.learners[who]
        if not me.done:
            count = len(me.data)
            fresh = Learner(me.data, Sender(count), Patience(self.now), me.connection + 1)
            self.learners[who] = fresh

    def step(self) -> None:
        draw = self.chance.random()
        if self.air and draw < 0.7:
            self.deliver(self.chance.randrange(len(self.air)))
        elif draw < 0.95:
            self.time_passes(self.chance.choice([0.5, 0.5, 3.0, 11.0]))
        elif draw < 0.975:
            self.controller_crashes()
        else:
            self.learner_crashes(self.chance.randrange(len(self.learners)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.floats(0, 0.6),
    st.floats(0, 0.4),
    st.integers(0, 2**32),
)
def test_any_network_ends_in_equal_bytes_within_the_budget(
    sizes: list[int], loss: float, repeat: float, seed: int
) -> None:
    world = World(sizes, random.Random(seed))
    world.loss, world.repeat = loss, repeat
    world.time_passes(0.0)
    for _ in range(120):
        world.step()
    world.loss = world.repeat = 0.0
    steps = 0
    while not all(learner.done for learner in world.learners):
        while world.air:
            world.deliver(0)
        world.time_passes(0.5)
        steps += 1
        assert steps < 400, f"no end after {steps / 2} s of a link that works again"
    for who, learner in enumerate(world.learners):
        assert world.controller.disk[who] == learner.data
