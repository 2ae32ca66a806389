"""The key of an encrypted federation whose sites are all on this machine.

Rule: the driver never loads OpenFHE. A process of its own makes the key, as `metisfl keys new` does
at a site; its parts are where they belong before a daemon starts (the secret one with the learners
alone), and nothing is left where they were made.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE
from metisfl.deploy.keys import write_new
from metisfl.deploy.processes import fault_of
from metisfl.deploy.run_folder import RunFolder
from metisfl.deploy.settings import Federation
from metisfl.proto.errors import MachineError

__all__ = ["give_key"]

NEW_KEY: Final = (sys.executable, "-m", "metisfl.deploy.command", "keys", "new")
LOADS: Final = (sys.executable, "-c", "import openfhe")
WITHOUT: Final = (
    "encryption needs OpenFHE, which {python} cannot load: {why}. `make setup` finds a Python that "
    "can (3.10, or 3.12 with glibc 2.38 or newer) and installs it; to run without encryption, set "
    'privacy = "plain" in the federation file, or use `metisfl demo --privacy plain`'
)


async def give_key(federation: Federation, run_folder: RunFolder) -> str:
    """Make a key and put its parts into the homes of controller and learners.

    Returns one line about it. Raises what `metisfl keys new` says, by whose fault it is.
    """
    folder = run_folder.folder / "encryption"
    try:
        made = await _make_key(federation, folder)
        _hand_out(run_folder, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"updates are encrypted (ckks): profile {made['profile']}, {made['why']}"


async def _make_key(federation: Federation, folder: Path) -> Mapping[str, Any]:
    """Run `metisfl keys new` and return what it says of the key."""
    asked = federation.encryption
    command = [
        *(*NEW_KEY, str(folder), "--json"),
        *("--max-learners", str(len(federation.learners))),
        *(() if asked.profile is None else ("--profile", asked.profile)),
        *("--error", repr(asked.error)),
        *("--min-contributors", str(asked.min_contributors)),
        *("--max-share", repr(asked.max_share)),
        *("--verify", asked.verify),
    ]
    code, said, complaint = await _run(command)
    if code == 0:
        made: Mapping[str, Any] = json.loads(said)
        return made
    code_of_loading, _, why = await _run(LOADS)
    if code_of_loading:
        raise MachineError(WITHOUT.format(python=sys.executable, why=_last_line(why)))
    raise fault_of(code)(f"`metisfl keys new` ended (exit code {code}): {_last_line(complaint)}")


async def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Run `command` to its end: exit code, stdout, stderr. It is killed if this is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the driver's
    )
    try:
        said, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace"), complaint.decode(errors="replace")


def _hand_out(run_folder: RunFolder, made: Path) -> None:
    """Copy the public part to controller and learners, the secret part to learners."""
    learners = [*run_folder.learners.values()]
    try:
        for name, homes in (
            (PUBLIC_FILE, [run_folder.controller, *learners]),
            (SECRET_FILE, learners),
        ):
            content = (made / name).read_bytes()
            for home in homes:
                write_new(home / "keys" / name, content)
    except OSError as error:
        raise MachineError(f"{error.filename}: {error.strerror}") from None


def _last_line(text: str) -> str:
    return (text.splitlines() or ["it said nothing"])[-1].removeprefix("metisfl: error: ")
