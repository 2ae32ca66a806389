"""The application: what the user wrote, loaded, checked and turned into a trainer.

Rule: everything that the user's code can do wrong ends in a UserError that names the place; the
user's code runs only inside `app_code`, so that a defect of ours is never taken for one of theirs.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from metisfl.learner.trainer import Trainer
from metisfl.proto.errors import FULL, DiskFull, MetisError, UserError
from metisfl.proto.tensors import Array

__all__ = [
    "SPLITS",
    "Features",
    "KerasApp",
    "Split",
    "app_code",
    "check_data",
    "load_app",
    "prepare_environment",
    "trainer_for",
]

SPLITS = ("train", "validation", "test")
ERROR_CHARACTERS_MAX = 600
# Code of Python, of packages and of ours: a mistake shows there, and was made elsewhere.
_NOT_THE_USERS = (
    "<",
    str(Path(__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
TRAINER_METHODS = ("initialise", "train", "evaluate", "save")

Features = Array | Mapping[str, Array] | Sequence[Array]


class KerasApp(Protocol):
    """An application that leaves training to us."""

    def model(self) -> Any:
        """A compiled `keras.Model`; the same architecture at every site."""

    def data(self, source: str) -> Mapping[str, tuple[Any, Any]]:
        """`{"train": (x, y), "validation": (x, y), "test": (x, y)}` of this site.

        `source` is what the site's settings say about where the data are. y is an array; x is an
        array, or a dict or list of arrays. The first axis counts examples.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples of one kind. All arrays have `examples` rows."""

    x: Features
    y: Array
    examples: int


def prepare_environment() -> None:
    """Set what TensorFlow reads from the environment when it is first imported.

    One thread, deterministic kernels and none chosen by the processor's vector units: results must
    not depend on the site's machine. Whatever the operator set stays: with more threads and
    TF_ENABLE_ONEDNN_OPTS=1 convolutions are faster, and only repeatable on one kind of machine.
    """
    for name, value in (
        ("CUDA_VISIBLE_DEVICES", ""),
        ("KERAS_BACKEND", "tensorflow"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("TF_DETERMINISTIC_OPS", "1"),
        ("TF_ENABLE_ONEDNN_OPTS", "0"),
        ("TF_NUM_INTEROP_THREADS", "1"),
        ("TF_NUM_INTRAOP_THREADS", "1"),
    ):
        os.environ.setdefault(name, value)


class app_code(AbstractContextManager[None]):
    """Runs the user's code: whatever it raises becomes a UserError with its last traceback line.

    A full disk is no mistake in it: that becomes DiskFull. Errors of ours (MetisError) and
    KeyboardInterrupt, SystemExit pass through.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFull(f"{self._what}: {_last_line(error)}") from error
        if isinstance(error, Exception) and not isinstance(error, MetisError):
            raise UserError(f"{self._what}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """The exception in one line with the last place in the user's own code that it came from."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARACTERS_MAX]
    if isinstance(error, SyntaxError):
        return f"{text} ({error.filename}, line {error.lineno})"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def load_app(reference: str, path: str | Path | None = None) -> object:
    """Import `package.module:object` and return the application.

    A class is instantiated and a function called, both without arguments; anything else is taken
    as it is. `path` is a folder that is put first on the import path. Raises UserError.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f"app {reference!r}: write it as 'module:object', such as 'hearts:Hearts'")
    if path is not None:
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise UserError(f"app {reference!r}: the path {folder} is not a folder")
        sys.path[:] = [str(folder), *(each for each in sys.path if each != str(folder))]
    found: Any = _imported(module_name, reference)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise UserError(
                f"app {reference!r}: {module_name} has no {name!r}; it has "
                f"{', '.join(public[:20]) or 'nothing public'}"
            )
        found = getattr(found, name)
    if isinstance(found, type) or (callable(found) and not _kind(found)):
        with app_code(f"app {reference!r} could not be made by calling it without arguments"):
            found = found()
    if not _kind(found):
        raise UserError(
            f"app {reference!r} is a {type(found).__name__} that has neither model() and "
            f"data(source), nor {', '.join(f'{name}()' for name in TRAINER_METHODS)}"
        )
    return found


def _imported(module_name: str, reference: str) -> object:
    prepare_environment()
    importlib.invalidate_caches()
    try:
        with app_code(f"app {reference!r} could not be imported"):
            return importlib.import_module(module_name)
    except UserError as error:
        cause = error.__cause__
        # The app itself is missing, rather than something that it imports.
        if isinstance(cause, ModuleNotFoundError) and cause.name in _parents(module_name):
            raise UserError(
                f"app {reference!r}: there is no module {cause.name!r}; set the app's path to the "
                f"folder that holds {module_name.split('.')[0]}.py"
            ) from cause
        raise


def _parents(module_name: str) -> set[str]:
    parts = module_name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _kind(app: object) -> str:
    """What kind of application: `trainer`, `keras`, or nothing for something else."""
    if all(callable(getattr(app, name, None)) for name in TRAINER_METHODS):
        return "trainer"
    if all(callable(getattr(app, name, None)) for name in ("model", "data")):
        return "keras"
    return ""


def trainer_for(app: Any, source: str) -> Trainer:
    """The trainer of `app` for the data that `source` names.

    An app that is itself a trainer is told its source by `open(source)`, if it has that. Only an
    app with model() and data() imports Keras. Raises UserError.
    """
    if _kind(app) == "trainer":
        if callable(getattr(app, "open", None)):
            with app_code(f"the app's open({source!r}) failed"):
                app.open(source)
        trainer: Trainer = app
        return trainer
    random.seed(0)  # an app that splits by unseeded luck must not split otherwise after a restart
    np.random.seed(0)
    with app_code(f"the app's data({source!r}) failed"):
        data = app.data(source)
    splits = check_data(data, source)
    from metisfl.learner.keras_trainer import KerasTrainer  # costs 5 s and 500 MB

    return KerasTrainer(app, splits)


def check_data(data: object, source: str) -> dict[str, Split]:
    """Check what an app's data() returned. Raises UserError that names split, shape and remedy."""
    where = f"the app's data({source!r})"
    if not isinstance(data, Mapping) or set(data) != set(SPLITS):
        found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise UserError(f"{where} must be a dict with the keys {', '.join(SPLITS)}; it is {found}")
    splits = {name: _split(data[name], f"{where}[{name!r}]") for name in SPLITS}
    forms = {name: _form(split) for name, split in splits.items()}
    for name in SPLITS[1:]:
        if forms[name] != forms["train"]:
            raise UserError(
                f"{where}: an example of {name} is {forms[name]} and one of train is "
                f"{forms['train']}; they must be alike"
            )
    return splits


def _split(pair: object, where: str) -> Split:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(f"{where} must be a pair (x, y); it is a {type(pair).__name__}")
    x, y = pair
    named: Mapping[Any, object]
    features: Features
    if isinstance(x, Mapping):
        named = {f"x[{key!r}]": value for key, value in x.items()}
        features = dict(zip(x, _arrays(named, where).values(), strict=True))
    elif isinstance(x, tuple | list) and x and all(hasattr(part, "shape") for part in x):
        named = {f"x[{index}]": value for index, value in enumerate(x)}
        features = list(_arrays(named, where).values())
    else:
        features = _arrays({"x": x}, where)["x"]
    labels = _arrays({"y": y}, where)["y"]
    lengths = {len(labels), *(len(part) for part in _parts(features))}
    if len(lengths) != 1:
        raise UserError(f"{where}: x and y have {sorted(lengths)} examples; they must be as many")
    if 0 in lengths:
        raise UserError(f"{where} has no examples; a site needs at least one in every split")
    return Split(features, labels, len(labels))


def _arrays(values: Mapping[Any, object], where: str) -> dict[Any, Array]:
    """The values as numeric arrays of at least one axis and without NaN."""
    arrays = {}
    for name, value in values.items():
        with app_code(f"{where}: {name} is no array"):
            array: Array = np.asarray(value)
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise UserError(
                f"{where}: {name} has the dtype {array.dtype} and the shape {array.shape}; "
                "it must be numbers, with one row for each example"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise UserError(
                f"{where}: {name} has NaN or infinity, first at example {row}; fill in or drop "
                "missing values in data()"
            )
        arrays[name] = array
    return arrays


def _parts(x: Features) -> list[Array]:
    if isinstance(x, Mapping):
        return list(x.values())
    return [x] if isinstance(x, np.ndarray) else list(x)


def _form(split: Split) -> str:
    """What one example looks like, apart from its values."""
    keys = list(split.x) if isinstance(split.x, Mapping) else range(len(_parts(split.x)))
    parts = zip(keys, _parts(split.x), strict=True)
    x = ", ".join(f"{key}: {part.shape[1:]} {part.dtype}" for key, part in parts)
    return f"x {{{x}}}, y {split.y.shape[1:]}"
