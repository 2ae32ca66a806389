"""`metisfl keys`: a secret reaches its site and no other, and what is shown is public."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import zmq
from example_key import FOUND, PUBLIC, public_part, secret_of
from zmq.utils import z85

from metisfl.deploy.ckks_keys import load_secret, write_new_key
from metisfl.deploy.keys import create_identity
from metisfl.deploy.keys_command import KEYS_GROUP, command
from metisfl.deploy.registry import load_registry
from metisfl.proto import ckks
from metisfl.proto.ckks_key import (
    FILE_BYTES_MAX,
    SEALED_MAGIC,
    PublicPart,
    SecretPart,
    is_secret,
)
from metisfl.proto.errors import MachineError, UserError

SECRET = secret_of(PUBLIC, b"top secret")


@dataclass(frozen=True)
class Sites:
    """`maker` has the whole key; `north` and `south` an identity and the public part."""

    maker: Path
    north: Path
    south: Path
    sealed: Path

    def seal(self, to: Path) -> Path:
        """Seal for the site `to`, as people do: with what `keys show` prints there."""
        command(["seal", str(self.maker), "--to", public_line(to), "--out", str(self.sealed)])
        return self.sealed


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    found = Sites(*(tmp_path / name for name in ("maker", "north", "south", "box")))
    write_new_key(found.maker, PUBLIC, SECRET)
    for folder in (found.north, found.south):
        create_identity(folder, f"learner:{folder.name}")
        (folder / "public.ckks").write_bytes(PUBLIC.pack())
    return found


def public_line(folder: Path) -> str:
    lines = (folder / "identity.key").read_text().splitlines()
    fields = dict(line.split() for line in lines if not line.startswith("#"))
    return f"{fields['principal']} {fields['public']}"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert command(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_every_command_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    said = capsys.readouterr().out
    names = {entry.name for entry in entry_points(group=KEYS_GROUP)}
    assert names == {"ceremony", "identity", "new", "open", "seal", "show"}
    for name in names:
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 4
        assert "not installed" not in line


def test_the_list_is_quick_and_loads_no_cryptography() -> None:
    program = (
        "import sys; from metisfl.deploy.keys_command import command; command(['--help']); "
        "print(*{name.partition('.')[0] for name in sys.modules} & {'openfhe', 'nacl', 'numpy'}, "
        "*[name for name in sys.modules if name.startswith('metisfl.learner.')], file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "\n")
    assert "  new       Make the key of an encrypted federation" in ended.stdout


# ---- Sealing -----------------------------------------------------------------


def test_a_sealed_secret_opens_at_the_site_that_it_is_for(
    sites: Sites, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = sites.seal(sites.north)
    assert sealed.stat().st_mode & 0o777 == 0o600
    assert command(["open", str(sealed), "--folder", str(sites.north)]) == 0
    assert load_secret(sites.north) == SECRET
    assert (sites.north / "secret.ckks").stat().st_mode & 0o777 == 0o600
    said = capsys.readouterr()
    assert "top secret" not in said.out + said.err
    assert PUBLIC.fingerprint.hex() in said.out


def test_what_was_sealed_shows_nothing_of_the_secret_and_is_known_as_one(sites: Sites) -> None:
    content = sites.seal(sites.north).read_bytes()
    assert b"top secret" not in content
    assert content.startswith(SEALED_MAGIC)
    assert is_secret(content)


def test_a_bare_key_will_do_and_so_does_all_that_show_prints(
    sites: Sites, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, to in enumerate(
        (public_line(sites.north).split()[1], shown(capsys, str(sites.north)))
    ):
        out = sites.sealed.with_name(f"box-{number}")
        assert command(["seal", str(sites.maker), "--to", to, "--out", str(out)]) == 0
        (sites.north / "secret.ckks").unlink(missing_ok=True)
        assert command(["open", str(out), "--folder", str(sites.north)]) == 0


def test_a_sealed_file_is_called_by_its_site_and_never_overwritten(sites: Sites) -> None:
    line = public_line(sites.north)
    for to, name in ((line, "north.sealed"), (line.split()[1], "secret.sealed")):
        assert command(["seal", str(sites.maker), "--to", to]) == 0
        before = (sites.maker / name).read_bytes()
        with pytest.raises(UserError, match=f"{name} exists; give another --out"):
            command(["seal", str(sites.maker), "--to", to])
        assert (sites.maker / name).read_bytes() == before


def test_a_key_that_looks_like_an_option_is_a_key_all_the_same(sites: Sites) -> None:
    """One in 85 begins with a dash."""
    publics = (zmq.curve_keypair()[0].decode() for _ in range(10_000))
    key = next(public for public in publics if public.startswith("-"))
    assert command(["seal", str(sites.maker), "--to", key]) == 0
    assert (sites.maker / "secret.sealed").exists()


@pytest.mark.parametrize(
    ("to", "story"),
    [
        ("", "is no public key"),
        ("learner:north", "is no public key: give the line that `metisfl keys show` prints"),
        ("learner:north " + "#" * 40, "is no public key"),
        ("learner:north KEY KEY", "is no public key"),
        ("controller KEY", "controller must never hold the secret part of a key"),
        ("broker KEY", "broker must never hold the secret part"),
        ("driver:me KEY", "driver:me must never hold the secret part"),
        ("learner:../../north KEY", "learner name '../../north'"),
        ("nobody KEY", "principal 'nobody'"),
        (f"learner:north {z85.encode(bytes(32)).decode()}", "is no key that can be sealed to"),
    ],
)
def test_nothing_is_sealed_to_what_is_no_site(sites: Sites, to: str, story: str) -> None:
    key = public_line(sites.north).split()[1]
    with pytest.raises(UserError) as raised:
        command(["seal", str(sites.maker), "--to", to.replace("KEY", key)])
    assert story in str(raised.value)
    assert {path.name for path in sites.maker.iterdir()} == {"public.ckks", "secret.ckks"}


def test_a_site_without_the_secret_can_seal_nothing(sites: Sites) -> None:
    with pytest.raises(UserError, match=r"secret\.ckks does not exist"):
        command(["seal", str(sites.north), "--to", public_line(sites.south)])


def test_another_site_cannot_open_it(sites: Sites) -> None:
    sealed = sites.seal(sites.north)
    with pytest.raises(UserError) as raised:
        command(["open", str(sealed), "--folder", str(sites.south)])
    assert str(raised.value).startswith(f"{sealed}: it is damaged, or was sealed to another key")
    assert public_line(sites.south) in str(raised.value), "to what it must be sealed"
    assert not (sites.south / "secret.ckks").exists()


@pytest.mark.parametrize("place", [8, 40, 60, -1])
def test_a_damaged_box_does_not_open(sites: Sites, place: int) -> None:
    sealed = sites.seal(sites.north)
    content = bytearray(sealed.read_bytes())
    content[place] ^= 1
    sealed.write_bytes(content)
    with pytest.raises(UserError, match="it is damaged, or was sealed to another key"):
        command(["open", str(sealed), "--folder", str(sites.north)])
    assert not (sites.north / "secret.ckks").exists()


@pytest.mark.parametrize("length", [0, 7, 8, 9, 55, 100])
def test_a_cut_box_does_not_open(sites: Sites, length: int) -> None:
    sealed = sites.seal(sites.north)
    sealed.write_bytes(sealed.read_bytes()[:length])
    with pytest.raises(UserError, match=r"it is damaged|this is no sealed key"):
        command(["open", str(sealed), "--folder", str(sites.north)])


@pytest.mark.parametrize(
    "content", [SECRET.pack(), PUBLIC.pack(), SEALED_MAGIC + bytes(FILE_BYTES_MAX)]
)
def test_what_is_no_sealed_key_is_refused(sites: Sites, content: bytes) -> None:
    sites.sealed.write_bytes(content)
    with pytest.raises(UserError, match="this is no sealed key: `metisfl keys seal` makes them"):
        command(["open", str(sites.sealed), "--folder", str(sites.north)])


def test_a_secret_of_another_key_is_not_taken(sites: Sites) -> None:
    """A box does not say who made it: the fingerprint decides."""
    another = public_part(context=b"another")
    (sites.north / "public.ckks").write_bytes(another.pack())
    with pytest.raises(UserError) as raised:
        command(["open", str(sites.seal(sites.north)), "--folder", str(sites.north)])
    assert PUBLIC.fingerprint.hex() in str(raised.value)
    assert another.fingerprint.hex() in str(raised.value)
    assert not (sites.north / "secret.ckks").exists()


def test_opening_needs_the_public_part_and_an_identity_and_no_secret_yet(sites: Sites) -> None:
    sealed = sites.seal(sites.north)
    arguments = ["open", str(sealed), "--folder", str(sites.north)]
    command(arguments)
    with pytest.raises(UserError, match=r"secret\.ckks exists, and a key is never overwritten"):
        command(arguments)
    (sites.north / "public.ckks").unlink()
    with pytest.raises(UserError, match=r"public\.ckks does not exist; copy it there first"):
        command(arguments)
    with pytest.raises(UserError, match=r"identity\.key does not exist"):
        command(["open", str(sealed), "--folder", str(sites.maker)])
    sealed.unlink()
    with pytest.raises(UserError, match="box: cannot be read: No such file"):
        command(["open", str(sealed), "--folder", str(sites.south)])


def test_without_pynacl_the_remedy_is_told(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nacl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nacl", None)
    with pytest.raises(MachineError, match=r"sealing needs PyNaCl.*pip install metisfl\[fhe\]"):
        sites.seal(sites.north)


# ---- Showing -----------------------------------------------------------------


def test_of_an_identity_alone_the_public_line_alone_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = create_identity(tmp_path, "broker").public_line
    assert shown(capsys, "--folder", str(tmp_path)) == shown(capsys, str(tmp_path)) == f"{line}\n"
    assert json.loads(shown(capsys, str(tmp_path), "--json")) == {"public_line": line}


def test_all_that_is_shown_may_go_into_a_list_of_peers(
    sites: Sites, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [shown(capsys, str(folder)) for folder in (sites.north, sites.south, sites.maker)]
    assert said[0].splitlines()[0] == public_line(sites.north)
    (tmp_path / "peers").write_text("".join(said))
    assert set(load_registry(tmp_path).peers) == {"learner:north", "learner:south"}


def test_of_a_key_everything_is_shown_that_its_sites_agree_to(
    sites: Sites, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(capsys, str(sites.maker))
    for part in (
        "standard, 44 bits",
        PUBLIC.fingerprint.hex(),
        "-1 to 1 times a tensor's scale 2^e",
        "their sum is at most 10",
        f"at most {FOUND.error:.1e} of a tensor's scale, where the weights sum to the number of",
        "promised are 1e-06",
        "5.504 a parameter up, 5.512 down with 10 learners",
        "repeatable     yes: the grid is wider than twice the noise",
        "at least 2 updates, of which none has more than 95%",
        "verify         none",
        "secret part    is in this folder",
    ):
        assert part in said
    assert "secret part    is not here" in shown(capsys, str(sites.north))
    assert "openfhe" not in said + shown(capsys, str(sites.maker), "--json")


def test_as_json_it_is_one_object(sites: Sites, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, str(sites.north), "--json")) == {
        "public_line": public_line(sites.north),
        "profile": "standard",
        "limb_bits": 44,
        "fingerprint": PUBLIC.fingerprint.hex(),
        "largest_sum_of_weights": 10,
        "expected_error": FOUND.error,
        "promised_error": 1e-6,
        "up_bytes_per_param": 5.504,
        "down_bytes_per_param": 5.512,
        "repeatable": True,
        "min_contributors": 2,
        "max_share": 0.95,
        "verify": "none",
        "secret_part_here": False,
    }
    assert json.loads(shown(capsys, str(sites.maker), "--json"))["public_line"] is None


def test_with_many_learners_both_halves_travel_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = public_part(max_learners=17, scaling_bits=30, grid_bits=20)
    write_new_key(tmp_path, part, secret_of(part))
    found = json.loads(shown(capsys, str(tmp_path), "--json"))
    assert found["down_bytes_per_param"] == pytest.approx(11.0, abs=0.01)


def joint_key_in(folder: Path) -> PublicPart:
    """A joint key of three sites, with this site's share, which needs none of its cryptography."""
    found = ckks.parameters_for(52, 3, joint=True)
    part = public_part(
        profile="wide",
        limb_bits=52,
        modulus=(1 << 52) - 4095,
        scaling_bits=found.scaling_bits,
        grid_bits=found.grid_bits,
        max_learners=3,
        error=1e-6,
        site_names="ada bob cyd",
    )
    write_new_key(folder, part, SecretPart(part.fingerprint, b"top secret", b"k" * 32))
    return part


