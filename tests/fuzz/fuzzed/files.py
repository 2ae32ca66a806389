"""Files that people and other machines write: settings, lists of keys, codes, keys, round records.

What is refused is a UserError where a person wrote it, a PeerError where another site did.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

import zmq
from example_key import PUBLIC, secret_of

from fuzzed.target import Target, file_named, refused
from metisfl.deploy import audit_line, invitations, registry
from metisfl.deploy import invitation_code as ic
from metisfl.deploy.keys import IDENTITY_FILE, create_identity, load_identity
from metisfl.deploy.sealing import recipient
from metisfl.deploy.settings import load_federation
from metisfl.learner import ceremony_kept
from metisfl.learner.ceremony_file import load_manifest
from metisfl.proto import ceremony, ckks_key
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.records import Counted, Missing, RoundRecord, pack_record, unpack_record
from metisfl.proto.topics import NAME

__all__ = ["TARGETS"]

KEY = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of the CurveZMQ specification
OTHER_KEY = b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
FEDERATION = b"""
[federation]
name = "hearts"
rounds = 3
quorum = 2
lease_s = 30
privacy = "ckks"
[encryption]
profile = "standard"
min_contributors = 2
max_share = 0.9
verify = "full"
[training]
epochs = 2
learning_rate = 1e-3
[app]
object = "package.module:App"
[broker]
ingress = "tcp://*:5555"
live = "tcp://[::1]:0"
[[learners]]
name = "ada"
data = "/data/ada.csv"
[[learners]]
name = "bob"
"""
BIG = 1 << 16
"""For files of text, whose parsers do the same for each line."""


def federation(data: bytes) -> bool:
    path = file_named("federation.toml", data)
    with refused(UserError):
        found = load_federation(path)
        names = [learner.name for learner in found.learners]
        assert all(map(NAME.fullmatch, [found.name, *names]))
        assert len(set(names)) == len(names)
        assert 1 <= found.quorum <= len(names) <= 1000
        assert all(learner.data.isprintable() for learner in found.learners)
        return True
    return False


def federations() -> Iterator[bytes]:
    yield FEDERATION
    yield (
        b'federation = {name = "f", rounds = 1, privacy = "plain"}\n'
        b'app.object = "a:b"\nlearners = [{name = "a"}]\n'
    )


def peers(data: bytes) -> bool:
    with refused(UserError):
        found = registry.parse_registry(file_named("peers", data))
        again = file_named("peers", registry.registry_text(found).encode())
        assert registry.parse_registry(again) == found
        return True
    return False


def peer_lists() -> Iterator[bytes]:
    yield b"# who may\nlearner:ada " + KEY + b"\n\ndriver:d " + OTHER_KEY + b" hearts,lungs\n"


def invited(data: bytes) -> bool:
    path = file_named("invitations", data)
    with refused(UserError):
        found = invitations.load(path.parent)
        lines = "".join(map(invitations._line, found.values()))
        assert invitations.load(file_named("invitations", lines.encode()).parent) == found
        return True
    return False


def invitation_lists() -> Iterator[bytes]:
    yield b"learner:ada " + KEY + b" f 1800000000 -\n"
    yield b"learner:bob " + KEY + b" f 1800000000 " + OTHER_KEY + b"\n"


def identity(data: bytes) -> bool:
    with refused(UserError):
        found = load_identity(file_named(IDENTITY_FILE, data).parent)
        assert zmq.curve_public(found.secret) == found.public
        return True
    return False


def identities() -> Iterator[bytes]:
    folder = file_named("place", b"").parent
    (folder / IDENTITY_FILE).unlink(missing_ok=True)
    create_identity(folder, "learner:ada")
    yield (folder / IDENTITY_FILE).read_bytes()


def code(data: bytes) -> bool:
    """An even first byte: the code as it is. Odd: what it says, whose length and sum are set."""
    text = data[1:].decode(errors="replace")
    if data[:1] and data[0] % 2:
        body = len(data[1:] + bytes(6)).to_bytes(2, "little") + data[1:]
        body += zlib.crc32(body).to_bytes(4, "little")
        text = f"metisfl1_{ic._base32(body)}"
    with refused(UserError):
        found = ic.parse_code(text)
        assert ic.parse_code(ic.format_code(found)) == found
        found.key_pair()
        return True
    return False


def codes() -> Iterator[bytes]:
    ends = "tcp://a.example:1", "tcp://a.example:2", "tcp://a.example:3"
    one = ic.Code("learner:ada", "f", *ends, KEY, OTHER_KEY, 1_800_000_000, bytes(range(16)))
    text = ic.format_code(one)
    yield b"\0" + text.encode()
    yield b"\1" + ic._body(text[9:], before=9)[2:-4]


def whom(data: bytes) -> bool:
    with refused(UserError):
        name, key = recipient(data.decode(errors="replace"))
        assert not name or NAME.fullmatch(name)
        assert len(key) == 40
        return True
    return False


def recipients() -> Iterable[bytes]:
    return [KEY, b"learner:ada " + KEY]


def _part(kind: type[ckks_key.PublicPart | ckks_key.SecretPart]) -> Callable[[bytes], bool]:
    def law(data: bytes) -> bool:
        with refused(PeerError):
            found = kind.parse(data)
            assert kind.parse(found.pack()) == found
            assert kind is ckks_key.SecretPart or found.pack() == data
            return True
        return False

    return law


def record(data: bytes) -> bool:
    with refused(MachineError):
        found = unpack_record(data)
        assert pack_record(unpack_record(pack_record(found))) == pack_record(found)  # NaN != NaN
        return True
    return False


def records() -> Iterator[bytes]:
    metrics = {"test.accuracy": 0.5, "test.examples": 20.0}
    yield pack_record(
        RoundRecord(
            "r",
            1,
            bytes(32),
            bytes(range(32)),
            10**18,
            10**18 + 1,
            10**18 + 2,
            ("ada", "bob", "cyd"),
            (Counted("ada", 0.5, bytes(32), 10, 0.25, metrics),),
            (Missing("bob", "late", "silent for 60 s"),),
            {"ada": metrics},
            (Missing("cyd", "left", "reboot"),),
            metrics,
        )
    )


def audit(data: bytes) -> bool:
    with refused(MachineError):
        assert audit_line.pack(audit_line.parse(data)) == data
        return True
    return False


def audit_lines() -> Iterator[bytes]:
    facts: dict[str, audit_line.Fact] = {"principal": "learner:ada", "line": 7}
    time = "2026-11-24T09:43:32.000001Z"
    yield audit_line.pack(audit_line.Line(1, time, "admitted", facts, audit_line.NO_DIGEST))


SITES = (("ada", KEY), ("bob", OTHER_KEY))
MANIFEST = ceremony.Manifest("f", "0123456789abcdef" * 2, SITES, 1e-6, 2, 0.95, "none")


def a_ceremony(data: bytes) -> bool:
    with refused(UserError):
        found = load_manifest(file_named("ceremony.toml", data))
        again = load_manifest(file_named("ceremony.toml", found.text().encode()))
        assert again == found
        assert again.digest == found.digest
        assert all(map(NAME.fullmatch, found.names))
        return True
    return False


def ceremonies() -> Iterator[bytes]:
    yield MANIFEST.text().encode()


def said(data: bytes) -> bool:
    """A first byte of 2 to 9 is the number of sites of an offer; any other: a confirmation."""
    sites, body = data[0] if data else 0, data[1:]
    with refused(PeerError):
        if 2 <= sites <= 9:
            assert ceremony.pack_offer(ceremony.parse_offer(body, sites)) == body
        elif (found := ceremony.parse_confirmation(body, MANIFEST.names)).site:
            assert ceremony.pack_complaint(found.kind, found.site) == body
        return True
    return False


def steps_said() -> Iterator[bytes]:
    boxes = (bytes(ceremony.BOX_BYTES),)
    offer = ceremony.Offer(bytes(ceremony.SHARE_BYTES), bytes(32), boxes)
    yield b"\2" + ceremony.pack_offer(offer)
    yield b"\0" + ceremony.pack_confirmation(MANIFEST, bytes(16), bytes(32))
    yield b"\0" + ceremony.pack_complaint(ceremony.BOX, "bob")


def kept(data: bytes) -> bool:
    with refused(ValueError):
        found = ceremony_kept.parse(data, MANIFEST, "ada")
        if isinstance(found, ceremony_kept.Kept):
            assert ceremony_kept.parse(ceremony_kept.pack(found), MANIFEST, "ada") == found
        return True
    return False


def kept_states() -> Iterator[bytes]:
    yield ceremony_kept.pack(ceremony_kept.begin_kept(MANIFEST, "ada"))


def _seeds(*parts: ckks_key.PublicPart | ckks_key.SecretPart) -> Callable[[], list[bytes]]:
    return lambda: [part.pack() for part in parts]


TARGETS = (
    Target("federation", federation, federations, BIG),
    Target("peers", peers, peer_lists, BIG),
    Target("invitations", invited, invitation_lists, BIG),
    Target("identity", identity, identities, 4096),
    Target("code", code, codes, ic.CHARACTERS_MAX + 64),
    Target("recipient", whom, recipients, 4096),
    Target("public-key", _part(ckks_key.PublicPart), _seeds(PUBLIC), BIG),
    Target("secret-key", _part(ckks_key.SecretPart), _seeds(secret_of(PUBLIC)), BIG),
    Target("audit-line", audit, audit_lines, audit_line.LINE_BYTES_MAX + 64),
    Target("record", record, records, BIG),
    Target("ceremony", a_ceremony, ceremonies, BIG),
    Target("ceremony-step", said, steps_said, BIG),
    Target("ceremony-state", kept, kept_states, BIG),
)
