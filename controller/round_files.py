"""The records of rounds on disk: `rounds/<run>/<round>.msgpack`, a chain.

Rule 1: a record is written once, durably, and never changed; writing it again changes nothing.
Rule 2: each names the one before it by digest, from round 0 on. One that is missing, damaged or
changed breaks the chain at the next one; the newest is held by the log, whose RoundClosed and
RunFinished name it to every site.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from metisfl.proto.errors import MachineError, machine_error
from metisfl.proto.model_file import sync_folder
from metisfl.proto.records import RoundRecord, pack_record, record_digest, unpack_record

__all__ = ["Chain", "read_chain", "write_record"]

SUFFIX = ".msgpack"


@dataclass(frozen=True, slots=True)
class Chain:
    """Records that follow each other. `fault` says why the chain ends before the files do."""

    records: tuple[RoundRecord, ...]
    head: bytes  # digest of the last of `records`
    fault: str = ""


def write_record(folder: Path, record: RoundRecord) -> None:
    """Write a record under `folder`. Raises DiskFull, MachineError if it cannot be made durable."""
    path = folder / record.run_id / f"{record.round:06d}{SUFFIX}"
    if path.exists():
        return
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(pack_record(record))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        text = f"round record {path}: {error.strerror}; make room or repair the disk"
        raise machine_error(text, error) from error


def read_chain(folder: Path) -> Chain:
    """Read the records of one run and check how they follow each other.

    Raises MachineError if the folder holds none or cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        contents = [path.read_bytes() for path in paths]
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}") from None
    if not paths:
        raise MachineError(f"{folder} holds no round records; name the folder of one run")
    records: list[RoundRecord] = []
    head = b""
    for number, (path, data) in enumerate(zip(paths, contents, strict=True)):
        try:
            record = unpack_record(data)
        except MachineError as error:
            return Chain(tuple(records), head, f"{path.name}: {error}")
        if (path.stem, record.round) != (f"{number:06d}", number):
            fault = f"{path.name} holds round {record.round}, where round {number} belongs"
            return Chain(tuple(records), head, fault)
        if record.previous != head or record.run_id != folder.name:
            fault = (
                f"{path.name} does not follow the record before it: that one has the digest "
                f"{head.hex() or 'of none'}, named is {record.previous.hex() or 'none'}"
            )
            return Chain(tuple(records), head, fault)
        records.append(record)
        head = record_digest(data)
    return Chain(tuple(records), head)