def test_of_a_joint_key_its_sites_its_cost_and_its_limits_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = joint_key_in(tmp_path)
    said = shown(capsys, str(tmp_path))
    for words in (
        "joint key      of ada, bob, cyd; a round is opened by all of them together (3 of 3)",
        "and by no fewer",
        "sites are taken to follow the protocol",
        "OpenFHE's flooding, of a fixed width (2^20 a site): a rule of thumb, and no proof",
        "13.003 a parameter up and as many down (two polynomials); to open a round 6.505 more",
        "wide, 52 bits for each parameter and polynomial",
        f"at most {part.parameters.error:.1e} of a tensor's scale",
        "repeatable     yes",
        "secret part    is in this folder: this site's share of the key, which never leaves it",
    ):
        assert words in said, said
    assert "kkkk" not in said
    found = json.loads(shown(capsys, str(tmp_path), "--json"))
    assert found["sites"] == ["ada", "bob", "cyd"]
    assert found["expected_error"] == part.parameters.error <= 1e-6
    assert found["up_bytes_per_param"] == found["down_bytes_per_param"]
    assert found["partial_bytes_per_param"] < 6.6
    assert found["repeatable"] is True
    (tmp_path / "secret.ckks").unlink()
    assert "secret part    is not in this folder" in shown(capsys, str(tmp_path))


def test_a_share_of_a_joint_key_is_sealed_to_nobody(sites: Sites, tmp_path: Path) -> None:
    joint_key_in(tmp_path / "joint")
    with pytest.raises(UserError, match=r"share of a joint key.*metisfl keys ceremony"):
        command(["seal", str(tmp_path / "joint"), "--to", public_line(sites.north)])
    assert {path.name for path in (tmp_path / "joint").iterdir()} == {"public.ckks", "secret.ckks"}


def test_a_folder_without_keys_and_none_at_all_are_the_users_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"identity\.key does not exist"):
        command(["show", str(tmp_path)])
    for arguments in ([], [str(tmp_path), "--folder", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            command(["show", *arguments])
        assert ended.value.code == 2
        assert "which folder? Give DIR, once" in capsys.readouterr().err
