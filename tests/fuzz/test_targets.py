"""The fuzzer's laws hold for what is known, and would be noticed to break."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fuzzed import databases, mutation
from fuzzed.samples import sample
from fuzzed.table import TARGETS
from fuzzed.target import TEXT_CHARACTERS_MAX, joined, parts_of, refused
from google.protobuf.message import DecodeError

from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import PeerError
from metisfl.proto.events import EVENT_TYPES, encode

HERE = Path(__file__).parent
GUIDE = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_taken_and_fits(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds, f"{name} starts from nothing"
    for seed in seeds:
        assert target.law(seed), f"{name} refuses its own seed {seed[:80]!r}"
        assert len(seed) <= target.bytes_max


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_that_are_cut_changed_or_nothing_keep_the_law(name: str) -> None:
    target, luck = TARGETS[name], random.Random(name)
    target.law(b"")
    for seed in target.seeds():
        for _ in range(20):
            damaged = bytearray(seed) or bytearray(1)
            damaged[luck.randrange(len(damaged))] ^= luck.randrange(1, 256)
            target.law(bytes(damaged[: luck.randrange(len(damaged)) + 1]))
            target.law(bytes(damaged))


@pytest.mark.parametrize("table", range(len(databases.TABLES)))
def test_any_value_may_stand_in_any_place_of_a_log(table: int) -> None:
    columns = [*databases.TABLES.values()][table]
    taken = 0
    for row in (1, 2, 6):
        for column in range(len(columns)):
            for value in range(len(databases.VALUES) + 2):
                taken += databases.log(bytes([table, row, column, value]))
    assert taken, "some values are right"


@pytest.mark.parametrize("name", TARGETS)
def test_the_guide_names_every_target(name: str) -> None:
    assert f"`{name}`" in GUIDE


def test_a_parser_that_raises_something_else_is_found() -> None:
    with pytest.raises(IndexError), refused(PeerError):
        raise IndexError("list index out of range")


@pytest.mark.parametrize("text", ["", "x" * (TEXT_CHARACTERS_MAX + 1)])
def test_an_error_that_says_nothing_or_everything_is_found(text: str) -> None:
    with pytest.raises(AssertionError), refused(PeerError):
        raise PeerError(text)


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_the_sample_of_an_event_has_something_in_every_field(name: str) -> None:
    message = sample(name)
    encode(message)
    empty = [f.name for f in message.DESCRIPTOR.fields if not getattr(message, f.name)]
    assert not empty, f"{name}: {empty}"


def test_parts_come_back() -> None:
    parts = [b"P", b"", bytes(300), b"x"]
    assert parts_of(joined(parts)) == parts


def test_mutations_keep_to_the_limit_and_often_leave_a_message() -> None:
    _, payload = encode(sample("RoundClosed"))

    def mutate(data: bytes, most: int) -> bytes:
        return (data + b"\0")[:most]

    messages = set()
    for seed in range(400):
        for most in (16, 4096):
            mutated = mutation.protobuf(payload, most, seed, mutate)
            assert len(mutated) <= most
            assert len(mutation.in_parts(joined([b"C", payload]), most, seed, mutate)) <= most
        with suppress(DecodeError):
            pb.RoundClosed.FromString(mutated)
            messages.add(mutated)
    assert len(messages) > 100, "many of them should differ, and be messages still"


def run_whole(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", *arguments], capture_output=True, text=True, timeout=100
    )


def test_a_target_runs_under_atheris_and_leaves_a_corpus(tmp_path: Path) -> None:
    ran = run_whole(str(HERE), "chunk", "--folder", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "number_of_executed_units" in (tmp_path / "chunk.log").read_text()
    again = run_whole(str(HERE), "chunk", "--input", str(next((tmp_path / "chunk").iterdir())))
    assert again.returncode == 0, again.stderr
    assert "as it should be" in again.stdout


BROKEN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fuzzed.engine import fuzz_all
from fuzzed.target import Target
def law(data):
    return [True, True, False][len(data)]
print(*fuzz_all([Target("broken", law, lambda: [b"x"], 9)], 1, Path(sys.argv[2])))
"""


def test_a_broken_law_is_told_with_the_command_that_shows_it_again(tmp_path: Path) -> None:
    for _ in range(2):  # the second time from what was found the first time
        ran = run_whole("-c", BROKEN, str(HERE), str(tmp_path))
        assert "IndexError: list index out of range" in ran.stdout, ran.stderr
        (found,) = (tmp_path / "found" / "broken").iterdir()
        assert ran.stdout.strip().endswith(f"-I tests/fuzz broken --input {found}")
        assert len(found.read_bytes()) > 2
