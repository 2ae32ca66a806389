"""The joint key of a federation whose sites are all on this machine: made by the sites themselves.

Rule: the driver writes the manifest and starts `metisfl keys ceremony` at each site, as its
operator would; it never sees a share. One that is killed is started again and goes on where it was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from metisfl.deploy.ckks_keys import PUBLIC_FILE
from metisfl.deploy.keys import load_identity
from metisfl.deploy.processes import fault_of
from metisfl.deploy.run_folder import RunFolder
from metisfl.deploy.settings import Federation
from metisfl.proto.ceremony import Manifest
from metisfl.proto.errors import MachineError

__all__ = ["make_joint_key"]

CEREMONY: Final = (sys.executable, "-m", "metisfl.deploy.command", "keys", "ceremony")
MANIFEST_FILE: Final = "ceremony.toml"
KILLS_FORGIVEN: Final = 8  # of one site's process
NUMBER_BYTES: Final = 16


async def make_joint_key(
    federation: Federation, run_folder: RunFolder, wires: Mapping[str, str]
) -> str:
    """Let the sites make their key through the broker at `wires`; the controller gets its public
    part.

    Returns one line about it. Raises what a site's `metisfl keys ceremony` says, by whose fault it
    is.
    """
    manifest = _manifest(federation, run_folder)
    path = run_folder.folder / MANIFEST_FILE
    try:
        path.write_text(manifest.text())
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    sites = [
        asyncio.ensure_future(_take_part(name, home / "keys", path, run_folder.logs, wires))
        for name, home in run_folder.learners.items()
    ]
    try:
        await asyncio.gather(*sites)
    finally:
        for site in sites:
            site.cancel()
        await asyncio.gather(*sites, return_exceptions=True)
    first = next(iter(run_folder.learners.values()))
    shutil.copy(first / "keys" / PUBLIC_FILE, run_folder.controller / "keys" / PUBLIC_FILE)
    return (
        f"updates are encrypted (ckks-threshold): {len(sites)} sites have made a joint key, which "
        "opens a model only if all of them take part"
    )


def _manifest(federation: Federation, run_folder: RunFolder) -> Manifest:
    asked = federation.encryption
    keys = {name: load_identity(home / "keys").public for name, home in run_folder.learners.items()}
    return Manifest(
        federation=federation.name,
        number=os.urandom(NUMBER_BYTES).hex(),
        sites=tuple(sorted(keys.items())),
        error=asked.error,
        min_contributors=asked.min_contributors,
        max_share=asked.max_share,
        verify=asked.verify,
    )


async def _take_part(
    name: str, keys: Path, manifest: Path, logs: Path, wires: Mapping[str, str]
) -> None:
    """Run the ceremony at one site to its end."""
    command = [*CEREMONY, str(manifest), "--folder", str(keys)]
    command += [part for key, value in wires.items() for part in (f"--{key}", value)]
    log = logs / f"{name}.ceremony.log"
    for _ in range(KILLS_FORGIVEN):
        code = await _run(command, log)
        if code >= 0:
            break
    if code:
        last = (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
        told = last.removeprefix("metisfl: error: ")
        raise fault_of(code)(f"{name}: `metisfl keys ceremony` ended (exit code {code}): {told}")


async def _run(command: Sequence[str], log: Path) -> int:
    """Run `command` to its end; what it says goes to `log`. It is killed if this is cancelled."""
    with log.open("ab") as said:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # Ctrl-C is the driver's
        )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
