import copy

import pytest
import torch
from conftest import record_kept, tiny
from torch import nn

from model import GPTModel
from training import activation_recompute as recompute_module
from training.activation_recompute import recompute_activations, recompute_inputs, storage_of

ARCHS = ("gpt2", "modern")
IDS = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))


def gradients_and_bytes(model, monkeypatch, half=False):
    """The gradients of one batch, and the bytes that were kept for them besides the parameters."""
    found = {}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with monkeypatch.context() as patch, record_kept(patch, found), autocast:
        loss = model(IDS, labels=IDS)[1]
    loss.backward()
    own = {storage_of(p) for p in model.parameters()}
    size = sum(x.untyped_storage().nbytes() for k, x in found.items() if k not in own)
    return [p.grad for p in model.parameters()], size


def awake(arch, **changes):
    """A model whose second matrices are not zero, so that gradients reach the first ones."""
    model = GPTModel(tiny(arch, **changes), seed=1)
    for block in model.blocks:
        fill = torch.Generator().manual_seed(2)
        nn.init.normal_(block.mlp.proj.weight, generator=fill)
    return model


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_computed_again_changes_no_bit_and_is_not_kept(arch, half, monkeypatch):
    plain, plain_bytes = gradients_and_bytes(awake(arch), monkeypatch, half)
    model = awake(arch)
    recompute_activations(model)
    again, bytes_again = gradients_and_bytes(model, monkeypatch, half)
    assert equal(plain, again)
    # Per token, each of two blocks does without two norms of 16 channels and 64 numbers of the MLP.
    assert plain_bytes - bytes_again == 2 * (2 * 16 + 64) * 2 * 16 * (2 if half else 4)


@pytest.mark.parametrize("arch", ARCHS)
def test_activation_checkpointing_is_on_only_when_asked_and_changes_no_gradient(arch, monkeypatch):
    calls, found = [], []
    original = recompute_module.checkpoint
    monkeypatch.setattr(
        recompute_module, "checkpoint", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    for asked in (False, True):
        model = awake(arch, use_activation_checkpoint=asked, dropout=0.1)
        recompute_activations(model)
        torch.manual_seed(5)
        model(IDS, labels=IDS)[1].backward()
        found.append([p.grad for p in model.parameters()])
        assert len(calls) == (2 if asked else 0)
    assert equal(*found)
    model.eval()(IDS)  # nothing is kept for a backward pass, so nothing is computed twice
    assert len(calls) == 2


def test_compiled_blocks_are_left_to_the_compiler(monkeypatch):
    model = awake("gpt2")
    model.compiled = True
    plain_bytes = gradients_and_bytes(awake("gpt2"), monkeypatch)[1]
    recompute_activations(model)
    assert gradients_and_bytes(model, monkeypatch)[1] == plain_bytes


@pytest.mark.parametrize("spare", [False, True], ids=["inputs", "blocks"])
def test_a_deep_copy_is_a_model_of_its_own(spare):
    model = awake("gpt2", use_activation_checkpoint=spare)
    recompute_activations(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    plain = GPTModel(model.config)
    plain.load_state_dict(other.state_dict())
    for m in (other, plain):
        m(IDS, labels=IDS)[1].backward()
    assert equal([p.grad for p in other.parameters()], [p.grad for p in plain.parameters()])
    assert all(p.grad is None for p in model.parameters())


class GatedMLP(nn.Module):
    """Another MLP: what its last layer multiplies does not come from an activation alone."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_a_changed_model_keeps_its_gradients(monkeypatch):
    found = []
    for recompute in (False, True):
        model = awake("gpt2")
        for seed, block in enumerate(model.blocks):
            torch.manual_seed(seed)
            block.mlp = GatedMLP()
        if recompute:
            recompute_activations(model)
        found.append(gradients_and_bytes(model, monkeypatch))
    (plain, plain_bytes), (again, bytes_again) = found
    assert equal(plain, again)
    assert bytes_again < plain_bytes


def test_a_forward_pass_that_failed_leaves_nothing_behind():
    model = awake("gpt2")
    block, broken = model.blocks[0], torch.zeros(1, 4, 16)
    recompute_inputs(block)
    proj, block.attn.proj = block.attn.proj, nn.Linear(3, 3)  # fails after the first norm
    with pytest.raises(RuntimeError):
        block(broken, None, None)
    block.attn.proj = proj
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(4))
    plain = awake("gpt2").blocks[0]
    for b in (block, plain):
        b(x, None, None).square().sum().backward()
    assert equal([p.grad for p in block.parameters()], [p.grad for p in plain.parameters()])
