"""How many events a second become durable: a real broker process, a real client, keys and all.

Rule: an event counts when the broker has acknowledged it, which means that it is on disk. The
second figure leaves the publisher's own database out, so the broker alone sets the pace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Final

import zmq

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.broker.window import WINDOW_EVENTS
from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity, add_peer, create_identity
from metisfl.proto import frames
from metisfl.proto.envelope import build_envelope
from metisfl.proto.errors import MachineError
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import Hello, TaskFailed
from metisfl.proto.topics import done_topic

__all__ = ["command"]

EVENT_BYTES: Final = 200
START_S: Final = 30.0
ANSWER_MS: Final = 30_000
SOFTWARE: Final = "metisfl bench"


@dataclass(frozen=True, slots=True)
class Figures:
    """Latency is from the flush of an event's transaction to its acknowledgement."""

    events_per_s: float
    ack_us_p50: float
    ack_us_p99: float
    events_per_s_no_outbox: float
    events: int
    window: int
    event_bytes: int
    broker_cpu_us_per_event: float
    publisher_cpu_us_per_event: float


@dataclass(frozen=True, slots=True)
class Broker:
    ingress: str
    live: str
    public: bytes
    pid: int


def command(argv: list[str]) -> int:
    """`metisfl bench events`: print the figures; with --json as one object."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench events",
        description=f"Publish events of {EVENT_BYTES} bytes, {WINDOW_EVENTS} in flight, through an "
        "outbox to a broker on this machine, both durable at every commit.",
    )
    parser.add_argument("--events", type=int, default=50_000, help="how many (default: 50000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--folder", type=Path, help="where both databases are made (default: a temporary folder)"
    )
    options = parser.parse_args(argv)
    if options.events < WINDOW_EVENTS:
        parser.error(f"--events must be at least {WINDOW_EVENTS}")
    with tempfile.TemporaryDirectory(prefix="metisfl-bench-", dir=options.folder) as folder:
        figures = _measure(Path(folder), options.events)
    if options.json:
        print(json.dumps({name: _rounded(value) for name, value in asdict(figures).items()}))
    else:
        for name, value in asdict(figures).items():
            print(f"{name:28} {_rounded(value):>12,}")
    return 0


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 1)


def _measure(folder: Path, events: int) -> Figures:
    with_outbox = create_identity(folder / "a", "learner:a")
    without = create_identity(folder / "b", "learner:b")
    with _broker(folder, [with_outbox, without]) as broker:
        seconds, latencies, cpu_s, broker_cpu_s = asyncio.run(
            _publish(broker, with_outbox, folder / "outbox.db", events)
        )
        bare_seconds = _publish_bare(broker, without, events)
    cuts = quantiles(latencies, n=100)
    return Figures(
        events_per_s=events / seconds,
        ack_us_p50=cuts[49] * 1e6,
        ack_us_p99=cuts[98] * 1e6,
        events_per_s_no_outbox=events / bare_seconds,
        events=events,
        window=WINDOW_EVENTS,
        event_bytes=EVENT_BYTES,
        broker_cpu_us_per_event=broker_cpu_s / events * 1e6,
        publisher_cpu_us_per_event=cpu_s / events * 1e6,
    )


def _event(name: str) -> TaskFailed:
    event = TaskFailed(task_id="bench", learner=name)
    event.reason = "x" * (EVENT_BYTES - event.ByteSize() - 3)
    assert event.ByteSize() == EVENT_BYTES, event.ByteSize()
    return event


async def _publish(
    broker: Broker, identity: Identity, path: Path, events: int
) -> tuple[float, list[float], float, float]:
    """Return (seconds, a latency for each event, CPU seconds here, CPU seconds of the broker)."""
    event, topic = _event("a"), done_topic("bench", "a")
    flushed: deque[tuple[int, float]] = deque()  # last sequence of each transaction, when it went
    latencies: list[float] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        outbox = Outbox(connection, identity.principal)
        client = BrokerClient(
            ingress=broker.ingress,
            live=broker.live,
            keys=ClientKeys(identity.public, identity.secret, broker.public),
            principal=identity.principal,
            outbox=outbox,
            software=SOFTWARE,
        )
        async with client:
            with connection:
                connection.execute("begin immediate")
                outbox.append(topic, event)
            await client.drained(START_S)  # connected
            first = last = outbox.last()
            started, cpu, broker_cpu = time.perf_counter(), time.process_time(), _cpu_s(broker.pid)
            while outbox.acked < first + events:
                room = await client.room()
                now, done = time.perf_counter(), outbox.acked
                while flushed and flushed[0][0] <= done:
                    sequence, at = flushed.popleft()
                    latencies.extend([now - at] * (sequence - first - len(latencies)))
                if not (count := min(room, first + events - last)):
                    await client.drained(START_S)
                    continue
                with connection:
                    connection.execute("begin immediate")
                    for _ in range(count):
                        last = outbox.append(topic, event)
                client.flush()
                flushed.append((last, time.perf_counter()))
            seconds = time.perf_counter() - started
            return (
                seconds,
                latencies,
                time.process_time() - cpu,
                _cpu_s(broker.pid) - broker_cpu,
            )


def _publish_bare(broker: Broker, identity: Identity, events: int) -> float:
    """Return the seconds for the same events, ready-made, without an outbox."""
    kind, payload = encode(_event("b"))
    messages = []
    for sequence in range(1, events + 1):
        envelope = build_envelope(
            event_id=os.urandom(16),
            topic=done_topic("bench", "b"),
            publisher=identity.principal,
            epoch=1,
            sequence=sequence,
            created_unix_ns=time.time_ns(),
            type=kind,
            correlation_id="",
            payload=payload,
        )
        messages.append((frames.PUBLISH, frames.pack_crc(envelope), envelope))
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        secure_client(
            dealer,
            public=identity.public,
            secret=identity.secret,
            server_public=broker.public,
        )
        dealer.connect(broker.ingress)
        dealer.send_multipart(
            frames.pack_hello(Hello(protocol=frames.PROTOCOL, software=SOFTWARE, epoch=1))
        )
        _answer(dealer)
        acked = sent = 0
        started = time.perf_counter()
        while acked < events:
            for message in messages[sent : acked + WINDOW_EVENTS]:
                dealer.send_multipart(message)
                sent += 1
            reply = _answer(dealer)
            if isinstance(reply, frames.Ack):
                acked = reply.sequence
        return time.perf_counter() - started


def _answer(dealer: zmq.Socket[bytes]) -> frames.Reply:
    if not dealer.poll(ANSWER_MS):
        raise MachineError(f"the broker did not answer within {ANSWER_MS // 1000} s")
    return frames.parse_reply(dealer.recv_multipart())


@contextmanager
def _broker(folder: Path, peers: list[Identity]) -> Iterator[Broker]:
    home = folder / "broker"
    identity = create_identity(home / "keys", "broker")
    for peer in peers:
        add_peer(home / "keys", peer.principal, peer.public)
    with ExitStack() as stack:
        ports = [stack.enter_context(closing(socket.socket())) for _ in range(2)]
        for port in ports:
            port.bind(("127.0.0.1", 0))
        ingress, live = (f"tcp://127.0.0.1:{port.getsockname()[1]}" for port in ports)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as ready:
        ready.bind(str(folder / "ready"))
        ready.settimeout(START_S)
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-m", "metisfl.broker.service"),
                *("--home", str(home), "--ingress", ingress, "--live", live),
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "ready")},
        )
        try:
            try:
                ready.recv(64)
            except TimeoutError:
                raise MachineError(f"the broker was not ready within {START_S:.0f} s") from None
            yield Broker(ingress, live, identity.public, process.pid)
        finally:
            process.terminate()
            process.wait()


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
