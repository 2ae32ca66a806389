"""Transfers without keys: they work with an endpoint without keys, and only with one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zmq
from structlog.testing import capture_logs

from metisfl.broker.client import Claim, ClientKeys, Credentials
from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy.curve import Insecure
from metisfl.deploy.keys import Identity
from metisfl.learner.transfer import BulkClient, UploadRefused
from metisfl.proto import credit
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

CONTROLLER = Identity("controller", *zmq.curve_keypair())
ADA = Identity("learner:ada", *zmq.curve_keypair())
KEYS = ClientKeys(ADA.public, ADA.secret, CONTROLLER.public)
MODEL = [Tensor("w", np.arange(1 << 20, dtype=np.float32), True)]


class Site:
    def __init__(self, home: Path) -> None:
        self.home, self.endpoint, self.bulk = home, "tcp://127.0.0.1:*", None
        self.update = home / "update"
        home.mkdir()
        self.digest = write_model(self.update, MODEL)

    def serve(self, identity: Identity | Insecure) -> BulkEndpoint:
        """Start an endpoint, or another one at the address of the last."""
        bulk = BulkEndpoint(
            endpoint=self.endpoint,
            identity=identity,
            peers={ADA.public: ADA.principal} if isinstance(identity, Identity) else {},
            store=ModelStore(self.home / "models"),
            spool=Spool(self.home / "spool"),
            on_stored=lambda *_: None,
        )
        bulk.expect({"t": Expected(ADA.principal)})
        bulk.start()
        self.endpoint = bulk.endpoint
        return bulk

    def client(self, credentials: Credentials) -> BulkClient:
        return BulkClient(self.endpoint, credentials, federation="f")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_a_claim_is_enough_for_an_insecure_endpoint_and_still_names_whose_task_it_is(
    site: Site, tmp_path: Path
) -> None:
    async def story() -> None:
        async with site.client(Claim(ADA.principal)) as ada:
            assert await ada.upload("t", site.update) == site.digest
        async with site.client(Claim("learner:bob")) as bob:
            with pytest.raises(UploadRefused, match="not learner:bob's"):
                await bob.upload("t", site.update)

    bulk = site.serve(Insecure())
    asyncio.run(asyncio.wait_for(story(), 30))
    bulk.close()


@pytest.mark.parametrize(
    ("credentials", "wrong", "right", "told"),
    [
        (Claim(ADA.principal), CONTROLLER, Insecure(), "it wants keys"),
        (KEYS, Insecure(), CONTROLLER, "it was started with --insecure and this process was not"),
    ],
    ids=["without keys", "with keys"],
)
def test_of_two_kinds_nothing_passes_and_the_log_says_why_until_both_are_of_one(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    credentials: Credentials,
    wrong: Identity | Insecure,
    right: Identity | Insecure,
    told: str,
) -> None:
    monkeypatch.setattr(credit, "SILENCE_S", 0.1)
    bulk = site.serve(wrong)

    async def story() -> tuple[list[str], dict[str, int]]:
        nonlocal bulk
        async with site.client(credentials) as client:
            with capture_logs() as lines:
                upload = asyncio.ensure_future(client.upload("t", site.update))
                await until(lambda: any("refuses" in line["event"] for line in lines))
                counts = bulk.counts
                bulk.close()
                bulk = site.serve(right)
                assert await upload == site.digest
            return [line["reason"] for line in lines if "refuses" in line["event"]], counts

    try:
        reasons, counts = asyncio.run(asyncio.wait_for(story(), 30))
    finally:
        bulk.close()
    counts.pop("handshakes_failed", None)
    assert not any(counts.values()), "nothing of who is of another kind came through"
    (reason,) = reasons
    assert told in reason
