from __future__ import annotations

import json

import pytest

from metisfl.native_c.bench import command
from metisfl.native_c.bench_turns import TURNS


def test_json_is_one_object_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--scheme", "plain", "--params", "5001", "--learners", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["scheme"], figures["params"], figures["learners"]) == ("plain", 5001, 3)
    assert figures["kernel"] in ("avx2", "portable")
    measured = {
        "absorb_ns_per_param",
        "absorb_many_ns_per_param",
        "gb_per_s",
        "add_pass_ns",
        "scan_ns",
        "fraction_of_add_pass",
        "fraction_of_scan",
        "numpy_ns",
    }
    assert set(figures) == measured | {"scheme", "params", "learners", "kernel"}
    assert all(figures[name] > 0 for name in measured), figures


@pytest.mark.parametrize("profile", ["compact", "standard", "fine", "wide"])
def test_the_encrypted_fold_is_measured_with_every_figure(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--scheme", "ckks", "--profile", profile, "--params", "50000", "--learners", "3"]
    assert command([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["scheme"], figures["profile"]) == ("ckks", profile)
    peers = {"openfhe_ns", "tenseal_ns", "ratio_openfhe", "ratio_tenseal"}
    assert all(figures[name] is None for name in peers), "they are measured when asked for"
    measured = {
        "absorb_ns_per_param",
        "absorb_many_ns_per_param",
        "gb_per_s",
        "add_pass_ns",
        "scan_ns",
        "fraction_of_add_pass",
        "fraction_of_scan",
        "expand_ns",
    }
    assert all(figures[name] > 0 for name in measured), figures
    assert command(arguments) == 0
    assert f"profile {profile}: 50,000 parameters" in capsys.readouterr().out


def test_the_peers_are_measured_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--scheme", "ckks", "--params", "2048", "--peers", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["openfhe_ns"] > 0
    assert figures["ratio_openfhe"] > 0


def test_the_table_names_the_fold_and_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--params", "1000", "--learners", "2"]) == 0
    printed = capsys.readouterr()
    assert "1,000 parameters, 2 learners" in printed.out
    assert "limit: reading only" in printed.out
    assert printed.err == ""


def test_a_long_run_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metisfl.native_c.bench_turns.QUIET_S", -1.0)
    assert command(["--params", "10", "--learners", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert f"turn {TURNS} of {TURNS}" in printed.err
    assert len(printed.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--scheme", "rot13"], "plain"),
        (["--params", "0"], "'0' is not a whole number, 1 to"),
        (["--params", "ten"], "'ten' is not a whole number"),
        (["--learners", "-3"], "--learners"),
        (["--learners", "10001"], "1 to 10,000"),
        (["--params", "4000000000", "--learners", "10000"], "lower --params or --learners"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_is_allowed(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        command(arguments)
    assert refused.value.code == 2
    assert text in capsys.readouterr().err
