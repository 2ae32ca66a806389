"""ceremony_shell.py: what it says, and what it does not say, for all that the broker may do."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from metisfl.broker.client import Batch, Outbox, Record
from metisfl.deploy.database import open_database
from metisfl.deploy.keys import Identity
from metisfl.deploy.signing import is_signed, sign
from metisfl.learner.ceremony_kept import load, save
from metisfl.learner.ceremony_shell import Ceremony
from metisfl.proto import ceremony as c
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ceremony import Manifest
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import decode, encode

PEOPLE = {name: Identity(f"learner:{name}", *zmq.curve_keypair()) for name in ("ada", "bob")}
SITES = tuple((name, one.public) for name, one in PEOPLE.items())
MANIFEST = Manifest("f", "0" * 32, SITES, 1e-6, 2, 0.95, "none")


class End(Exception):
    """The log has no more batches for now."""


class Client:
    """A broker's client that hands on these batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    async def records(self, lane: str) -> AsyncIterator[Batch]:
        assert lane == "f/ceremony/all/"
        for batch in self._batches:
            yield batch
        raise End

    def flush(self) -> None:
        pass


@pytest.fixture
def connection(tmp_path: Path) -> Any:
    found = open_database(tmp_path / "learner.db")
    yield found
    found.close()


def record(sequence: int, site: str, step: int, body: bytes, kind: str = "CeremonyStep") -> Record:
    signed = sign(PEOPLE[site], c.signed_bytes(MANIFEST, site, step, body))
    said = pb.CeremonyStep(
        ceremony=MANIFEST.ceremony, learner=site, step=step, body=body, signature=signed
    )
    return Record(sequence, 0, "f/ceremony/all/", f"learner:{site}", kind, "", encode(said)[1])


def follow(folder: Path, connection: sqlite3.Connection, *batches: Batch) -> list[pb.CeremonyStep]:
    """What ada has said when these batches were read. Raises what ends the ceremony."""
    outbox = Outbox(connection, "learner:ada")

    async def go() -> None:
        ceremony = Ceremony(
            manifest=MANIFEST,
            identity=PEOPLE["ada"],
            folder=folder,
            connection=connection,
            outbox=outbox,
            client=Client(batches),  # type: ignore[arg-type]
        )
        await ceremony.until_made()

    with pytest.raises(End):
        asyncio.run(go())
    return said_in(outbox)


def said_in(outbox: Outbox) -> list[pb.CeremonyStep]:
    envelopes = [parse_envelope(envelope) for _, _, envelope in outbox.rows(0, 100)]
    found = [decode(envelope.type, envelope.payload) for envelope in envelopes]
    assert all(isinstance(each, pb.CeremonyStep) for each in found)
    return found  # type: ignore[return-value]


def test_what_is_said_is_signed_and_said_when_the_log_was_read_to_its_end(
    tmp_path: Path, connection: sqlite3.Connection
) -> None:
    assert follow(tmp_path, connection, Batch((), 5, caught_up=False)) == []
    said = follow(tmp_path, connection, Batch((), 5, caught_up=True))
    assert [(each.learner, each.step) for each in said] == [("ada", 1)]
    signed = c.signed_bytes(MANIFEST, "ada", 1, said[0].body)
    assert is_signed(PEOPLE["ada"].public, signed, said[0].signature)
    again = follow(tmp_path, connection, Batch((), 5, caught_up=True))
    assert [each.body for each in again] == [said[0].body] * 2, "a restart says the same again"


def test_a_site_that_lost_its_secrets_says_nothing_more(
    tmp_path: Path, connection: sqlite3.Connection
) -> None:
    former = record(1, "ada", 1, bytes(32))
    with pytest.raises(PeerError, match="its secrets of this ceremony are lost"):
        follow(tmp_path, connection, Batch((former,), 1, caught_up=True))
    assert said_in(Outbox(connection, "learner:ada")) == []
    with pytest.raises(PeerError, match="its secrets of this ceremony are lost"):
        follow(tmp_path, connection, Batch((), 1, caught_up=True))


def test_a_log_that_was_trimmed_is_never_taken_for_the_whole(
    tmp_path: Path, connection: sqlite3.Connection
) -> None:
    """A site that has missed a step would take the next one for early, and blame who said it."""
    trimmed = Batch((), 50, caught_up=True, trimmed_to=40)
    follow(tmp_path, connection, trimmed)  # it has not begun: what is gone was no step of its own
    kept = load(tmp_path, MANIFEST, "ada")
    assert kept is not None
    own = {(1, "ada"): kept.state.own[1]}
    save(tmp_path, replace(kept, state=replace(kept.state, heard=own), through=39))
    with pytest.raises(UserError, match="the broker has trimmed its log"):
        follow(tmp_path, connection, trimmed)
    save(tmp_path, replace(kept, state=replace(kept.state, heard=own), through=40))
    follow(tmp_path, connection, trimmed)


def test_what_cannot_be_read_is_nobodys(tmp_path: Path, connection: sqlite3.Connection) -> None:
    good = record(1, "bob", 1, bytes(32))
    odd = [replace(good, type="Nonsense"), replace(good, payload=b"\xff"), replace(good, type="")]
    odd.append(replace(good, type="LearnerLeft", payload=b""))
    batch = Batch(tuple(odd), 4, caught_up=True)
    assert [each.step for each in follow(tmp_path, connection, batch)] == [1]
    kept = load(tmp_path, MANIFEST, "ada")
    assert kept is not None
    assert not kept.state.heard


def test_records_that_were_applied_are_passed_by(
    tmp_path: Path, connection: sqlite3.Connection
) -> None:
    """What is kept is from the middle of a batch: the batch comes again from its beginning."""
    one = record(7, "bob", 1, bytes(32))
    follow(tmp_path, connection, Batch((one,), 7, caught_up=True))
    kept = load(tmp_path, MANIFEST, "ada")
    assert kept is not None
    assert kept.through == 7
    other = record(6, "bob", 1, b"\1" * 32)
    follow(tmp_path, connection, Batch((other,), 7, caught_up=True))
    late = record(8, "bob", 1, b"\1" * 32)
    with pytest.raises(PeerError, match="bob has said two different things in step 1"):
        follow(tmp_path, connection, Batch((late,), 8, caught_up=True))
