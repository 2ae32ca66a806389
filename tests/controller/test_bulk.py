"""The endpoint with real CURVE sockets: whatever one peer does, the others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import zmq
from structlog.testing import capture_logs

from metisfl.broker.client import ClientKeys
from metisfl.controller import gate
from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.patience import FUTILE_PER_S
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import Uploads
from metisfl.deploy.audit import Audit
from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity
from metisfl.deploy.registry import Peer, Watch, admit, expel
from metisfl.deploy.run import StopSignal
from metisfl.learner.transfer import BulkClient
from metisfl.native_c import crc32c
from metisfl.proto import bulk as frames
from metisfl.proto.chunk import CHUNK_BYTES, federation_digest
from metisfl.proto.credit import BUDGET_CHUNKS
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

FEDERATION = federation_digest("demo", "run-1")
ANSWER_MS = 10_000


def identity(principal: str) -> Identity:
    return Identity(principal, *zmq.curve_keypair())


CONTROLLER = identity("controller")
LEARNERS = [identity(f"learner:l{number}") for number in range(20)]
ADA = LEARNERS[0]


def a_model(path: Path, megabytes: float) -> bytes:
    values = np.random.default_rng(3).standard_normal(int(megabytes * (1 << 18)))
    return write_model(path, [Tensor("w", values.astype(np.float32), trainable=True)])


class Site:
    """A controller's bulk endpoint; what it announces is in `stored` and `refused`."""

    def __init__(self, home: Path, **other: Any) -> None:
        self.stored: Queue[tuple[str, bytes, int]] = Queue()
        self.refused: Queue[tuple[str, str, str]] = Queue()
        self.store = ModelStore(home / "models")
        self.spool = Spool(home / "spool")
        self.bulk = BulkEndpoint(
            endpoint=other.get("endpoint", "tcp://127.0.0.1:*"),
            identity=CONTROLLER,
            peers={one.public: one.principal for one in LEARNERS},
            store=self.store,
            spool=self.spool,
            on_stored=lambda *what: self.stored.put(what),
            on_refused=lambda *what: self.refused.put(what),
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.bulk.start()
    yield site
    site.bulk.close()
    site.bulk.finished.result(timeout=10)


@pytest.fixture
def dial(site: Site) -> Iterator[Callable[[Identity], zmq.Socket[bytes]]]:
    """Connect to the endpoint with somebody's key and nothing of ours in between."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []

    def connect(who: Identity) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        secure_client(socket, public=who.public, secret=who.secret, server_public=CONTROLLER.public)
        socket.connect(site.bulk.endpoint)
        sockets.append(socket)
        return socket

    yield connect
    for socket in sockets:
        socket.close(linger=0)
    context.destroy(linger=0)  # and what a failed test has left open


def ask(socket: zmq.Socket[bytes], parts: list[Any]) -> frames.Frame:
    """Send a message and return the answer."""
    socket.send_multipart(parts)
    assert socket.poll(ANSWER_MS), "no answer"
    return frames.parse(socket.recv_multipart(), crc32c)


def client_of(site: Site, who: Identity) -> BulkClient:
    keys = ClientKeys(who.public, who.secret, CONTROLLER.public)
    return BulkClient(site.bulk.endpoint, keys, federation="demo")


def upload(site: Site, task: str, path: Path, who: Identity = ADA) -> None:
    async def go() -> None:
        async with client_of(site, who) as client:
            await asyncio.wait_for(client.upload(task, path, run_id="run-1"), 30)

    asyncio.run(go())


def test_twenty_uploads_at_once_stay_within_the_budget(site: Site, tmp_path: Path) -> None:
    digest = a_model(tmp_path / "m.model", 3)
    site.bulk.expect(
        {one.principal[8:]: Expected(one.principal, federation=FEDERATION) for one in LEARNERS}
    )

    async def go() -> None:
        clients = [client_of(site, who) for who in LEARNERS]
        uploads = [
            client.upload(who.principal[8:], tmp_path / "m.model", run_id="run-1")
            for client, who in zip(clients, LEARNERS, strict=True)
        ]
        await asyncio.wait_for(asyncio.gather(*uploads), 60)
        for client in clients:
            client.close()

    asyncio.run(go())
    stored = [site.stored.get_nowait() for _ in LEARNERS]
    assert {(task, found) for task, found, _ in stored} == {
        (one.principal[8:], digest) for one in LEARNERS
    }
    granted = site.bulk.counts["upload_chunks_granted_max"]
    assert granted * CHUNK_BYTES <= 16 << 20, f"{granted} chunks were under way"
    assert granted > BUDGET_CHUNKS // 2, "the budget was hardly used"
    assert site.bulk.counts["chunk_bytes_received"] == len(LEARNERS) * (3 << 20)


@pytest.mark.parametrize(
    ("parts", "story"),
    [
        ([b"O", b"short", b"t", b""], "fields of 5 bytes; they have 58"),
        ([b"?", b"what"], "unknown kind b'?'"),
        ([b"lonely"], "of 1 parts"),
        ([b"C", bytes(96), b"payload"], "magic is"),
        ([b"part"] * 50, "of 50 parts"),
        ([bytes(8), bytes(200_000)], "unknown kind"),
    ],
)
def test_a_bad_frame_is_answered_and_counted(
    site: Site,
    dial: Callable[[Identity], zmq.Socket[bytes]],
    parts: list[bytes],
    story: str,
) -> None:
    with capture_logs() as logs:
        answer = ask(dial(ADA), parts)
    assert isinstance(answer, frames.Refused)
    assert answer.code == frames.Code.BAD_FRAME
    assert story in answer.reason
    assert site.bulk.counts["bad_frames"] == 1
    assert [line["peer"] for line in logs] == ["learner:l0"]


def test_frames_that_only_a_controller_sends_are_bad_frames(
    dial: Callable[[Identity], zmq.Socket[bytes]],
) -> None:
    answer = ask(dial(ADA), frames.pack(frames.Stored(bytes(16), bytes(32)), crc32c))
    assert isinstance(answer, frames.Refused)
    assert answer.reason == "a Stored frame is not for a controller"


def test_credit_beyond_the_model_is_a_bad_frame(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]]
) -> None:
    draft = site.store.draft(0)
    digest = site.store.put(draft, a_model(draft, 0.001))
    socket = dial(ADA)
    assert isinstance(ask(socket, frames.pack(frames.Get(digest, 0, 0), crc32c)), frames.Model)
    credit = frames.Credit(frames.model_subject(digest), 0, 7)
    answer = ask(socket, frames.pack(credit, crc32c))
    assert isinstance(answer, frames.Refused)
    assert "up to chunk 7 of 1" in answer.reason


def test_an_oversized_part_costs_its_sender_the_connection_and_nobody_else_anything(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]], tmp_path: Path
) -> None:
    a_model(tmp_path / "m.model", 0.3)
    site.bulk.expect({"t": Expected("learner:l1")})
    rude = dial(ADA)
    monitor = rude.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    rude.send_multipart([b"C", bytes(96), bytes(frames.MESSAGE_BYTES_MAX + 1)])
    assert monitor.poll(ANSWER_MS), "the connection stands"
    rude.disable_monitor()
    monitor.close(linger=0)
    upload(site, "t", tmp_path / "m.model", LEARNERS[1])
    assert site.stored.get(timeout=10)[0] == "t"


def test_garbage_from_one_learner_does_not_stop_another(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]], tmp_path: Path
) -> None:
    a_model(tmp_path / "m.model", 3)
    site.bulk.expect({"t": Expected("learner:l1")})
    rude, noise = dial(ADA), np.random.default_rng(1)
    for size in range(300):
        rude.send_multipart([noise.bytes(1), noise.bytes(size), noise.bytes(size)])
    with capture_logs() as logs:
        upload(site, "t", tmp_path / "m.model", LEARNERS[1])
        assert site.stored.get(timeout=10)[0] == "t"
        rude.close(linger=0)
    assert len(logs) < 20, "a flood of garbage fills the log"


def test_who_sends_nothing_but_what_leads_nowhere_is_not_read_any_more(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]], tmp_path: Path
) -> None:
    a_model(tmp_path / "m.model", 3)
    site.bulk.expect({"t": Expected("learner:l1")})
    rude, flood = dial(ADA), 20 * int(FUTILE_PER_S)
    others = frames.pack(frames.Open("t", FEDERATION, bytes(32), 0, b""), crc32c)
    with capture_logs() as logs:
        for number in range(flood):
            rude.send_multipart(others if number % 2 else [b"?", bytes(100)])
        upload(site, "t", tmp_path / "m.model", LEARNERS[1])
        assert site.stored.get(timeout=10)[0] == "t"
        while site.bulk.counts.get("frames_unread", 0) < flood // 2:  # else most of it is read
            rude.poll(1)
    assert "learner:l0" in {line["peer"] for line in logs if "unread" in line["event"]}


def test_a_learner_cannot_upload_for_another(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]]
) -> None:
    site.bulk.expect({"t": Expected("learner:l1")})
    answer = ask(dial(ADA), frames.pack(frames.Open("t", FEDERATION, bytes(32), 0, b""), crc32c))
    assert isinstance(answer, frames.Refused)
    assert answer.code == frames.Code.NOT_YOURS
    assert site.refused.empty(), "the task is not its to spoil"


def test_an_unknown_key_is_not_let_in_until_it_is_known(
    site: Site, dial: Callable[[Identity], zmq.Socket[bytes]]
) -> None:
    stranger = identity("learner:new")
    socket = dial(stranger)
    monitor = socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED
    )
    socket.send_multipart([b"?", b"let me in"])
    assert monitor.poll(ANSWER_MS)
    assert not socket.poll(0), "a stranger was answered"
    socket.disable_monitor()
    monitor.close(linger=0)
    site.bulk.replace_peers({stranger.public: stranger.principal})
    socket.close(linger=0)
    assert isinstance(ask(dial(stranger), [b"?", b"let me in"]), frames.Refused)


async def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(what)


def test_an_expelled_site_is_cut_off_and_an_upload_of_another_goes_on(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "LOOK_S", 0.01)
    keys = tmp_path / "keys"
    bob = LEARNERS[1]
    for who in (ADA, bob):
        admit(keys, Peer(who.principal, who.public))
    digest = a_model(tmp_path / "m.model", 60)
    tasks = {"ada": Expected(ADA.principal, federation=FEDERATION)}
    tasks["bob"] = Expected(bob.principal, federation=FEDERATION)
    audit = Audit(tmp_path / "audit.jsonl")

    async def go() -> None:
        site.bulk.expect(tasks)
        stop = StopSignal()
        keeping = asyncio.create_task(gate.keep_gate(Watch(keys), "demo", site.bulk, audit, stop))
        async with client_of(site, ADA) as ada, client_of(site, bob) as theirs:
            path = tmp_path / "m.model"
            going_on = asyncio.create_task(ada.upload("ada", path, run_id="run-1"))
            cut = asyncio.create_task(theirs.upload("bob", path, run_id="run-1"))
            received = "chunks_received"
            await until(lambda: site.bulk.counts.get(received, 0) > 0, f"{site.bulk.counts}")
            expel(keys, bob.principal)
            await asyncio.wait_for(going_on, 30)
            assert not cut.done(), "who was expelled was served to the end"
            cut.cancel()
            await asyncio.gather(cut, return_exceptions=True)
        stop.request()
        await keeping

    asyncio.run(go())
    audit.close()
    assert site.stored.get_nowait()[:2] == ("ada", digest)
    assert site.stored.empty()
    assert "expelled" in (tmp_path / "audit.jsonl").read_text()


def test_an_address_in_use_is_said_with_its_remedy(site: Site, tmp_path: Path) -> None:
    second = Site(tmp_path, endpoint=site.bulk.endpoint)
    with pytest.raises(MachineError, match="Address already in use; stop what uses that address"):
        second.bulk.start()
    second.bulk.close()


def test_a_thread_that_dies_of_a_defect_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Uploads, now: float) -> bool:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Uploads, "work", broken)
    site = Site(tmp_path)
    site.bulk.start()
    with pytest.raises(ZeroDivisionError, match="a defect"):
        site.bulk.finished.result(timeout=10)
    site.bulk.close()


def test_an_endpoint_without_authenticator_ends(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.bulk.start()
    site.bulk._authenticator.stop()
    with pytest.raises(MachineError, match="authenticator has ended"):
        site.bulk.finished.result(timeout=10)
    site.bulk.close()


def test_a_waiter_that_gives_up_does_not_disturb_the_endpoint(site: Site) -> None:
    async def go() -> None:
        waiter = asyncio.wrap_future(site.bulk.finished)
        waiter.cancel()

    asyncio.run(go())
    assert not site.bulk.finished.cancelled()


def test_closing_twice_or_before_the_start_is_fine(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.bulk.close()
    site.bulk.close()
    started = Site(tmp_path)
    started.bulk.start()
    started.bulk.close()
    started.bulk.close()
    started.bulk.expect({"t": Expected("learner:l1")})
    started.bulk.finished.result(timeout=10)


def test_a_task_id_that_cannot_name_a_file_is_a_defect(site: Site) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        site.bulk.expect({"../t": Expected("learner:l1")})


def test_no_socket_of_the_endpoint_uses_zmtp_heartbeats(site: Site) -> None:
    """They abort the process when a receive queue is full and the peer resets."""
    assert site.bulk._socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
