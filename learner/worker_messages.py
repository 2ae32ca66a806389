"""What the daemon and its training process say to each other.

Rule: frames are a u32 length and a pickle, at most FRAME_BYTES_MAX: both ends are one program of
one user on one machine. Nothing of this ever comes from a network.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from metisfl.learner.trainer import Hyperparameters

__all__ = [
    "DURABLE_S",
    "FRAME_BYTES_MAX",
    "LENGTH",
    "Cancel",
    "Failure",
    "Fault",
    "Job",
    "Opening",
    "Progress",
    "Ready",
    "Result",
    "Run",
    "Sealing",
    "Start",
    "pack",
]

FRAME_BYTES_MAX: Final = 1 << 20
LENGTH: Final = struct.Struct("<I")
DURABLE_S: Final = 1.0
"""Work that took as long outlives a power cut; what took less is sooner done again than synced."""

Fault = Literal["user", "peer", "machine", "full", "cancelled"]
"""Who must act; "full" is a full disk, which is nobody's failure."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How an encrypted model is opened."""

    plain_path: Path
    """Where the plain model is put, unless it is there already."""
    initial_seed: int
    """What the ciphertexts leave out is taken from the initial model of this seed."""
    initial: bool
    """Whether the model is the initial one: one site made it alone."""
    partials_path: Path | None = None
    """What opens a model of a joint key, the fold of all partials; None to make a partial."""
    model_digest: bytes = b""
    """The model's digest, which partials name."""
    checkpoint_path: Path | None = None
    """Where what was opened is kept for a later run."""
    own: tuple[str, bytes] | None = None
    """This site's name, and the digest of the update that it gave in the model's round, if any."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """How an update is sealed."""

    trained_path: Path
    """Where the plain model behind the update stays until its round is over."""
    exponents: tuple[int, ...]
    """Of each float tensor; none: all are 0."""
    reference_weight: float | None
    """The update weighs its examples divided by this. None, for an initial model: it weighs 1."""
    examples: int = 0
    """What a `seal` job's model was trained on; other jobs know it themselves."""


@dataclass(frozen=True, slots=True)
class Job:
    """One task for the worker.

    initialise writes the initial model, or what `continues_path` holds, to `update_path`; train
    reads `model_path` and writes the update to `update_path`; evaluate reads `model_path` and, with
    `keep_folder`, saves it there.
    In an encrypted federation `opening` says how the model is opened and `sealing` how the update
    is sealed; seal only does the latter, with a model that an earlier job left, and open makes this
    site's part in opening the model at `model_path`, a partial, at `update_path`.
    """

    kind: Literal["initialise", "train", "evaluate", "seal", "open"]
    seed: int = 0
    model_path: Path | None = None
    update_path: Path | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    keep_folder: Path | None = None
    continues_path: Path | None = None
    opening: Opening | None = None
    sealing: Sealing | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a job gave. `digest` is that of the file at `update_path`, empty for evaluate."""

    digest: bytes = b""
    examples: int = 0
    batches: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    training_s: float = 0.0
    """Wall time inside the trainer."""
    durable: bool = False
    """Whether what was written outlives a power cut; then a note of it should, too."""
    trained_digest: bytes = b""
    """Of the file at `sealing.trained_path`."""
    exponents: tuple[int, ...] = ()
    """That the update needs."""
    exceeded: str = ""
    """The first tensor that does not fit; then there is no update, and `digest` is empty."""


@dataclass(frozen=True, slots=True)
class Failure:
    reason: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Progress:
    fraction: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ready:
    """The application is loaded, and the key if there is one."""

    examples: int
    """Size of the training split; 0 if the application does not say."""


@dataclass(frozen=True, slots=True)
class Start:
    """First frame to the child: what to load."""

    app: str
    path: str | None
    source: str
    parent: int
    keys: str | None
    """The folder of the key to open and seal with; None in a plain federation."""


@dataclass(frozen=True, slots=True)
class Run:
    number: int
    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop job `number`; no effect on another."""

    number: int


def pack(message: object) -> bytes:
    """A message as a frame."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    assert len(body) <= FRAME_BYTES_MAX, f"{type(message).__name__} of {len(body)} bytes"
    return LENGTH.pack(len(body)) + body
