import subprocess
import sys
import types

import pytest
import torch
from conftest import CPU, ROOT

from runtime import device as device_module
from runtime.device import (
    Device,
    has_bf16_units,
    pick_device,
    seed_dropout,
    tune,
)
from runtime.setting_fields import UserError


def test_without_gpu_auto_is_the_cpu_in_float32_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device = pick_device()
    assert (device.torch_device.type, device.precision, device.amp) == ("cpu", "fp32", False)
    assert "no CUDA or MPS device found" in device.description


@pytest.mark.parametrize("bf16, wanted", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_gets_bf16_where_it_has_it_and_each_rank_its_own(monkeypatch, bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    device = pick_device(local_rank=3)
    assert device.torch_device == torch.device("cuda", 3) and device.precision == wanted
    assert pick_device("cuda:1", local_rank=3).torch_device.index == 1
    with pytest.raises(UserError, match="GPU 4 wanted, but this machine has 4"):
        pick_device(local_rank=4)


@pytest.mark.parametrize(
    "name, said", [("tpu", "not one of"), ("cuda", "finds none here; try --device cpu")]
)
def test_a_device_that_is_not_there_is_an_error(monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        pick_device(name)


def test_dropout_seed_decides_the_masks():
    x, masks = torch.ones(100), []
    for seed in (3, 4, 3):
        seed_dropout(CPU, seed)
        masks.append(torch.nn.functional.dropout(x))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("found, has", [({"avx512_bf16": True}, True), ({"avx512_f": True}, False)])
def test_bf16_units_of_a_cpu_are_asked_for(monkeypatch, found, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    has_bf16_units.cache_clear()
    assert has_bf16_units(torch.device("cpu")) is has
    has_bf16_units.cache_clear()


def test_memory_is_kept_unless_it_is_to_be_spared(monkeypatch):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda *a: calls.append(a))
    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: library)
    tune(CPU, sparing=True)
    assert calls == [(-3, 2**20)]  # M_MMAP_THRESHOLD: blocks from 1 MB on go back at once
    tune(CPU)
    assert calls[1:] == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD: never
    monkeypatch.setattr(device_module.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    tune(CPU)  # another C library


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about Linux's memory")
def test_freed_memory_is_used_again_without_new_pages():
    # In a process of its own, so that nothing else moves the heap. 50 MB are 12,800 pages.
    code = (
        "import resource, torch; from runtime import device; device.tune(device.pick_device('cpu'))\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for i in range(20):\n"
        "    if i == 10: before = faults()\n"
        "    x = torch.ones(50 << 18); del x\n"
        "print(faults() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    assert int(ran.stdout) < 1000


@pytest.mark.parametrize("precision, wanted", [("bf16", "high"), ("fp32", "highest")])
def test_tf32_is_for_those_who_did_not_ask_for_float32(monkeypatch, precision, wanted):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    tune(Device(torch.device("cuda", 0), precision, "test"))
    assert set_to == [wanted]
