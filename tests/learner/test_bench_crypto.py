"""`metisfl bench crypto` measures files as learners make them, and says what it found."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from metisfl.deploy.bench import command as bench
from metisfl.learner.bench_crypto import CryptoFigures, measure
from metisfl.learner.bench_joint import JointFigures, measure_joint
from metisfl.proto import ckks

FILE_HEADER_BYTES = 4096
PARAMS = 30_000


@pytest.mark.parametrize("profile", ckks.PROFILES)
def test_bytes_and_error_are_those_that_the_profile_promises(profile: str) -> None:
    figures = measure(profile, PARAMS)
    limb_bits = ckks.PROFILES[profile]
    whole = ckks.ciphertexts(PARAMS, ckks.RING_DIMENSION) * ckks.RING_DIMENSION * limb_bits // 8
    for found, polynomials in (
        (figures.up_bytes_per_param, 1),
        (figures.down_bytes_per_param, 1),
        (figures.down_bytes_per_param_expanded, 2),
    ):
        extra = found * PARAMS - FILE_HEADER_BYTES - polynomials * whole
        assert 0 < extra < 2000, "headers and seeds"
    rounding_to_float32 = 2.0**-26  # of a mean that is below 1/4
    assert 0 < figures.max_abs_error <= figures.expected_error + rounding_to_float32
    assert figures.expected_error == ckks.parameters_for(limb_bits, figures.learners).error


def test_as_json_it_prints_one_object_and_nothing_else_to_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench(["crypto", "--profile", "compact", "--params", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [field.name for field in fields(CryptoFigures)]
    assert (found["profile"], found["params"], found["learners"]) == ("compact", 100, 10)
    assert found["encrypt_mparams_per_s"] > 0
    assert found["decrypt_mparams_per_s"] > 0


def test_for_a_person_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["crypto", "--params", "100"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("encryption, profile standard: 100 parameters, 10 learners, ")
    for words in ("bytes a parameter", "million parameters/s", "error of a mean"):
        assert words in said.out
    assert "sealing the update of learner 10 of 10" in said.err, "it says what it is doing"


@pytest.mark.parametrize("params", ["0", "100000001", "1e6"])
def test_a_size_out_of_bounds_is_refused(params: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(["crypto", "--params", params])
    assert ended.value.code == 2
    assert "allowed is a whole number from 1 to 100000000" in capsys.readouterr().err


@pytest.mark.parametrize("sites", [2, 3])
def test_under_a_joint_key_bytes_and_error_are_those_that_it_promises(sites: int) -> None:
    figures = measure_joint(sites, PARAMS)
    whole = ckks.ciphertexts(PARAMS, ckks.RING_DIMENSION) * ckks.RING_DIMENSION * 52 // 8
    for found, polynomials in (
        (figures.up_bytes_per_param, 2),
        (figures.down_bytes_per_param, 2),
        (figures.partial_bytes_per_param, 1),
    ):
        extra = found * PARAMS - FILE_HEADER_BYTES - polynomials * whole
        assert 0 < extra < 2000, "headers and nonces"
    assert 0 < figures.max_abs_error <= figures.expected_error + 2.0**-26
    assert figures.expected_error == ckks.parameters_for(52, sites, joint=True).error
    assert figures.expected_error <= 1e-6


def test_of_a_joint_key_it_prints_one_object_or_a_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    joint = ["crypto", "--threshold", "2", "--params", "100"]
    assert bench([*joint, "--profile", "wide", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [field.name for field in fields(JointFigures)]
    assert (found["profile"], found["params"], found["sites"]) == ("wide", 100, 2)
    for speed in ("encrypt", "partial", "decrypt"):
        assert found[f"{speed}_mparams_per_s"] > 0
    assert bench(joint) == 0
    said = capsys.readouterr()
    assert said.out.startswith("encryption under a joint key: 100 parameters, 2 sites, ")
    for words in ("make a partial", "bytes a parameter, up and down", "error of a mean"):
        assert words in said.out
    assert "making the partial of site 2 of 2" in said.err


@pytest.mark.parametrize(
    ("options", "story"),
    [
        (["3", "--profile", "fine"], "--threshold: a joint key is of --profile wide"),
        (["1"], "allowed is a whole number from 2 to"),
        (["1000"], "allowed is a whole number from 2 to"),
    ],
)
def test_a_joint_key_that_cannot_be_is_refused(
    options: list[str], story: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(["crypto", "--threshold", *options])
    assert ended.value.code == 2
    assert story in capsys.readouterr().err
