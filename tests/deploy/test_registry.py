"""registry.py and key_lists.py: lists say what is wrong with them, writing never loses a key."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy.key_lists import add_server, load_servers
from metisfl.deploy.keys import FILE_BYTES_MAX
from metisfl.deploy.registry import Change, Peer, Registry, Watch, admit, expel, load_registry
from metisfl.proto.errors import UserError

KEY_A = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
KEY_B = b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
KEY_WITH_HASH = KEY_A[:35] + b"0####"

public_keys = st.binary(min_size=32, max_size=32).map(z85.encode)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "all")
principals = st.sampled_from(["broker", "controller"]) | st.builds(
    "{}:{}".format, st.sampled_from(["learner", "driver"]), names
)
federations = st.frozensets(names, max_size=3)
registries = st.dictionaries(principals, st.tuples(public_keys, federations), max_size=5).map(
    lambda made: Registry({name: Peer(name, *rest) for name, rest in made.items()})
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property; each example writes its file anew."""
    return tmp_path_factory.mktemp("keys")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_missing_lists_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"peers does not exist; `metisfl admit` makes it"):
        load_registry(tmp_path)
    with pytest.raises(UserError, match=r"servers does not exist; create it"):
        load_servers(tmp_path)


def test_lists_have_comments_blank_lines_and_keys_with_hashes(tmp_path: Path) -> None:
    (tmp_path / "peers").write_bytes(
        b"# the sites\r\n\n  learner:a\t"
        + KEY_WITH_HASH
        + b" \r\n # b is late\ncontroller "
        + KEY_B
    )
    assert load_registry(tmp_path).keys == {KEY_WITH_HASH: "learner:a", KEY_B: "controller"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learner:a", r"peers:1: 1 words; allowed is `principal publickey`"),
        (f"# x\nlearner:a {KEY_A.decode()} # site a", r"peers:2: 5 words"),
        (f"learner:A {KEY_A.decode()}", r"peers:1: learner name 'A': use 1 to 63 of a-z"),
        (f"learner {KEY_A.decode()}", r"peers:1: principal 'learner': use broker, controller, lea"),
        (f"broker:x {KEY_A.decode()}", r"peers:1: principal 'broker:x': use broker"),
        (f"learner:a {KEY_A.decode()[1:]}", r"peers:1: .* is not a public key: 40 characters"),
        (f"learner:a {'#' * 40}", r"peers:1: .* is not a public key"),
        (f"learner:a é{KEY_A.decode()[1:]}", r"peers:1: .* is not a public key"),
        (
            f"learner:a {KEY_A.decode()}\n\nlearner:a {KEY_B.decode()}",
            r"peers:3: the principal of line 1 again",
        ),
        (
            f"learner:a {KEY_A.decode()}\nlearner:b {KEY_A.decode()}",
            r"peers:2: the key of line 1 again",
        ),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "peers").write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_registry(tmp_path)


def test_only_servers_are_listed_as_servers(tmp_path: Path) -> None:
    (tmp_path / "servers").write_text(f"learner:a {KEY_A.decode()}")
    with pytest.raises(UserError, match="not a server; use broker or controller"):
        load_servers(tmp_path)
    with pytest.raises(UserError, match="use broker or controller"):
        add_server(tmp_path, "driver:d", KEY_B)


def test_a_list_that_anybody_may_write_is_refused(tmp_path: Path) -> None:
    admit(tmp_path, Peer("learner:a", KEY_A))
    (tmp_path / "peers").chmod(0o666)
    with pytest.raises(UserError, match=r"changed by others; `chmod 644 .*peers`"):
        load_registry(tmp_path)


def test_a_list_has_a_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "peers").open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    with pytest.raises(UserError, match="4194305 bytes"):
        load_registry(tmp_path)


def test_adding_keeps_what_people_wrote_and_is_harmless_when_repeated(tmp_path: Path) -> None:
    (tmp_path / "peers").write_text(f"# our sites\nlearner:a {KEY_A.decode()}")
    (tmp_path / "peers").chmod(0o640)
    admit(tmp_path, Peer("learner:b", KEY_B))
    admit(tmp_path, Peer("learner:b", KEY_B))
    expected = f"# our sites\nlearner:a {KEY_A.decode()}\nlearner:b {KEY_B.decode()}\n"
    assert (tmp_path / "peers").read_text() == expected
    assert mode_of(tmp_path / "peers") == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["peers"], "a temporary file was left"


