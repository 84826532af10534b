import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from corpus import tokenizing
from corpus.huggingface_dataset import HuggingFaceTexts
from corpus.tokenizer import build_tokenizer
from runtime.setting_fields import UserError

datasets = pytest.importorskip("datasets")
BYTES = build_tokenizer("bytes")
ROWS = ["first document", "", "second, with 世界", None, "third\n\n"]
TEXTS = [row for row in ROWS if row]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


def folder(tmp_path, name="set", rows=ROWS, split="train"):
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    lines = (json.dumps({"body": text, "n": i}) + "\n" for i, text in enumerate(rows))
    (path / f"{split}.jsonl").write_text("".join(lines))
    return str(path)


def ids_of(made, out):
    return np.concatenate([np.load(out / s["file"]) for s in made["shards"]]).tolist()


WANTED = [i for text in TEXTS for i in [*text.encode(), 256]]


def test_rows_become_documents_each_with_the_end_token(tmp_path):
    texts = HuggingFaceTexts(folder(tmp_path), "", "", "body")
    made = tokenizing.prepare(texts, BYTES, tmp_path / "out", workers=1, column="body")
    assert ids_of(made, tmp_path / "out") == WANTED
    assert made["documents"] == 3 and made["bytes"] == len("".join(TEXTS).encode())
    assert made["sources"][0]["path"] == f"{tmp_path}/set (train, body)"


def test_a_parquet_folder_and_a_saved_set_are_the_same_texts(tmp_path):
    rows = datasets.Dataset.from_dict({"body": ROWS})
    (tmp_path / "p").mkdir()
    rows.to_parquet(tmp_path / "p" / "train-0.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    names = [folder(tmp_path), *(str(tmp_path / n) for n in ("p", "saved", "both"))]
    assert len({HuggingFaceTexts(n, "", "", "body").record["sha256"] for n in names}) == 1
    with pytest.raises(UserError, match="has no split 'test'"):
        HuggingFaceTexts(str(tmp_path / "saved"), "", "test", "body")


def test_the_key_is_of_the_content_and_not_of_the_place(tmp_path):
    def key(name, column="body", **more):
        texts = HuggingFaceTexts(name, "", more.pop("split", ""), column)
        job = tokenizing._describe_job(texts, BYTES, 100, 1, "", column)
        return job["key"]

    first = key(folder(tmp_path))
    assert first == key(folder(tmp_path, "moved"))
    assert first != key(folder(tmp_path, "other", [*ROWS, "more"]))
    assert first != key(folder(tmp_path, "split", ["ab", "c"]))
    assert key(folder(tmp_path, "x", ["ab", "c"])) != key(folder(tmp_path, "y", ["a", "bc"]))


def test_split_column_and_data_set_are_found_or_named(tmp_path):
    name = folder(tmp_path)
    folder(tmp_path, rows=["held out"], split="test")
    assert [t.text for t in HuggingFaceTexts(name, "", "test", "body").texts()] == ["held out"]
    assert HuggingFaceTexts(name, "", "", "body").split == "train"
    for arguments, said in (
        ((name, "", "", "text"), "has no 'text'; it has 'body', 'n': name one with --text-column"),
        ((name, "", "valid", "body"), "valid"),
        ((name, "", "", "n"), "row 0 of 'n' is no text but int"),
        ((f"{tmp_path}/none", "", "", "body"), "datasets can't load it"),
    ):
        with pytest.raises(UserError) as caught:
            HuggingFaceTexts(*arguments)
        assert said in str(caught.value) and "\n" not in str(caught.value)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from corpus import tokenizing
from corpus.huggingface_dataset import HuggingFaceTexts
from corpus.tokenizer import build_tokenizer
finish, done = tokenizing._ShardFile.finish, []
def killing(self):
    about = finish(self)
    done.append(1)
    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return about
tokenizing._ShardFile.finish = killing
texts = HuggingFaceTexts(sys.argv[1], "", "", "body")
from pathlib import Path
tokenizing.prepare(texts, build_tokenizer("bytes"), Path(sys.argv[2]), 200_000, 1, column="body")
"""


@pytest.mark.long
def test_a_killed_call_that_is_repeated_ends_with_the_same_bytes(tmp_path):
    name = folder(tmp_path, rows=[f"{i} " * 40_000 for i in range(12)])
    texts = HuggingFaceTexts(name, "", "", "body")
    whole = tokenizing.prepare(texts, BYTES, tmp_path / "whole", 200_000, 1, column="body")
    assert len(whole["shards"]) > 3
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "c2"),
    }
    code = KILLED.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, name, str(tmp_path / "out")], env=env)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out" / "tokens.json").exists()
    kept = (tmp_path / "out" / "tokens_000001.npy").stat().st_mtime_ns
    tokenizing.prepare(texts, BYTES, tmp_path / "out", 200_000, 1, column="body")
    assert (tmp_path / "out" / "tokens_000001.npy").stat().st_mtime_ns == kept
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.long
def test_the_command_prepares_a_data_set_offline(program, tmp_path):
    name = folder(tmp_path)
    flags = f"--hf {name} --text-column body --tokenizer-name bytes --workers 1"
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    out = program("data/prepare.py", "--out", "p", *flags.split(), **env)
    assert f"{len(WANTED)} tokens" in out and "3 documents" in out
    same = program(
        "data/prepare.py", "--out", "p", *flags.replace("text-column", "column").split(), **env
    )
    assert f"{len(WANTED)} tokens" in same
    for more, wanted in (
        (["--split", "x"], 'Unknown split "x"'),
        (["--column", "n"], "--column n contradicts --text-column"),
        (["a.txt"], "and a.txt are two corpora"),
        (["--document-separator", "x"], "a row of --hf is a document"),
    ):
        said = program("data/prepare.py", "--out", "p", *flags.split(), *more, ok=False, **env)
        assert wanted in said and "Traceback" not in said
    said = program("data/prepare.py", "--out", "p", "a.txt", "--split", "x", ok=False)
    assert "give its --hf" in said
    (tmp_path / "a.txt").write_text("some text")
    more = ["--text-column", "x", "--tokenizer-name", "bytes"]
    said = program("data/prepare.py", "--out", "p", "a.txt", *more, ok=False)
    assert "none of the files has columns" in said
