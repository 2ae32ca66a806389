"""`metisfl status` against real daemons: who is awaited, and who does not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from daemons import DEADLINE_S, METISFL, Daemons

SITES = {"ada": "honest 1", "bob": "honest 2"}


def status(daemons: Daemons, code: int = 0) -> Any:
    """`metisfl status --json`."""
    command = [METISFL, "status", str(daemons.folder / "federation.toml"), "--json"]
    command += ["--home", str(daemons.homes.driver)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_a_hung_site_is_named_with_its_lease_and_a_dead_controller_is_silent(
    tmp_path: Path,
) -> None:
    daemons = Daemons(tmp_path, SITES)
    try:
        os.mkfifo(daemons.pause)
        driver = daemons.run(rounds=1, lease_s=40)
        daemons.pause.open().close()  # returns when bob trains, who will not come to an end
        told = status(daemons)
        assert told["broker"]["head"] > 0
        told = told["controller"]
        assert (told["phase"], told["round"], told["quorum"]) == ("training", 1, 2)
        assert "bob" in [one["learner"] for one in told["awaited"]]
        assert all(0 < one["lease_left_s"] <= 40 for one in told["awaited"])
        daemons.pause.unlink()
        daemons.restart("bob")
        assert driver.wait(DEADLINE_S) == 0
        assert status(daemons)["controller"]["phase"] == "finished"
        daemons.end("controller", signal.SIGKILL)
        assert status(daemons, code=4)["controller"] is None
    finally:
        daemons.stop()
