import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT

from corpus import read_text as text
from corpus import tokenizing as token_files
from corpus import tokenizing_workers as workers
from corpus.find_text import find_sources
from corpus.read_text import Text
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import prepare
from runtime.setting_fields import UserError

BYTES = build_tokenizer("bytes")


@pytest.fixture
def corpus(tmp_path):
    """Documents in every format; what they say, in order."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    documents = [f"document {i}\nwith some words é世\n" * (i % 7 + 1) for i in range(40)]
    (folder / "a.txt").write_text(documents[0])
    (folder / "b.md").write_text(documents[1])
    lines = "".join(
        json.dumps({"text": d, "id": i}) + "\n\n" for i, d in enumerate(documents[2:20])
    )
    (folder / "c.jsonl").write_text(lines + '{"text": ""}\n')
    (folder / "d.txt.gz").write_bytes(gzip.compress(documents[20].encode()))
    zstandard = pytest.importorskip("zstandard")
    packed = "".join(json.dumps({"text": d}) + "\n" for d in documents[21:30]).encode()
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(packed))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": documents[30:39], "n": list(range(9))})
    parquet.write_table(table, folder / "f.parquet")
    (folder / "ignored.csv").write_text("not,text")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "g.py").write_text(documents[39])
    return folder, documents


def stream(folder):
    made = json.loads((folder / "tokens.json").read_text())
    return np.concatenate([np.load(folder / s["file"]) for s in made["shards"]])


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".json"}


def test_every_format_gives_its_documents_each_with_the_end_token(corpus, tmp_path):
    folder, documents = corpus
    made = prepare(find_sources([folder]), BYTES, tmp_path / "out")
    ids = stream(tmp_path / "out")
    parts = np.split(ids, np.flatnonzero(ids == 256) + 1)
    assert [BYTES.decode(p.tolist()) for p in parts[:-1]] == documents and not len(parts[-1])
    assert made["documents"] == 40 and made["tokens"] == len(ids)
    assert made["bytes"] == sum(len(d.encode()) for d in documents)
    assert made["dtype"] == "uint16" and len(made["sources"]) == 7
    assert build_tokenizer(str(tmp_path / "out" / "tokenizer.json")).name == "bytes"


def test_globs_are_taken_in_name_order(corpus):
    folder, _ = corpus
    names = [p.name for p in find_sources([str(folder / "?.txt"), str(folder / "b.md")])]
    assert names == ["a.txt", "b.md"]
    with pytest.raises(UserError, match="no text in it"):
        find_sources([folder / "*.xyz"])


def test_output_does_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 128)
    found = []
    for n in (1, 2, 5):
        out = tmp_path / f"out{n}"
        prepare(find_sources([corpus[0]]), BYTES, out, shard_tokens=500, workers=n)
        found.append(bytes_of(out))
    assert len(found[0]) > 4 and found[0] == found[1] == found[2]


def test_a_stopped_run_keeps_its_shards_and_ends_with_the_same_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 128)
    sources = find_sources([corpus[0]])
    prepare(sources, BYTES, tmp_path / "whole", shard_tokens=500)
    original, calls = workers._encode, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "_encode", stopped)
        prepare(sources, BYTES, tmp_path / "out", shard_tokens=500)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npy")}
    assert kept and not (tmp_path / "out" / "tokens.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    prepare(sources, BYTES, tmp_path / "out", shard_tokens=500)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in kept.items())


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
from corpus import tokenizing as token_files, tokenizing_workers as workers
from pathlib import Path
from corpus.tokenizer import build_tokenizer

original, calls = getattr({where}), []

def killing(*args, **options):
    calls.append(1)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)

setattr({where}, killing)
token_files.prepare([Path(sys.argv[1])], build_tokenizer("bytes"), Path(sys.argv[2]), 100_000)
"""


@pytest.mark.parametrize(
    "where, count",
    [
        ('workers, "_encode"', 3),  # in a worker
        ('token_files.os, "fsync"', 4),  # a shard is written, but has no name yet
        ('token_files, "_write_whole"', 4),  # a shard is there, but not yet counted
        ('token_files.os, "replace"', 5),
    ],
)
def test_killed_half_way_it_ends_with_the_same_bytes(tmp_path, where, count):
    source = tmp_path / "a.txt"
    source.write_text("".join(f"line {i} of many\n" for i in range(400_000)))
    script = KILL.format(root=str(ROOT), where=where, count=count)
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, timeout=60, stderr=subprocess.PIPE, text=True)
    if "_encode" in where:  # a worker dies, not the whole
        assert done.returncode == 1 and "a worker was killed" in done.stderr
    else:
        assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "tokens.json").exists()
    for out in ("out", "whole"):
        prepare([source], BYTES, tmp_path / out, 100_000)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert len(bytes_of(tmp_path / "out")) > 5


