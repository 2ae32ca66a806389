"""The chain of records: nothing can be changed, left out or added later without showing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import recorded

from metisfl.controller.round_files import read_chain, write_record
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError
from metisfl.proto.records import pack_record, record_digest, unpack_record


def test_the_log_names_the_records_and_the_records_each_other(tmp_path: Path) -> None:
    world = recorded(tmp_path)
    chain = read_chain(tmp_path / "r1")
    assert (chain.fault, [one.round for one in chain.records]) == ("", [0, 1, 2, 3])
    closed = [e.message for e in world.log if isinstance(e.message, pb.RoundClosed)]
    digests = [record_digest(pack_record(one)) for one in chain.records]
    assert [one.previous_record for one in closed] == [b"", *digests[:-1]]
    assert world.run.finished is not None
    assert world.run.finished.record == chain.head == digests[-1]


def test_a_round_that_failed_is_in_the_chain_too(tmp_path: Path) -> None:
    recorded(tmp_path, fails=True)
    chain = read_chain(tmp_path / "r1")
    assert chain.fault == ""
    last = chain.records[-1]
    assert (last.round, last.counted, last.model_digest) == (3, (), b"")
    assert {(one.kind, one.reason) for one in last.missing} == {("failed", "no data")}
    assert last.invited == ("ada", "bob", "cyd")


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("how", ["changed", "damaged", "gone", "of another run"])
def test_what_is_changed_later_shows(tmp_path: Path, number: int, how: str) -> None:
    recorded(tmp_path)
    path = tmp_path / "r1" / f"{number:06d}.msgpack"
    record = unpack_record(path.read_bytes())
    if how == "changed":
        path.write_bytes(pack_record(replace(record, closed_ns=record.closed_ns + 1)))
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(pack_record(replace(record, run_id="r0")))
    chain = read_chain(tmp_path / "r1")
    assert chain.fault, f"record {number} was {how}, and the chain is said to be whole"
    assert len(chain.records) <= number + 1


def test_the_last_one_is_held_by_the_log_alone(tmp_path: Path) -> None:
    world = recorded(tmp_path)
    path = tmp_path / "r1" / "000003.msgpack"
    record = unpack_record(path.read_bytes())
    path.write_bytes(pack_record(replace(record, metrics={"test.accuracy": 1.0})))
    chain = read_chain(tmp_path / "r1")
    assert chain.fault == ""
    assert world.run.finished is not None
    assert chain.head != world.run.finished.record


def test_a_record_is_written_once(tmp_path: Path) -> None:
    recorded(tmp_path)
    path = tmp_path / "r1" / "000001.msgpack"
    before = path.read_bytes()
    write_record(tmp_path, replace(unpack_record(before), closed_ns=0))
    assert path.read_bytes() == before


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="holds no round records"):
        read_chain(tmp_path)
    with pytest.raises(MachineError, match="No such file"):
        read_chain(tmp_path / "nowhere")
