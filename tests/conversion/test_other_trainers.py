"""Files of nanoGPT and llm.c, made here from what is public of their formats, and the loss of the
model in them computed by numpy in float64, with nothing of ours.
"""

import math

import numpy as np
import pytest
import torch
from converted import hf

from checkpoint import load_model
from conversion.opening import open_weights, read_weights
from runtime.setting_fields import UserError

pytest.importorskip("transformers")
L, H, C, V, T = 2, 4, 24, 50, 12  # blocks, heads, channels, vocabulary, positions


def nanogpt_tensors(bias=True, vocab=V):
    """The state dict of nanoGPT's GPT: matrices are those of nn.Linear, (out, in)."""
    draw = np.random.default_rng(0)
    found = {"transformer.wte.weight": draw.normal(0, 0.5, (vocab, C))}
    found["transformer.wpe.weight"] = draw.normal(0, 0.5, (T, C))
    for i in range(L):
        block = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            found[f"{block}{norm}.weight"] = draw.normal(1, 0.2, C)
            found[f"{block}{norm}.bias"] = draw.normal(0, 0.2, C)
        matrices = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
        matrices |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name, shape in matrices.items():
            found[f"{block}{name}.weight"] = draw.normal(0, 1.5 / math.sqrt(shape[1]), shape)
            found[f"{block}{name}.bias"] = draw.normal(0, 0.2, shape[0])
    found["transformer.ln_f.weight"] = draw.normal(1, 0.2, C)
    found["transformer.ln_f.bias"] = draw.normal(0, 0.2, C)
    kept = {k: v.astype(np.float32) for k, v in found.items() if bias or not k.endswith(".bias")}
    return kept | {"lm_head.weight": kept["transformer.wte.weight"]}


def loss_of(tensors, ids, exact):
    """The mean next-token loss of GPT-2 on a row of ids, nats (Radford et al. 2019). exact: GELU by
    the error function (Hendrycks and Gimpel 2016), else by tanh.
    """
    w = {k.removeprefix("transformer."): v.astype(np.float64) for k, v in tensors.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def gelu(x):
        if exact:
            return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    n = len(ids)
    x = w["wte.weight"][ids] + w["wpe.weight"][:n]
    for i in range(L):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
        heads = []
        for part in np.split(np.arange(C), H):
            scores = q[:, part] @ k[:, part].T / math.sqrt(C // H)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(heads, -1), f"h.{i}.attn.c_proj")
        inner = gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    logits = norm(x, "ln_f") @ w["lm_head.weight"].T
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float((log_sum[:-1] - logits[np.arange(n - 1), ids[1:]]).mean())


def our_loss(path, ids):
    batch = torch.tensor(ids)[None]
    with torch.no_grad():
        return float(load_model(path).model(batch, labels=batch)[1])


IDS = np.random.default_rng(7).integers(0, V, T)
ARGS = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, "dropout": 0.1}


def write_nanogpt(path, tensors, **changes):
    """A ckpt.pt as nanoGPT's train.py saves it, with optimizer, progress and settings."""
    weights = {k: torch.from_numpy(v) for k, v in tensors.items()}
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}
    content = {
        "model": weights,
        "optimizer": {"state": moments, "param_groups": [{"lr": 6e-4, "params": [0]}]},
        "model_args": {**ARGS, "bias": True, **changes},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.1),
        "config": {"dataset": "shakespeare", "compile": True},
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_checkpoint_of_nanogpt_has_the_loss_computed_independently(tmp_path, bias, compiled):
    tensors = nanogpt_tensors(bias)
    mark = "_orig_mod." if compiled else ""
    path = write_nanogpt(tmp_path / "ckpt.pt", {mark + k: v for k, v in tensors.items()}, bias=bias)
    hf("import", path, tmp_path / "out.pt")
    wanted = loss_of(tensors, IDS, exact=True)
    assert our_loss(tmp_path / "out.pt", IDS) == pytest.approx(wanted, abs=2e-6)
    assert abs(wanted - loss_of(tensors, IDS, exact=False)) > 2e-5  # the kind of GELU counts


def test_a_checkpoint_of_nanogpt_without_flash_attention_has_masks_that_are_left(tmp_path):
    tensors = nanogpt_tensors()
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, T, T), np.float32) for i in range(L)}
    found = read_weights(write_nanogpt(tmp_path / "ckpt.pt", tensors | masks))
    assert found.config.d_model == C and found.tokenizer is None


LAYOUT = """wte wpe h.ln_1.weight h.ln_1.bias h.attn.c_attn.weight h.attn.c_attn.bias
    h.attn.c_proj.weight h.attn.c_proj.bias h.ln_2.weight h.ln_2.bias h.mlp.c_fc.weight
    h.mlp.c_fc.bias h.mlp.c_proj.weight h.mlp.c_proj.bias ln_f.weight ln_f.bias""".split()
