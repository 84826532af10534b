import collections
import copy
import faulthandler
import hashlib
import io
import os
import pickle
import signal
import struct
import time
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import equal

from checkpointing import file_format, safe_pickle
from checkpointing.file_format import Unreadable, open_verified, tensor_bytes, write_with_checksum
from checkpointing.safe_pickle import TensorRef

CONTENT = {"a": torch.arange(3.0), "n": 1, "d": {"s": "ü", "l": [None, True, 0.5]}}
START = b"\x80\x02"  # of every pickle of protocol 2


def seal(archive: bytes) -> bytes:
    """The archive with the seal that its bytes deserve."""
    assert archive.endswith(b"\0\0")
    sealed = archive[:-2] + struct.pack("<H", 71)
    return sealed + b"sha256:" + hashlib.sha256(sealed).hexdigest().encode()


def zipped(*members, tamper=lambda archive: None, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", **options) as archive:
        warnings.simplefilter("ignore")  # doubled names
        for name, content in members:
            archive.writestr(name, content)
        tamper(archive)
    return buffer.getvalue()


def members(pickled, numbers=bytes(8)):
    return ("a/data.pkl", pickled), ("a/byteorder", b"little"), ("a/data/0", numbers)


def sealed(pickled, numbers=bytes(8)):
    return seal(zipped(*members(pickled, numbers)))


@dataclass(frozen=True)
class Claim:
    """A tensor as a pickle describes it, true or not; it is true of 8 bytes."""

    shape: Any = (2,)
    stride: Any = (1,)
    offset: Any = 0
    count: Any = 2
    key: Any = "0"
    dtype: Any = torch.FloatStorage


class Numbers(Claim):
    pass


class Describe(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Numbers):
            return ("storage", obj.dtype, obj.key, "cpu", obj.count)
        return None

    def reducer_override(self, obj):
        if type(obj) is not Claim:
            return NotImplemented
        numbers = Numbers(**vars(obj))
        hooks = collections.OrderedDict()
        arguments = (numbers, obj.offset, obj.shape, obj.stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


def described(tree):
    buffer = io.BytesIO()
    Describe(buffer, 2).dump(tree)
    return buffer.getvalue()


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def read(path):
    with open_verified(path) as contents:
        return contents.read(contents.tree)


def refused(path, *parts):
    with pytest.raises(Unreadable) as caught:
        read(path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 400 + len(str(path))
    assert said.startswith(f"{path}: ") and all(part in said for part in parts), said


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "c.pt"
    write_with_checksum(path, CONTENT)
    return path


@contextmanager
def takes_little_memory(monkeypatch):
    """Fails where a tensor takes 1 MB or Python 4 MB."""
    sizes, original = [0], torch.empty

    def empty(*shape, **options):
        made = original(*shape, **{**options, "device": "meta"})
        sizes.append(made.nbytes)
        return original(*shape, **options) if made.nbytes < 1e6 else original(0)

    monkeypatch.setattr(torch, "empty", empty)
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(sizes) < 1e6 and peak < 4e6


@pytest.fixture
def little_memory(monkeypatch):
    with takes_little_memory(monkeypatch):
        yield


# The seal


def test_a_flipped_bit_at_any_place_is_refused(small):
    whole = small.read_bytes()
    for i in range(len(whole)):
        small.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(Unreadable):
            read(small)
    small.write_bytes(whole)
    assert equal(read(small), CONTENT)


def test_every_other_value_of_a_byte_is_refused(small):
    whole = small.read_bytes()
    seal_at = len(whole) - 71
    numbers_at = whole.index(struct.pack("<3f", 0, 1, 2))
    for i in (0, numbers_at + 2, seal_at - 1, seal_at, seal_at + 7, len(whole) - 1):
        for value in set(range(256)) - {whole[i]}:
            small.write_bytes(whole[:i] + bytes([value]) + whole[i + 1 :])
            with pytest.raises(Unreadable):
                read(small)


def test_a_file_cut_off_anywhere_is_refused(small):
    whole = small.read_bytes()
    for n in range(len(whole)):
        small.write_bytes(whole[:n])
        with pytest.raises(Unreadable):
            read(small)


@pytest.mark.parametrize("more", [b"\0", b"\n", b"PK", bytes(71), bytes(100_000)])
def test_appended_bytes_are_refused(small, more):
    small.write_bytes(small.read_bytes() + more)
    refused(small, "no checksum at its end")


def test_a_zeroed_tail_of_any_length_is_refused(small):
    whole = small.read_bytes()
    for n in [*range(1, 200), *range(200, len(whole), 7), len(whole)]:
        small.write_bytes(whole[:-n] + bytes(n))
        with pytest.raises(Unreadable):
            read(small)


def test_a_file_twice_or_without_its_middle_is_refused(small):
    whole = small.read_bytes()
    for content in (whole + whole, whole[:500] + whole[600:], whole[1:]):
        small.write_bytes(content)
        refused(small, "checksum")


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"<html>404</html>" * 9, b"sha256:", b"sha256:" + b"0" * 64, b"\0" * 71],
)
def test_what_never_was_a_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    refused(tmp_path / "c.pt")


def test_a_sealed_file_that_is_no_archive_is_refused(tmp_path):
    for body in (b"", b"x" * 1000):
        (tmp_path / "c.pt").write_bytes(seal(body + b"\0\0"))
        refused(tmp_path / "c.pt", "not a checkpoint")


def test_an_unsealed_file_of_torch_is_refused(tmp_path):
    torch.save(CONTENT, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "no checksum at its end")


@pytest.mark.timeout(10)
def test_what_is_not_a_plain_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    refused(tmp_path, "not a plain file")
    refused(tmp_path / "fifo", "not a plain file")
    refused("/dev/zero", "not a plain file")
    for name in ("none.pt", "loop", "dangling"):
        refused(tmp_path / name, "no such checkpoint")


# What was written comes back


def test_torch_and_zipfile_read_it_too(small):
    for mmap in (False, True):
        assert equal(torch.load(small, weights_only=True, mmap=mmap), CONTENT)
    with zipfile.ZipFile(small) as archive:
        assert archive.testzip() is None
        seal_stored = archive.comment
    body = small.read_bytes()[:-71]
    assert seal_stored == b"sha256:" + hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("storage", safe_pickle._DTYPES)
def test_every_type_and_shape_comes_back(tmp_path, storage):
    dtype = safe_pickle._DTYPES[storage]
    shapes = [(), (0,), (3,), (2, 3), (1, 1, 4), (0, 3)]
    content = {
        str(shape): torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
        for shape in shapes
    }
    write_with_checksum(tmp_path / "c.pt", content)
    assert equal(read(tmp_path / "c.pt"), content)
    with open_verified(tmp_path / "c.pt") as contents:
        assert tensor_bytes(contents.tree) == tensor_bytes(content) == 14 * dtype.itemsize
        stored = contents.tree["(2, 3)"]
    assert isinstance(stored, TensorRef) and stored.shape == (2, 3) and stored.dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 5e-324, 1.7e308])
