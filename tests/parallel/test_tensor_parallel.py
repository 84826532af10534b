import copy

import pytest
import torch
import torch.distributed as dist
from conftest import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.common import on_ranks
from model import GPTModel
from parallel.tensor_parallel import joined, part_of, split_dim, split_model
from training.activation_recompute import recompute_activations


def two_ways(ranks, arch):
    """Outputs and gradients of a block whole, in our parts, and in those of torch."""
    whole = GPTModel(tiny(arch, n_heads=4), seed=3)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for p in whole.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    ours, theirs = copy.deepcopy(whole), copy.deepcopy(whole)
    split_model(ours, dist.group.WORLD)
    recompute_activations(ours)  # which DTensors don't take
    plan = {
        "attn.qkv": ColwiseParallel(),
        "attn.proj": RowwiseParallel(),
        "mlp.fc": ColwiseParallel(),
        "mlp.proj": RowwiseParallel(),
    }
    parallelize_module(theirs.blocks[0], init_device_mesh("cpu", (ranks.world,)), plan)
    found = []
    for model in (whole, ours, theirs):
        x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        rotary = (model.cos[:16], model.sin[:16]) if arch == "modern" else None
        y = model.blocks[0](x, None, rotary)
        (y * torch.arange(16)).sum().backward()
        grads = {}
        for name, p in model.blocks[0].named_parameters():
            g, dim = p.grad, split_dim(name)
            if hasattr(g, "full_tensor"):
                g = g.full_tensor()
            elif model is ours and dim is not None:
                g = joined(g, dim, whole.shapes[f"blocks.0.{name}"][dim], dist.group.WORLD)
            grads[name] = g
        found.append((y.detach(), x.grad, grads))
    return found


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_a_block_in_parts_is_the_whole_block_and_torchs_parts(arch):
    (y, dx, grads), *others = on_ranks(2, two_ways, arch)
    for other_y, other_dx, other_grads in others:
        torch.testing.assert_close(other_y, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_dx, dx, rtol=1e-4, atol=1e-4)
        assert other_grads.keys() == grads.keys()
        for name, g in grads.items():
            torch.testing.assert_close(other_grads[name], g, rtol=1e-4, atol=1e-3)


def masks(ranks):
    """What two ranks drop from the same: inside attention, and of a block's output."""
    model = GPTModel(tiny("gpt2", dropout=0.5, n_layers=1), seed=1)
    split_model(model, dist.group.WORLD)
    with torch.no_grad():
        for p in model.blocks[0].attn.parameters():
            p.zero_()
        model.blocks[0].attn.qkv.bias[2 * 8 :] = 1.0  # all values are 1: what is dropped shows
    inside = []
    model.blocks[0].attn.proj.register_forward_pre_hook(lambda m, x: inside.append(x[0].clone()))
    after = []
    model.blocks[0].drop.register_forward_hook(lambda m, x, y: after.append(y.clone()))
    torch.manual_seed(5)
    model.hidden_states(torch.zeros(1, 16, dtype=torch.int64))
    found = [None] * 2
    dist.all_gather_object(found, (inside[0], after[1]))
    return found


def test_dropout_differs_between_heads_and_is_the_same_for_what_ranks_share():
    (a, after_a), (b, after_b) = on_ranks(2, masks)
    assert a.shape == b.shape and not torch.equal(a, b)
    assert torch.equal(after_a, after_b) and (after_a == 0).any()


@pytest.mark.parametrize("size, parts", [(8, 2), (7, 3), (5, 4), (2, 4)])
def test_parts_make_the_whole(size, parts):
    x = torch.randn(3, size)
    pieces = [part_of(x, 1, i, parts) for i in range(parts)]
    assert torch.equal(torch.cat(pieces, 1), x)
    by_torch = [piece for piece in x.chunk(parts, 1)]
    assert all(torch.equal(a, b) for a, b in zip(by_torch, pieces, strict=False))