PADDED = 64


def write_llmc(path, tensors, version, vocab=V, padded=PADDED):
    """A model file as llm.c's train_gpt2.py writes it: the vocabulary is padded, here with rows
    that would be seen in the loss.
    """
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, T, vocab, L, H, C, padded
    parts = []
    for name in LAYOUT:
        if name == "wte":
            rows = np.full((padded - vocab, C), 3.0, np.float32)
            parts.append(np.concatenate((tensors["transformer.wte.weight"], rows)))
        elif name == "wpe":
            parts.append(tensors["transformer.wpe.weight"])
        elif name.startswith("h."):
            parts += [tensors[f"transformer.h.{i}.{name[2:]}"] for i in range(L)]
        else:
            parts.append(tensors[f"transformer.{name}"])
    numbers = torch.from_numpy(np.concatenate([p.reshape(-1) for p in parts]))
    if version == 5:
        numbers = numbers.bfloat16().view(torch.int16)
    path.write_bytes(header.tobytes() + numbers.numpy().tobytes())
    return path


@pytest.mark.parametrize("version", [3, 5])
def test_a_model_of_llmc_has_the_loss_computed_independently(tmp_path, version):
    tensors = nanogpt_tensors()
    path = write_llmc(tmp_path / "model.bin", tensors, version)
    hf("import", path, tmp_path / "out.pt")
    if version == 5:  # the numbers that bfloat16 leaves
        tensors = {k: torch.from_numpy(v).bfloat16().float().numpy() for k, v in tensors.items()}
    wanted = loss_of(tensors, IDS, exact=False)
    assert our_loss(tmp_path / "out.pt", IDS) == pytest.approx(wanted, abs=2e-6)
    assert load_model(tmp_path / "out.pt").model.config.vocab_size == V  # without padding


def test_biases_in_a_file_of_nanogpt_count_whatever_its_arguments_say(tmp_path):
    write_nanogpt(tmp_path / "x.pt", nanogpt_tensors(), bias=False)
    found = read_weights(tmp_path / "x.pt").state_dict["blocks.1.mlp.fc.bias"]
    assert found.tolist() == nanogpt_tensors()["transformer.h.1.mlp.c_fc.bias"].tolist()


def test_files_are_told_by_their_content_not_by_their_name(tmp_path):
    tensors = nanogpt_tensors()
    write_nanogpt(tmp_path / "a.bin", tensors)
    write_llmc(tmp_path / "b.pt", tensors, 3)
    assert read_weights(tmp_path / "a.bin").source.startswith("nanoGPT")
    assert read_weights(tmp_path / "b.pt").source.startswith("llm.c")


def test_a_flipped_byte_of_a_weight_is_found(tmp_path):
    path = write_nanogpt(tmp_path / "ckpt.pt", nanogpt_tensors())
    content = bytearray(path.read_bytes())
    weight = nanogpt_tensors()["transformer.wte.weight"].tobytes()
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        read_weights(path)


WRONG = [
    (lambda p: write_llmc(p, nanogpt_tensors(), 1), "version 1 of llm.c"),
    (lambda p: write_llmc(p, nanogpt_tensors(), 3).write_bytes(p.read_bytes()[:-4]), "bytes, but"),
    (lambda p: p.write_bytes((20240326).to_bytes(4, "little") * 3), "header of llm.c is cut off"),
    (lambda p: p.write_bytes(b"hello"), "neither a whole checkpoint of ours"),
    (lambda p: torch.save({"weights": 1}, p), "it has weights"),
    (lambda p: write_nanogpt(p, nanogpt_tensors(), n_layer=3), "without h.2."),
    (lambda p: write_nanogpt(p, nanogpt_tensors(), n_layer=1), "do not explain: h.1.attn"),
    (lambda p: write_nanogpt(p, nanogpt_tensors(), n_embd=28), "has the shape"),
    (lambda p: torch.save({"model": {"a": 1}, "model_args": {}}, p), "more than tensors"),
    (lambda p: torch.save({"model": {}, "model_args": {"n_layer": 2}}, p), "without 'vocab_size'"),
]


@pytest.mark.parametrize("write, named", WRONG)
def test_a_wrong_file_is_one_line_that_says_what_is_wrong(tmp_path, write, named):
    write(tmp_path / "x")
    with pytest.raises(UserError, match=named):
        hf("import", tmp_path / "x", tmp_path / "out.pt")
    with pytest.raises(UserError, match=named), open_weights(tmp_path / "x") as weights:
        _ = weights.state_dict
    assert not (tmp_path / "out.pt").exists()