def test_every_bit_of_a_number_comes_back(tmp_path, value):
    tensor = torch.tensor([value], dtype=torch.float64)
    write_with_checksum(tmp_path / "c.pt", {"t": tensor, "f": value})
    back = read(tmp_path / "c.pt")
    assert back["t"].view(torch.int64).item() == tensor.view(torch.int64).item()
    assert struct.pack("<d", back["f"]) == struct.pack("<d", value)


@pytest.mark.parametrize("value", [2**31, -(2**63), 2**1000, "a\nb\0", "", "\U0001f339", [], {}])
def test_plain_values_come_back(tmp_path, value):
    write_with_checksum(tmp_path / "c.pt", {"v": value})
    assert equal(read(tmp_path / "c.pt"), {"v": value})


def test_an_empty_tensor_comes_back_wherever_its_zero_is(tmp_path):
    write_with_checksum(tmp_path / "c.pt", {"t": torch.zeros(2, 0, 3)})
    assert read(tmp_path / "c.pt")["t"].shape == (2, 0, 3)


def test_a_part_of_a_larger_tensor_comes_back(tmp_path):
    write_with_checksum(tmp_path / "c.pt", {"t": torch.arange(10)[4:7]})
    assert read(tmp_path / "c.pt")["t"].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, 3).t(), torch.zeros(()).expand(3), torch.arange(9)[::2]]
)
def test_tensors_with_gaps_are_refused(tmp_path, tensor):
    write_with_checksum(tmp_path / "c.pt", {"t": tensor})
    refused(tmp_path / "c.pt", "not in their order")


def test_one_tensor_is_read_without_the_others(small):
    with open_verified(small) as contents:
        part = contents.read({"a": contents.tree["a"]})
    assert part["a"].tolist() == [0, 1, 2] and part.keys() == {"a"}


def test_an_open_file_stays_the_old_one_when_it_is_replaced(small, tmp_path):
    write_with_checksum(tmp_path / "new.pt", {"a": torch.full((3,), 9.0)})
    with open_verified(small) as contents:
        os.replace(tmp_path / "new.pt", small)
        assert equal(contents.read(contents.tree), CONTENT)
    assert read(small)["a"].tolist() == [9, 9, 9]


