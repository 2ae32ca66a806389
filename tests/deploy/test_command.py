"""command.py and bench.py: they find, list and hand over; the rest belongs to the subcommands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from metisfl.deploy import bench_round, command
from metisfl.proto.errors import MachineError, PeerError, UserError

MODULES = {
    "quick_command": '''
"""Do a thing,
and do it well.

Rule: this paragraph is not part of the summary.
"""
from metisfl.proto.errors import PeerError

def command(argv):
    print("quick", argv)
    return 7

def refuse(argv):
    raise PeerError("the peer sent nonsense")

def interrupt(argv):
    raise KeyboardInterrupt

def defect(argv):
    raise ZeroDivisionError
''',
    "heavy_command": '"""Train for hours."""\nraise AssertionError("help imported a command")\n',
    "wanting_command": '"""Need a package."""\nimport a_package_nobody_has\n',
    "silent_command": "def command(argv): return 0\n",
}
ENTRIES = {
    "quick": "quick_command:command",
    "refuse": "quick_command:refuse",
    "interrupt": "quick_command:interrupt",
    "defect": "quick_command:defect",
    "heavy": "heavy_command:command",
    "wanting": "wanting_command:command",
    "silent": "silent_command:command",
    "lost": "nowhere.at_all:command",
}


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Entry points of this test's own, in both groups, instead of the installed ones."""
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def own_entry_points(*, group: str) -> list[EntryPoint]:
        assert group in ("metisfl.commands", "metisfl.benches")
        bench = EntryPoint("bench", "metisfl.deploy.bench:command", group)
        own = [EntryPoint(name, value, group) for name, value in ENTRIES.items()]
        return [*own, bench] if group == "metisfl.commands" else own

    monkeypatch.setattr(command, "entry_points", own_entry_points)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_command_gets_its_arguments_and_gives_its_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["quick", "--help", "x"]) == 7
    assert capsys.readouterr().out == "quick ['--help', 'x']\n"


def test_without_arguments_those_of_the_process_are_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["metisfl", "quick", "1"])
    assert command.main() == 7
    assert capsys.readouterr().out == "quick ['1']\n"


def test_help_lists_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    listed = {words[0]: words[1:] for words in lines if words}
    assert listed["quick"] == ["Do a thing, and do it well."]
    assert listed["heavy"] == ["Train for hours."]
    assert listed["silent"] == []
    assert listed["lost"] == ["(not installed: nowhere.at_all)"]
    assert not sys.modules.keys() & MODULES.keys()


def test_no_command_is_a_usage_error_with_the_help_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: metisfl COMMAND")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"metisfl {version('metisfl')}\n"


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["qiuck"]) == UserError.exit_code
    assert capsys.readouterr().err == (
        "metisfl: error: no command `metisfl qiuck`; did you mean quick? "
        "`metisfl --help` lists them\n"
    )


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("refuse", PeerError.exit_code, "metisfl: error: the peer sent nonsense\n"),
        ("interrupt", 130, ""),
        ("wanting", MachineError.exit_code, "needs the Python module 'a_package_nobody_has'"),
        ("lost", MachineError.exit_code, "needs the Python module 'nowhere'"),
        ("defect", 70, "ZeroDivisionError"),
    ],
)
def test_how_a_command_ends_is_how_the_process_ends(
    name: str, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name]) == code
    printed = capsys.readouterr().err
    assert complaint in printed
    assert ("Traceback" in printed) == (name == "defect")


def test_benches_are_found_in_their_own_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench", "quick", "--learners", "10"]) == 7
    assert capsys.readouterr().out == "quick ['--learners', '10']\n"
    assert command.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: metisfl bench COMMAND")
    assert "heavy" in printed
    assert command.main(["bench", "heavi"]) == 2
    assert "did you mean heavy? `metisfl bench --help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--learners", "0", "1 to 1000"),
        ("--learners", "1001", "1 to 1000"),
        ("--params", "-3", "1 to 4294967296"),
        ("--rounds", "ten", "1 to 100000"),
        ("--rounds", "9" * 5000, "1 to 100000"),
    ],
)
def test_a_bench_of_a_size_that_cannot_be_starts_no_process(
    flag: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_round.command([flag, value])
    assert ended.value.code == 2
    assert f"cannot be; allowed is a whole number from {allowed}" in capsys.readouterr().err
