import dataclasses
import math

import pytest
import torch
from conftest import tiny

import model as model_module
from config import GPTConfig, from_dict
from model import GPTModel
from settings.presets import PRESETS

ARCHS = ("gpt2", "modern")


def batch(V=97, B=2, T=16, seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def awake(arch, **changes):
    """A model whose zero-initialised matrices are filled, so that every part has an effect."""
    model = GPTModel(tiny(arch, **changes), seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.2, generator=g)
    return model.eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_first_loss_is_ln_of_the_vocabulary(arch):
    # A model that knows nothing gives each of V ids the probability 1/V: ln(50257) = 10.825 nats.
    for width, heads in ((64, 4), (768, 12)):
        config = GPTConfig(arch=arch, n_layers=2, n_heads=heads, d_model=width)
        ids = batch(50257, 4, 64)
        with torch.no_grad():
            loss = GPTModel(config, seed=0)(ids, labels=ids, return_logits=False)[1]
        assert abs(loss.item() - math.log(50257)) < 0.1


def test_gpt2_sizes_are_those_of_openai():
    # Counts of the released checkpoints: embeddings (50257 + 1024) C, blocks 12 C^2 + 13 C, final norm 2 C.
    wanted = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    wanted["gpt2-xl"] = 1_557_611_200
    for preset, count in wanted.items():
        config = from_dict(PRESETS[preset]).model
        one = GPTModel(dataclasses.replace(config, n_layers=1, d_ff=0))
        block = sum(p.numel() for p in one.blocks[0].parameters())
        assert one.num_parameters() + (config.n_layers - 1) * block == count


def test_logits_equal_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = tiny("gpt2", vocab_size=211, d_model=32, n_heads=4, n_layers=3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=211,
            n_positions=16,
            n_embd=32,
            n_layer=3,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3, generator=g)
    mine = GPTModel(config).eval()
    names = {"wte.weight": "transformer.wte.weight", "wpe.weight": "transformer.wpe.weight"}
    names |= {f"norm_f.{k}": f"transformer.ln_f.{k}" for k in ("weight", "bias")}
    parts = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attn.qkv": "attn.c_attn",
        "attn.proj": "attn.c_proj",
    }
    parts |= {"mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    names |= {
        f"blocks.{i}.{a}.{k}": f"transformer.h.{i}.{b}.{k}"
        for i in range(3)
        for a, b in parts.items()
        for k in ("weight", "bias")
    }
    source, state = theirs.state_dict(), {}
    for name, their_name in names.items():
        w = source[their_name]
        if w.ndim == 2 and ".h." in their_name:
            w = w.T  # Hugging Face keeps these transposed (Conv1D)
        if "qkv" in name:  # (3, H, D) there, (H, 3, D) here
            w = w.unflatten(0, (3, 4, 8)).transpose(0, 1).flatten(0, 2)
        state[name] = w
    mine.load_state_dict(state)
    ids = batch(211)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_position_sees_the_future(arch):
    model, ids = awake(arch), batch()
    with torch.no_grad():
        before = model(ids)[0]
        ids[:, 9] = (ids[:, 9] + 1) % 97
        after = model(ids)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-6 for t in range(9, 16))