def test_adding_never_replaces_a_key_silently(tmp_path: Path) -> None:
    add_server(tmp_path, "broker", KEY_A)
    for principal, key in (("broker", KEY_B), ("controller", KEY_A)):
        with pytest.raises(UserError, match="remove that line first"):
            add_server(tmp_path, principal, key)
    assert load_servers(tmp_path) == {"broker": KEY_A}


@settings(deadline=None)  # a busy disk is no mistake
@given(st.dictionaries(principals, public_keys, max_size=5))
def test_what_was_added_is_what_loads(scratch: Path, listed: dict[str, bytes]) -> None:
    (scratch / "peers").unlink(missing_ok=True)
    distinct = {principal: key for key, principal in {k: p for p, k in listed.items()}.items()}
    for principal, key in distinct.items():
        admit(scratch, Peer(principal, key))
    if distinct:
        assert load_registry(scratch).keys == {key: who for who, key in distinct.items()}


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [b"learner:a", b"broker", b" ", b"\n", b"#", KEY_A, KEY_B, b"\xff", b"\x00"]
        )
    ).map(b"".join)
)
def test_any_bytes_are_a_list_or_a_user_error(scratch: Path, content: bytes) -> None:
    (scratch / "peers").write_bytes(content)
    try:
        peers = load_registry(scratch).keys
    except UserError:
        return
    assert all(len(z85.decode(key)) == 32 for key in peers)


def test_a_peer_may_be_bound_to_federations(tmp_path: Path) -> None:
    (tmp_path / "peers").write_text(
        f"learner:a {KEY_A.decode()} lungs,hearts\nlearner:b {KEY_B.decode()}\n"
    )
    registry = load_registry(tmp_path)
    assert registry.peers["learner:a"].federations == {"hearts", "lungs"}
    assert set(registry.of("hearts").peers) == {"learner:a", "learner:b"}
    assert set(registry.of("bones").peers) == {"learner:b"}


def test_who_may_be_in_more_federations_than_before_has_not_changed_in_the_old_one() -> None:
    before = Registry({"learner:a": Peer("learner:a", KEY_A, frozenset({"lungs"}))})
    after = Registry({"learner:a": Peer("learner:a", KEY_A)})
    assert after.of("lungs").since(before.of("lungs")) == Change()
    assert after.of("bones").since(before.of("bones")).admitted != ()


def test_who_is_expelled_is_gone_and_everything_else_stays_as_people_wrote_it(
    tmp_path: Path,
) -> None:
    text = f"# ours\nlearner:a {KEY_A.decode()}\n\n# theirs\nlearner:b {KEY_B.decode()}\n"
    (tmp_path / "peers").write_text(text)
    assert expel(tmp_path, "learner:a") == Peer("learner:a", KEY_A)
    assert (tmp_path / "peers").read_text() == text.replace(f"learner:a {KEY_A.decode()}\n", "")
    with pytest.raises(UserError, match="does not list learner:a"):
        expel(tmp_path, "learner:a")


@given(registries, registries)
def test_a_change_leads_from_one_list_to_the_other(before: Registry, after: Registry) -> None:
    change = after.since(before)
    peers: Mapping[str, Peer] = {
        **{n: p for n, p in before.peers.items() if p not in change.expelled},
        **{p.principal: p for p in change.admitted},
    }
    assert peers == after.peers
    assert not set(change.admitted) & set(change.expelled)


def test_a_changed_list_is_seen_and_one_that_cannot_be_read_changes_nothing(
    tmp_path: Path,
) -> None:
    admit(tmp_path, Peer("learner:a", KEY_A))
    watch = Watch(tmp_path)
    assert not watch.changed()
    admit(tmp_path, Peer("learner:b", KEY_B))
    assert watch.changed()
    assert set(watch.registry.peers) == {"learner:a", "learner:b"}
    (tmp_path / "peers").write_text("learner:a\n")
    assert not watch.changed()
    (tmp_path / "peers").unlink()
    assert not watch.changed()
    assert set(watch.registry.peers) == {"learner:a", "learner:b"}