def test_a_folder_of_other_tokens_is_not_touched(corpus, tmp_path):
    sources = find_sources([corpus[0]])
    prepare(sources, BYTES, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(UserError, match="holds the tokens of other text"):
        prepare(sources[:2], BYTES, tmp_path / "out")
    prepare(sources, BYTES, tmp_path / "out")  # the same again is nothing to do
    assert bytes_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2 has no 'text'; it has 'txt': name one"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 is not"),
        ("a.jsonl", b"[1]\nx", "line 1 is not"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not"),
        ("a.txt.gz", b"not gzip at all", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"words " * 9999)[:-20], "cannot be read"),
        ("a.txt.zst", b"not zstandard", "damaged .zst data"),
        ("a.parquet", b"PAR1 but no", "not a Parquet file"),
        ("a.txt", b"", "is empty"),
    ],
)
def test_damaged_sources_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare([tmp_path / name], BYTES, tmp_path / "out")
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.npy*"))


def test_text_without_any_place_to_cut_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    (tmp_path / "a.txt").write_text("世" * 3000)
    pieces = list(text.read_texts(tmp_path / "a.txt"))
    assert "".join(p.text for p in pieces) == "世" * 3000
    assert all(p.n_bytes == len(p.text.encode()) for p in pieces)
    assert max(p.n_bytes for p in pieces) <= 18 * 100 * 3
    assert [p.ends_document for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_wide_vocabularies_take_uint32(tmp_path):
    class Wide:
        name, fingerprint, vocab_size, end_token = "wide", "wide", 70_000, 69_999
        safe_cut = None

        def encode(self, text):
            return np.full(len(text), 69_000)

        def to_json(self):
            return "{}"

    (tmp_path / "a.txt").write_text("abc")
    made = prepare([tmp_path / "a.txt"], Wide(), tmp_path / "out")
    assert made["dtype"] == "uint32" and stream(tmp_path / "out").tolist() == [69_000] * 3 + [
        69_999
    ]


def test_disk_full_is_one_line(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; name another folder"):
        token_files.tokenize_files(find_sources([corpus[0]]), BYTES, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*.npy*")]
    assert os.path.exists(tmp_path / "cache")


def test_nothing_is_forked_once_a_gpu_is_in_use(monkeypatch):
    tokenizer, dtype = build_tokenizer("bytes"), np.dtype(np.uint16)
    with workers._pool(tokenizer, dtype, 1) as pool:
        assert isinstance(pool, ProcessPoolExecutor)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with workers._pool(tokenizer, dtype, 1) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
        assert pool.submit(workers._work, [Text("ab", 2, True)]).result() == b"a\0b\0\0\1"


def test_the_text_can_have_any_name(tmp_path):
    rows = [{"body": "one", "text": "x"}, {"body": "two", "text": "y"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    files = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    prepare(files, BYTES, tmp_path / "body", workers=1, column="body")
    prepare(files, BYTES, tmp_path / "text", workers=1)
    end = bytes([0])
    body, other = (
        (stream(tmp_path / n) % 256).astype(np.uint8).tobytes() for n in ("body", "text")
    )
    assert body == (b"one" + end + b"two" + end) * 2
    assert other == (b"x" + end + b"y" + end) * 2


def test_a_missing_column_is_one_line_that_names_those_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), tmp_path / "b.parquet")
    for name, where in (("a.jsonl", "a.jsonl: line 1 "), ("b.parquet", "b.parquet ")):
        with pytest.raises(UserError) as caught:
            prepare([tmp_path / name], BYTES, tmp_path / "out", workers=1)
        assert f"{where}has no 'text'; it has 'body', 'title': name one with --text-column" in str(
            caught.value
        )


def test_the_cache_of_texts_read_as_ever_keeps_its_key(tmp_path):
    # As data prepared by earlier versions has it: the name of the text is a part only if it is new.
    (tmp_path / "a.jsonl").write_text('{"text": "x", "body": "y"}\n')
    sha = hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    decides = ["rosetrainer tokens 1", "bytes", 100_000_000, 1 << 20, [".jsonl"], sha]
    key = hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest()
    files = [tmp_path / "a.jsonl"]
    assert token_files._describe_job(files, BYTES, 100_000_000, 1, "", "text")["key"] == key
    assert token_files._describe_job(files, BYTES, 100_000_000, 1, "", "body")["key"] != key