@pytest.mark.parametrize("arch", ARCHS)
def test_order_of_the_past_matters(arch):
    model, ids = awake(arch), batch()
    swapped = ids.clone()
    swapped[:, [2, 5]] = ids[:, [5, 2]]
    with torch.no_grad():
        assert (model(ids)[0][:, -1] - model(swapped)[0][:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_changes_nothing_and_gives_no_nan(arch):
    model, ids = awake(arch), batch()
    mask = torch.ones_like(ids)
    mask[0, 10:], mask[1, :] = 0, 0  # the second row is padding only
    with torch.no_grad():
        short = model(ids[:1, :10], labels=ids[:1, :10])
        logits, loss = model(ids, attention_mask=mask, labels=ids)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1, :10], short[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, short[1], rtol=1e-5, atol=0)


def test_an_all_ones_mask_takes_the_path_without_mask():
    assert model_module.causal_and_padding(torch.ones(2, 5), 0, 5) is None
    assert model_module.causal_and_padding(None, 0, 5) is None


@pytest.mark.parametrize("arch", ARCHS)
def test_reductions_agree(arch):
    model, ids = awake(arch), batch()
    labels = ids.clone()
    labels[0, :4] = -100
    mean, total = (model(ids, labels=labels, reduction=r)[1] for r in ("mean", "sum"))
    each = model(ids, labels=labels, reduction="none")[1]
    scored = 2 * 15 - 3  # the shift drops label 0 of each row; labels 1..3 of one row are ignored
    torch.testing.assert_close(total / scored, mean)
    torch.testing.assert_close(each.sum(), total.detach())
    logits, loss = model(ids, labels=ids, return_logits=False)
    assert logits is None and loss.ndim == 0
    assert model(ids)[1] is None


def test_an_ngram_row_depends_on_the_last_four_ids_and_on_nothing_else():
    ids = torch.randint(0, 97, (1, 40))
    rows = model_module.ngram_table_rows(ids, 10_007)
    assert rows.shape == (1, 40, 3) and rows.min() >= 0 and rows.max() < 10_007
    assert torch.equal(rows, model_module.ngram_table_rows(ids, 10_007, longest=6)[:, :, :3])
    moved = model_module.ngram_table_rows(torch.cat((ids[:, 5:], ids[:, :5]), 1), 10_007)
    for i, n in enumerate((2, 3, 4)):  # a window has the same rows wherever it stands
        assert torch.equal(rows[:, 5 + n :, i], moved[:, n:35, i])
    other = ids.clone()
    other[0, 20] = (ids[0, 20] + 1) % 97
    changed = (model_module.ngram_table_rows(other, 10_007) != rows)[0]
    assert [changed[:, i].nonzero().flatten().tolist() for i in range(3)] == [
        [20, 21],
        [20, 21, 22],
        [20, 21, 22, 23],
    ]
    assert not torch.equal(rows, model_module.ngram_table_rows(ids.flip(1), 10_007).flip(1))


def test_ngram_rows_spread_evenly():
    # All 97 * 97 pairs into 1000 rows: 9.409 each on average; Poisson, 6 sigma.
    pairs = torch.cartesian_prod(torch.arange(97), torch.arange(97))
    rows = model_module.ngram_table_rows(pairs, 1000)[:, 1, 0]
    counts = torch.bincount(rows, minlength=1000)
    assert counts.max() <= 9.409 + 6 * 9.409**0.5


def test_ngrams_see_no_future_no_padding_and_short_input():
    model, ids = awake("modern", ngram_rows=500), batch()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        before = model(ids)[0]
        hidden = model(ids, attention_mask=mask)[0]
        ids[0, :6] = (ids[0, :6] + 1) % 97  # padding, whose ids must not matter
        torch.testing.assert_close(model(ids, attention_mask=mask)[0][:, 6:], hidden[:, 6:])
        ids[:, 9] = (ids[:, 9] + 1) % 97
        assert torch.equal(before[1, :9], model(ids)[0][1, :9])
        assert model(ids[:, :1])[0].shape == (2, 1, 97)


def test_heads_are_tied_as_the_architecture_says():
    gpt2, modern = (GPTModel(tiny(arch)) for arch in ARCHS)
    assert gpt2.output_weight is gpt2.wte.weight
    assert modern.output_weight is not modern.wte.weight
    assert not any("bias" in name for name, _ in modern.named_parameters())


def test_modern_starts_with_zero_output_projections():
    for name, p in GPTModel(tiny("modern")).named_parameters():
        assert (p.abs().max() == 0) == name.endswith(("proj.weight", "lm_head.weight"))


def test_a_slice_of_qkv_is_whole_heads():
    # Half of the heads, cut out as a contiguous slice of the rows, computes what those heads computed.
    whole = awake("gpt2").blocks[0].attn
    half = model_module.Attention(tiny("gpt2", d_model=16, n_heads=2))
    half.qkv = torch.nn.Linear(16, 24)
    half.proj = torch.nn.Identity()
    with torch.no_grad():
        half.qkv.weight.copy_(whole.qkv.weight[:24])
        half.qkv.bias.copy_(whole.qkv.bias[:24])
        whole.proj = torch.nn.Identity()
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(half.eval()(x, None, None), whole(x, None, None)[..., :8])


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(1)
    first = GPTModel(tiny(), seed=3).state_dict()
    torch.manual_seed(2)
    second = GPTModel(tiny(), seed=3).state_dict()
    other = GPTModel(tiny(), seed=4).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_too_long_input_and_unknown_vocabulary_are_named():
    with pytest.raises(ValueError, match="17 tokens, but max_position_embeddings=16"):
        GPTModel(tiny())(batch(T=17))
    with pytest.raises(ValueError, match="vocab_size=0"):
        GPTModel(tiny(vocab_size=0))
