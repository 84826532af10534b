import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from helpers import llmc, npy

from corpus.hashing import hash_of, mix
from corpus.shards import JoinedTokens, TokenShards, ToyTokens
from runtime.setting_fields import UserError


def refused(path, *parts, vocab_size=100):
    with pytest.raises(UserError) as caught:
        source = TokenShards([path], vocab_size)
        source.read(0, source.num_tokens)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4"])
def test_npy_ids_come_back(tmp_path, dtype):
    source = TokenShards([npy(tmp_path / "a.npy", range(50), dtype)], 100)
    assert source.num_tokens == 50
    assert source.read(7, 10).tolist() == list(range(7, 17))


@pytest.mark.parametrize("magic, version, dtype", [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc_ids_come_back(tmp_path, magic, version, dtype):
    source = TokenShards([llmc(tmp_path / "a.bin", range(50), magic, version, dtype)], 100)
    assert source.read(0, 50).tolist() == list(range(50))


def plain(path, ids, dtype):
    path.write_bytes(np.asarray(ids).astype(dtype).tobytes())
    return path


DRAW = np.random.default_rng(5)
WORDS = (50_000 * DRAW.random(3000) ** 3).astype(int)  # frequent ids are low, as in real text
STREAMS = {  # ids of tokenizers of many sizes
    "gpt2": WORDS,
    "200,000 ids": 4 * WORDS,
    "65,536 ids": WORDS * 65_535 // 50_000,
    "evenly drawn": DRAW.integers(0, 50257, 3000),
    "characters": WORDS % 61,
    "bytes, and an end token": np.append(WORDS % 256, 256),
    "counting": np.arange(3000),
}


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("name", STREAMS)
def test_width_of_ids_without_header_is_told_from_the_data(tmp_path, name, dtype):
    ids = STREAMS[name]
    if ids.max() >= 65_536 and dtype == "<u2":
        return
    for count in (100, 101, 1000, len(ids)):
        source = TokenShards([plain(tmp_path / "a.bin", ids[:count], dtype)], 200_000)
        assert source.read(0, source.num_tokens).tolist() == ids[:count].tolist()
        assert len(source.notes) == (dtype == "<u4")  # the unusual one is said


@pytest.mark.parametrize("name", STREAMS)
def test_small_files_of_uint16_need_no_flag(tmp_path, name):
    for count in (1, 2, 3, 5, 31):
        ids = STREAMS[name][7 : 7 + count] % 65_536
        source = TokenShards([plain(tmp_path / "a.bin", ids, "<u2")], 65_536)
        assert source.read(0, count).tolist() == ids.tolist()


def test_ids_of_other_widths_are_refused_with_the_flag_that_says_it(tmp_path):
    refused(plain(tmp_path / "few.bin", WORDS[:9], "<u4"), "too few to tell", "--bin-dtype")
    refused(plain(tmp_path / "u8.bin", WORDS % 61, "u1"), "as in uint8 ids", "--bin-dtype")
    refused(plain(tmp_path / "odd.bin", WORDS[:2999] % 61, "u1"), "as in uint8 ids")
    refused(plain(tmp_path / "i64.bin", WORDS, "<u8"), "as in int64 ids", "convert")
    cyrillic = "".join(chr(0x430 + i % 32) for i in WORDS)
    (tmp_path / "cyrillic.bin").write_text(cyrillic, encoding="utf-8")
    refused(tmp_path / "cyrillic.bin", "text; use --train-data")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_the_width_that_is_given_is_taken(tmp_path, dtype):
    for count in (1, 9, 3000):
        path = plain(tmp_path / "a.bin", WORDS[:count] % 61, np.dtype(dtype).newbyteorder("<"))
        source = TokenShards([path], 100, bin_dtype=dtype)
        assert source.read(0, count).tolist() == (WORDS[:count] % 61).tolist()
    path.write_bytes(bytes(3))
    if dtype != "uint8":
        with pytest.raises(UserError, match=f"odd size .3 bytes.*{dtype} ids take"):
            TokenShards([path], 100, bin_dtype=dtype)


def test_first_ids_that_look_like_the_start_of_another_format_are_ids(tmp_path):
    for first in (0x0280, 0x0480, 0x0580, 0x8B1F):  # pickles, gzip: " time" is id 640 of GPT-2
        ids = [first, *WORDS[:99].tolist()]
        assert TokenShards([plain(tmp_path / "a.bin", ids, "<u2")], 50257).read(0, 1) == [first]


def test_bin_without_header_is_uint16(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.arange(50, dtype="<u2").tobytes())
    source = TokenShards([tmp_path / "a.bin"], 100)
    assert source.read(0, 50).tolist() == list(range(50))


def test_folders_and_globs_are_read_in_name_order(tmp_path):
    for name in ("b", "a", "c"):
        npy(tmp_path / f"{name}.npy", [ord(name)])
    (tmp_path / "notes.json").write_text("{}")
    for path in (tmp_path, tmp_path / "*.npy"):
        assert TokenShards([path], 200).read(0, 3).tolist() == [97, 98, 99]
    refused(tmp_path / "*.bin", "no token shard")


def test_joined_ranges_are_one_stream(tmp_path):
    source = TokenShards([npy(tmp_path / "a.npy", range(100))], 100)
    joined = JoinedTokens([(source, 90, 100), (source, 10, 15), (source, 50, 60)])
    wanted = [*range(90, 100), *range(10, 15), *range(50, 60)]
    for start in range(25):
        for count in (0, 1, 7, 25 - start):
            assert (
                joined.read(start, min(count, 25 - start)).tolist() == wanted[start : start + count]
            )


def test_shards_are_one_stream(tmp_path):
    files = [npy(tmp_path / f"{i}.npy", range(10 * i, 10 * i + 10)) for i in range(3)]
    source = TokenShards(files, 100)
    for start in range(30):
        for count in (0, 1, 5, 30 - start):
            stop = min(start + count, 30)
            assert source.read(start, stop - start).tolist() == list(range(start, stop))


def test_ids_outside_of_the_vocabulary_are_named_with_file_and_position(tmp_path):
    refused(npy(tmp_path / "a.npy", [1, 2, 3, 100, 4]), "token 3 is 100", "0..99")
    refused(npy(tmp_path / "b.npy", [1, -7], "<i4"), "token 1 is -7")


def test_what_is_not_a_shard_is_refused_by_name(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    refused(tmp_path / "none.npy", "no such file")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "no token shard")
    refused(file("html.npy", b"<!DOCTYPE html><html>"), "neither", "--train-data")
    refused(file("html.bin", b"<!DOCTYPE html><html>"), "text", "--train-data")
    refused(file("gzip.bin", b"\x1f\x8b\x08\0" * 600), "gzip data")
    refused(file("odd.bin", b"\1\0\2\0\3"), "odd size (5 bytes)")
    refused(file("empty.bin", b""), "an empty file")
    refused(llmc(tmp_path / "m.bin", [1, 2], magic=20240521), "a header like llm.c's")
    refused(file("empty.npy", b""), "neither")
    refused(file("head.npy", b"\x93NUMPY\x01\0\x10\0bad"), "damaged .npy header")
    refused(npy(tmp_path / "f.npy", [0.5], "<f4"), "float32", "expected 1-D uint16")
    refused(npy(tmp_path / "2d.npy", np.zeros((2, 3))), "(2, 3)")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(tmp_path / "pickle.npy", "object")
    refused(llmc(tmp_path / "v.bin", [1, 2], version=3), "version 3")
    refused(llmc(tmp_path / "n.bin", [1, 2], count=2_000_000), "its header stands for")
    refused(llmc(tmp_path / "neg.bin", [1, 2], count=-4), "its header stands for")
    refused(file("short.bin", struct.pack("<3i", 20240520, 1, 5)), "1024 bytes")


def test_truncated_or_grown_shard_is_refused(tmp_path):
    path = npy(tmp_path / "a.npy", range(50))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    refused(path, "cut off")
    path.write_bytes(whole + b"12")
    refused(path, "its header stands for")


def test_shard_that_shrinks_while_open_gives_an_error_not_a_crash(tmp_path):
    path = npy(tmp_path / "a.npy", range(50))
    source = TokenShards([path], 100)
    os.truncate(path, 140)
    with pytest.raises(UserError, match="did it shrink"):
        source.read(0, 50)


def test_fingerprint_follows_the_content(tmp_path):
    prints = {
        TokenShards([npy(tmp_path / f"{i}.npy", [1, 2, i])], 100).fingerprint for i in range(4)
    }
    again = TokenShards([npy(tmp_path / "9.npy", [1, 2, 0])], 100).fingerprint
    assert len(prints) == 4 and again in prints


def test_toy_tokens_are_the_same_at_each_visit_and_cover_the_vocabulary():
    toy = ToyTokens(10_000, 50, seed=1)
    assert np.array_equal(toy.read(100, 40), toy.read(0, 1000)[100:140])
    assert np.array_equal(np.unique(toy.read(0, 10_000)), np.arange(50))
    assert not np.array_equal(toy.read(0, 100), ToyTokens(10_000, 50, seed=2).read(0, 100))


def test_mix_is_splitmix64():
    # First three outputs of Vigna's splitmix64.c from state 0: mix of multiples of the golden gamma.
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(x) for x in mix(state)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_hash_of_tells_numbers_apart():
    assert len({hash_of(1, 23), hash_of(12, 3), hash_of(1, 2, 3), hash_of(123)}) == 4


def test_an_npy_of_other_integers_is_refused_with_a_command_that_converts_it(tmp_path):
    path = npy(tmp_path / "my a.npy", np.arange(40).reshape(2, 20), "<i8")
    with pytest.raises(UserError, match=r"holds int64 of shape .*; convert it: ") as caught:
        TokenShards([path], 100)
    command = str(caught.value).split("convert it: python")[1]
    subprocess.run(["sh", "-c", sys.executable + command], check=True)
    source = TokenShards([tmp_path / "my a.uint32.npy"], 100)
    assert source.read(0, 40).tolist() == list(range(40))


def test_the_largest_id_is_seen_anywhere_in_a_small_stream(tmp_path):
    for place in (0, 999, 1000, 2999):
        ids = np.arange(3000) % 60
        ids[place] = 97
        files = [npy(tmp_path / f"{i}.npy", ids[1000 * i : 1000 * i + 1000]) for i in range(3)]
        assert TokenShards(files, 50257).largest_id_seen() == 97
    assert TokenShards([npy(tmp_path / "none.npy", [])], 10).largest_id_seen() == -1
