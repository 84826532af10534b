import pytest
import torch

from config import GPTConfig
from runtime.device import Device
from training.flops import flops_per_token, peak_flops, sheet_flops


def test_the_flops_of_gpt2_small_are_those_of_its_matrices_and_attention():
    matrices = 12 * (4 * 768**2 + 2 * 768 * 3072) + 50257 * 768
    assert flops_per_token(GPTConfig(), 1024) == 6 * matrices + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 125),
        ("Tesla T9000", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, tflops):
    assert sheet_flops(name) == (tflops and tflops * 1e12)


def test_a_cpu_is_measured_and_an_unknown_device_is_not():
    device = Device(torch.device("cpu"), "fp32", "")
    a = torch.ones(1024, 1024)
    with torch.profiler.profile() as profiler:
        found = peak_flops(device)
        a @ a
    products = [e for e in profiler.events() if e.name == "aten::mm"]
    fastest = min(e.time_range.elapsed_us() for e in products) / 1e6
    assert found == pytest.approx(2 * 1024**3 / fastest, rel=0.5)
    assert peak_flops(Device(torch.device("mps"), "fp32", "")) is None