def test_a_file_that_shrinks_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    write_with_checksum(path, {"a": torch.zeros(100_000)})
    with pytest.raises(Unreadable, match="shrinks"), open_verified(path) as contents:
        os.truncate(path, 50_000)
        contents.read(contents.tree["a"])


# Hostile files. All of them are sealed, so what refuses them is not the checksum.


def test_a_true_claim_is_read(tmp_path, little_memory):
    (tmp_path / "c.pt").write_bytes(sealed(described({"t": Claim()}), struct.pack("<2f", 1, 2)))
    assert read(tmp_path / "c.pt")["t"].tolist() == [1, 2]


SYSTEM = text("touch evil") + b"\x85R."
RUNS = {
    "system": START + b"cposix\nsystem\n" + SYSTEM,
    "eval": START + b"cbuiltins\neval\n" + text("open('evil', 'w')") + b"\x85R.",
    "exec": START + b"c__builtin__\nexec\n" + text("open('evil', 'w')") + b"\x85R.",
    "open": START + b"cio\nopen\n(" + text("evil") + text("w") + b"tR.",
    "STACK_GLOBAL": START + text("posix") + text("system") + b"\x93" + SYSTEM,
    "INST": START + b"(" + text("touch evil") + b"iposix\nsystem\n.",
    "OBJ": START + b"(cposix\nsystem\n" + text("touch evil") + b"o.",
    "below dicts": START + b"}" + text("model") + b"cposix\nsystem\n" + SYSTEM[:-1] + b"s.",
    "unused": START + b"cposix\nsystem\n" + SYSTEM[:-1] + b"}.",
    "nested pickle": START
    + b"cpickle\nloads\nc_codecs\nencode\n("
    + text("cposix\nsystem\n(S'touch evil'\ntR.")
    + text("latin1")
    + b"tR\x85R.",
}


@pytest.mark.parametrize("name", RUNS)
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pickle.loads(RUNS[name])
    assert os.path.exists("evil"), "the pickle is harmless"
    os.remove("evil")
    (tmp_path / "c.pt").write_bytes(sealed(RUNS[name]))
    refused(tmp_path / "c.pt")
    assert not os.path.exists("evil")


ODD_PICKLES = {
    "empty": b"",
    "no end": START + b"}",
    "nothing on the stack": START + b".",
    "unknown instruction": START + b"}\xff.",
    "protocol": b"\x80\x63}.",
    "BUILD": START + b"}}" + text("evil") + b"Nsb.",
    "NEWOBJ": START + b"ccollections\nOrderedDict\n)\x81.",
    "BINBYTES": START + b"}" + text("a") + b"B\1\0\0\0xs.",
    "BYTEARRAY8": START + b"}" + text("a") + b"\x96" + struct.pack("<Q", 2**62) + b"s.",
    "LONG4": START + b"}" + text("a") + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"s.",
    "text of 4 GB": START + b"}X\xff\xff\xff\xff.",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "unknown memo": START + b"h\7.",
    "EXT1": START + b"\x82\1.",
    "PERSID": START + b"Px\n.",
    "persistent id of no tensor": START + b"NQ.",
    "call of a type": START + b"ctorch\nFloatStorage\n)R.",
    "OrderedDict with arguments": START + b"ccollections\nOrderedDict\n}\x85R.",
    "numbers in place of a tensor": described({"t": Numbers()}),
    "no tensor": START + b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "function as a value": START + b"}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\ns.",
    "tuple": described({"a": (1, 2)}),
    "bytes": described({"a": b"x"}),
    "set": described({"a": {1}}),
    "complex": described({"a": 1j}),
    "number as a key": described({1: "a"}),
    "None as a key": described({"d": {None: "a"}}),
    "dtype": described({"a": torch.float32}),
    "deep": described([[[[[[[[[[[]]]]]]]]]]]),
    "deep dicts": described({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}),
}


@pytest.mark.parametrize("name", ODD_PICKLES)
def test_odd_pickles_are_refused(tmp_path, little_memory, name):
    (tmp_path / "c.pt").write_bytes(sealed(ODD_PICKLES[name]))
    refused(tmp_path / "c.pt")


def test_a_huge_memo_index_takes_no_memory(tmp_path, little_memory):
    (tmp_path / "c.pt").write_bytes(sealed(START + b"}r\xff\xff\xff\x7f."))
    assert read(tmp_path / "c.pt") == {}


