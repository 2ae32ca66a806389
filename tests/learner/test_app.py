"""Loading an application: each mistake of its author is named, with the place."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from metisfl.learner.app import app_code, check_data, load_app, trainer_for
from metisfl.proto.errors import PeerError, UserError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Write an app's module under a name of its own; forget what was imported afterwards."""
    modules, path = set(sys.modules), list(sys.path)

    def write(source: str, name: str = "app") -> str:
        module = f"{name}_{len(list(tmp_path.iterdir()))}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return module

    yield write
    sys.path[:] = path
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


TRAINER = """
class App:
    def open(self, source): self.source = source
    def initialise(self, seed): ...
    def train(self, tensors, hyperparameters, seed, progress, cancelled): ...
    def evaluate(self, tensors, progress, cancelled): ...
    def save(self, tensors, folder): ...
"""


@pytest.mark.parametrize("what", ["App", "make", "app", "holder.app"])
def test_a_class_a_function_and_an_object_are_apps(tmp_path: Path, write: Write, what: str) -> None:
    more = """
def make(): return App()
app = App()
class holder: app = App()
"""
    module = write(TRAINER + more)
    loaded = load_app(f"{module}:{what}", tmp_path)
    assert type(loaded).__name__ == "App"


def test_an_app_that_is_a_trainer_is_used_as_it_is_and_told_its_source(
    tmp_path: Path, write: Write
) -> None:
    app = load_app(f"{write(TRAINER)}:App", tmp_path)
    assert trainer_for(app, "ward 3") is app
    assert app.source == "ward 3"  # type: ignore[attr-defined]


@pytest.mark.parametrize("reference", ["app", "app:", ":App", ""])
def test_a_reference_without_both_halves(reference: str) -> None:
    with pytest.raises(UserError, match="write it as 'module:object'"):
        load_app(reference)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the path .*nowhere is not a folder"):
        load_app("app:App", tmp_path / "nowhere")


@pytest.mark.parametrize("module", ["no_such_app", "no_such_package.app"])
def test_a_module_that_is_not_there(module: str) -> None:
    with pytest.raises(UserError, match=r"there is no module 'no_such_\w+'; set the app's path"):
        load_app(f"{module}:App")


def test_a_package_that_the_app_needs_is_missing(tmp_path: Path, write: Write) -> None:
    module = write("import no_such_package_at_all")
    with pytest.raises(UserError) as caught:
        load_app(f"{module}:App", tmp_path)
    assert "No module named 'no_such_package_at_all'" in str(caught.value)
    assert f"{module}.py, line 1)" in str(caught.value)


def test_an_attribute_that_is_not_there(tmp_path: Path, write: Write) -> None:
    module = write(TRAINER)
    with pytest.raises(UserError, match="has no 'Ap'; it has App"):
        load_app(f"{module}:Ap", tmp_path)


def test_an_exception_in_the_apps_import_shows_its_last_line(tmp_path: Path, write: Write) -> None:
    module = write("import math\n\nprint(math.sqrt(-1))\n")
    with pytest.raises(UserError) as caught:
        load_app(f"{module}:App", tmp_path)
    assert "could not be imported: ValueError: math domain error" in str(caught.value)
    assert str(caught.value).endswith(f"{module}.py, line 3)")


def test_the_place_is_the_apps_own_also_when_a_library_raises(tmp_path: Path, write: Write) -> None:
    module = write("import json\n\njson.loads('{')\n")
    with pytest.raises(UserError) as caught:
        load_app(f"{module}:App", tmp_path)
    assert "JSONDecodeError: Expecting property name" in str(caught.value)
    assert str(caught.value).endswith(f"{module}.py, line 3)")


def test_a_syntax_error_shows_its_place(tmp_path: Path, write: Write) -> None:
    module = write("x = 1\ndef broken(:\n")
    with pytest.raises(UserError) as caught:
        load_app(f"{module}:App", tmp_path)
    assert "SyntaxError" in str(caught.value)
    assert str(caught.value).endswith(f"{module}.py, line 2)")


def test_an_app_that_cannot_be_made(tmp_path: Path, write: Write) -> None:
    module = write("class App:\n    def __init__(self, more): ...\n")
    with pytest.raises(UserError, match=r"calling it without arguments.*missing 1 required"):
        load_app(f"{module}:App", tmp_path)


def test_an_object_that_is_no_app_says_what_is_needed(tmp_path: Path, write: Write) -> None:
    module = write("class App:\n    def model(self): ...\n")
    with pytest.raises(UserError) as caught:
        load_app(f"{module}:App", tmp_path)
    assert "neither model() and data(source), nor initialise(), train(), evaluate(), save()" in str(
        caught.value
    )


