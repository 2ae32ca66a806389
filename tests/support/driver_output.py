"""What a test reads of a running `metisfl up` or `metisfl run`."""

from __future__ import annotations

import subprocess


def wait_for(driver: subprocess.Popen[str], words: str) -> None:
    assert driver.stderr is not None
    for line in driver.stderr:
        if words in line:
            return
    raise AssertionError(f"the driver ended without saying {words!r}")
