"""A site holds both parts of a key or neither; else its daemon says what is missing and ends."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest
import zmq

from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, write_new_key, write_secret
from metisfl.deploy.key_lists import add_server
from metisfl.deploy.keys import create_identity
from metisfl.deploy.run import StopSignal
from metisfl.learner.crypto import generate
from metisfl.learner.service import serve
from metisfl.proto.errors import UserError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    keys = tmp_path / "keys"
    create_identity(keys, "learner:ada")
    for server in ("broker", "controller"):
        add_server(keys, server, zmq.curve_keypair()[0])
    write_new_key(keys, *generate("compact", max_learners=4))
    return tmp_path


def refusal(home: Path) -> str:
    with pytest.raises(UserError) as refused:
        asyncio.run(serve(Namespace(home=home, name="ada", insecure=False), StopSignal()))
    assert [path.name for path in home.iterdir()] == ["keys"], "nothing was begun"
    return str(refused.value)


def test_a_public_part_without_the_secret_one(home: Path) -> None:
    (home / "keys" / SECRET_FILE).unlink()
    assert "secret.ckks does not exist" in refusal(home)
    assert "`metisfl keys open" in refusal(home)


def test_a_secret_part_without_the_public_one(home: Path) -> None:
    (home / "keys" / PUBLIC_FILE).unlink()
    assert "secret.ckks is there and" in refusal(home)


def test_parts_of_two_keys(home: Path) -> None:
    (home / "keys" / SECRET_FILE).unlink()
    write_secret(home / "keys", generate("compact", max_learners=4)[1])
    assert "both must be of one key" in refusal(home)


def test_a_secret_part_that_others_can_read(home: Path) -> None:
    (home / "keys" / SECRET_FILE).chmod(0o644)
    assert "secret.ckks" in refusal(home)