def test_errors_of_ours_and_defects_outside_app_code_are_not_blamed_on_the_app() -> None:
    with pytest.raises(PeerError), app_code("the app"):
        raise PeerError("from elsewhere")
    with pytest.raises(KeyboardInterrupt), app_code("the app"):
        raise KeyboardInterrupt


def good() -> dict[str, tuple[object, object]]:
    return {
        name: (np.ones((rows, 3), np.float32), np.ones(rows))
        for name, rows in (("train", 6), ("validation", 2), ("test", 3))
    }


def test_good_data_come_as_arrays_with_their_lengths() -> None:
    splits = check_data(good(), "here")
    assert {name: split.examples for name, split in splits.items()} == {
        "train": 6,
        "validation": 2,
        "test": 3,
    }


def test_x_may_be_lists_of_numbers_a_dict_or_a_list_of_arrays() -> None:
    def of(x: Callable[[int], object]) -> dict[str, tuple[object, object]]:
        return {name: (x(rows), [0] * rows) for name, rows in (("train", 4), ("validation", 2),
                                                               ("test", 3))}  # fmt: skip

    rows = check_data(of(lambda n: [[1.0, 2.0]] * n), "s")["test"].x
    assert isinstance(rows, np.ndarray)
    assert rows.shape == (3, 2)
    named = check_data(of(lambda n: {"image": np.zeros((n, 8, 8)), "age": np.zeros(n)}), "s")
    assert isinstance(named["test"].x, dict)
    assert named["test"].x["image"].shape == (3, 8, 8)
    listed = check_data(of(lambda n: [np.zeros((n, 8)), np.zeros(n)]), "s")["test"].x
    assert isinstance(listed, list)
    assert [part.shape for part in listed] == [(3, 8), (3,)]


def with_nan() -> object:
    x = np.ones((6, 3))
    x[4, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": None}, "data('s')['test'] must be a pair (x, y); it is a NoneType"),
        ({"more": 1}, "must be a dict with the keys train, validation, test; it is"),
        ({"train": (with_nan(), np.ones(6))}, "['train']: x has NaN or infinity, first at exa"),
        ({"train": (with_nan(), np.ones(6))}, "example 4; fill in or drop"),
        (
            {"test": ({"a": np.full(3, np.inf)}, np.ones(3))},
            "['test']: x['a'] has NaN or infinity, first at example 0",
        ),
        ({"test": (np.ones((3, 3)), np.full(3, np.nan))}, "['test']: y has NaN"),
        ({"test": (np.ones((3, 3)), np.ones(4))}, "x and y have [3, 4] examples"),
        ({"test": (np.ones((0, 3)), np.ones(0))}, "['test'] has no examples; a site needs"),
        ({"test": (np.array(1.0), np.ones(3))}, "shape (); it must be numbers, with one row"),
        ({"test": (np.array([["a"] * 3] * 3), np.ones(3))}, "x has the dtype <U1"),
        ({"test": ([[1.0], [1.0, 2.0]], np.ones(2))}, "['test']: x is no array: ValueError"),
        (
            {"test": (np.ones((3, 4), np.float32), np.ones(3))},
            "an example of test is x {0: (4,) float32}, y () and one of train is "
            "x {0: (3,) float32}, y (); they must be alike",
        ),
    ],
)
def test_what_is_wrong_with_data_is_said_with_the_split(
    change: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_data({**good(), **change}, "s")
    assert words in str(caught.value)


def test_an_exception_in_data_shows_the_apps_line(tmp_path: Path, write: Write) -> None:
    module = write(
        """
        class App:
            def model(self): ...
            def data(self, source):
                return {"a": 1}[source]
        """
    )
    with pytest.raises(UserError) as caught:
        trainer_for(load_app(f"{module}:App", tmp_path), "ward")
    assert str(caught.value).startswith("the app's data('ward') failed: KeyError: 'ward' (")
    assert str(caught.value).endswith(f"{module}.py, line 5)")


def test_unseeded_luck_in_data_is_the_same_after_a_restart(tmp_path: Path, write: Write) -> None:
    """Else a patient of the test split would be trained on after the next start."""
    module = write(
        """
        import random
        import numpy as np
        drawn = []
        class App:
            def model(self): ...
            def data(self, source):
                drawn.append((np.random.permutation(9).tolist(), random.random()))
                raise ValueError("enough seen")
        """
    )
    app = load_app(f"{module}:App", tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="enough seen"):
            trainer_for(app, "ward")
    drawn = sys.modules[module].drawn
    assert drawn[0] == drawn[1]
