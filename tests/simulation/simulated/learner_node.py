"""A learner: what learner/shell.py and state.py do, around the real learner.task.

Law: tasks, reports and cursors are committed together before anything that depends on them leaves
the site; a result that was not synced may be lost in a power cut, and is then made again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from metisfl.learner import task as t
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.bulk import Code
from metisfl.proto.events import may_send
from simulated.client import Client, Records
from simulated.disk import Changes, Disk, Outbox
from simulated.invariants import Invariants
from simulated.network import Network
from simulated.scenario import FEDERATION, Scenario, partial, sealed, trained
from simulated.scheduler import Node, Scheduler
from simulated.transfer import Transfer

__all__ = ["LearnerNode"]

BEAT_S: Final = 1.0
PROGRESS_S: Final = 0.5
GRACE_S: Final = 5.0
ROOM_S: Final = 0.5
APPLICATION_S: Final = 0.3  # until it is loaded


class LearnerNode(Node):
    """One site."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        invariants: Invariants,
        scenario: Scenario,
        learner: str,
    ) -> None:
        super().__init__(scheduler, learner)
        self.disk = Disk(self)
        self.leaves = False  # its application cannot be loaded the next time
        self.has_missed = False  # records that were trimmed before it read them
        self.hang_chance = 0.0
        self._network, self._invariants, self._scenario = network, invariants, scenario
        self.client: Client | None = None
        self.tasks = t.Tasks(learner)

    # ---- Life ---------------------------------------------------------------------------

    def boot(self) -> None:
        self.tasks = self._saved = self.disk.get("tasks") or t.Tasks(self.name)
        self._cursors: dict[str, int] = {}
        self._waiting: deque[tuple[pb.TaskAssigned, Callable[[], None]]] = deque()
        self._turn: pb.TaskAssigned | None = None  # whose turn it is
        self._working = ""  # the task that the training process has
        self._cancelled = False
        self._transfer: Transfer | None = None
        self._fetched: list[bytes] = []
        self._outbox = Outbox(self.disk, f"learner:{self.name}")
        self.client = Client(self, self._network, self._outbox, self._invariants)
        self.later(APPLICATION_S, self._loaded)
        self.later(BEAT_S, self._beat)

    def died(self, *, power_cut: bool) -> None:
        if power_cut:
            self.disk.power_cut()
        self.client = None
        left = self.disk.get("tasks") or t.Tasks(self.name)
        self._invariants.lost(self.name, left, self.disk.files)

    def _loaded(self) -> None:
        assert self.client is not None
        if self.leaves:
            self.leaves = False
            self._publish_membership(pb.LearnerLeft(learner=self.name, reason="no application"))
            self.later(GRACE_S, self._end)
            return
        examples = self._scenario.examples_of(self.name)
        self._publish_membership(pb.LearnerJoined(learner=self.name, examples=examples))
        self._sweep()
        for effect in t.resume(self.tasks):
            if isinstance(effect, t.Upload) and not self._is_intact(effect):
                self._handle([t.Lost(effect.task.task_id)])
                continue
            self._perform([effect])
        for lane in (topics.run_topic(FEDERATION), topics.task_topic(FEDERATION, self.name)):
            self.client.read(lane, lambda *batch, lane=lane: self._on_batch(lane, *batch))

    def _is_intact(self, upload: t.Upload) -> bool:
        return bool(self.disk.read(("update", upload.task.task_id)) == upload.digest)

    def _end(self) -> None:
        self.crash(down_s=self.scheduler.random.uniform(0.5, 6.0))

    def _beat(self) -> None:
        self._save()
        self.later(BEAT_S, self._beat)

    # ---- Events -------------------------------------------------------------------------

    def _on_batch(
        self, lane: str, records: Records, through: int, caught_up: bool, trimmed_to: int
    ) -> None:
        self.has_missed = self.has_missed or trimmed_to > 0
        events: list[t.Event] = []
        for _, envelope, message in records:
            assert may_send(envelope.publisher, message)
            if event := t.told_by(message):
                events.append(event)
        self._handle(events, lane, through)

    def _handle(
        self,
        events: Sequence[t.Event],
        lane: str = "",
        through: int = 0,
        *,
        durable: bool = False,
    ) -> None:
        tasks = self.tasks
        effects: list[t.Effect] = []
        for event in events:
            tasks, caused = t.handle(tasks, event)
            tasks.validate()
            effects += caused
        self.tasks = tasks
        if lane:
            self._cursors[lane] = through
        reports = [effect.message for effect in effects if isinstance(effect, t.Report)]
        if reports or any(isinstance(effect, t.Upload) for effect in effects):
            self._save(reports, durable=bool(reports) or durable)
        self._perform(effects)

    def _save(self, reports: Sequence[t.Answer] = (), *, durable: bool = True) -> None:
        assert self.client is not None
        if not reports and self.tasks is self._saved and not self._cursors:
            return
        changes: Changes = {"tasks": self.tasks}
        topic = topics.done_topic(FEDERATION, self.name)
        for report in reports:
            self.say("reports", type(report).__name__, report.task_id)
            self._outbox.append(changes, topic, report, report.task_id)
        for lane, through in self._cursors.items():
            self._outbox.advance(changes, lane, through)
        self.client.tidy_sync = durable
        self.disk.commit(changes, sync=durable)
        self._saved = self.tasks
        self._cursors.clear()
        if reports:
            self.client.flush()

    def _publish_membership(self, message: pb.LearnerJoined | pb.LearnerLeft) -> None:
        assert self.client is not None
        self.say(type(message).__name__)
        changes: Changes = {}
        self._outbox.append(changes, topics.member_topic(FEDERATION, self.name), message)
        self.disk.commit(changes)
        self.client.flush()

    # ---- Effects ------------------------------------------------------------------------

    def _perform(self, effects: Sequence[t.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, t.Fetch):
                self._start(effect.task, self._fetch, effect.task)
            elif isinstance(effect, t.Work):
                self._start(effect.task, self._work, effect.task, effect.outcome)
            elif isinstance(effect, t.Upload):
                self._start(effect.task, self._upload, effect.task, effect.digest)
            elif isinstance(effect, t.Stop):
                self._stop(effect.task_id)
            elif isinstance(effect, t.Discard):
                self._sweep()

    def _start(self, task: pb.TaskAssigned, do: Callable[..., None], *args: Any) -> None:
        self._waiting.append((task, lambda: do(*args)))
        self._next()

    def _next(self) -> None:
        """Let the next activity have its turn; one that was stopped may still be letting go."""
        if self._turn is None and self._waiting:
            self._turn, do = self._waiting.popleft()
            self.later(0.0, do)

    def _over(self) -> None:
        self._turn, self._transfer, self._working, self._cancelled = None, None, "", False
        self._next()

    def _stop(self, task_id: str) -> None:
        self.say("stops", task_id)
        waiting = [entry for entry in self._waiting if entry[0].task_id != task_id]
        self._waiting = deque(waiting)
        if self._working == task_id:
            self._cancelled = True  # the training process is asked, and killed in the end
            self.later(GRACE_S * self.scheduler.random.random(), self._let_go, task_id)
        elif self._turn is not None and self._turn.task_id == task_id:
            if self._transfer is not None:
                self._transfer.close()
            self._turn = None
            self._over()

    def _let_go(self, task_id: str) -> None:
        if self._working == task_id and self._cancelled:
            self._over()
            self._sweep()

    def _sweep(self) -> None:
        """Delete what is for no task any more."""
        rounds = {_round(j.assigned) for j in self.tasks.jobs.values() if _trains(j.assigned)}
        for kind, name in list(self.disk.files):
            wanted = {"update": self.tasks.jobs.keys(), "trained": rounds}.get(kind)
            if wanted is not None and name not in wanted:
                del self.disk.files[kind, name]

    # ---- Fetching -----------------------------------------------------------------------

    def _fetch(self, task: pb.TaskAssigned) -> None:
        if self._turn is not task:
            return
        wanted = [one for one in (task.model_digest, task.partials_digest) if one]
        files = self.disk.files
        for digest in wanted:
            if digest in self._fetched or ("model", digest) in files:
                continue
            for kind, name in list(files):
                if kind == "model" and name not in wanted:
                    del files[kind, name]
            self._transfer = Transfer.download(
                self,
                self._network,
                digest,
                lambda refusal, _, digest=digest: self._downloaded(task, digest, refusal),
            )
            return
        self._fetched = wanted
        self._over()
        self._handle([t.Fetched(task.task_id)])

    def _downloaded(self, task: pb.TaskAssigned, digest: bytes, refusal: str) -> None:
        if refusal:
            self._over()
            self._fail(task, f"the controller has not given the model: {refusal}")
            return
        self.disk.files["model", digest] = (digest, False)
        self._fetch(task)

    # ---- Working ------------------------------------------------------------------------

    def _work(self, task: pb.TaskAssigned, earlier: t.Outcome | None) -> None:
        if self._turn is not task:
            return
        kept = self.disk.read(("trained", _round(task)))
        if earlier is not None and kept != earlier.trained_digest:
            self._over()
            self._handle([t.Lost(task.task_id)])
            return
        self._working = task.task_id
        self._invariants.works(task, self.tasks.over)
        self.say("works", task.task_id, "sealing" if earlier else "")
        chance = self.scheduler.random.random
        takes_s = self._scenario.training_s * (0.2 + chance())
        if earlier is not None or task.kind == pb.EVALUATE:
            takes_s *= 0.2
        if chance() < self.hang_chance:
            self.say("hangs", task.task_id)
            return
        self._train(task, earlier, self.now + takes_s)

    def _train(self, task: pb.TaskAssigned, earlier: t.Outcome | None, end: float) -> None:
        if self._working != task.task_id:
            return
        if self.now < end:
            self.progress(task, "working", 0.5)
            self.later(min(PROGRESS_S, end - self.now), self._train, task, earlier, end)
            return
        if self._scenario.failure(task):
            self._over()
            self._fail(task, self._scenario.failure(task))
            return
        outcome, durable = self._trained(task, earlier)
        # What the training process says may be overtaken by the end of this one.
        self.later(0.001 * self.scheduler.random.random(), self._worked, task, outcome, durable)

    def _trained(
        self, task: pb.TaskAssigned, earlier: t.Outcome | None
    ) -> tuple[tuple[t.Outcome, str], bool]:
        """The files and the result of the training process."""
        scenario, files = self._scenario, self.disk.files
        durable = self.scheduler.random.random() < 0.5
        examples = scenario.examples_of(task.learner)
        if task.kind == pb.EVALUATE:
            metrics = {"test.examples": float(examples), "test.loss": 0.5}
            return (t.Outcome(b"", examples, 1, metrics, 0.1), ""), durable
        if task.kind == pb.OPEN:
            made = partial(task, self.scheduler.random.random())
            files["update", task.task_id] = (made, True)
            return (t.Outcome(made, 0, 0, {}, 0.1), ""), True
        if earlier is None:
            self._invariants.trained(task)
        plain = trained(task)
        if scenario.terms is None:
            files["update", task.task_id] = (plain, durable)
            return (t.Outcome(plain, examples, 1, {}, 0.1), ""), durable
        files["trained", _round(task)] = (plain, durable)
        needed = scenario.exponents(task)
        allowed = tuple(task.exponents) or (0,) * len(needed)
        exceeds = any(n > a for n, a in zip(needed, allowed, strict=True))
        digest = b"" if exceeds else sealed(plain, allowed)
        if not exceeds:
            files["update", task.task_id] = (digest, durable)
        outcome = t.Outcome(digest, examples, 1, {}, 0.1, needed, plain)
        return (outcome, "w" if exceeds else ""), durable

    def _worked(self, task: pb.TaskAssigned, result: tuple[t.Outcome, str], durable: bool) -> None:
        if self._working != task.task_id:
            return
        outcome, exceeded = result
        self._over()
        if task.task_id not in self.tasks.jobs:
            self._sweep()
        if exceeded:
            self._handle([t.Exceeded(task.task_id, outcome, exceeded)])
        else:
            self._handle([t.Done(task.task_id, outcome)], durable=durable)

    # ---- Uploading ----------------------------------------------------------------------

    def _upload(self, task: pb.TaskAssigned, digest: bytes) -> None:
        if self._turn is not task:
            return
        self._invariants.leaves(task, digest)
        self._transfer = Transfer.upload(
            self,
            self._network,
            task,
            digest,
            self._scenario.chunks,
            lambda refusal, code: self._uploaded(task, digest, refusal, code),
        )

    def _uploaded(self, task: pb.TaskAssigned, digest: bytes, refusal: str, code: int) -> None:
        if code == Code.NO_SPACE:
            self._transfer = None
            self.progress(task, "waiting", 0.0)  # for room there: this site is not silent
            self.later(ROOM_S, self._upload, task, digest)
            return
        self._over()
        if refusal:
            self._fail(task, f"the controller refused the update: {refusal}")
        else:
            self._handle([t.Uploaded(task.task_id)])

    def _fail(self, task: pb.TaskAssigned, reason: str) -> None:
        self.say("fails", task.task_id, reason)
        self._handle([t.Failed(task.task_id, reason)])

    def progress(self, task: pb.TaskAssigned, state: str, fraction: float) -> None:
        assert self.client is not None
        self.client.beat(
            topics.beat_topic(FEDERATION, self.name),
            pb.Progress(task_id=task.task_id, learner=self.name, state=state, fraction=fraction),
        )


def _round(task: pb.TaskAssigned) -> str:
    return f"{task.run_id}.{task.round}"


def _trains(task: pb.TaskAssigned) -> bool:
    return task.kind in (pb.INITIALISE, pb.TRAIN)
