import json
import multiprocessing
import os
import random
import subprocess

import numpy as np
import pytest

from corpus import find_text as text_files
from corpus import read_text as text
from corpus import tokenizing as token_files
from corpus import tokenizing_workers as workers
from corpus.find_text import stdlib_files
from corpus.tokenizer import build_tokenizer
from corpus.tokenizing import tokenize_files
from runtime.setting_fields import UserError

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
        patch.setattr(workers, "_encode", lambda *a: pytest.fail("tokenized again"))
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
        tokenize_files(text_files.find_sources([tmp_path / "empty"]), BYTES, tmp_path / "cache")


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
    monkeypatch.setattr(text_files.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError) as caught:
        stdlib_files()
    assert "--train-data" in str(caught.value) and "--use-toy-data" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.Jsonl"])
def test_kinds_are_told_without_regard_to_case(tmp_path, name):
    file = write(tmp_path / name, json.dumps({"text": "one"}) + "\n")
    assert np.load(only([file], BYTES, tmp_path / "cache")).tolist() == [*b"one", 256]
    assert text_files.kind_of(tmp_path / "A.TXT.GZ") == (".txt", ".gz")
    assert text_files.find_sources([tmp_path]) == [file]


def test_files_left_out_of_a_folder_are_counted_with_the_reason(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/B.MD", "c.pdf", "d.pdf", "e.csv", "LICENSE"):
        write(folder / name, "words")
    write(folder / "empty.txt", "")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "again").symlink_to(folder / "sub")
    os.mkfifo(folder / "pipe.txt")
    files, (note,) = text_files.find_texts([folder])
    assert files == [folder / "a.txt", folder / "sub/B.MD"]
    assert note.startswith(f"{folder}: 2 files read, 8 left out (2 *.pdf, ")
    for reason in ("1 *.csv", "1 without ending", "1 empty", "1 broken link", "1 link to a folder"):
        assert reason in note or ", ..." in note
    for name in (".git/hooks/a.txt", ".b.txt", "._a.txt", "node_modules/x/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "words")
    again, (note,) = text_files.find_texts([folder])
    assert again == files and "3 hidden" in note and "12 left out" in note
    inside = folder / ".git"  # asked for by name, it is read
    assert text_files.find_texts([inside])[0] == [inside / "hooks/a.txt"]
    (tmp_path / "only.txt").write_text("words")
    assert text_files.find_texts([tmp_path / "only.txt"]) == ([tmp_path / "only.txt"], [])


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", b'[{"text": "x"}]', ".jsonl"),
        ("a.CSV", b"a,b", ".jsonl"),
        ("a.zip", b"PK\x03\x04", "unpack it"),
        ("a.tar.gz", b"\x1f\x8b", "unpack it"),
        ("a.npy", b"\x93NUMPY", "--train-npy"),
        ("a.bin", b"\1\0", "--train-npy"),
        ("a.txt", b"\x93NUMPY\1\0", "--train-npy"),
        ("a.txt", b"\x1f\x8b\x08\0", "gzip data"),
        ("a.txt", b"PK\x03\x04", "zip archive"),
        ("a.txt", "words".encode("utf-32"), "is UTF-32; convert it first: iconv -f UTF-32 -t"),
        ("a.txt", "words".encode("utf-16"), "is UTF-16; convert it first: iconv -f UTF-16 -t"),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_do(tmp_path, name, content, said):
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        text_files.find_sources([file])
    assert said in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"is a pipe or a device.*write it to a file first"):
        text_files.find_sources([tmp_path / "pipe"])


def test_a_nul_byte_is_named_with_a_command_that_goes_on(tmp_path):
    file = write(tmp_path / "my a.txt", "words " * 500 + "\0" + "more " * 500)
    with pytest.raises(
        UserError,
        match=r"byte 3000 is NUL; .* to train on the rest, make another file and take this one away: ",
    ) as caught:
        list(text.read_texts(file))
    subprocess.run(
        [
            "sh",
            "-c",
            str(caught.value).split(
                "to train on the rest, make another file and take this one away: "
            )[1],
        ],
        check=True,
    )
    (clean,) = text.read_texts(tmp_path / "my a.clean.txt")
    assert clean.text == "words " * 500 + "more " * 500


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_mark_is_named_with_a_command_that_converts_it(tmp_path, order):
    file = write(tmp_path / "a.txt", ("words é " * 500).encode(f"utf-16-{order}"))
    with pytest.raises(UserError, match="UTF-16; convert it first: ") as caught:
        list(text.read_texts(file))
    subprocess.run(["sh", "-c", str(caught.value).split("convert it first: ")[1]], check=True)
    assert next(text.read_texts(tmp_path / "a.utf8.txt")).text == "words é " * 500


MARK = "<|endoftext|>"


@pytest.mark.parametrize("block", [8, 64, 1 << 20])
def test_a_separator_parts_the_documents_of_a_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    draw = random.Random(block)
    documents = [
        "".join(draw.choice(["word ", "two\n", "é", "<|end", "|>", "END"]) for _ in range(n))
        for n in (3, 50, 1, 400, 2, 2)
    ]
    documents = [f"x{d}y" for d in documents]
    for between in (MARK, MARK + "\n", MARK + "\r\n", f"{MARK}\n \n{MARK}\n"):
        file = write(tmp_path / "a.txt", between.join(documents) + MARK + "\n")
        found, parts = [], []
        for part in text.read_texts(file, MARK):
            assert part.n_bytes == len(part.text.encode())
            parts.append(part.text)
            if part.ends_document:
                found.append("".join(parts))
                parts = []
        assert found == documents and not parts


def test_the_usual_separator_is_noticed_and_taken_when_asked_for(tmp_path):
    file = write(tmp_path / "a.txt", f"one\n{MARK}\ntwo\n")
    plain, made = tokenize_files([file], BYTES, tmp_path / "cache")
    (note,) = token_files.note_on_documents(made, "")
    assert "stands 1 times" in note and f"--document-separator '{MARK}'" in note
    parted, made = tokenize_files([file], BYTES, tmp_path / "cache", MARK)
    assert np.load(parted[0]).tolist() == [*b"one\n", 256, *b"two\n", 256]
    assert (
        len(np.load(plain[0])) == 4 + 14 + 4 + 1 and token_files.note_on_documents(made, MARK) == []
    )
    _, made = tokenize_files([file], BYTES, tmp_path / "cache", "=====")
    assert "parts no text" in token_files.note_on_documents(made, "=====")[0]
