"""A learner of the run that lies: it answers each task at once, in every way that it should not.

Its last word on a task of training makes its update unusable, so an honest federation goes on with
the others, and has their model.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from random_updates import write_update

from attacks.bulk import Bulk
from attacks.publishing import OTHERS, Ingress, bomb_bytes
from attacks.target import Attack, End, Tally, Target, dealer
from metisfl.deploy.ckks_keys import load_public
from metisfl.learner.conversation import Upload, UploadRefused
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.bulk import Credit, Get, Model, Open, Refused
from metisfl.proto.chunk import chunk_count, federation_digest, task_digest
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.events import decode, encode
from metisfl.proto.model_file import ModelWriter, open_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import encrypted_manifest, parse_manifest, serialise_manifest

MILLION: Final = 1_000_000
ANSWER_MS: Final = 3000
ASK_S: Final = 0.2


class Liar:
    """Its connections, and what it knows."""

    def __init__(
        self, target: Target, ingress: Ingress, bulk: Bulk, folder: Path, public: PublicPart | None
    ) -> None:
        self.target, self.ingress, self.bulk = target, ingress, bulk
        self.folder, self.public = folder, public
        self.done = topics.done_topic(target.federation, target.name)

    # ---- Events -------------------------------------------------------------------------

    def say(self, kind: str, payload: bytes, topic: str = "") -> None:
        self.ingress.publish(self.ingress.envelope(topic or self.done, kind, payload))

    def event(self, message: Any, topic: str = "") -> None:
        self.say(message.DESCRIPTOR.name, message.SerializeToString(), topic)

    def completed(self, task_id: str, digest: bytes, examples: int = 32, **fields: Any) -> None:
        done = pb.TaskCompleted(
            task_id=task_id,
            learner=self.target.name,
            update_digest=digest,
            examples=examples,
            exponents=[0] if self.public else [],
        )
        done.MergeFrom(pb.TaskCompleted(**fields))
        self.event(done)

    def join(self) -> None:
        topic = topics.member_topic(self.target.federation, self.target.name)
        joined = pb.LearnerJoined(learner=self.target.name, examples=32)
        self.say(*encode(joined), topic)

    # ---- Tasks --------------------------------------------------------------------------

    def answer(self, task: pb.TaskAssigned) -> None:
        """Every lie, then one last word, so that nobody waits for this learner."""
        self.ingress.tell("tasks")
        self.lie_about_others(task)
        self.completed(task.task_id, os.urandom(32), metrics={"test.loss": math.nan})
        self.completed(task.task_id, os.urandom(32), metrics={"test.loss": math.inf})
        self.say("TaskCompleted", random.choice(list(bomb_bytes())))
        if task.kind != pb.TRAIN:
            self.completed(task.task_id, b"", metrics={"test.examples": 1.0})
            return
        if task.round % 3 == 0:  # they use up what a task may be offered
            self.offer_bombs(task)
        model = self.model(task.model_digest)
        if model is None:
            self.event(pb.TaskFailed(task_id=task.task_id, learner=self.target.name, reason="no"))
            return
        form = self.form(task, model)
        self.offer_beyond(task, form)
        if self.public is None:
            self.upload(task, self.written(form, "nan", math.nan))
        update = self.written(form, "update", 1e30)
        if not self.upload(task, update):
            self.event(pb.TaskFailed(task_id=task.task_id, learner=self.target.name, reason="no"))
        elif task.round % 2:
            # Twice, with different updates: the first word holds, and is not what is stored.
            self.completed(task.task_id, os.urandom(32))
            self.completed(task.task_id, update[1])
        else:
            self.completed(task.task_id, update[1], examples=MILLION)
        self.ingress.take()

    def lie_about_others(self, task: pb.TaskAssigned) -> None:
        """Events about the tasks of others, and those that only a controller sends."""
        for name in OTHERS:
            theirs = task.task_id.removesuffix(self.target.name) + name
            self.completed(theirs, os.urandom(32))
            self.event(pb.TaskFailed(task_id=theirs, learner=self.target.name, reason="lie"))
            self.event(pb.TaskCompleted(task_id=theirs, learner=name, examples=1))
            self.event(pb.LearnerLeft(learner=name, reason="lie"))
            self.event(pb.UpdateStored(task_id=theirs, learner=name, digest=os.urandom(32)))
        self.event(pb.RunFinished(run_id=task.run_id, outcome=pb.RunFinished.FAILED, reason="lie"))
        digest = os.urandom(32)
        closed = pb.RoundClosed(run_id=task.run_id, round=task.round, model_digest=digest)
        closed.counted.add(learner="ada", task_id=task.task_id, weight=1, update_digest=digest)
        self.event(closed)

    # ---- Updates ------------------------------------------------------------------------

    def model(self, digest: bytes) -> Manifest | None:
        """The manifest of the model that is to be trained."""
        self.bulk.send(Get(digest, 0, 0))
        until = time.monotonic() + ANSWER_MS / 1000
        while time.monotonic() < until:
            for frame in self.bulk.take(100):
                if isinstance(frame, Model) and frame.digest == digest:
                    return parse_manifest(frame.manifest)
                if isinstance(frame, Refused) and frame.subject == digest[:16]:
                    return None
        return None

    def form(self, task: pb.TaskAssigned, model: Manifest) -> Manifest:
        """What an update has to look like."""
        if self.public is None:
            return model
        exponents = list(task.exponents) or [0] * len(model.tensors)
        return encrypted_manifest(model, self.public.update_form(exponents))

    def written(self, form: Manifest, name: str, value: float) -> tuple[Path, bytes]:
        """An update of this value, or of random ciphertexts; and its digest."""
        path = self.folder / name
        if self.public is not None:
            return path, write_update(path, random.randrange(2**32), form, self.public)
        with ModelWriter(path, serialise_manifest(form)) as writer:
            writer.append(np.full(form.payload_bytes // 4, value, np.float32).view("u1").data)
            return path, writer.commit(sync=False)

    def upload(self, task: pb.TaskAssigned, update: tuple[Path, bytes]) -> bool:
        """Bring it; False if it was refused, or not taken for a while."""
        path, digest = update
        federation = federation_digest(self.target.federation, task.run_id)
        with open_model(path) as model:
            upload = Upload(model, task.task_id, federation, digest)
            until = time.monotonic() + ANSWER_MS / 1000
            ask = 0.0
            while not upload.done and time.monotonic() < until:
                if time.monotonic() >= ask:
                    ask = time.monotonic() + ASK_S
                    self.bulk.send(upload.question())
                while (frame := upload.next_frame()) is not None:
                    self.bulk.send(frame)
                    upload.sent()
                for answer in self.bulk.take(50):
                    if answer.subject == upload.subject:
                        try:
                            upload.take(answer)
                        except UploadRefused:
                            return False
            return upload.done

    def offer_bombs(self, task: pb.TaskAssigned) -> None:
        """An update for a task of its own, with manifests that unfold."""
        federation = federation_digest(self.target.federation, task.run_id)
        for manifest in bomb_bytes():
            self.bulk.send(Open(task.task_id, federation, os.urandom(32), 2**40, manifest))
        wrong = os.urandom(16)
        self.bulk.send(Open(task.task_id, wrong, os.urandom(32), 100, b""))
        self.bulk.drain()

    def offer_beyond(self, task: pb.TaskAssigned, form: Manifest) -> None:
        """The right manifest, and then chunks out of order, damaged and beyond the end."""
        federation = federation_digest(self.target.federation, task.run_id)
        manifest = serialise_manifest(form)
        subject, count = task_digest(task.task_id), chunk_count(form)
        self.bulk.send(Open(task.task_id, federation, os.urandom(32), form.payload_bytes, manifest))
        self.bulk.send(Credit(subject, 2**29, 2**30, True))
        self.bulk.send(Credit(subject, count, count))
        self.bulk.drain()


def liar(target: Target, end: End, tell: Tally) -> None:
    """Take part in every run, and lie."""
    with (
        tempfile.TemporaryDirectory() as folder,
        dealer(target, target.ingress, "broker") as events,
        dealer(target, target.bulk, "controller") as transfers,
    ):
        public = load_public(target.home / "keys") if target.home else None
        ingress, bulk = Ingress(events, target, tell, keeps=True), Bulk(transfers, tell)
        one = Liar(target, ingress, bulk, Path(folder), public)
        ingress.hello()
        one.join()
        lane, after = topics.task_topic(target.federation, target.name), 0
        while not end.wait(0.01):
            batch = ingress.fetch(lane, after)
            if batch is None:
                ingress.hello()
                continue
            after = max(after, batch.through)
            for record in batch.records:
                envelope = pb.Envelope.FromString(record.envelope)
                task = decode(envelope.type, envelope.payload)
                if isinstance(task, pb.TaskAssigned):
                    one.answer(task)
                    ingress.settle(end)


ATTACKS: Final[dict[str, Attack]] = {"liar": liar}
