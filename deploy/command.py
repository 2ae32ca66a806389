"""The `metisfl` command: finds the subcommand among the installed entry points and hands over.

Rule: this file knows no subcommand. A folder offers one by registering `command(argv) -> int` in
the entry-point group `metisfl.commands`; its summary is the first paragraph of its module's
docstring, read without importing it: `--help` stays quick however heavy a subcommand is.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec

from metisfl.deploy.run import ExitCode
from metisfl.proto.errors import MachineError, UserError

__all__ = ["dispatch", "main"]

COMMANDS_GROUP = "metisfl.commands"
ABOUT = "Federated learning: sites train one model together, and their data stay where they are."
HELP_OPTIONS = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `metisfl` with `argv` (default: the process's arguments) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with ExitCode("metisfl") as exit_code:
        if arguments == ["--version"]:
            print(f"metisfl {version('metisfl')}")
        else:
            exit_code.value = dispatch("metisfl", COMMANDS_GROUP, ABOUT, arguments)
    return exit_code.value


def dispatch(prog: str, group: str, about: str, argv: list[str]) -> int:
    """Run the entry point of `group` that `argv[0]` names, with the rest of `argv`.

    Raises UserError for an unknown name, MachineError if a package that it needs is not installed.
    """
    offered = {entry.name: entry for entry in entry_points(group=group)}
    if not argv or argv[0] in HELP_OPTIONS:
        print(_help(prog, about, offered), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else UserError.exit_code
    name, *rest = argv
    if name not in offered:
        close = difflib.get_close_matches(name, offered, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"no command `{prog} {name}`; {hint}`{prog} --help` lists them")
    return _load(prog, offered[name])(rest)


def _load(prog: str, entry: EntryPoint) -> Callable[[list[str]], int]:
    try:
        command: Callable[[list[str]], int] = entry.load()
    except ModuleNotFoundError as error:
        raise MachineError(
            f"`{prog} {entry.name}` needs the Python module {error.name!r}, which is not installed "
            f"for {sys.executable}"
        ) from None
    return command


def _help(prog: str, about: str, offered: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in offered), default=0)
    listed = [f"  {name:<{width}}  {_summary(entry)}" for name, entry in sorted(offered.items())]
    return "\n".join(
        [
            f"usage: {prog} COMMAND ...",
            "",
            about,
            "",
            "commands:",
            *listed,
            "",
            f"`{prog} COMMAND --help` tells more about one.",
        ]
    )


def _summary(entry: EntryPoint) -> str:
    """Return the first paragraph of the docstring of the entry point's module, unimported."""
    try:
        spec = find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return f"(not installed: {entry.module})"
    source = getattr(spec.loader, "get_source", lambda _: None)(entry.module)
    docstring = (ast.get_docstring(ast.parse(source)) if source else None) or ""
    return " ".join(docstring.split("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(main())
