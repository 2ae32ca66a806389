"""`--insecure`: asked for by name, shouted about, and never a way into a server that has keys."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from zmq.utils import z85

from metisfl.broker.client import Claim, ClientKeys, Credentials, Handshakes
from metisfl.deploy import curve, insecure, processes
from metisfl.deploy.broker_access import load_access
from metisfl.deploy.insecure import INSECURE, INSECURE_VARIABLE, Shout, add_insecure, shout_until
from metisfl.deploy.keys import Identity, check_principal
from metisfl.deploy.run import StopSignal
from metisfl.deploy.run_folder import DRIVER, create_run_folder
from metisfl.deploy.settings import Federation, load_federation
from metisfl.proto.errors import UserError

PATIENCE_MS = 5000  # never waited for in a test that passes
SERVER = Identity("broker", *zmq.curve_keypair())
ADA = Identity("learner:ada", *zmq.curve_keypair())
KEYS = ClientKeys(ADA.public, ADA.secret, SERVER.public)
STRANGER = ClientKeys(*zmq.curve_keypair(), SERVER.public)
CLAIM = Claim(ADA.principal)
EVENTS = curve.SELF_TEST_EVENTS
Context = zmq.Context[zmq.Socket[bytes]]


class Door:
    """A bound ROUTER with its authenticator, secure or insecure."""

    def __init__(self, *, secure: bool) -> None:
        self.context: Context = zmq.Context()
        self.authenticator = curve.Authenticator(
            self.context, {ADA.public: ADA.principal} if secure else {}, insecure=not secure
        )
        self.authenticator.start()
        self.socket = self.context.socket(zmq.ROUTER)
        curve.guard_server(self.socket, SERVER if secure else curve.Insecure())
        self.socket.rcvtimeo = PATIENCE_MS
        self.socket.bind("tcp://127.0.0.1:0")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        self.socket.close()
        self.authenticator.stop()
        self.context.destroy(linger=0)

    def knock(self, credentials: Credentials | None, password: bytes = b"") -> str:
        """Connect once, with a message; the principal that it came from, or why we were refused."""
        dealer = self.context.socket(zmq.DEALER)
        if credentials is not None:
            credentials.put_on(dealer)
        if password:
            dealer.plain_password = password
        curve.set_hygiene(dealer)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        monitor = dealer.get_monitor_socket(EVENTS)
        handshakes = Handshakes(dealer, credentials or CLAIM)
        try:
            dealer.connect(self.endpoint)
            assert monitor.poll(PATIENCE_MS), "the handshake neither succeeded nor failed"
            if why := handshakes.why_refused():
                return f"refused: {why}"
            dealer.send(b"hello")
            return str(self.socket.recv_multipart(copy=False)[1].get("User-Id"))
        finally:
            handshakes.close()
            dealer.close(linger=0)


@pytest.fixture
def secure() -> Iterator[Door]:
    door = Door(secure=True)
    yield door
    door.close()


@pytest.fixture
def open_door() -> Iterator[Door]:
    door = Door(secure=False)
    yield door
    door.close()


def test_a_secure_server_takes_known_keys_and_no_claim(secure: Door) -> None:
    assert secure.knock(KEYS) == ADA.principal
    assert "it does not know this key" in secure.knock(STRANGER)
    assert "it wants keys" in secure.knock(CLAIM)
    assert "start both in the same way" in secure.knock(None), "NULL"
    assert secure.knock(KEYS) == ADA.principal, "and is none the worse for it"


def test_an_insecure_server_takes_claims_and_no_keys(open_door: Door) -> None:
    assert open_door.knock(CLAIM) == ADA.principal
    assert open_door.knock(Claim("controller")) == "controller", "whoever says so"
    assert "it was started with --insecure and this process was not" in open_door.knock(KEYS)
    assert "start both in the same way" in open_door.knock(None), "NULL"


@pytest.mark.parametrize(
    "name",
    ["root", "learner:", "learner:Ada", "learner:ada/all", "learner:a\n", "driver", "x" * 255],
)
def test_a_claim_that_is_no_principal_is_refused_and_told(open_door: Door, name: str) -> None:
    assert "for a principal" in open_door.knock(Claim(name))
    (refusal,) = open_door.authenticator.take_refusals()
    assert refusal.public == b""
    assert "is no principal" in refusal.reason


def test_a_claim_has_no_password(open_door: Door) -> None:
    assert "for a principal" in open_door.knock(CLAIM, password=b"secret")


def judged(request: list[bytes], *, by_insecure: bool) -> bytes:
    with zmq.Context() as context:
        peers = {ADA.public: ADA.principal}
        judge = curve.Authenticator(context, peers, insecure=by_insecure)
        return judge._answer(request)[6]


HEAD = [b"id", b"", b"1.0", b"7", b"metisfl", b"127.0.0.1", b""]


def test_each_authenticator_answers_its_own_mechanism_only() -> None:
    """libzmq would not even ask; if it did, the answer is no."""
    by_key = [*HEAD, b"CURVE", z85.decode(ADA.public)]
    by_claim = [*HEAD, b"PLAIN", ADA.principal.encode(), b""]
    assert judged(by_key, by_insecure=False) == judged(by_claim, by_insecure=True) == b"learner:ada"
    assert judged(by_claim, by_insecure=False) == judged(by_key, by_insecure=True) == b""
    for mechanism in (b"PLAIN", b"NULL", b""):
        assert judged([*HEAD, mechanism, by_key[-1]], by_insecure=False) == b""
    for by_insecure in (False, True):
        assert judged([*HEAD, b"NULL"], by_insecure=by_insecure) == b""
        assert judged([*HEAD, b"NULL", *by_claim[-2:]], by_insecure=by_insecure) == b""


@given(st.lists(st.binary(max_size=300) | st.just(b"learner:ada"), max_size=4))
def test_only_a_principal_alone_is_believed(credentials: list[bytes]) -> None:
    found = judged([*HEAD, b"PLAIN", *credentials], by_insecure=True)
    if found:
        assert credentials == [found, b""]
        assert check_principal(found.decode())
    else:
        assert credentials != [b"learner:ada", b""]


# ---- By name only ----------------------------------------------------------------------------


def parsed(*arguments: str) -> bool:
    parser = argparse.ArgumentParser(prog="metisfl-x")
    add_insecure(parser)
    return bool(parser.parse_args(arguments).insecure)


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_it_is_a_flag_or_its_variable_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool
) -> None:
    monkeypatch.delenv(INSECURE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(INSECURE_VARIABLE, value)
    assert parsed() is wanted
    assert parsed("--insecure")


@pytest.mark.parametrize("value", ["true", "yes", " 1", "11"])
def test_a_variable_that_is_neither_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv(INSECURE_VARIABLE, value)
    with pytest.raises(SystemExit) as ended:
        parsed()
    assert ended.value.code == UserError.exit_code
    assert f"METISFL_INSECURE={value!r} cannot be; allowed are 1, 0" in capsys.readouterr().err


def test_the_variable_does_not_reach_a_daemon_behind_the_back_of_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(
        f"import os, sys; print(sys.argv[1:], repr(os.environ[{INSECURE_VARIABLE!r}]))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(INSECURE_VARIABLE, "1")

    async def told(options: dict[str, str | None]) -> str:
        log = tmp_path / f"log-{len(options)}"
        daemon = await processes.start("tells", "tells", options, log)
        await daemon.process.wait()
        return log.read_text().strip()

    assert asyncio.run(told({})) == "[] ''"
    assert asyncio.run(told({"insecure": None})) == "['--insecure'] ''"


def test_a_driver_has_keys_or_says_that_it_needs_none(
    tmp_path: Path, federation: Federation
) -> None:
    with pytest.raises(UserError, match="--home DIR is missing"):
        load_access(federation, None, insecure=False)
    with pytest.raises(UserError, match=r"identity.key does not exist"):
        load_access(federation, tmp_path, insecure=False)
    for home in (None, tmp_path, create_run_folder(tmp_path / "run", ["ada"]).driver):
        access = load_access(federation, home, insecure=True)
        assert access.keys == Claim(access.principal), "keys in the home are not looked at"
        assert access.principal.startswith("driver:")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    path = tmp_path / "federation.toml"
    path.write_text(
        "[federation]\nname = 'f'\nrounds = 1\nprivacy = 'plain'\n[app]\nobject = 'a:A'\n"
        "[broker]\ningress = 'tcp://127.0.0.1:5570'\nlive = 'tcp://127.0.0.1:5571'\n"
        "[[learners]]\nname = 'ada'\n"
    )
    return load_federation(path)


def test_an_insecure_run_folder_has_every_home_and_no_key(tmp_path: Path) -> None:
    made = create_run_folder(tmp_path / "run", ["ada", "bob"], insecure=True)
    for home in (made.broker, made.controller, made.driver, *made.learners.values()):
        assert list((home / "keys").iterdir()) == []
    assert made.driver_keys == Claim(DRIVER)


# ---- Shouted about -----------------------------------------------------------------------------


def test_a_polling_daemon_shouts_at_the_start_and_once_a_minute() -> None:
    shout = Shout()
    with capture_logs() as lines:
        for tenths in range(1815):  # three minutes and 1.5 s
            shout.tick(1000 + tenths / 10)
    assert lines == [{"event": INSECURE, "log_level": "critical"}] * 4


def test_a_waiting_daemon_shouts_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insecure, "AGAIN_S", 0.001)

    async def daemon(lines: list[Any]) -> None:
        stop = StopSignal()
        shouting = asyncio.ensure_future(shout_until(stop))
        while len(lines) < 3:
            await asyncio.sleep(0)
        stop.request()
        await asyncio.wait_for(shouting, PATIENCE_MS / 1000)

    with capture_logs() as lines:
        asyncio.run(daemon(lines))
    assert {line["log_level"] for line in lines} == {"critical"}
    assert {line["event"] for line in lines} == {INSECURE}
