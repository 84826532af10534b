import multiprocessing
import random

import numpy as np
import pytest

import text
import token_files
from config import UserError
from text import stdlib_files
from token_files import tokenize_files
from tokenizer import build_tokenizer

BYTES = build_tokenizer("bytes")


def only(files, tokenizer, cache):
    ((shard,), _) = tokenize_files(files, tokenizer, cache)
    return shard


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_each_file_is_followed_by_the_end_token(tmp_path):
    files = [write(tmp_path / "a", "one"), write(tmp_path / "b", "two\n")]
    ids = np.load(only(files, BYTES, tmp_path / "cache"))
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*b"one", 256, *b"two\n", 256]


def test_second_start_reads_the_cache_and_changed_text_does_not(tmp_path, monkeypatch):
    file = write(tmp_path / "a", "one")
    first = tokenize_files([file], BYTES, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_encode", lambda *a: pytest.fail("tokenized again"))
        assert tokenize_files([file], BYTES, tmp_path / "cache") == first
    assert tokenize_files([write(file, "two")], BYTES, tmp_path / "cache") != first
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 2
    assert not list((tmp_path / "cache").glob("**/*.tmp"))


def test_pieces_give_the_ids_of_the_whole(tmp_path, monkeypatch, gpt2_files):
    import tiktoken

    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    draw = random.Random(0)
    words = ["a", " b", "\n", "\n\n", "  ", "don't", "'s", "\t", ";", "12", "é", "世", " \n", "Z"]
    content = "".join(draw.choice(words) for _ in range(20_000))
    gpt2 = build_tokenizer("gpt2")
    ids = np.load(only([write(tmp_path / "a", content)], gpt2, tmp_path / "cache"))
    assert ids.tolist() == [*tiktoken.get_encoding("gpt2").encode_ordinary(content), 50256]
    pieces = [t.text for t in text.read_texts(tmp_path / "a")]
    assert all(t.n_bytes == len(t.text.encode()) for t in text.read_texts(tmp_path / "a"))
    assert len(pieces) > 50 and "".join(pieces) == content


def test_tinyshakespeare_gives_the_ids_of_tiktoken(tmp_path, shared_text, gpt2_files):
    import tiktoken

    ids = np.load(only([shared_text], build_tokenizer("gpt2"), tmp_path))
    assert ids[:-1].tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(
        shared_text.read_text()
    )


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b"abc\xff\xfe", "byte 3 is 0xff, not UTF-8"),
        (b"good\nline" * 20 + "cut é".encode()[:-1], "byte 184 is 0xc3, not UTF-8"),
        (b"ab\0c", "byte 2 is NUL"),
    ],
)
def test_what_is_not_text_is_named_with_its_position(tmp_path, monkeypatch, content, said):
    monkeypatch.setattr(text, "BLOCK_BYTES", 16)
    with pytest.raises(UserError) as caught:
        tokenize_files([write(tmp_path / "a", content)], BYTES, tmp_path / "cache")
    assert said in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/*.npy*"))


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        tokenize_files([tmp_path / "none.txt"], BYTES, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text in it"):
        tokenize_files(text.find_sources([tmp_path / "empty"]), BYTES, tmp_path / "cache")


def test_cache_that_cannot_be_written_names_the_flag(tmp_path):
    file = write(tmp_path / "a", "one")
    with pytest.raises(UserError, match="--cache-dir"):
        tokenize_files([file], BYTES, file / "below-a-file")


def _tokenize(file, cache, counter):
    original = token_files._ShardFile.finish

    def counted(self):
        with counter.get_lock():
            counter.value += 1
        return original(self)

    token_files._ShardFile.finish = counted
    tokenize_files([file], BYTES, cache)


def test_processes_that_start_together_tokenize_once(tmp_path):
    context = multiprocessing.get_context("fork")
    file, counter = write(tmp_path / "a", "line\n" * 200_000), context.Value("i", 0)
    workers = [
        context.Process(target=_tokenize, args=(file, tmp_path / "cache", counter))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4 and counter.value == 1


def test_standard_library_is_found_in_a_fixed_mixed_order():
    files = stdlib_files()
    assert files == stdlib_files() and sum(p.stat().st_size for p in files) > 1_000_000
    assert files != sorted(files)
    assert not any("site-packages" in p.parts or "test" in p.parts for p in files)


def test_python_without_its_source_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError) as caught:
        stdlib_files()
    assert "--train-data" in str(caught.value) and "--use-toy-data" in str(caught.value)
