"""settings.py: a federation file is what it says, or is refused by key with what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metisfl.deploy.settings import (
    FILE_BYTES_MAX,
    App,
    Encryption,
    Federation,
    Learner,
    Training,
    load_federation,
)
from metisfl.proto.errors import UserError
from metisfl.proto.topics import NAME

FULL = """\
[federation]
name = "hearts"
rounds = 20
quorum = 2
without_quorum = "fail"
lease_s = 30
seed = 1
privacy = "ckks"
max_examples = 5000

[encryption]
profile = "fine"
error = 1e-7
min_contributors = 2
max_share = 0.5
verify = "full"

[training]
epochs = 2
batch_size = 64
learning_rate = 0.01

[app]
object = "hearts.app:Hearts"
path = "code"

[[learners]]
name = "cleveland"
data = "Cleveland Clinic"
[[learners]]
name = "zurich"
[[learners]]
name = "budapest"

[broker]
ingress = "tcp://127.0.0.1:5570"
live = "tcp://127.0.0.1:5571"
[controller]
bulk = "tcp://127.0.0.1:5572"
"""
SHORT = """\
federation = { name = "hearts", rounds = 1 }
app = { object = "hearts:Hearts" }
learners = [{ name = "a" }, { name = "b" }]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples; each writes its file anew."""
    folder = tmp_path_factory.mktemp("federation")
    (folder / "code").mkdir()
    return folder


def load(folder: Path, content: str | bytes) -> Federation:
    path = folder / "hearts.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_federation(path)


def test_a_full_file_is_read_as_written(folder: Path) -> None:
    assert load(folder, FULL) == Federation(
        name="hearts",
        rounds=20,
        quorum=2,
        waits_for_quorum=False,
        lease_s=30.0,
        seed=1,
        privacy="ckks",
        encryption=Encryption("fine", error=1e-7, min_contributors=2, max_share=0.5, verify="full"),
        training=Training(epochs=2, batch_size=64, learning_rate=0.01),
        app=App(object="hearts.app:Hearts", path=folder.resolve() / "code"),
        learners=(
            Learner("cleveland", "Cleveland Clinic"),
            Learner("zurich", "zurich"),
            Learner("budapest", "budapest"),
        ),
        ingress="tcp://127.0.0.1:5570",
        live="tcp://127.0.0.1:5571",
        bulk="tcp://127.0.0.1:5572",
        max_examples=5000,
    )


def test_a_short_file_gets_the_defaults(folder: Path) -> None:
    federation = load(folder, SHORT)
    assert federation.quorum == 2, "by default all learners"
    assert federation.waits_for_quorum, "a site that is away for a while ends no run"
    assert federation.lease_s == 60.0
    assert federation.seed == 0
    assert federation.max_examples == 0, "no bound"
    assert federation.privacy == "ckks", "nothing leaves in plain unless somebody says so"
    assert federation.encryption == Encryption(None, 1e-6, 2, 0.95, "none")
    assert federation.training == Training(epochs=1, batch_size=32, learning_rate=None)
    assert federation.app.path == folder.resolve()
    assert {federation.ingress, federation.live, federation.bulk} == {"tcp://127.0.0.1:0"}


def test_paths_start_at_the_file_and_not_at_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder, FULL)
    monkeypatch.chdir(folder)
    assert load_federation(Path("hearts.toml")) == expected


REFUSED = [
    ('name = "hearts"', 'name = "Hearts"', "federation.name 'Hearts': use 1 to 63 of a-z"),
    ('name = "hearts"', "name = 7", "federation.name: 7 cannot be; allowed is a text"),
    ('name = "hearts"\n', "", "federation.name: is missing; it must be given"),
    ("rounds = 20\n", "", "federation.rounds: is missing; it must be given"),
    ("rounds = 20", "rounds = 0", "federation.rounds: 0 cannot be; allowed is a whole number "),
    ("rounds = 20", "rounds = 100_001", "a whole number from 1 to 100000"),
    ("rounds = 20", "rounds = 20.0", "federation.rounds: 20.0 cannot be"),
    ("rounds = 20", "rounds = true", "federation.rounds: True cannot be"),
    ("rounds = 20", 'rounds = "20"', "federation.rounds: '20' cannot be"),
    ("rounds", "round", "federation.round: no such key; did you mean 'rounds'? known are name, "),
    ("quorum = 2", "quorum = 4", "federation.quorum: 4 is more than the 3 learners listed"),
    ("quorum = 2", "quorum = 0", "federation.quorum: 0 cannot be"),
    ("lease_s = 30", "lease_s = 0.5", "federation.lease_s: 0.5 cannot be; allowed is a number "),
    ("lease_s = 30", "lease_s = nan", "federation.lease_s: nan cannot be"),
    ("lease_s = 30", "lease_s = inf", "a number from 1 to 86400"),
    ("lease_s = 30", "lease_s = true", "federation.lease_s: True cannot be"),
    ("seed = 1", "seed = 9223372036854775808", "federation.seed: 9223372036854775808 cannot be"),
    ("max_examples = 5000", "max_examples = -1", "federation.max_examples: -1 cannot be"),
    ('"ckks"', '"none"', 'federation.privacy: \'none\' cannot be; allowed is "plain" or "ckks"'),
    (
        '"ckks"',
        '"plain"',
        'encryption: not used where federation.privacy is "plain"; remove the table',
    ),
    ('"fine"', '"tiny"', "encryption.profile: 'tiny' cannot be; allowed is \"compact\" or "),
    ("profile =", "profil =", "encryption.profil: no such key; did you mean 'profile'?"),
    ("error = 1e-7", "error = 0", "encryption.error: 0 cannot be; allowed is a number from 1e-12 "),
    (
        "contributors = 2",
        "contributors = 4",
        "encryption.min_contributors: 4 is more than the 3 le",
    ),
    ("contributors = 2", "contributors = 3", "federation.quorum: 2 is less than encryption.min_co"),
    ("contributors = 2", "contributors = 0", "encryption.min_contributors: 0 cannot be"),
    ("max_share = 0.5", "max_share = 0.49", "0.49 cannot be kept by the 2 learners of a quorum"),
    ("max_share = 0.5", "max_share = 1.1", "encryption.max_share: 1.1 cannot be; allowed is a num"),
    ('"full"', '"some"', 'encryption.verify: \'some\' cannot be; allowed is "none" or "full"'),
    ("epochs = 2", "epochs = 1001", "training.epochs: 1001 cannot be"),
    ("epochs", "epoch", "training.epoch: no such key; did you mean 'epochs'?"),
    ("batch_size = 64", "batch_size = -1", "training.batch_size: -1 cannot be"),
    ("= 0.01", "= 0", "training.learning_rate: 0 cannot be; allowed is a number from 1e-12"),
    ('"hearts.app:Hearts"', '"hearts.app"', "app.object: 'hearts.app' cannot be; allowed is \"pa"),
    ('object = "hearts.app:Hearts"', "", "app.object: is missing"),
    ('path = "code"', 'path = "cod"', "is not a folder; relative paths start at the file's"),
    ('path = "code"', f'path = "{"x" * 300}"', "is not a folder"),
    ('path = "code"', 'path = "a\\u0000"', "app.path: 'a\\x00' cannot be"),
    ('name = "zurich"', 'name = "cleveland"', "learners[1].name: 'cleveland' is the name of lear"),
    ('name = "zurich"', 'name = "all"', "learners[1].name 'all': use"),
    ('name = "zurich"', 'nmae = "zurich"', "learners[1].nmae: no such key; did you mean 'name'?"),
    ('data = "Cleveland Clinic"', 'data = ""', "learners[0].data: '' cannot be"),
    ('"tcp://127.0.0.1:5570"', '"127.0.0.1:5570"', "broker.ingress: '127.0.0.1:5570' cannot be"),
    ('"tcp://127.0.0.1:5570"', '"tcp://h:65536"', "ADDRESS:PORT with a port from 0 to 65535"),
    (":5571", ":5570", "broker.ingress: 'tcp://127.0.0.1:5570' is given twice"),
    ("[controller]", "[controler]", "controler: no such key; did you mean 'controller'?"),
    ("[training]", "[[training]]", "cannot be; allowed is a table with the keys epochs, batch_s"),
    ("[[learners]]", "[[learner]]", "learner: no such key; did you mean 'learners'?"),
    ("rounds = 20", "rounds = 20\nrounds = 21", "not a TOML file: "),
    ("rounds = 20", "rounds =", "line 3"),
    ('name = "hearts"', "name = hearts", "(at line 2, column 8); a text stands in quotes"),
    ('"hearts.app:Hearts"', '"hearts/app:Hearts"', "its folder is app.path"),
    ('"hearts.app:Hearts"', '"app.py:Hearts"', 'a module without its ".py": "app:Hearts"'),
]


@pytest.mark.parametrize(("old", "new", "complaint"), REFUSED, ids=[new for _, new, _ in REFUSED])
def test_what_cannot_be_is_refused_by_its_key(
    folder: Path, old: str, new: str, complaint: str
) -> None:
    assert old in FULL
    with pytest.raises(UserError) as refused:
        load(folder, FULL.replace(old, new))
    text = str(refused.value)
    assert text.startswith(f"{folder / 'hearts.toml'}: ")
    assert complaint in text


@pytest.mark.parametrize(
    "encryption",
    [
        "",
        "[encryption]\nmin_contributors = 1",
        "[encryption]\nmin_contributors = 1\nmax_share = 0.9",
    ],
)
def test_a_federation_of_one_is_encrypted_only_if_it_says_that_this_hides_nothing(
    folder: Path, encryption: str
) -> None:
    alone = SHORT.replace(', { name = "b" }', "")
    with pytest.raises(
        UserError, match=r'federation.privacy: a sum over one .* allowed is "plain"'
    ):
        load(folder, f"{alone}{encryption}")
    load(folder, alone.replace("rounds = 1", 'rounds = 1, privacy = "plain"'))
    load(folder, f"{alone}[encryption]\nmin_contributors = 1\nmax_share = 1")


@pytest.mark.parametrize(
    ("learners", "encryption", "complaint"),
    [
        (1, "", "a joint key of 1 sites; with an error of 1e-06 allowed are 2 to 31"),
        (32, "", "a joint key of 32 sites; with an error of 1e-06 allowed are 2 to 31"),
        (3, '[encryption]\nprofile = "compact"', 'a joint key has the profile "wide"'),
        (3, "[encryption]\nmin_contributors = 4", "is more than the 3 learners listed"),
    ],
)
def test_a_joint_key_is_one_that_can_be_made(
    folder: Path, learners: int, encryption: str, complaint: str
) -> None:
    names = ", ".join(f'{{ name = "l{number}" }}' for number in range(learners))
    head = SHORT[: SHORT.index("learners")].replace(
        "rounds = 1", 'rounds = 1, privacy = "ckks-threshold"'
    )
    with pytest.raises(UserError, match=complaint):
        load(folder, f"{head}learners = [{names}]\n{encryption}")
    two = 'learners = [{ name = "a" }, { name = "b" }]'
    assert load(folder, f"{head}{two}").privacy == "ckks-threshold"


@pytest.mark.parametrize("missing", ["federation", "app", "learners"])
def test_a_required_table_is_missed_by_name(folder: Path, missing: str) -> None:
    kept = [line for line in SHORT.splitlines() if not line.startswith(missing)]
    with pytest.raises(UserError, match=f"{missing}: is missing"):
        load(folder, "\n".join(kept))


@pytest.mark.parametrize("count", [0, 1001])
def test_the_number_of_learners_has_bounds(folder: Path, count: int) -> None:
    learners = ", ".join(f'{{ name = "l{number}" }}' for number in range(count))
    head = SHORT[: SHORT.index("learners")]
    with pytest.raises(UserError, match=r"learners: .* cannot be; allowed is 1 to 1000 tables"):
        load(folder, f"{head}learners = [{learners}]")


def test_a_thousand_learners_are_a_federation(folder: Path) -> None:
    learners = ", ".join(f'{{ name = "l{number}" }}' for number in range(1000))
    head = SHORT[: SHORT.index("learners")]
    assert load(folder, f"{head}learners = [{learners}]").quorum == 1000


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:0", "tcp://[::1]:5570", "tcp://eth0:1", "tcp://broker.example.org:65535"]
)
def test_endpoints_may_be_any_that_can_be_bound(folder: Path, endpoint: str) -> None:
    assert load(folder, f'{SHORT}broker = {{ ingress = "{endpoint}" }}').ingress == endpoint


def test_a_huge_file_is_refused_unread(folder: Path) -> None:
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        load(folder, b"#" * (FILE_BYTES_MAX + 1))


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    for path in (folder / "nothing.toml", folder, Path("a\0b")):
        with pytest.raises(UserError, match="cannot be read"):
            load_federation(path)


def test_a_file_in_another_encoding_names_the_line(folder: Path) -> None:
    with pytest.raises(UserError, match="line 24 is not UTF-8"):
        load(folder, FULL.replace("Hearts", "Hérts").encode("latin-1"))


# Any file gives a Federation that keeps its promises, or a UserError: never another exception.


def load_or_refuse(folder: Path, content: bytes) -> None:
    try:
        federation = load(folder, content)
    except UserError:
        return
    names = [learner.name for learner in federation.learners]
    assert len(set(names)) == len(names) <= 1000
    assert all(NAME.fullmatch(name) for name in [federation.name, *names])
    assert 1 <= federation.quorum <= len(names)
    assert 1 <= federation.rounds <= 100_000
    assert 1 <= federation.lease_s <= 86_400
    assert 0 <= federation.seed < 2**63
    assert federation.privacy in ("plain", "ckks")
    encryption = federation.encryption
    if federation.privacy == "ckks":
        assert 1 <= encryption.min_contributors <= federation.quorum
        assert encryption.max_share * federation.quorum >= 1
    assert encryption.profile in (None, "compact", "standard", "fine", "wide")
    assert 1e-12 <= encryption.error <= 0.1
    assert encryption.verify in ("none", "full")
    assert federation.app.path.is_dir()


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, bool | str) else repr(value)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
values = st.recursive(
    st.none().map(lambda _: 0)
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from(["tcp://127.0.0.1:5571", "cleveland", "x" * 300, "../" * 200, "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
lines_with_values = [n for n, line in enumerate(FULL.splitlines()) if " = " in line]


@given(st.sampled_from(lines_with_values), values)
def test_any_value_of_any_key(folder: Path, number: int, value: object) -> None:
    lines = FULL.splitlines()
    key = lines[number].split(" = ")[0]
    lines[number] = f"{key} = {toml(value)}"
    load_or_refuse(folder, "\n".join(lines).encode())


@given(st.data())
def test_any_damage_to_the_bytes(folder: Path, data: st.DataObject) -> None:
    content = FULL.encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    load_or_refuse(folder, content[:start] + data.draw(st.binary(max_size=8)) + content[end:])


@given(st.dictionaries(texts | st.sampled_from(["federation", "app", "learners"]), values))
def test_any_document(folder: Path, document: dict[str, object]) -> None:
    content = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in document.items())
    load_or_refuse(folder, content.encode())


@given(st.binary(max_size=200))
@example(b"x = " + b"[" * 100_000)
@example(b"x = " + b"{x=" * 100_000)
@example(b"x" + b".x" * 100_000 + b" = 1")
@example(b"x = 0x" + b"f" * 100_000)
@example(b"x = " + b"9" * 5000)
@example(b"x = " + b"{a=" * 500 + b"1" + b"}" * 500)
@example(b"a." * 5000 + b"b = 1")
def test_any_bytes(folder: Path, content: bytes) -> None:
    load_or_refuse(folder, content)
