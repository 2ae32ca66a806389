"""`metisfl invite`, `admit` without a key and `join`: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from metisfl.deploy import joining
from metisfl.deploy.admit_command import command as admit
from metisfl.deploy.curve import Authenticator, secure_server
from metisfl.deploy.expel_command import command as expel
from metisfl.deploy.invitation_code import Code, parse_code
from metisfl.deploy.invitations import change, load
from metisfl.deploy.invite_command import command as invite
from metisfl.deploy.join_command import command as join
from metisfl.deploy.keys import Identity, create_identity, load_identity
from metisfl.deploy.registry import Peer, load_registry
from metisfl.deploy.registry import admit as list_peer
from metisfl.proto.enrolment import fingerprint
from metisfl.proto.errors import MachineError, PeerError, UserError

ADA = "learner:ada"
SITE = zmq.curve_keypair()[0]

Said = pytest.CaptureFixture[str]


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Homes of a broker and a controller that know each other, below the current folder."""
    for name in ("broker", "controller"):
        create_identity(tmp_path / name / "keys", name)
    list_peer(tmp_path / "broker" / "keys", Peer("controller", public(tmp_path / "controller")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def public(home: Path) -> bytes:
    return load_identity(home / "keys").public


def code_of(said: Said, *more: str) -> str:
    """What `metisfl invite ada` prints on stdout."""
    said.readouterr()
    options = ["--home", "broker", "--host", "fed.example.org", "--federation", "f"]
    assert invite(["ada", *options, *more]) == 0
    return said.readouterr().out


def asked(homes: Path) -> str:
    """Let a site ask, as the broker would write it down; return its fingerprint."""
    folder = homes / "broker" / "keys"
    change(
        folder,
        lambda before: {who: replace(it, asked=SITE) for who, it in before.items()},
        now_unix_s=time.time(),
    )
    servers = {"broker": public(homes / "broker"), "controller": public(homes / "controller")}
    return fingerprint(ADA, site=SITE, **servers)


# ---- metisfl invite ------------------------------------------------------------------------


def test_a_code_holds_all_that_a_site_needs_and_the_broker_keeps_no_part_of_it(
    homes: Path, capsys: Said
) -> None:
    word = code_of(capsys, "--hours", "2", "--ingress", "tcp://[2001:db8::1]:7000")
    code = parse_code(word)
    assert (code.principal, code.federation) == (ADA, "f")
    ends = "tcp://[2001:db8::1]:7000", "tcp://fed.example.org:5571", "tcp://fed.example.org:5572"
    assert (code.ingress, code.live, code.bulk) == ends
    servers = public(homes / "broker"), public(homes / "controller")
    assert (code.broker, code.controller) == servers
    assert abs(code.expires_unix_s - time.time() - 7200) < 60
    (kept,) = load(homes / "broker" / "keys").values()
    key, secret = code.key_pair()
    assert (kept.principal, kept.public, kept.asked) == (ADA, key, None)
    text = (homes / "broker" / "keys" / "invitations").read_text()
    assert secret.decode() not in text
    assert code.token.hex() not in text


def test_stdout_has_the_code_alone_and_stderr_what_to_do_with_it(homes: Path, capsys: Said) -> None:
    assert invite(["driver:ops", "--home", "broker", "--host", "127.0.0.1", "--federation=f"]) == 0
    said = capsys.readouterr()
    assert parse_code(said.out).principal == "driver:ops"
    assert said.out.count("\n") == 1
    assert "metisfl join CODE --home ops" in said.err
    assert "metisfl admit driver:ops --home broker" in said.err
    assert "Only this machine itself can reach tcp://127.0.0.1:5570" in said.err


def test_settings_come_from_the_environment_as_for_the_daemons(
    homes: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METISFL_INGRESS", "tcp://*:7000")
    monkeypatch.setenv("METISFL_BULK", "tcp://models.example.org:7002")
    monkeypatch.setenv("METISFL_FEDERATION", "g")
    assert invite(["ada", "--home", "broker", "--host", "fed.example.org", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ingress"] == "tcp://fed.example.org:7000", "--host stands for `*`"
    assert told["bulk"] == "tcp://models.example.org:7002"
    assert told["federation"] == "g"
    assert parse_code(told["code"]).principal == told["principal"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], r"--ingress tcp://\*:5570 is where the server listens, .* add --host"),
        (["--ingress", "tcp://0.0.0.0:1"], r"not where sites find it: add --host"),
        (["--host", "h", "--live", "tcp://*:0"], "leaves the choice of port .* such as 5571"),
        (["--host", "h", "--bulk", "h:1"], "--bulk 'h:1': use tcp://ADDRESS:PORT"),
        (["--host", "h", "--bulk", "tcp://h:65536"], "use tcp://ADDRESS:PORT"),
    ],
)
def test_an_endpoint_that_no_site_can_reach_is_refused_with_the_remedy(
    homes: Path, options: list[str], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        invite(["ada", "--home", "broker", "--federation", "f", *options])
    assert load(homes / "broker" / "keys") == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [("--host", "*"), ("--host", "::1"), ("--host", "a b"), ("--hours", "0"), ("--hours", "721")],
)
def test_a_value_that_cannot_be_is_a_usage_error(homes: Path, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        invite(["ada", "--home", "broker", "--federation", "f", option, value])
    assert ended.value.code == 2


OPTIONS = ["--host", "h", "--federation", "f"]


def test_only_a_broker_that_knows_its_controller_can_invite(homes: Path) -> None:
    with pytest.raises(UserError, match=r"holds the key of controller: --home is the broker's"):
        invite(["ada", "--home", "controller", *OPTIONS])
    expel(["controller", "--home", "broker"])
    with pytest.raises(UserError, match="first `metisfl admit controller KEY --home broker`"):
        invite(["ada", "--home", "broker", *OPTIONS])


def test_who_is_admitted_is_not_invited(homes: Path) -> None:
    list_peer(homes / "broker" / "keys", Peer(ADA, SITE))
    with pytest.raises(UserError, match="`metisfl expel learner:ada` first"):
        invite(["ada", "--home", "broker", *OPTIONS])
    with pytest.raises(UserError, match="a controller is not invited"):
        invite(["controller", "--home", "broker", *OPTIONS])
    with pytest.raises(UserError, match="principal 'nurse:ada'"):
        invite(["nurse:ada", "--home", "broker", *OPTIONS])


def test_a_second_code_replaces_the_first(homes: Path, capsys: Said) -> None:
    code_of(capsys)
    assert invite(["ada", "--home", "broker", *OPTIONS]) == 0
    said = capsys.readouterr()
    assert "Its earlier code does not work any more." in said.err
    (kept,) = load(homes / "broker" / "keys").values()
    assert kept.public == parse_code(said.out).key_pair()[0]


# ---- metisfl admit NAME --------------------------------------------------------------------


def test_the_operator_admits_who_reads_the_same_fingerprint(
    homes: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_of(capsys)
    shown = asked(homes)
    monkeypatch.setattr("builtins.input", lambda question: "y" if "[y/N]" in question else "")
    assert admit(["ada", "--home", "broker", "--home", "controller"]) == 0
    assert f"    {shown}\n" in capsys.readouterr().out
    for home in ("broker", "controller"):
        assert load_registry(homes / home / "keys").peers[ADA] == Peer(ADA, SITE, frozenset("f"))
    assert load(homes / "broker" / "keys") == {}, "a code works once"


@pytest.mark.parametrize("answer", ["", "n", "no", "yyy", None])
def test_without_a_yes_nobody_is_admitted(
    homes: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    def answered(_: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    code_of(capsys)
    asked(homes)
    monkeypatch.setattr("builtins.input", answered)
    with pytest.raises(UserError, match=r"not admitted: .* `metisfl invite` it again"):
        admit(["ada", "--home", "broker"])
    assert ADA not in load_registry(homes / "broker" / "keys").peers
    assert ADA in load(homes / "broker" / "keys")


def test_a_script_says_the_fingerprint_and_a_wrong_one_admits_nobody(
    homes: Path, capsys: Said
) -> None:
    code_of(capsys)
    shown = asked(homes)
    wrong = shown[:-1] + ("A" if shown[-1] != "A" else "B")
    for told in (wrong, shown[:14], ""):
        with pytest.raises(UserError, match="is not admitted"):
            admit(["ada", "--home", "broker", "--fingerprint", told])
    assert admit(["ada", "--home", "broker", "--fingerprint", shown.lower()]) == 0
    said = capsys.readouterr().out
    assert f"admit --federation f --home CONTROLLER_HOME -- {ADA} " in said, "it is elsewhere"


def test_who_has_not_asked_or_is_too_late_is_not_admitted(homes: Path, capsys: Said) -> None:
    with pytest.raises(UserError, match="nobody was invited"):
        admit(["ada", "--home", "broker"])
    code_of(capsys)
    with pytest.raises(UserError, match="has not asked yet: the site runs `metisfl join`"):
        admit(["ada", "--home", "broker"])
    with pytest.raises(UserError, match="no invitation for learner:bob"):
        admit(["bob", "--home", "broker"])
    shown = asked(homes)
    change(
        homes / "broker" / "keys",
        lambda before: {who: replace(it, expires_unix_s=1) for who, it in before.items()},
        now_unix_s=0,
    )
    with pytest.raises(UserError, match="has expired; `metisfl invite` it again"):
        admit(["ada", "--home", "broker", "--fingerprint", shown])


def test_without_a_name_those_who_were_invited_are_listed(homes: Path, capsys: Said) -> None:
    code_of(capsys)
    assert admit(["--home", "broker"]) == 0
    assert "learner:ada to f, until " in (said := capsys.readouterr().out)
    assert "has not asked yet" in said
    shown = asked(homes)
    assert admit(["--home", "broker"]) == 0
    assert capsys.readouterr().out.endswith(f": {shown}\n")


# ---- metisfl join, when it cannot be ---------------------------------------------------------


@pytest.fixture
def code(homes: Path, capsys: Said) -> str:
    """A code for a broker that nobody has started."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as holder:
        port = holder.bind_to_random_port("tcp://127.0.0.1")
    return code_of(capsys, "--ingress", f"tcp://127.0.0.1:{port}")


def test_a_damaged_code_makes_no_files(
    homes: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="the code is cut off"):
        join([code[:-5], "--home", "ada"])
    monkeypatch.setattr("sys.stdin", io.StringIO(code[:-5]))
    with pytest.raises(UserError, match="the code is cut off"):
        join(["-", "--home", "ada"])
    assert not (homes / "ada").exists()


def test_a_home_of_somebody_else_is_refused(homes: Path, code: str) -> None:
    create_identity(homes / "ada" / "keys", "learner:bob")
    with pytest.raises(UserError, match=r"holds the key of learner:bob, .* for learner:ada"):
        join([code, "--home", "ada"])
    assert not (homes / "ada" / "keys" / "servers").exists()


def test_where_nobody_answers_it_says_what_is_tried_and_goes_on(
    homes: Path, code: str, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "UNREACHABLE_S", 0.0)
    monkeypatch.setattr(joining, "ASK_AGAIN_S", 0.1)
    with pytest.raises(MachineError, match=r"no broker answered within 1 s at tcp://127.0.0.1:\d+"):
        join([code, "--home", "ada", "--wait-s", "1"])
    said = capsys.readouterr().out
    assert said.count("Nobody answers at tcp://127.0.0.1:") == 1
    assert "may this machine connect to that port?" in said


def test_its_own_lines_of_the_settings_are_replaced_and_others_stay(homes: Path, code: str) -> None:
    (homes / "ada").mkdir()
    mine = "# mine\nMETISFL_APP=a:B\nMETISFL_BULK=tcp://old:1\n"
    (homes / "ada" / "site.env").write_text(mine)
    with pytest.raises(MachineError):
        join([code[:40], code[40:], "--home", "ada", "--wait-s", "1"])
    lines = (homes / "ada" / "site.env").read_text().splitlines()
    assert lines[:2] == ["# mine", "METISFL_APP=a:B"]
    wanted = {"METISFL_BULK=tcp://fed.example.org:5572", "METISFL_FEDERATION=f", "METISFL_NAME=ada"}
    assert wanted <= set(lines)
    assert len(lines) == 7


@pytest.fixture
def stranger(code: str) -> Iterator[None]:
    """Somebody else, with a key of its own, listens where the broker should."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = Authenticator(context, {})
    authenticator.start()
    with context.socket(zmq.ROUTER) as socket:
        secure_server(socket, Identity("broker", *zmq.curve_keypair()))
        socket.bind(parse_code(code).ingress)
        yield
    authenticator.stop()
    context.destroy(linger=0)


@pytest.mark.usefixtures("stranger")
def test_a_server_with_another_key_is_not_asked_anything(
    homes: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "STRANGER_S", 0.2)
    with pytest.raises(PeerError, match="does not hold the key of the broker that the code was"):
        join([code, "--home", "ada"])


@pytest.fixture
def refusing(homes: Path, code: str) -> Iterator[Code]:
    """The broker's own key, and nobody known."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = Authenticator(context, {})
    authenticator.start()
    with context.socket(zmq.ROUTER) as socket:
        secure_server(socket, load_identity(homes / "broker" / "keys"))
        socket.bind(parse_code(code).ingress)
        yield parse_code(code)
    authenticator.stop()
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("later_s", "why"),
    [(0, r"it was used or withdrawn; or it has expired, .* clock says"), (10**6, "it expired at")],
)
def test_a_code_that_opens_nothing_is_explained_with_both_clocks(
    homes: Path,
    code: str,
    refusing: Code,
    monkeypatch: pytest.MonkeyPatch,
    later_s: int,
    why: str,
) -> None:
    now = time.time
    monkeypatch.setattr(joining.time, "time", lambda: now() + later_s)
    with pytest.raises(UserError, match=f"does not know this code any more: {why}"):
        join([code, "--home", "ada", "--wait-s", "20"])
