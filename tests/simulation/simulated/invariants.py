"""What must hold, whatever happens: checked while it happens, by one who sees all disks.

The numbers are those of the README. The log is read here a second time, by other code than the
controller's: what a round asked for, what came, and what was counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from metisfl.controller.round import apply
from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Logged, Run
from metisfl.learner.task import Stage, Tasks
from metisfl.proto import events_pb2 as pb
from metisfl.proto.bulk import Credit
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.events import decode
from metisfl.proto.topics import federation_lane
from simulated.ledger import Ledger
from simulated.scenario import FEDERATION, Scenario
from simulated.scheduler import Broken, Scheduler

if TYPE_CHECKING:
    from simulated.broker_node import Log
    from simulated.disk import Disk

__all__ = ["Invariants"]


VOID = pb.RoundOpened | pb.RoundClosed | pb.ModelOpened | pb.RunStopped


class Invariants:
    """The nodes tell it what they do; it raises Broken when that must not be."""

    def __init__(self, scheduler: Scheduler, scenario: Scenario) -> None:
        self._scheduler, self._scenario = scheduler, scenario
        self.disks: dict[str, Disk] = {}  # by principal
        self.ledger = Ledger(scenario)
        self.states = [Run(FEDERATION, scenario.terms)]  # after each record of the log
        self.messages: list[Any] = []
        self._opened: dict[bytes, tuple[Any, Any]] = {}
        self.lanes: dict[str, list[int]] = defaultdict(list)
        self._stored: dict[str, int] = defaultdict(int)  # events of each publisher in the log
        self._acked: dict[str, int] = defaultdict(int)
        self._cursors: dict[tuple[str, str], int] = {}
        self._floor = 0  # the log was trimmed up to here
        self._answered: set[bytes] = set()
        self._partials: dict[tuple[str, int, str], bytes] = {}
        self._trainings: Counter[str] = Counter()
        self._allowed: Counter[str] = Counter()  # trainings whose result is lost
        self._results: dict[str, dict[str, pb.TaskAssigned]] = defaultdict(dict)

    # ---- I1: the log --------------------------------------------------------------------

    def logged(self, log: Log, batch: Any) -> None:
        """A batch has reached the broker's disk."""
        for place in batch.appends:
            envelope = parse_envelope(place.envelope)
            name, sequence = envelope.publisher, envelope.sequence
            if place.sequence != len(self.messages) + 1:
                raise Broken("I1", f"place {place.sequence} follows {len(self.messages)}")
            if sequence != self._stored[name] + 1:
                raise Broken(
                    "I1", f"event {sequence} of {name} follows its event {self._stored[name]}"
                )
            if self.disks[name].get(("row", sequence)) != place.envelope:
                raise Broken("I1", f"event {sequence} of {name} is not what its outbox holds")
            self._stored[name] = sequence
            topic, whole = envelope.topic, federation_lane(FEDERATION)
            for lane, before in (
                (topic, place.previous_in_topic),
                (whole, place.previous_in_federation),
            ):
                newest = self.lanes[lane][-1] if self.lanes[lane] else 0
                if before != newest:
                    raise Broken("I1", f"in {lane} {place.sequence} follows {before}, not {newest}")
                self.lanes[lane].append(place.sequence)
            self._follow(envelope, batch.logged_unix_ns)
            self._opened[place.envelope] = (envelope, self.messages[-1])
        for publisher, _, sequence in sorted(batch.watermarks):
            if sequence != self._stored[publisher]:
                raise Broken(
                    "I1",
                    f"the watermark of {publisher} is {sequence}, its last event in the log "
                    f"{self._stored[publisher]}",
                )

    def _follow(self, envelope: Any, logged: int) -> None:
        """Fold the event into the whole log's state, and into the ledger of rounds."""
        message = decode(envelope.type, envelope.payload)
        self._scheduler.say("log", envelope.type, envelope.correlation_id, envelope.publisher)
        self.messages.append(message)
        state, dropped = apply(self.states[-1], Logged(message, envelope.publisher, logged))
        state.validate()  # the controller's is compared with it
        self.states.append(state)
        self.ledger.check_end(message)
        # Two decisions of one moment may cross: the second to be logged is void.
        if not (dropped and isinstance(message, VOID)):
            self.ledger.take(message)

    def opened(self, envelope: bytes) -> tuple[Any, Any]:
        """What a reader sees in a record: envelope and message, looked into once for all."""
        return self._opened[envelope]

    def acknowledged(self, principal: str, sequence: int) -> None:
        """A client believes that the broker has all up to here."""
        self._acked[principal] = max(self._acked[principal], sequence)
        if sequence > self._stored[principal]:
            raise Broken(
                "I1",
                f"{principal} was told that event {sequence} is stored; the log holds "
                f"{self._stored[principal]} of its events",
            )

    # ---- I2: readers ---------------------------------------------------------------------

    def begins(self, reader: str, lane: str, cursor: int) -> None:
        """A reader begins at what it has committed."""
        self._cursors[reader, lane] = cursor

    def applies(
        self, reader: str, lane: str, numbers: Sequence[int], through: int, trimmed_to: int
    ) -> None:
        """A reader takes these records, and its cursor is `through` when it has applied them."""
        cursor, sequences = self._cursors[reader, lane], self.lanes[lane]
        first, last = bisect_right(sequences, cursor), bisect_right(sequences, through)
        there = sequences[first:last]
        if list(numbers) != there:
            read = set(numbers)
            gone = [number for number in there if number not in read]
            told = gone and gone[-1] <= trimmed_to <= self._floor
            if not told or list(numbers) != [number for number in there if number in read]:
                raise Broken(
                    "I2",
                    f"{reader} reads {list(numbers)} of {lane} from {cursor} to {through}, trimmed "
                    f"to {trimmed_to}; the log has {there} there, and is trimmed to {self._floor}",
                )
        self._cursors[reader, lane] = through

    def trimmed(self, floor: int) -> None:
        """The broker has forgotten the records up to here."""
        self._floor = floor

    def runs_finished(self, through: int) -> int:
        """How many runs had ended when the log was so long."""
        runs = {run.run_id for run in self._scenario.runs}
        return sum(
            isinstance(message, pb.RunFinished) and message.run_id in runs
            for message in self.messages[:through]
        )

    # ---- I3: what was trained and stored ---------------------------------------------------

    def answered_stored(self, subject: bytes) -> None:
        self._answered.add(subject)

    def asked_for(self, credit: Credit) -> None:
        """The controller allows chunks of an upload."""
        if credit.subject in self._answered and credit.limit > credit.first:
            raise Broken("I3", f"an update was answered STORED and is asked for again: {credit}")

    def trained(self, task: pb.TaskAssigned) -> None:
        """A training has come to its end at a site."""
        self._scheduler.say(task.learner, "has trained", task.task_id)
        self._trainings[task.task_id] += 1
        self._results[task.learner][task.task_id] = task
        if self._trainings[task.task_id] > 1 + self._allowed[task.task_id]:
            raise Broken(
                "I3",
                f"{task.task_id} was trained {self._trainings[task.task_id]} times; "
                f"{self._allowed[task.task_id]} times its result was lost in a crash",
            )

    def leaves(self, task: pb.TaskAssigned, digest: bytes) -> None:
        """A site begins to send what it has made."""
        if task.kind != pb.OPEN:
            return
        known = self._partials.setdefault((task.run_id, task.round, task.learner), digest)
        if known != digest:
            raise Broken("I11", f"two partials of round {task.round} leave {task.learner}")

    def works(self, task: pb.TaskAssigned, over: Mapping[str, tuple[float, int]]) -> None:
        """A site begins with a task; it knows what is over."""
        if over.get(task.run_id, (0, 0))[0] == inf:
            raise Broken("I10", f"{task.learner} begins {task.task_id}; its run has ended")

    def lost(self, learner: str, left: Tasks, files: Mapping[Any, Any]) -> None:
        """A learner has died, and this is what its disk holds: what is not there may come again."""
        for task_id in list(self._results[learner]):
            job = left.jobs.get(task_id)
            if job is not None and job.stage is Stage.REPORTED:
                continue
            kept = job is not None and job.outcome is not None
            if kept and job is not None and job.stage is Stage.UPLOADING:
                kept = ("update", task_id) in files or self._scenario.terms is not None
            if kept and self._scenario.terms is not None:
                task = self._results[learner][task_id]
                kept = ("trained", f"{task.run_id}.{task.round}") in files or (
                    "update",
                    task_id,
                ) in files
            if not kept:
                del self._results[learner][task_id]
                self._allowed[task_id] += 1

    # ---- I7, I8: the controller ----------------------------------------------------------------

    def controller_read(self, run: Run, through: int) -> None:
        """The controller has applied the log up to here."""
        place = bisect_right(self.lanes[federation_lane(FEDERATION)], through)
        if run != self.states[place]:
            raise Broken(
                "I7",
                f"at {through} the controller's state is {_difference(run, self.states[place])}",
            )

    def packed(self, run: Run, data: bytes) -> None:
        """A snapshot was made."""
        again = unpack(data, self._scenario.terms)
        if again != run or (len(data) % 4 == 0 and pack(again) != data):
            raise Broken("I7", f"a snapshot gives back {_difference(again, run)}")

    def credit(self, uploads: Any) -> None:
        """The controller has handed out credit."""
        allocator = uploads._credit
        held = sum(member.held for member in allocator._members.values())
        allowed = sum(
            upload.receiver.limit - upload.receiver.received for upload in uploads._uploads.values()
        )
        if not allowed <= held == allocator.outstanding <= self._scenario.budget:
            raise Broken(
                "I8",
                f"{allocator.outstanding} chunks are outstanding, {held} held, {allowed} allowed; "
                f"the budget is {self._scenario.budget}",
            )

    # ---- The end --------------------------------------------------------------------------------

    def finish(self, cursors: Mapping[tuple[str, str], int]) -> None:
        """All is quiet: everything has arrived everywhere."""
        for principal, disk in self.disks.items():
            if self._stored[principal] != disk.get("last", 0):
                raise Broken(
                    "I1",
                    f"the log holds {self._stored[principal]} events of {principal}, its outbox "
                    f"accepted {disk.get('last', 0)}",
                )
        for (reader, lane), cursor in cursors.items():
            behind = [number for number in self.lanes[lane] if number > cursor]
            if behind:
                raise Broken("I2", f"{reader} has never read {behind} of {lane}")
        self.ledger.finish(self.states[-1])

    def recovered(self, log: Log) -> None:
        """The broker has come back."""
        for principal, acked in self._acked.items():
            if log.watermarks.get(principal, (1, 0))[1] < acked:
                raise Broken("I1", f"event {acked} of {principal} was acknowledged, and is gone")


def _difference(one: Run, other: Run) -> str:
    names = [
        name for name in Run.__dataclass_fields__ if getattr(one, name) != getattr(other, name)
    ]
    return "; ".join(
        f"{name} {getattr(one, name)!r}, not {getattr(other, name)!r}" for name in names
    )[:1500]
