"""How many events a second become durable: real broker processes, a real client, keys and all.

Rule 1: an event counts when the broker has acknowledged it, which means that it is on disk. The
second figure leaves the publisher's own database out, so the broker alone sets the pace.
Rule 2: the publisher is a controller, whom the broker holds to no rate.
Rule 3: with keys (CURVE) and without (PLAIN, `--insecure`) is measured in turns of one run, so that
whatever disturbs this machine disturbs both.
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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import quantiles
from typing import Final

import zmq

from metisfl.broker.client import BrokerClient, Claim, ClientKeys, Credentials, Outbox
from metisfl.broker.window import WINDOW_EVENTS
from metisfl.deploy.curve import set_hygiene
from metisfl.deploy.insecure import INSECURE_VARIABLE
from metisfl.deploy.keys import create_identity
from metisfl.deploy.registry import Peer, admit
from metisfl.proto import frames
from metisfl.proto.envelope import build_envelope
from metisfl.proto.errors import MachineError
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import Hello, TaskFailed
from metisfl.proto.topics import task_topic

__all__ = ["command"]

EVENT_BYTES: Final = 200
START_S: Final = 30.0
ANSWER_MS: Final = 30_000
SOFTWARE: Final = "metisfl bench"
TURNS: Final = 4
PUBLISHER: Final = "controller"
TOPIC: Final = task_topic("bench", "a")


@dataclass(frozen=True, slots=True)
class Figures:
    """Latency is from the flush of an event's transaction to its acknowledgement."""

    events_per_s: float
    ack_us_p50: float
    ack_us_p99: float
    events_per_s_no_outbox: float
    broker_cpu_us_per_event: float
    publisher_cpu_us_per_event: float


@dataclass(frozen=True, slots=True)
class Broker:
    """A running one, and by what the publisher is known to it."""

    ingress: str
    live: str
    pid: int
    credentials: Credentials


@dataclass(slots=True)
class Side:
    """What was measured of one broker so far."""

    broker: Broker
    folder: Path
    events: int = 0
    seconds: float = 0.0
    seconds_no_outbox: float = 0.0
    cpu_s: float = 0.0
    broker_cpu_s: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def figures(self) -> Figures:
        cuts = quantiles(self.latencies, n=100)
        return Figures(
            events_per_s=self.events / self.seconds,
            ack_us_p50=cuts[49] * 1e6,
            ack_us_p99=cuts[98] * 1e6,
            events_per_s_no_outbox=self.events / self.seconds_no_outbox,
            broker_cpu_us_per_event=self.broker_cpu_s / self.events * 1e6,
            publisher_cpu_us_per_event=self.cpu_s / self.events * 1e6,
        )


