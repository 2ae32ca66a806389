"""The broker's process: opens the log, lets known keys in, serves until it is told to end.

Rule: whoever cannot be kept out is not served. The authenticator runs before anything is bound, and
READY comes after a random key was refused and the end of the log was found whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog
import zmq

from metisfl import __version__
from metisfl.broker.announcer import Announcer
from metisfl.broker.dispatch import Dispatch
from metisfl.broker.doors import Context, Doors
from metisfl.broker.gate import Gate
from metisfl.broker.loop import Loop
from metisfl.broker.retention import KEEP_DAYS, LOG_LIMIT_BYTES, Limits
from metisfl.broker.store import Store
from metisfl.broker.writer import Writer
from metisfl.deploy import logs, run
from metisfl.deploy.audit import AUDIT_FILE, Audit
from metisfl.deploy.ckks_keys import refuse_secret_parts
from metisfl.deploy.curve import Authenticator, Insecure, guard_server, self_test
from metisfl.deploy.insecure import Shout, add_insecure
from metisfl.deploy.keys import Identity, load_identity
from metisfl.deploy.memory_guard import MEMORY_LIMIT_BYTES
from metisfl.deploy.options import (
    INGRESS,
    LIVE,
    add_option,
    daemon_parser,
    name_of,
    size,
    whole_number,
)
from metisfl.deploy.registry import Watch
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.frames import Head

NAME: Final = "metisfl-broker"
SOFTWARE: Final = f"metisfl {__version__}"
TICK_S: Final = 1.0
SELF_TEST_S: Final = 5.0
LOG_FOLDER: Final = "log"

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `metisfl-broker`; returns its exit code."""
    options = _options(argv)
    return run.run_polling(NAME, lambda stop: _main(options, stop))


def serve(
    home: Path,
    ingress: str,
    live: str,
    stop: run.PollableStop,
    limits: Limits | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    *,
    insecure: bool = False,
) -> None:
    """Serve until `stop`. Raises MetisError if that cannot begin or go on."""
    refuse_secret_parts("the broker", [home, home / "keys", home / LOG_FOLDER])
    identity = Insecure() if insecure else _identity(home / "keys")
    watch = None if insecure else Watch(home / "keys")
    incarnation = time.time_ns()
    with ExitStack() as stack:
        store = Store(home / LOG_FOLDER, limits)
        stack.callback(store.close)
        recovered = store.reader.recovered()
        audit = Audit(home / AUDIT_FILE)
        stack.callback(audit.close)
        context: Context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        listed = {} if watch is None else watch.registry.keys
        authenticator = Authenticator(context, listed, insecure=insecure)
        authenticator.start()
        stack.callback(authenticator.stop)
        doors = Doors(
            context,
            lambda socket: guard_server(socket, identity),
            ingress=ingress,
            live=live,
            head=Head(incarnation, recovered.head),
        )
        stack.callback(doors.close)
        if isinstance(identity, Identity):
            for endpoint, kind in (
                (doors.ingress_endpoint, zmq.DEALER),
                (doors.live_endpoint, zmq.SUB),
            ):
                self_test(context, endpoint, identity.public, SELF_TEST_S, kind)
        authenticator.take_refusals()
        writer = Writer(store, context)
        stack.callback(writer.close)
        dispatch = Dispatch(recovered, incarnation=incarnation, software=SOFTWARE)
        loop = Loop(
            doors=doors,
            stop_descriptor=stop.fileno(),
            dispatch=dispatch,
            store=store,
            writer=writer,
            incarnation=incarnation,
            insecure=insecure,
        )
        announcer = Announcer(home, dispatch.sequencer, incarnation)
        gate = Gate(watch, authenticator, dispatch, loop, announcer, audit, memory_limit_bytes)
        if isinstance(identity, Identity):
            gate.receive(home / "keys", identity.public)
            gate.record("started", software=SOFTWARE, public=identity.public.decode())
        else:
            gate.record("started insecure", software=SOFTWARE)
        run.ready()
        log.info(
            "serving",
            ingress=doors.ingress_endpoint,
            live=doors.live_endpoint,
            events=recovered.head,
        )
        _turn_until(stop, loop, writer, gate, Shout() if insecure else None)
        loop.finish()
        gate.finish()
        log.info("ended", events=dispatch.sequencer.durable_head)


def _identity(folder: Path) -> Identity:
    identity = load_identity(folder)
    if identity.principal != "broker":
        raise UserError(
            f"{folder} holds the key of {identity.principal!r}: a broker's home has a key "
            "made with `metisfl keys identity broker`"
        )
    return identity


def _turn_until(
    stop: run.PollableStop, loop: Loop, writer: Writer, gate: Gate, shout: Shout | None
) -> None:
    watchdog_s = run.watchdog_interval_s()
    next_tick = next_watchdog = time.monotonic()
    while not stop.requested:
        now = time.monotonic()
        if now >= next_tick:
            next_tick = now + TICK_S
            if shout is not None:
                shout.tick(now)
            if not writer.is_alive():
                raise MachineError("the broker's writer has died; see the log before this line")
            gate.tick()
            gate.note(loop.tick())
        if watchdog_s is not None and now >= next_watchdog:
            next_watchdog = now + watchdog_s
            run.watchdog()
        wait_s = next_tick - now
        if watchdog_s is not None:
            wait_s = min(wait_s, next_watchdog - now)
        loop.turn(int(wait_s * 1000) + 1)


def _check(home: Path) -> int:
    store = Store(home / LOG_FOLDER)
    try:
        events, floor = store.reader.check()
    finally:
        store.close()
    trimmed = f", behind {floor} that were trimmed" if floor else ""
    print(f"{store.path} is whole: {events} events{trimmed}")
    return 0


def _give_up(home: Path, federation: str) -> int:
    store = Store(home / LOG_FOLDER)
    try:
        head = store.give_up(federation)
    finally:
        store.close()
    print(f"{store.path} keeps nothing up to {head} for the controller of {federation} any more")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = daemon_parser(NAME, "Carry events between controller, learners and drivers, durably.")
    add_option(parser, "ingress", help="endpoint to publish to", default=INGRESS)
    add_option(parser, "live", help="endpoint to subscribe to", default=LIVE)
    add_option(
        parser,
        "log-limit",
        help="what the log may take of the disk, such as 500MiB",
        default=f"{LOG_LIMIT_BYTES // 1024**3}GiB",
        type=size,
    )
    add_option(
        parser,
        "keep-days",
        help="days after which events go that the controller has read",
        default=str(KEEP_DAYS),
        type=whole_number(1, 36_500),
    )
    add_option(
        parser,
        "memory-limit",
        help="memory beyond which all connections are cut and begin anew",
        default=f"{MEMORY_LIMIT_BYTES // 1024**2}MiB",
        type=size,
    )
    add_insecure(parser)
    parser.add_argument(
        "--check", action="store_true", help="read the whole log, tell whether it is whole, end"
    )
    parser.add_argument(
        "--give-up",
        metavar="FEDERATION",
        type=name_of("federation"),
        help="keep nothing any more for the controller of FEDERATION, which never comes back; end",
    )
    return parser.parse_args(argv)


def _main(options: argparse.Namespace, stop: run.PollableStop) -> int:
    logs.configure(NAME)
    if options.check:
        return _check(Path(options.home))
    if options.give_up:
        return _give_up(Path(options.home), options.give_up)
    limits = Limits.of(options.log_limit, options.keep_days)
    serve(
        Path(options.home),
        options.ingress,
        options.live,
        stop,
        limits,
        options.memory_limit,
        insecure=options.insecure,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
