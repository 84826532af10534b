"""Reads the file that the client of Weights & Biases keeps of a run.

It is a log as LevelDB has them (its doc/log_format.md): blocks of 32 KiB, with chunks of a record in
them. Before the first chunk lie seven bytes that say what it is. A record is a protocol buffer.
"""

import json
import struct

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path):
    """The records of a .wandb file. Stops where the file of a killed process breaks off."""
    content, place, parts, records = path.read_bytes(), 7, [], []
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:  # too little for a chunk's header: padding
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        chunk = content[place + 7 : place + 7 + length]
        if not kind or len(chunk) < length:
            break
        parts = [chunk] if kind in (_FULL, _FIRST) else [*parts, chunk]
        if kind in (_FULL, _LAST):
            records.append(Record.FromString(b"".join(parts)))
        place += 7 + length
    return records


def history_of(records):
    """The rows of the history: a dict of the values of each step."""
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def run_of(records):
    """The record that describes the run."""
    return next(r.run for r in records if r.WhichOneof("record_type") == "run")