def command(argv: list[str]) -> int:
    """`metisfl bench events`: print the figures; with --json as one object."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench events",
        description=f"Publish events of {EVENT_BYTES} bytes, {WINDOW_EVENTS} in flight, through an "
        "outbox to a broker on this machine, both durable at every commit; with keys (curve) and, "
        "in turns, without (plain).",
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
        curve, plain = _measure(Path(folder), options.events)
    told = {
        **_rounded(curve),
        "events": options.events,
        "window": WINDOW_EVENTS,
        "event_bytes": EVENT_BYTES,
        "plain": _rounded(plain),
        "curve_of_plain": round(curve.events_per_s / plain.events_per_s, 3),
        "curve_of_plain_no_outbox": round(
            curve.events_per_s_no_outbox / plain.events_per_s_no_outbox, 3
        ),
    }
    print(json.dumps(told) if options.json else "\n".join(_table(curve, plain, told)))
    return 0


def _table(curve: Figures, plain: Figures, told: dict[str, object]) -> list[str]:
    """The figures for people, side by side."""
    columns = _rounded(curve), _rounded(plain)
    rows = [f"{'':28} {'curve':>12} {'plain':>12}"]
    rows += [
        f"{one.name:28} {columns[0][one.name]:>12,} {columns[1][one.name]:>12,}"
        for one in fields(Figures)
    ]
    rest = ("curve_of_plain", "curve_of_plain_no_outbox", "events", "window", "event_bytes")
    return rows + [f"{name:28} {told[name]:>12,}" for name in rest]


def _rounded(figures: Figures) -> dict[str, float]:
    return {name: round(value, 1) for name, value in asdict(figures).items()}


def _measure(folder: Path, events: int) -> tuple[Figures, Figures]:
    """With keys, without; each is `events` in all."""
    turns = min(TURNS, events // WINDOW_EVENTS)
    with ExitStack() as stack:
        sides = []
        for name in ("curve", "plain"):
            (folder / name).mkdir()
            broker = stack.enter_context(_broker(folder / name, insecure=name == "plain"))
            sides.append(Side(broker, folder / name))
        for turn in range(turns):
            count = events // turns + (events % turns if turn == 0 else 0)
            for side in sides if turn % 2 == 0 else sides[::-1]:
                asyncio.run(_publish(side, side.folder / f"outbox-{turn}.db", count))
                side.seconds_no_outbox += _publish_bare(side.broker, count)
                side.events += count
    curve, plain = sides
    return curve.figures(), plain.figures()


def _event() -> TaskFailed:
    event = TaskFailed(task_id="bench", learner="a")
    event.reason = "x" * (EVENT_BYTES - event.ByteSize() - 3)
    assert event.ByteSize() == EVENT_BYTES, event.ByteSize()
    return event


async def _publish(side: Side, path: Path, events: int) -> None:
    """Publish so many through a new outbox at `path`; times are added to `side`."""
    event, broker = _event(), side.broker
    flushed: deque[tuple[int, float]] = deque()  # last sequence of each transaction, when it went
    latencies: list[float] = []

    def note_acknowledged() -> None:
        now, done = time.perf_counter(), outbox.acked
        while flushed and flushed[0][0] <= done:
            sequence, at = flushed.popleft()
            latencies.extend([now - at] * (sequence - first - len(latencies)))

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        outbox = Outbox(connection, PUBLISHER)
        client = BrokerClient(
            ingress=broker.ingress,
            live=broker.live,
            keys=broker.credentials,
            principal=PUBLISHER,
            outbox=outbox,
            software=SOFTWARE,
        )
        async with client:
            with connection:
                connection.execute("begin immediate")
                outbox.append(TOPIC, event)
            await client.drained(START_S)  # connected
            first = last = outbox.last()
            started, cpu, broker_cpu = time.perf_counter(), time.process_time(), _cpu_s(broker.pid)
            while outbox.acked < first + events:
                room = await client.room()
                note_acknowledged()
                if not (count := min(room, first + events - last)):
                    await client.drained(START_S)
                    continue
                with connection:
                    connection.execute("begin immediate")
                    for _ in range(count):
                        last = outbox.append(TOPIC, event)
                client.flush()
                flushed.append((last, time.perf_counter()))
            note_acknowledged()
            side.seconds += time.perf_counter() - started
            side.cpu_s += time.process_time() - cpu
            side.broker_cpu_s += _cpu_s(broker.pid) - broker_cpu
            side.latencies += latencies


def _publish_bare(broker: Broker, events: int) -> float:
    """Return the seconds for the same events, ready-made, without an outbox."""
    kind, payload = encode(_event())
    epoch = time.time_ns()  # newer than that of any outbox so far
    messages = []
    for sequence in range(1, events + 1):
        envelope = build_envelope(
            event_id=os.urandom(16),
            topic=TOPIC,
            publisher=PUBLISHER,
            epoch=epoch,
            sequence=sequence,
            created_unix_ns=time.time_ns(),
            type=kind,
            correlation_id="",
            payload=payload,
        )
        messages.append((frames.PUBLISH, frames.pack_crc(envelope), envelope))
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        broker.credentials.put_on(dealer)
        set_hygiene(dealer)
        dealer.connect(broker.ingress)
        dealer.send_multipart(
            frames.pack_hello(Hello(protocol=frames.PROTOCOL, software=SOFTWARE, epoch=epoch))
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
def _broker(folder: Path, *, insecure: bool) -> Iterator[Broker]:
    home = folder / "broker"
    credentials = Claim(PUBLISHER) if insecure else _keys(folder / "keys", home / "keys")
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
                *(("--insecure",) if insecure else ()),
            ],
            env={**os.environ, INSECURE_VARIABLE: "", "NOTIFY_SOCKET": str(folder / "ready")},
        )
        try:
            try:
                ready.recv(64)
            except TimeoutError:
                raise MachineError(f"the broker was not ready within {START_S:.0f} s") from None
            yield Broker(ingress, live, process.pid, credentials)
        finally:
            process.terminate()
            process.wait()


def _keys(folder: Path, of_broker: Path) -> ClientKeys:
    """Make the keys of the broker and of the publisher, whom it knows; return the latter's."""
    broker = create_identity(of_broker, "broker")
    publisher = create_identity(folder, PUBLISHER)
    admit(of_broker, Peer(publisher.principal, publisher.public))
    return ClientKeys(publisher.public, publisher.secret, broker.public)


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