def laughs(width, depth):
    level = ["ha"] * width
    for _ in range(depth - 1):
        level = [level] * width
    return level


@pytest.mark.parametrize("width, depth", [(10, 8), (1001, 3), (2, 40)])
def test_few_bytes_that_stand_for_many_values_are_refused(tmp_path, little_memory, width, depth):
    (tmp_path / "c.pt").write_bytes(sealed(described({"a": laughs(width, depth)})))
    refused(tmp_path / "c.pt", "")


def test_a_list_within_itself_is_refused(tmp_path, little_memory):
    knot = []
    knot += [knot] * 100
    (tmp_path / "c.pt").write_bytes(sealed(described(knot)))
    refused(tmp_path / "c.pt", "")


FALSE_CLAIMS = {
    "10^12 elements": dict(shape=(10**12,), count=10**12),
    "10^12 elements of few": dict(shape=(10**12,)),
    "more numbers than bytes": dict(count=3),
    "less numbers than bytes": dict(count=1, shape=(1,)),
    "other type": dict(dtype=torch.DoubleStorage),
    "shape beyond its numbers": dict(shape=(3,)),
    "product beyond its numbers": dict(shape=(2, 2), stride=(2, 1)),
    "offset beyond its numbers": dict(offset=1),
    "negative offset": dict(offset=-1),
    "huge offset": dict(offset=2**70),
    "negative shape": dict(shape=(-1,)),
    "two negative sizes": dict(shape=(-1, -2), stride=(2, 1)),
    "huge shape": dict(shape=(2**70,)),
    "huge empty shape": dict(shape=(0, 2**70), stride=(1, 1)),
    "shape of floats": dict(shape=(2.0,)),
    "shape of booleans": dict(shape=(True,)),
    "shape is no tuple": dict(shape=2),
    "shape is text": dict(shape="2"),
    "gaps": dict(shape=(1, 2), stride=(1, 2)),
    "expanded": dict(shape=(2,), stride=(0,)),
    "transposed": dict(shape=(2, 2), stride=(1, 2)),
    "negative stride": dict(stride=(-1,)),
    "too few strides": dict(stride=()),
    "too many strides": dict(stride=(1, 1)),
    "unknown numbers": dict(key="1"),
    "path as key": dict(key="../data.pkl"),
    "negative count": dict(count=-2),
    "count is a float": dict(count=2.0),
    "no type": dict(dtype="float"),
}


@pytest.mark.parametrize("name", FALSE_CLAIMS)
def test_false_claims_of_tensors_are_refused(tmp_path, little_memory, name):
    (tmp_path / "c.pt").write_bytes(sealed(described({"t": Claim(**FALSE_CLAIMS[name])})))
    refused(tmp_path / "c.pt")


def test_tensors_that_share_their_numbers_are_refused(tmp_path, little_memory):
    claim = dict(shape=(25_000,), count=25_000)  # 100 kB, and 100 tensors of it 10 MB
    tree = {f"t{i}": Claim(**claim) for i in range(100)}
    (tmp_path / "c.pt").write_bytes(sealed(described(tree), bytes(100_000)))
    refused(tmp_path / "c.pt", "share")


def overlapping(archive):
    for i in range(1, 60):
        archive.filelist.append(copy.copy(archive.filelist[2]))
        archive.filelist[-1].filename = f"a/data/{i}"


def of_size(index, size):
    def tamper(archive):
        archive.filelist[index].file_size = archive.filelist[index].compress_size = size

    return tamper


def elsewhere(archive):
    archive.filelist[2].header_offset = 2**40


def extra_length(archive):
    archive.fp.seek(archive.filelist[2].header_offset + 28)
    archive.fp.write(b"\xff\xff")
    archive.fp.seek(0, os.SEEK_END)


def encrypted(archive):
    archive.filelist[0].flag_bits |= 1


