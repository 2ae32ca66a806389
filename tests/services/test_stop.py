"""`metisfl stop` against real daemons: the run ends everywhere, and the daemons go on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

from daemons import DEADLINE_S, METISFL, Daemons
from driver_output import wait_for

from metisfl.deploy.audit_files import AUDIT_FILE

SITES = {"ada": "honest 1", "bob": "honest 2"}


def stop(daemons: Daemons, *more: str) -> subprocess.Popen[str]:
    """`metisfl stop`, begun."""
    command = [METISFL, "stop", str(daemons.folder / "federation.toml"), *more]
    driver = subprocess.Popen(
        [*command, "--home", str(daemons.homes.driver)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    daemons.drivers.append(driver)
    return driver


def result(driver: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, complained = driver.communicate(timeout=DEADLINE_S)
    return driver.returncode, said, complained


def facts(home: Path) -> list[tuple[str, dict[str, object]]]:
    lines = map(json.loads, (home / AUDIT_FILE).read_text().splitlines())
    return [(line["what"], line["facts"]) for line in lines if line["what"].startswith("run ")]


def wait_until_free(home: Path) -> None:
    """Until a site has nothing to do and keeps no update that nobody will ask for."""
    deadline = time.monotonic() + DEADLINE_S
    tasks, updates = -1, [home]
    while tasks or updates:
        assert time.monotonic() < deadline, f"{home.name} has {tasks} tasks and {updates}"
        with closing(sqlite3.connect(f"file:{home / 'learner.db'}?mode=ro", uri=True)) as database:
            ((tasks,),) = database.execute("select count(*) from task").fetchall()
        updates = [*(home / "outbox").iterdir()]


def test_a_run_is_stopped_though_the_controller_is_killed_before_it_hears_of_it(
    tmp_path: Path,
) -> None:
    daemons = Daemons(tmp_path, SITES)
    try:
        driver = daemons.run(rounds=100_000, lease_s=600)
        wait_for(driver, "round 2 of")
        os.mkfifo(daemons.pause)
        daemons.pause.open().close()  # returns when bob trains, who will not come to an end
        daemons.end("controller", signal.SIGKILL)
        first = stop(daemons, "--reason", "the data are wrong", "--json")
        wait_for(first, "waiting for the controller")
        second = stop(daemons)
        wait_for(second, "waiting for the controller")
        daemons.pause.unlink()  # bob hangs all the same
        daemons.start("controller")

        code, said, complained = result(first)
        assert code == 0, complained
        end = json.loads(said)
        why = "stopped by driver:local: the data are wrong"
        assert (end["outcome"], end["reason"]) == ("STOPPED", why)
        assert end["rounds"] >= 2
        code, said, complained = result(second)
        assert code == 0, complained
        assert f"run {end['run_id']} was {why}\nstopped after round {end['rounds']}; " in said

        code, _, complained = result(driver)
        assert code == 5, complained
        assert f"the run was {why}; stopped after round {end['rounds']}" in complained
        assert (daemons.homes.controller / "models" / f"{end['model_digest']}.model").exists()
        closed = [record for record in daemons.records() if record.model_digest]
        assert closed[-1].round == end["rounds"]
        assert closed[-1].model_digest.hex() == end["model_digest"]
        chain = daemons.homes.controller / "rounds" / end["run_id"]
        for what in ("show", "verify"):
            command = [METISFL, "rounds", what, str(chain), "--head", end["record"]]
            shown = subprocess.run(command, capture_output=True, text=True)
            assert shown.returncode == 0, shown.stderr
            assert what == "verify" or "2 invited, stopped" in shown.stdout

        stops = [found for found in facts(daemons.homes.controller) if found[0] == "run stopped"]
        ((_, told),) = stops
        assert (told["by"], told["reason"]) == ("driver:local", "the data are wrong")
        assert facts(daemons.homes.controller)[-1][1]["outcome"] == "STOPPED"

        code, _, complained = result(stop(daemons))
        assert code == 2
        assert "no run of outages is under way: there is nothing to stop" in complained
        code, said, _ = result(stop(daemons, "--run", end["run_id"]))
        assert (code, "was stopped by driver:local" in said) == (0, True), "it stays so"

        for site in SITES:
            wait_until_free(daemons.homes.learners[site])
        code, _, complained = result(daemons.run(rounds=1))
        assert code == 0, complained
        (run_id, *_) = [told["run"] for what, told in facts(daemons.homes.controller)][::-1]
        code, said, _ = result(stop(daemons, "--run", str(run_id)))
        assert (code, "had completed before it was stopped" in said) == (1, True)
    finally:
        daemons.stop()
