"""What a reader of the repository may rely on: short files, a guide in every folder, no private
addresses."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("broker", "controller", "deploy", "learner", "native_c", "proto", "tests")
TOP_FILES = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
LINES_MAX = 400
LINES_MEDIAN_MAX = 250


def ignored() -> set[str]:
    """Names of folders that git ignores, read from .gitignore, and git's own."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    return {line.strip("/") for line in lines if line.endswith("/")} | {".git"}


def sources(folder: Path = ROOT) -> Iterator[Path]:
    """Every file that belongs to the repository."""
    skipped = ignored()
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in skipped:
            yield from sources(path)
        elif path.is_file() and path.name not in skipped:
            yield path


def text_of(path: Path) -> str | None:
    """None for a file that is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


# Put together from pieces, so that this file does not hold what it looks for.
FORBIDDEN = {
    "the address of a package index": "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("py" + "pi", "org"),
            ("files", "python" + "hosted", "org"),
            ("registry", "npm" + "js", "org"),
            ("deb", "deb" + "ian", "org"),
            ("proxy", "go" + "lang", "org"),
        )
    ),
    "a path of one machine": r"(?<![\w.$}~-])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me/\w+)/",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in sources()
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("the address of a package index", "see https://py" + "pi.org/simple"),
        ("a path of one machine", "cd /ro" + "ot/.cache"),
        ("a path of one machine", "PATH=/ho" + "me/me/bin"),
    ],
)
def test_the_search_finds_what_it_is_for(what: str, line: str) -> None:
    assert re.search(FORBIDDEN[what], line)


def test_the_top_of_the_tree_holds_nothing_else() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored()
    assert names == {*FOLDERS, *TOP_FILES}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_explains_itself(folder: str) -> None:
    guide = ROOT / folder / "README.md"
    assert guide.is_file(), f"{folder}/ has no README.md: what it is, its laws, how to change it"


def test_python_files_are_short() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
        if path.suffix == ".py" and not path.stem.endswith("_pb2")
    }
    long = {name: count for name, count in lines.items() if count > LINES_MAX}
    assert not long, f"over {LINES_MAX} lines, split by subject: {long}"
    bodies = [count for name, count in lines.items() if not name.endswith("__init__.py")]
    median = statistics.median(bodies)
    assert median <= LINES_MEDIAN_MAX, f"half of the files are over {median} lines"