TRUE = described({"t": Claim()})
OF_10_KB = described({"t": Claim(shape=(2500,), count=2500)})
OF_1_TB = described({"t": Claim(count=10**12 // 4)})
ODD_ARCHIVES = {
    "nothing in it": zipped(),
    "bomb": zipped(*members(TRUE, bytes(10**7)), compression=zipfile.ZIP_DEFLATED),
    "bomb of a pickle": zipped(
        *members(START + b"(" * 10**6 + b"."), compression=zipfile.ZIP_DEFLATED
    ),
    "LZMA": zipped(*members(TRUE), compression=zipfile.ZIP_LZMA),
    "doubled": zipped(*members(TRUE), ("a/data/0", bytes(8))),
    "doubled pickle": zipped(*members(TRUE), ("a/data.pkl", TRUE)),
    "overlapping": zipped(*members(OF_10_KB, bytes(10_000)), tamper=overlapping),
    "numbers of 10^12 bytes": zipped(*members(OF_1_TB), tamper=of_size(2, 10**12)),
    "pickle of 10^12 bytes": zipped(*members(TRUE), tamper=of_size(0, 10**12)),
    "numbers beyond the file": zipped(*members(TRUE), tamper=elsewhere),
    "header beyond the file": zipped(*members(TRUE), tamper=extra_length),
    "encrypted": zipped(*members(TRUE), tamper=encrypted),
    "no pickle": zipped(*members(TRUE)[1:]),
    "no byte order": zipped(members(TRUE)[0], members(TRUE)[2]),
    "no numbers": zipped(*members(TRUE)[:2]),
    "big-endian": zipped(members(TRUE)[0], ("a/byteorder", b"big"), members(TRUE)[2]),
    "no folder": zipped(*((name[2:], content) for name, content in members(TRUE))),
    **{
        f"part named {name!r}": zipped(*members(TRUE), (name, b"x"))
        for name in (
            *("../../x", "a/../x", "/etc/x", "b/data/0", "a/data/../../x", "a/data/0/x"),
            *("a/code/x.py", "a/constants.pkl", "a/data/", "x\ny", "a\\..\\x"),
        )
    },
}


@pytest.mark.parametrize("name", ODD_ARCHIVES)
def test_odd_archives_are_refused(tmp_path, little_memory, name):
    (tmp_path / "c.pt").write_bytes(seal(ODD_ARCHIVES[name]))
    refused(tmp_path / "c.pt")
    assert os.listdir(tmp_path) == ["c.pt"]


def test_numbers_that_begin_beyond_the_file_are_refused_before_they_get_memory(tmp_path):
    (tmp_path / "c.pt").write_bytes(seal(ODD_ARCHIVES["header beyond the file"]))
    refused(tmp_path / "c.pt", "beyond the end of the file")


def test_a_description_beyond_its_limit_is_refused_unread(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr(file_format, "LARGEST_PICKLE", 1000)
    (tmp_path / "c.pt").write_bytes(sealed(b"N" * 1001))
    refused(tmp_path / "c.pt", "absurd size")
    (tmp_path / "c.pt").write_bytes(sealed(START + b"}" + text("x" * 989) + b"Ns."))
    assert read(tmp_path / "c.pt") == {"x" * 989: None}  # 1000 bytes


def test_every_single_change_of_a_pickle_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = described({"t": Claim(), "l": [1, 2.5, "x", None]})
    accepted = 0
    for i in range(2, len(pickled)):
        for change in (1, 0x20, 0x80):
            altered = pickled[:i] + bytes([pickled[i] ^ change]) + pickled[i + 1 :]
            (tmp_path / "c.pt").write_bytes(sealed(altered))
            try:
                accepted += type(read("c.pt")) is dict
            except Unreadable as refusal:
                assert "\n" not in str(refusal)
    assert 0 < accepted < len(pickled)


def test_few_bytes_that_stand_for_a_long_key_are_refused(tmp_path, monkeypatch):
    (tmp_path / "c.pt").write_bytes(sealed(described({"t": Claim(key=laughs(10, 6))})))
    with takes_little_memory(monkeypatch):
        refused(tmp_path / "c.pt")


def test_a_deep_key_does_not_crash_the_process(tmp_path):
    (tmp_path / "c.pt").write_bytes(sealed(START + b"})" + b"\x85" * 200_000 + b"Ns."))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            read(tmp_path / "c.pt")
        except Unreadable:
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    assert os.WEXITSTATUS(status) == 0


def test_a_refusal_is_one_line_whatever_the_file_says(tmp_path):
    (tmp_path / "c.pt").write_bytes(sealed(START + b"cevil\r\x1b[2J\nx\n."))
    with pytest.raises(Unreadable) as caught:
        read(tmp_path / "c.pt")
    assert str(caught.value).isprintable()


def test_a_shape_of_absurd_numbers_takes_no_time(tmp_path):
    shape = (2**2000,) * 8000
    for hostile in (shape, (1,) * 9, (2**62, 0)):
        (tmp_path / "c.pt").write_bytes(sealed(described({"t": Claim(shape=hostile)})))
        start = time.perf_counter()
        refused(tmp_path / "c.pt", "a tensor of impossible shape")
        assert time.perf_counter() - start < 5
