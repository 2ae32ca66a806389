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
from metisfl.broker.dispatch import Dispatch
from metisfl.broker.loop import Loop
from metisfl.broker.retention import KEEP_DAYS, LOG_LIMIT_BYTES, Limits
from metisfl.broker.store import Store
from metisfl.broker.writer import Writer
from metisfl.deploy import logs, run
from metisfl.deploy.ckks_keys import refuse_secret_parts
from metisfl.deploy.curve import Authenticator, secure_server, self_test
from metisfl.deploy.keys import PEERS_FILE, Identity, load_identity, load_peers
from metisfl.deploy.options import (
    INGRESS,
    LIVE,
    add_option,
    daemon_parser,
    name_of,
    size,
    whole_number,
)
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.frames import MESSAGE_BYTES_MAX, Head, pack_head

NAME: Final = "metisfl-broker"
SOFTWARE: Final = f"metisfl {__version__}"
TICK_S: Final = 1.0
SELF_TEST_S: Final = 5.0
BACKLOG: Final = 1024
INGRESS_RECEIVE_HWM: Final = 512
INGRESS_SEND_HWM: Final = 256
LIVE_SEND_HWM: Final = 2048
SUBSCRIPTION_MESSAGE_BYTES_MAX: Final = 512
REFUSED_KEYS_TOLD_MAX: Final = 1024
LOG_FOLDER: Final = "log"

Context = zmq.Context[zmq.Socket[bytes]]
log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `metisfl-broker`; returns its exit code."""
    options = _options(argv)
    return run.run_polling(NAME, lambda stop: _main(options, stop))


def serve(
    home: Path, ingress: str, live: str, stop: run.PollableStop, limits: Limits | None = None
) -> None:
    """Serve until `stop`. Raises MetisError if that cannot begin or go on."""
    refuse_secret_parts("the broker", [home, home / "keys", home / LOG_FOLDER])
    identity = load_identity(home / "keys")
    if identity.principal != "broker":
        raise UserError(
            f"{home / 'keys'} holds the key of {identity.principal!r}: a broker's home has a key "
            "made with `metisfl keys identity broker`"
        )
    peers = _Peers(home / "keys")
    incarnation = time.time_ns()
    with ExitStack() as stack:
        store = Store(home / LOG_FOLDER, limits)
        stack.callback(store.close)
        recovered = store.reader.recovered()
        context: Context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        authenticator = Authenticator(context, peers.known)
        authenticator.start()
        stack.callback(authenticator.stop)
        ingress_socket = _ingress_socket(context, identity)
        live_socket = _live_socket(context, identity, Head(incarnation, recovered.head))
        bound = []
        for socket, endpoint, flag in (
            (ingress_socket, ingress, "--ingress"),
            (live_socket, live, "--live"),
        ):
            stack.callback(socket.close, linger=0)
            bound.append(_bind(socket, endpoint, flag))
        for endpoint, socket_type in zip(bound, (zmq.DEALER, zmq.SUB), strict=True):
            self_test(context, endpoint, identity.public, SELF_TEST_S, socket_type)
        authenticator.take_refusals()
        writer = Writer(store, context)
        stack.callback(writer.close)
        dispatch = Dispatch(recovered, incarnation=incarnation, software=SOFTWARE)
        loop = Loop(
            ingress=ingress_socket,
            live=live_socket,
            stop_descriptor=stop.fileno(),
            dispatch=dispatch,
            store=store,
            writer=writer,
            incarnation=incarnation,
        )
        run.ready()
        log.info("serving", ingress=bound[0], live=bound[1], events=recovered.head)
        _turn_until(stop, loop, dispatch, writer, authenticator, peers)
        loop.finish()
        log.info("ended", events=dispatch.sequencer.durable_head)


def _turn_until(
    stop: run.PollableStop,
    loop: Loop,
    dispatch: Dispatch,
    writer: Writer,
    authenticator: Authenticator,
    peers: _Peers,
) -> None:
    watchdog_s = run.watchdog_interval_s()
    next_tick = next_watchdog = time.monotonic()
    refused = _RefusedKeys()
    while not stop.requested:
        now = time.monotonic()
        if now >= next_tick:
            next_tick = now + TICK_S
            loop.tick()
            if not (authenticator.is_alive() and writer.is_alive()):
                raise MachineError("a thread of the broker has died; see the log before this line")
            if peers.changed():
                authenticator.replace(peers.known)
                dispatch.keep_only(set(peers.known.values()))
                log.info("list of peers read again", peers=len(peers.known))
            refused.tell(authenticator)
        if watchdog_s is not None and now >= next_watchdog:
            next_watchdog = now + watchdog_s
            run.watchdog()
        wait_s = next_tick - now
        if watchdog_s is not None:
            wait_s = min(wait_s, next_watchdog - now)
        loop.turn(int(wait_s * 1000) + 1)


class _Peers:
    """The list of peers, read again when the file changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = self._version()
        self.known = load_peers(folder)

    def changed(self) -> bool:
        """Look; True if `known` is a new list. A list that cannot be read leaves the old one."""
        if (version := self._version()) == self._seen:
            return False
        self._seen = version
        try:
            self.known = load_peers(self._folder)
        except UserError as error:
            log.error("the list of peers stays as it was", reason=str(error))
            return False
        return True

    def _version(self) -> tuple[int, int, int]:
        try:
            status = (self._folder / PEERS_FILE).stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_mtime_ns, status.st_size)


class _RefusedKeys:
    """Each unknown key is logged once, however often it knocks."""

    def __init__(self) -> None:
        self._told: set[bytes] = set()

    def tell(self, authenticator: Authenticator) -> None:
        for refusal in authenticator.take_refusals():
            if refusal.public in self._told or len(self._told) >= REFUSED_KEYS_TOLD_MAX:
                continue
            self._told.add(refusal.public)
            log.warning(
                "connection refused",
                public=refusal.public.decode(),
                address=refusal.address,
                reason=refusal.reason,
            )


def _ingress_socket(context: Context, identity: Identity) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    secure_server(socket, identity)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    socket.rcvhwm, socket.sndhwm = INGRESS_RECEIVE_HWM, INGRESS_SEND_HWM
    return socket


def _live_socket(context: Context, identity: Identity, head: Head) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.XPUB)
    secure_server(socket, identity)
    socket.setsockopt(zmq.XPUB_MANUAL, 1)
    socket.setsockopt(zmq.XPUB_WELCOME_MSG, b"".join(pack_head(head)))
    socket.setsockopt(zmq.MAXMSGSIZE, SUBSCRIPTION_MESSAGE_BYTES_MAX)
    socket.sndhwm = LIVE_SEND_HWM
    return socket


def _bind(socket: zmq.Socket[bytes], endpoint: str, flag: str) -> str:
    """Bind and return the endpoint with its port."""
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EADDRINUSE, zmq.EADDRNOTAVAIL):
            raise MachineError(
                f"{endpoint} cannot be bound: {error.strerror}. Another process may have it "
                f"(`ss -ltnp` shows which); end that one or choose another endpoint with {flag}"
            ) from None
        raise UserError(
            f"{flag} {endpoint!r} cannot be bound: {error.strerror}; use tcp://ADDRESS:PORT"
        ) from None
    found = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(found, bytes), found
    return found.decode().rstrip("\0")


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
    serve(Path(options.home), options.ingress, options.live, stop, limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
