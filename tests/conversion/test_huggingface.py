import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, tiny
from converted import KINDS, checkpoint_of, hf, random_model

from checkpoint import load_model
from config import GPTConfig
from conversion.agreement import BOUND, check_agreement, largest_difference
from conversion.huggingface import to_huggingface
from conversion.opening import read_weights
from corpus.shards import ToyTokens
from corpus.token_dataset import TokenDataset
from loss import IGNORE
from runtime.setting_fields import UserError
from training.evaluation import evaluate

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def code_of_folders_is_copied_here(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", f"{tmp_path}/code")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the export of each kind of model, and the checkpoint that it is of."""
    top = tmp_path_factory.mktemp("exported")
    for i, config in enumerate(KINDS.values()):
        hf("export", checkpoint_of(random_model(config), top / f"{i}.pt"), top / str(i))
    return {kind: (top / str(i), top / f"{i}.pt") for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_give_back_every_bit(exported, kind, tmp_path):
    folder, checkpoint = exported[kind]
    hf("import", folder, tmp_path / "back.pt")
    before, after = load_model(checkpoint), load_model(tmp_path / "back.pt")
    assert after.settings.model == before.settings.model
    for name, p in before.model.named_parameters():
        assert torch.equal(p, after.model.get_parameter(name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_has_the_logits_of_ours_at_every_position(exported, kind):
    folder, checkpoint = exported[kind]
    remote = KINDS[kind].ngram_rows > 0  # which transformers has no code for
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = load(folder, trust_remote_code=remote).eval(), load_model(checkpoint).model
    ids = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = ours(ids)[0], theirs(ids).logits
    assert wanted.abs().max() > 1  # not models that say nothing
    assert (wanted - found).abs().max() < 5e-6  # measured: 1e-6, of logits up to 4


def test_the_classes_of_exports_are_those_of_transformers(exported):
    for kind, name in (("gpt2", "GPT2LMHeadModel"), ("modern", "NanoChatForCausalLM")):
        entries = json.loads((exported[kind][0] / "config.json").read_text())
        assert entries["architectures"] == [name] and "auto_map" not in entries


def test_scores_of_the_turned_rotation_are_the_same_bits():
    # q . k is a sum of products; both signs of the second half of a head are turned, so none changes
    model = random_model(tiny("modern", n_layers=1))
    theirs, ours = to_huggingface(model).model.layers[0].self_attn, model.blocks[0].attn
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(3))
    q, k, v = ours.qkv(x).unflatten(-1, (2, 3, 8)).transpose(1, 2).unbind(3)
    their_q, their_k, their_v = (
        m(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for m in (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    )
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4)
    assert torch.equal(their_q * sign, q) and torch.equal(their_k * sign, k)
    assert torch.equal(their_v, v)


@pytest.mark.parametrize("kind", ["gpt2", "modern"])
def test_perplexity_by_transformers_is_that_of_the_evaluation(exported, kind):
    folder, checkpoint = exported[kind]
    run, val = load_model(checkpoint), TokenDataset(ToyTokens(400, 97, seed=5), 16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    nll, count = 0.0, 0
    for ids, labels in val.batches(7):
        scored = int((labels[:, 1:] != IGNORE).sum())
        with torch.no_grad():
            nll += float(theirs(ids, labels=labels).loss) * scored
        count += scored
    found = evaluate(run.model, val, 5, CPU)
    assert found.tokens == count == 399
    assert found.ppl == pytest.approx(float(torch.tensor(nll / count).exp()), rel=1e-5)


def test_an_n_gram_model_generates_alike_with_and_without_cache_and_padding():
    model = random_model(KINDS["modern with n-grams"])
    theirs, ids = to_huggingface(model), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    grown = ids
    with torch.no_grad():
        for _ in range(8):
            grown = torch.cat((grown, model(grown)[0][:, -1:].argmax(-1)), 1)
    for cache in (True, False):
        assert torch.equal(theirs.generate(ids, use_cache=cache, **greedy), grown)
    padded, mask = torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    padded[:, 3:], mask[:, :3] = ids, 0
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **greedy)[:, 3:], grown)


def test_the_export_of_n_grams_says_that_code_is_beside_it(exported, capsys, tmp_path):
    hf("export", exported["modern with n-grams"][1], tmp_path / "x")
    said = capsys.readouterr().out
    assert "modeling_rosetrainer.py" in said and "trust_remote_code=True" in said
    assert "holds no tokenizer" in said
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=False)


def test_an_export_that_is_refused_leaves_nothing(exported, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(UserError, match="is there already and not empty"):
        hf("export", exported["gpt2"][1], full)
    monkeypatch.setattr("conversion.agreement.BOUND", 0.0)
    monkeypatch.setattr("conversion.agreement.largest_difference", lambda a, b: (1e-9, 1.0, 1))
    with pytest.raises(UserError, match="nothing was written"):
        hf("export", exported["gpt2"][1], tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_imported_weights_are_evaluated_only_on_data_that_are_named(exported, tmp_path):
    from checkpointing.validation import validation_of
    from settings.eval_and_generate import EvalSettings

    hf("import", exported["gpt2"][0], tmp_path / "i.pt")
    run = load_model(tmp_path / "i.pt")
    np.save(tmp_path / "v.npy", np.arange(90, dtype=np.uint16))
    args = EvalSettings(checkpoint_path=("i.pt",), val_npy=(str(tmp_path / "v.npy"),))
    assert validation_of(args, run.settings, run, "i.pt").num_tokens == 90
    with pytest.raises(UserError, match="say what to evaluate them on"):
        validation_of(EvalSettings(checkpoint_path=("i.pt",)), run.settings, run, "i.pt")


def test_whoever_may_read_one_file_of_an_export_may_read_all(exported):
    folder = exported["gpt2"][0]
    (folder.parent / "usual").touch()
    usual = (folder.parent / "usual").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {usual}


@pytest.mark.parametrize("entry", [{"eos_token_id": "x"}, {"quantization_config": {"bits": 4}}])
def test_what_transformers_cannot_read_is_one_line(exported, entry, tmp_path):
    with pytest.raises(UserError, match="transformers can't read it"):
        hf("import", edited(exported, "gpt2", tmp_path, **entry), tmp_path / "out.pt")


def edited(exported, kind, tmp_path, **entries):
    folder = tmp_path / "edited"
    shutil.copytree(exported[kind][0], folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **entries}))
    return folder


OTHERS = [
    ("gpt2", {"vocab_size": 0}, "vocab_size=0 is no model"),
    ("gpt2", {"n_layer": "2"}, "must be of type int"),
    ("gpt2", {"activation_function": "relu"}, "activation_function"),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("gpt2", {"n_layer": 3}, "lack transformer.h.2"),
    ("gpt2", {"n_layer": 1}, "weights that no model here has: transformer.h.1"),
    ("gpt2", {"n_positions": 8}, "wpe.weight has the shape"),
    ("gpt2", {"model_type": "llama"}, "'llama'"),
    ("modern", {"final_logit_softcapping": 15.0}, "final_logit_softcapping=15.0"),
    ("modern", {"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ("modern", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ("modern", {"hidden_act": "silu"}, "hidden_act"),
    ("modern", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ("modern", {"attention_bias": True}, "attention_bias"),
]


@pytest.mark.parametrize("kind, entries, named", OTHERS)
def test_what_our_models_do_not_compute_is_refused_by_name(
    exported, kind, entries, named, tmp_path
):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        hf("import", edited(exported, kind, tmp_path, **entries), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_gpt2_is_read_in_each_of_its_forms(exported, safe, prefix, sharded, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, checkpoint = exported["gpt2"]
    new = tmp_path / "model"
    new.mkdir()
    shutil.copy(folder / "config.json", new)
    tensors = load_file(folder / "model.safetensors")
    if not prefix:
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # a mask, as the first files have it
    tensors["lm_head.weight"] = next(v for k, v in tensors.items() if "wte" in k).clone()
    name = "model.safetensors" if safe else "pytorch_model.bin"
    files = {name: tensors}
    if sharded:
        items = sorted(tensors.items())
        files = {f"1-{name}": dict(items[::2]), f"2-{name}": dict(items[1::2])}
        where = {k: file for file, part in files.items() for k in part}
        (new / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    for file, part in files.items():
        (save_file if safe else torch.save)(part, new / file)
    found = read_weights(new)
    for k, v in load_model(checkpoint).model.state_dict().items():
        assert torch.equal(found.state_dict[k], v)


def test_a_bin_that_would_run_code_is_not_run(exported, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    shutil.copytree(exported["gpt2"][0], tmp_path / "x")
    (tmp_path / "x/model.safetensors").unlink()
    torch.save({"wte.weight": Evil()}, tmp_path / "x/pytorch_model.bin")
    with pytest.raises(UserError, match="not to be read as weights"):
        hf("import", tmp_path / "x", tmp_path / "out.pt")
    assert not (tmp_path / "ran").exists()


def test_a_name_without_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="nobody/nothing: no such file or folder, and not to be had"
    ):
        hf("import", "nobody/nothing", tmp_path / "out.pt")


def test_the_bound_is_passed_by_rounding_and_not_by_small_mistakes():
    # exact GELU for its tanh form; the epsilon of NanoChat's RMSNorm; two heads exchanged
    model = random_model(tiny(d_model=64, n_layers=4))
    theirs = to_huggingface(model)
    check_agreement(model, theirs)
    other = random_model(dataclasses.replace(model.config, gelu="none"))
    with pytest.raises(UserError, match="no rounding"):
        check_agreement(other, theirs)
    modern = random_model(tiny("modern", d_model=64, n_layers=4))
    theirs = to_huggingface(modern)
    check_agreement(modern, theirs)
    with torch.no_grad():
        rows = modern.blocks[3].attn.qkv.weight.view(2, -1, 64)
        rows.copy_(rows.flip(0).clone())
    with pytest.raises(UserError, match="no rounding"):
        check_agreement(modern, theirs)


SHAPES = {  # heads, width, blocks: the larger ones have fewer blocks than GPT-2's
    "GPT-2 small": GPTConfig(n_heads=12, d_model=768, n_layers=12),
    "GPT-2 medium": GPTConfig(n_heads=16, d_model=1024, n_layers=3),
    "GPT-2 large": GPTConfig(n_heads=20, d_model=1280, n_layers=2),
    "GPT-2 XL": GPTConfig(n_heads=25, d_model=1600, n_layers=2),
    "modern 768": GPTConfig("modern", n_heads=12, d_model=768, n_layers=4),
    "modern 1280": GPTConfig("modern", n_heads=10, d_model=1280, n_layers=3),
}


@pytest.mark.long
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_perplexity_by_transformers_is_that_of_eval_py(tmp_path, program, arch):
    """Of a model that has learned a little, on the bytes of a text in windows that overlap by one."""
    text = (ROOT / "model.py").read_text()
    (tmp_path / "val.txt").write_text(text)
    flags = (
        f"--arch {arch} --ngram-rows 0 --num-steps 40 --checkpoint-path run.pt --eval-at-start off"
    )
    program("train_minimal.py", *flags.split())
    program("eval.py", *"--checkpoint-path run.pt --val-data val.txt --json found.json".split())
    program("hf.py", "export", "run.pt", "x")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=False)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "x", trust_remote_code=False).eval()
    ids = torch.tensor([*auto(text).input_ids, auto.eos_token_id])
    nll = 0.0
    for start in range(0, len(ids) - 1, 127):  # windows of 128, the length of the run
        window = ids[start : start + 128][None]
        with torch.no_grad():
            nll += float(theirs(window, labels=window).loss) * (window.shape[1] - 1)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    ppl = float(torch.tensor(nll / (len(ids) - 1), dtype=torch.float64).exp())
    print(f"{arch}: perplexity {ppl:.7f} by transformers, {found['ppl']:.7f} by eval.py")
    assert ppl == pytest.approx(found["ppl"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_large_models_agree_at_1024_positions(name):
    model = random_model(SHAPES[name])
    difference, largest, tokens = largest_difference(model, to_huggingface(model))
    print(f"{name}: {difference:.2g}, of logits up to {largest:.3g}")
    assert tokens == 1024 and largest > 3
    assert difference < BOUND * largest


@pytest.mark.long
def test_a_model_of_the_hub_is_imported_by_its_name(tmp_path):
    """Out of the cache of huggingface_hub, as it is after a download."""
    model = random_model(KINDS["gpt2"])
    hf("export", checkpoint_of(model, tmp_path / "a.pt"), tmp_path / "exported")
    cached = tmp_path / "hub/models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    shutil.copytree(tmp_path / "exported", cached / "snapshots" / ("0" * 40))
    command = [sys.executable, str(ROOT / "hf.py"), "import", "someone/tiny", "b.pt"]
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = load_model(tmp_path / "b.pt").model.state_dict()
    assert all(found[name].equal(p) for name, p in model.state_dict().items())
    command[3:] = ["someone/other", "c.pt"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "not to be had from Hugging Face's hub" in done.stderr
