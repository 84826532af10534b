import dataclasses

import pytest
import torch
from conftest import CPU, record_kept, toy_settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model
from loss import workspace_bytes
from model import GPTModel
from runtime.device import Device
from runtime.setting_fields import UserError
from training import memory
from training.activation_recompute import recompute_activations, storage_of
from training.memory import estimate, fit_micro_batch

BF16 = Device(torch.device("cpu"), "bf16", "test")
SHAPE = "--n-layers 6 --n-heads 4 --d-model 256 --vocab-size 1000 --seq-len 512 --lr 1e-3".split()


def kept(args, device, monkeypatch):
    """What a forward pass keeps besides the parameters, counted on tensors without data."""
    found = {}
    with FakeTensorMode():
        gpt = GPTModel(args.model)
        recompute_activations(gpt)
        own = {storage_of(x) for x in (*gpt.parameters(), *gpt.buffers())}
        ids = torch.zeros(args.batch_size, args.seq_len, dtype=torch.int64)
        with record_kept(monkeypatch, found), device.autocast():
            gpt(ids, labels=ids, reduction="sum", return_logits=False)
    return sum(x.untyped_storage().nbytes() for k, x in found.items() if k not in own)


@pytest.mark.parametrize("device", [CPU, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_activations_are_those_that_the_model_keeps(arch, device, monkeypatch):
    args = toy_settings(*SHAPE, "--arch", arch, "--global-batch-size", "8")
    found = estimate(args, device).activations - workspace_bytes(
        1000, device.amp, device.torch_device
    )
    assert found == pytest.approx(kept(args, device, monkeypatch), rel=0.05)


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_weights_gradients_and_optimizer_are_counted(arch):
    args = toy_settings(*SHAPE, "--arch", arch)
    need, numbers = estimate(args, CPU), GPTModel(args.model).num_parameters()
    assert need.weights == need.gradients == pytest.approx(4 * numbers, rel=0.01)
    assert need.optimizer == 2 * need.weights
    muon = estimate(toy_settings(*SHAPE, "--arch", arch, "--optimizer", "muon"), CPU)  # flags win
    blocks = 6 * 12 * 256 * 256 * 4  # one momentum instead of two moments
    assert muon.optimizer == need.optimizer - blocks


def test_recomputing_keeps_one_block_and_the_inputs_of_the_others():
    plain, spare = (
        estimate(toy_settings(*SHAPE, "--global-batch-size", "8", *more), CPU).activations
        for more in ([], ["--use-activation-checkpoint"])
    )
    # Per token: 6 x 40 C bytes of blocks against 6 x 4 C of their inputs and 64 C of one whole block.
    expected = 8 * 512 * 256 * (6 * 40 - 6 * 4 - 64)
    assert plain - spare == pytest.approx(expected, rel=0.01)


def test_a_changed_model_is_counted_as_it_is(monkeypatch):
    class GatedMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate, self.up = (nn.Linear(config.d_model, config.d_ff) for _ in range(2))
            self.down = nn.Linear(config.d_ff, config.d_model)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    plain = estimate(toy_settings(*SHAPE, "--d-ff", "768"), CPU)
    monkeypatch.setattr(model, "MLP", GatedMLP)
    args = toy_settings(*SHAPE, "--d-ff", "776")
    need = estimate(args, CPU)
    assert need.weights == 4 * GPTModel(args.model).num_parameters() > plain.weights
    found = need.activations - workspace_bytes(1000, False, CPU.torch_device)
    assert found == pytest.approx(kept(args, CPU, monkeypatch), rel=0.05)


def test_the_largest_micro_batch_that_fits_is_taken(monkeypatch):
    args = toy_settings(*SHAPE, "--global-batch-size", "24", "--batch-size", "4")
    args = dataclasses.replace(args, micro_batch="auto")
    need = estimate(args, CPU, 6).total

    def fit(free, args=args, **more):
        monkeypatch.setattr(memory, "free_memory_of", lambda device: free)
        return fit_micro_batch(args, CPU, **more)

    fitted = fit(need / 0.9 * 1.001)
    assert (fitted.batch_size, fitted.grad_accum_steps) == (6, 4)
    assert (fitted.global_batch_size, fitted.micro_batch) == (24, "given")
    assert fit(need / 0.9 * 0.999).batch_size == 4
    assert fit(1e15).batch_size == 24
    two_ranks = dataclasses.replace(args, batch_size=4, grad_accum_steps=3)
    assert fit(1e15, two_ranks).batch_size == 12
    assert fit(2 * need / 0.9 * 1.001, local_world=2).batch_size == 6
    assert fit(1e15, agree=lambda wish: [-3]).batch_size == 3  # what another rank can
    with pytest.raises(
        UserError, match=r"one sequence of 512 tokens needs .* GB can be used; lower"
    ):
        fit(1e6)
    with pytest.raises(UserError, match="one sequence"):  # another rank has no room
        fit(1e15, agree=lambda wish: [0])
    with pytest.raises(UserError, match="does not say how much memory is free"):
        fit(float("inf"))


def test_a_given_micro_batch_stays():
    args = toy_settings("--batch-size", "4")
    assert fit_micro_batch(args, CPU) is args


def test_parts_of_a_model_need_parts_of_its_memory():
    whole = estimate(
        toy_settings(*SHAPE, "--global-batch-size", "24", "--batch-size", "4", world=1), CPU
    )
    flags = [*SHAPE, "--global-batch-size", "24", "--batch-size", "4"]
    tp = dataclasses.replace(toy_settings(*flags), tensor_parallel_size=2)
    need = estimate(tp, CPU)
    assert need.weights == whole.weights / 2 and need.optimizer == whole.optimizer / 2
    assert whole.activations / 2 < need.activations < whole.activations
    two_ranks = dataclasses.replace(toy_settings(*flags), grad_accum_steps=3, parallel="fsdp")
    need = estimate(two_ranks, CPU)  # 24 sequences = 2 ranks x 3 x 4
    assert need.weights == whole.weights / 2 and need.optimizer == whole.optimizer / 2
    assert need.gradients == whole.gradients  # until the last micro-step
    at_once = dataclasses.replace(two_ranks, batch_size=12, grad_accum_steps=1)
    assert estimate(at_once, CPU).gradients == whole.gradients / 2
    block = 12 * 256 * 256 + 2 * 1000 * 256  # and the ends of the model, weights and gradients
    assert need.activations - whole.activations == pytest.approx(8 * block, rel=0.5)


@pytest.mark.parametrize(
    "free, said",  # in parts of weights, gradients and optimizer, or of the whole step
    [
        (
            (0.99, 0),
            "weights, gradients and optimizer alone are too much, for any batch; lower --n-layers or --d-model, or spread it over several "
            "machines with --parallel fsdp",
        ),
        ((0, 0.49), "lower --batch-size or --seq-len, or try --use-activation-checkpoint"),
        ((0, 0.51), ""),  # the estimate may be off: it is tried
        ((0, 1e6), ""),
    ],
)
def test_what_cannot_fit_is_refused_before_memory_is_taken(monkeypatch, free, said):
    # Most of it is the activations of 8 long sequences, or the weights for a short one.
    more = "--d-model 16" if free[1] else "--seq-len 16 --global-batch-size 1 --d-model 512"
    args = toy_settings(*SHAPE, "--global-batch-size", "8", *more.split())
    need = estimate(args, CPU)
    assert (need.activations < 0.9 * need.total / 2) is (free[1] == 0)
    bytes_free = free[0] * (need.total - need.activations) + free[1] * need.total
    monkeypatch.setattr(memory, "free_memory_of", lambda device: bytes_free)
    if not said:
        assert fit_micro_batch(args, CPU) is args
        with pytest.raises(UserError, match="--allow-memory"):  # another rank has less
            fit_micro_batch(args, CPU, agree=lambda wish: [1])
        return
    with pytest.raises(UserError, match=f"GB are free for it; {said}.*--allow-memory"):
        fit_micro_batch(args, CPU)
    brave = dataclasses.replace(args, allow_memory=True)
    assert fit_micro_batch(brave, CPU) is brave
    monkeypatch.setattr(memory, "free_memory_of", lambda device: 1.01 * need.total)
    fit_micro_batch(args, CPU)
    with pytest.raises(UserError, match="takes in each process about"):  # three share it
        fit_micro_batch(args, CPU, local_world=3)
    monkeypatch.setattr(memory, "free_memory_of", lambda device: 0.0)
    with pytest.raises(UserError) as caught:
        fit_micro_batch(dataclasses.replace(args, parallel="fsdp"), CPU)
    assert "spread it" not in str(caught.value)
