"""Random damage to data files: a clear error, or ids that are right wherever the format can tell."""

import gzip
import json
import random

import numpy as np
import pytest
from helpers import llmc, npy

from corpus.read_text import read_texts
from corpus.shards import TokenShards
from corpus.tokenizer import build_tokenizer
from runtime.setting_fields import UserError

IDS = np.random.default_rng(0).integers(0, 50257, 400)
CASES = 2000
SHARDS = {
    "npy16": (lambda p: npy(p / "a.npy", IDS), 128, 2),
    "npy32": (lambda p: npy(p / "a.npy", IDS, "<u4"), 128, 4),
    "npyi32": (lambda p: npy(p / "a.npy", IDS, "<i4"), 128, 4),
    "llmc16": (lambda p: llmc(p / "a.bin", IDS), 1024, 2),
    "llmc32": (lambda p: llmc(p / "a.bin", IDS, 20240801, 7, "<u4"), 1024, 4),
    "plain16": (
        lambda p: (p / "a.bin", (p / "a.bin").write_bytes(IDS.astype("<u2").tobytes()))[0],
        0,
        2,
    ),
}


def damaged(whole, draw):
    """The bytes with one kind of damage, more often near the start, where headers are."""
    data, at = bytearray(whole), int(len(whole) * draw.random() ** 2)
    kind = draw.choice(["flip", "bytes", "cut", "insert", "append", "zeros", "drop"])
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        data[at : at + 5] = draw.randbytes(len(data[at : at + 5]))
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = draw.randbytes(draw.randrange(1, 9))
    elif kind == "append":
        data += draw.randbytes(draw.randrange(1, 9))
    elif kind == "zeros":
        data[at : at + 40] = bytes(len(data[at : at + 40]))
    else:
        del data[at : at + draw.randrange(1, 9)]
    return kind, bytes(data)


def one_line(error, path):
    said = str(error)
    assert "\n" not in said and path.name in said and len(said) < 500


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_shards_are_refused_or_right(tmp_path, name):
    make, header, size = SHARDS[name]
    path, draw, refused = make(tmp_path), random.Random(name), 0
    whole = path.read_bytes()
    assert len(whole) == header + 400 * size
    for _ in range(CASES):
        kind, data = damaged(whole, draw)
        path.write_bytes(data)
        try:
            source = TokenShards([path], 50257)
            ids = source.read(0, source.num_tokens)
        except UserError as error:
            refused += 1
            one_line(error, path)
            continue
        if header == 0 and kind in ("cut", "insert", "append", "drop"):
            continue  # without a header nothing says how long it should be
        wanted = np.frombuffer(data[header:], f"<u{size}")  # damage inside of the ids is unknowable
        assert np.array_equal(ids, wanted) and len(ids) == 400, (kind, len(ids))
    assert refused > CASES / 10


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_texts_are_refused_or_read(tmp_path, name):
    documents = [f"document {i}: words, é and 世\n" * 3 for i in range(30)]
    content = "".join(documents)
    if "jsonl" in name:
        content = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    whole = content.encode()
    if name.endswith(".gz"):
        whole = gzip.compress(whole)
    elif name.endswith(".zst"):
        whole = pytest.importorskip("zstandard").compress(whole)
    path, draw = tmp_path / name, random.Random(name)
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": documents}), path)
        whole = path.read_bytes()
    refused = 0
    for _ in range(CASES):
        _, data = damaged(whole, draw)
        path.write_bytes(data)
        try:
            texts = list(read_texts(path))
        except UserError as error:
            refused += 1
            one_line(error, path)
        else:
            if name.endswith(".gz") and data[:10] == whole[:10]:  # its checksum covers the rest
                assert "".join(t.text for t in texts) == content
    assert refused > CASES / 20


def test_damaged_tokenizer_files_are_refused_or_whole(tmp_path):
    import base64

    tokens = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    tokens += [base64.b64encode(t).decode() for t in (b"th", b"the", b" a")] + [None]
    record = {
        "format": "rosetrainer tokenizer 1",
        "name": "t",
        "pattern": "[a-z]+|.",
        "end_token": 259,
    }
    whole = json.dumps({**record, "tokens": tokens}).encode()
    path, draw = tmp_path / "t.json", random.Random(0)
    path.write_bytes(whole)
    assert build_tokenizer(str(path)).encode("the").tolist() == [257]
    for _ in range(300):
        path.write_bytes(damaged(whole, draw)[1])
        try:
            tokenizer = build_tokenizer(str(path))
            tokenizer.decode(tokenizer.encode("the cat").tolist())
        except UserError as error:
            one_line(error, path)
