"""Jobs of an encrypted federation: a plain job between a model that is opened and an update that is
sealed.

Rule 1: what is plain stays where `Opening` and `Sealing` say; only a sealed update is put where
uploads come from.
Rule 2: an update is sealed from the trained file, whichever attempt it is for: the same values, new
seeds.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from metisfl.learner.checkpoint import keep
from metisfl.learner.crypto import Crypto
from metisfl.learner.jobs import JobLine, Jobs
from metisfl.learner.partial_file import make_partial
from metisfl.learner.sealed_file import Exceeded, open_sealed, seal
from metisfl.learner.worker_messages import DURABLE_S, Job, Result, Sealing
from metisfl.proto import ckks
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.model_file import open_model, sync_file, sync_folder, write_model
from metisfl.proto.tensors import compare_manifests, float_specs, is_encrypted, manifest_of

__all__ = ["EncryptedJobs"]


class EncryptedJobs:
    """Does jobs whose models and updates are encrypted with one key."""

    def __init__(self, jobs: Jobs, crypto: Crypto, line: JobLine) -> None:
        self._jobs = jobs
        self._crypto = crypto
        self._line = line

    def do(self, job: Job) -> Result:
        """Do one job. Raises MetisError and OSError."""
        if job.kind == "seal":
            assert job.sealing is not None
            return self._seal(job, job.sealing, Result(examples=job.sealing.examples))
        if job.kind == "open":
            return self._partial(job)
        if job.continues_path is not None:
            assert job.sealing is not None
            return self._seal(job, job.sealing, self._continued(job, job.continues_path))
        plain = job
        if job.model_path is not None:
            plain = replace(plain, model_path=self._opened(job, job.model_path))
        if job.sealing is None:
            return self._jobs.do(plain)
        trained = self._jobs.do(replace(plain, update_path=job.sealing.trained_path))
        return self._seal(job, job.sealing, replace(trained, trained_digest=trained.digest))

    def _opened(self, job: Job, path: Path) -> Path:
        """The plain model of an encrypted one; opened once, though it is trained and evaluated."""
        opening = job.opening
        assert opening is not None, f"{job.kind} without a word on how to open the model"
        if opening.plain_path.exists():
            return opening.plain_path
        with ExitStack() as files:
            model = files.enter_context(open_model(path))
            if not is_encrypted(model.manifest):
                raise PeerError("the model is plain, in a federation that is encrypted")
            partials = opening.partials_path
            open_sealed(
                self._crypto,
                model,
                opening.plain_path,
                others=lambda: self._jobs.initial(opening.initial_seed),
                progress=lambda _: self._line.go_on(0.0),  # what follows is the job itself
                initial=opening.initial,
                partials=None if partials is None else files.enter_context(open_model(partials)),
                model_digest=opening.model_digest,
            )
        if opening.checkpoint_path is not None:
            keep(opening.plain_path, opening.checkpoint_path)
        return opening.plain_path

    def _continued(self, job: Job, path: Path) -> Result:
        """The model of an earlier run in the place of an initial one."""
        assert job.sealing is not None
        started_s = time.perf_counter()
        try:
            earlier = open_model(path)
        except FileNotFoundError:
            raise UserError(
                f"this site has opened no model of run {path.stem}, or only older ones are kept"
            ) from None
        with earlier as model:
            own = manifest_of(self._jobs.initial(job.seed))
            if difference := compare_manifests(own, model.manifest):
                raise UserError(f"the app builds another model than run {path.stem}: {difference}")
            digest = write_model(job.sealing.trained_path, model.tensors(), sync=False)
        return Result(trained_digest=digest, training_s=time.perf_counter() - started_s)

    def _partial(self, job: Job) -> Result:
        """This site's part in opening a model under a joint key."""
        opening, path = job.opening, job.update_path
        assert opening is not None
        assert opening.own is not None
        assert job.model_path is not None
        assert path is not None
        started_s = time.perf_counter()
        with open_model(job.model_path) as model:
            digest = make_partial(
                self._crypto,
                model,
                path,
                model_digest=opening.model_digest,
                own=opening.own,
                initial=opening.initial,
                progress=self._line.go_on,
            )
        sync_folder(path.parent)
        return Result(digest=digest, durable=True, training_s=time.perf_counter() - started_s)

    def _seal(self, job: Job, sealing: Sealing, trained: Result) -> Result:
        """Seal the trained file; return what was `trained`, with the update or what exceeded."""
        assert job.update_path is not None
        started_s = time.perf_counter()
        weight = self._weight(sealing, trained.examples)
        with open_model(sealing.trained_path) as model:
            made = seal(
                self._crypto,
                model.tensors(),
                job.update_path,
                exponents=_exponents(sealing, len(float_specs(model.manifest))),
                weight=weight,
                sync=False,
                progress=lambda _: self._line.go_on(1.0),  # what came before was the job itself
            )
        if isinstance(made, Exceeded):
            return replace(trained, digest=b"", exponents=made.exponents, exceeded=made.tensor)
        durable = trained.training_s + time.perf_counter() - started_s >= DURABLE_S
        if durable:
            sync_file(job.update_path)
            sync_folder(job.update_path.parent)
        return replace(trained, digest=made.digest, exponents=made.exponents, durable=durable)

    def _weight(self, sealing: Sealing, examples: int) -> float:
        """What the update is multiplied by. Raises UserError, or PeerError for the reference."""
        if sealing.reference_weight is None:
            return 1.0
        if not sealing.reference_weight > 0:
            raise PeerError(
                f"the controller gave the reference weight {sealing.reference_weight}; a weight "
                "is the examples divided by it, so it must be above 0"
            )
        weight = examples / sealing.reference_weight
        most = self._crypto.public.max_learners
        if not (weight > 0 and ckks.weights_fit(weight, most)):
            remedy = "make a key for more learners, or train on fewer examples here"
            if not self._jobs.examples():
                remedy = "let the application's trainer say its examples(), for the reference"
            raise UserError(
                f"{examples} examples weigh {weight:.6g} where the reference is "
                f"{sealing.reference_weight:.6g}; the key allows weights above 0 up to {most}: "
                f"{remedy}"
            )
        return weight


def _exponents(sealing: Sealing, floats: int) -> tuple[int, ...]:
    exponents = sealing.exponents or (0,) * floats
    if len(exponents) != floats:
        raise PeerError(
            f"the controller gave {len(exponents)} exponents for {floats} float tensors; it must "
            "give one for each"
        )
    return exponents
