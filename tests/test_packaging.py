"""What is installed: the wheel's contents, the commands, and the Python that `make` picks."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = {
    **PROJECT["scripts"],
    **{
        f"{group} {name}": target
        for group, entries in PROJECT["entry-points"].items()
        for name, target in entries.items()
    },
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_command_leads_somewhere(name: str) -> None:
    module, _, attribute = TARGETS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute, None)), TARGETS[name]


def test_the_installed_commands_are_those_of_this_tree() -> None:
    installed = {
        entry.name if entry.group == "console_scripts" else f"{entry.group} {entry.name}": (
            entry.value
        )
        for entry in metadata.distribution("metisfl").entry_points
    }
    assert installed == TARGETS, "run `make setup`"


def test_there_is_one_version() -> None:
    version = importlib.import_module("metisfl").__version__
    assert version == metadata.version("metisfl") == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version}" in changes, "the changelog does not know this version"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    beside_python = Path(sys.executable).parent
    command = [str(beside_python / "uv"), "build", "--wheel", "--quiet", "--offline"]
    command += ["--no-build-isolation", "--python", sys.executable, "--out-dir", str(folder)]
    built = subprocess.run(
        [*command, f"-Cbuild-dir={folder / 'build'}", "."],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("metisfl-*.whl")
    assert "-cp310-abi3-" in file.name, "one wheel serves every Python from 3.10 on"
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    modules = {
        f"metisfl/{path.relative_to(ROOT).as_posix()}"
        for folder in ("broker", "controller", "deploy", "learner", "native_c", "proto")
        for path in (ROOT / folder).rglob("*.py")
        if "requirements" not in path.parts
    }
    assert modules - wheel == set()
    assert {"metisfl/__init__.py", "metisfl/py.typed"} <= wheel


def test_the_wheel_holds_the_examples_that_the_demo_writes_out(wheel: set[str]) -> None:
    folder = "metisfl/deploy/examples"
    for name in ("heart_disease/hearts.py", "heart_disease/federation.toml"):
        assert f"{folder}/{name}" in wheel
    assert f"{folder}/heart_disease/heart_disease_uci.csv" in wheel
    assert f"{folder}/penguins/penguins.csv" in wheel


def test_the_wheel_holds_no_sources_of_the_build(wheel: set[str]) -> None:
    sources = {name for name in wheel if name.endswith((".c", ".h", ".txt", ".pyc"))}
    assert {name for name in sources if ".dist-info/" not in name} == set()
    tops = {name.partition("/")[0].partition("-")[0] for name in wheel}
    assert tops == {"metisfl"}, "nothing may be installed beside the package"


# --- deploy/requirements/python.sh --------------------------------------------------------------


def choose(tmp_path: Path, pythons: dict[str, str], **environment: str) -> tuple[int, str, str]:
    """Run the search where PATH holds only `pythons`: name -> shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "uname").write_text("#!/bin/sh\necho Linux x86_64\n")
    for name, script in pythons.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    ran = subprocess.run(
        ["/bin/sh", str(ROOT / "deploy" / "requirements" / "python.sh")],
        env={
            "PATH": str(folder),
            "PYENV_ROOT": str(tmp_path / "none"),
            "SYSROOT": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stdout.strip(), ran.stderr.strip()


STAND_IN = "echo 'pyenv: python3.10: command not found' >&2; exit 127"


def test_a_stand_in_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    pythons = {"python3.10": STAND_IN, "python3": "echo 3.10 2036 - /a path/python3"}
    code, path, why = choose(tmp_path, pythons)
    assert (code, path) == (0, "/a path/python3")
    assert "Python 3.10 (/a path/python3)" in why


def test_312_is_taken_where_openfhe_loads_on_it(tmp_path: Path) -> None:
    code, path, why = choose(tmp_path, {"python3.12": "echo 3.12 2038 - /p/python3.12"})
    assert (code, path) == (0, "/p/python3.12")
    assert "no 3.10 here" in why


@pytest.mark.parametrize(
    ("pythons", "remedy"),
    [
        ({"python3.10": STAND_IN, "python3": "echo 3.11 2041 - /p"}, "pyenv install 3.10"),
        ({"python3.12": "echo 3.12 2036 - /p"}, "glibc 2.38"),
        ({"python3.10": "echo 3.10 2036 python3.10-venv /p"}, "apt-get install python3.10-venv"),
    ],
)
def test_none_that_fits_is_one_sentence_with_the_remedy(
    tmp_path: Path, pythons: dict[str, str], remedy: str
) -> None:
    code, path, why = choose(tmp_path, pythons)
    assert (code, path) == (2, "")
    assert remedy in why
    assert "\n" not in why


@pytest.mark.parametrize(
    ("script", "remedy"),
    [(STAND_IN, "does not run"), ("echo 3.11 2041 - /p", "for 3.10 and 3.12")],
)
def test_a_python_asked_for_that_does_not_do_is_refused(
    tmp_path: Path, script: str, remedy: str
) -> None:
    code, path, why = choose(tmp_path, {"mine": script}, PYTHON="mine")
    assert (code, path) == (2, "")
    assert remedy in why


def test_a_python_asked_for_is_taken(tmp_path: Path) -> None:
    script = "echo 3.12 2036 - /p/mine"
    code, path, why = choose(tmp_path, {"mine": script}, PYTHON="mine")
    assert (code, path) == (0, "/p/mine")
    assert "encryption will not load" in why
