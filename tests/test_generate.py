import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, tiny

import training.sampling as sampling_module
from corpus.tokenizer import build_tokenizer
from dataset import TextDatasetForCausalLM
from kv_cache import KVCache, LayerCache
from model import GPTModel
from training.sampling import Sampling, generate, lay_out_for_generation, window_start
from training.text_generation import TextStream, continue_texts, drawable, fitting_prompt

GREEDY = Sampling(temperature=0)
ARCHS = [("gpt2", {}), ("modern", {}), ("modern", {"ngram_rows": 500, "ngram_longest": 7})]


def sharp(arch="gpt2", **changes):
    """A model of 16 positions with weights so large that its predictions differ clearly."""
    model = GPTModel(tiny(arch, vocab_size=257, **changes), seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.3, generator=g)
    return model


@pytest.fixture
def model():
    return sharp()


PROMPT = [5, 6, 7]


def numbers(count, seed=0):
    return torch.randint(0, 257, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def recorded(monkeypatch):
    """The probabilities that tokens are drawn with from now on: {ids before: (V,)}."""
    found, plain = {}, Sampling.probabilities

    def spy(self, logits, occurred):
        p = plain(self, logits, occurred)
        found.update(zip(map(tuple, occurred), p, strict=True))
        return p

    monkeypatch.setattr(Sampling, "probabilities", spy)
    return found


def test_greedy_takes_the_likeliest_token_each_time(model):
    model.eval()
    out = PROMPT + generate(model, [PROMPT], 8, CPU, GREEDY)[0]
    for t in range(3, 11):
        assert out[t] == model(torch.tensor([out[:t]]))[0][0, -1].argmax()


@pytest.mark.parametrize("lengths", [(5,), (1, 9, 5, 3), (14, 2, 16, 30)])
@pytest.mark.parametrize("arch, changes", ARCHS)
def test_a_cache_changes_no_prediction(monkeypatch, arch, changes, lengths):
    # Rows of different length, each in its own time beyond the 16 positions of the model.
    model = sharp(arch, **changes)
    prompts = [numbers(n, seed=i) for i, n in enumerate(lengths)]
    hot = Sampling(temperature=1.0, top_k=0)
    for kind in (GREEDY, hot):
        seeds = range(len(prompts))
        found, written = [], []
        for use_cache in (True, False):
            probabilities = recorded(monkeypatch)
            written.append(generate(model, prompts, 40, CPU, kind, seeds, use_cache=use_cache))
            found.append(probabilities)
            monkeypatch.undo()
        assert written[0] == written[1]
        assert found[0].keys() == found[1].keys() and len(found[0]) == 40 * len(prompts)
        for ids, p in found[0].items():
            torch.testing.assert_close(p, found[1][ids], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch, changes", ARCHS)
def test_a_row_is_the_same_alone_and_beside_others(arch, changes):
    model, prompts = sharp(arch, **changes), [numbers(n, seed=n) for n in (3, 12, 7, 20)]
    seeds, kind = [4, 5, 6, 7], Sampling(temperature=1.0)
    together = generate(model, prompts, 30, CPU, kind, seeds)
    alone = [
        generate(model, [p], 30, CPU, kind, [s])[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("arch, changes", ARCHS)
def test_text_in_parts_gives_the_logits_of_the_whole(arch, changes):
    model = sharp(arch, **changes).eval()
    ids = torch.tensor([numbers(16, seed=i) for i in range(2)])
    for mask in (None, torch.tensor([[0] * 6 + [1] * 10, [1] * 16])):
        cache, parts = KVCache(model.config.n_layers, 16, model.config.ngram_longest), []
        with torch.no_grad():
            whole = model(ids, mask)[0]
            for start, end in ((0, 7), (7, 8), (8, 14), (14, 16)):
                seen = None if mask is None else mask[:, :end]
                parts.append(model(ids[:, start:end], seen, cache=cache)[0])
            cache = KVCache(model.config.n_layers, 16, model.config.ngram_longest)
            model(ids[:, :7], None if mask is None else mask[:, :7], cache=cache)
            loss = model(ids[:, 7:], mask, ids[:, 7:], cache=cache)[1]
            wanted = F.cross_entropy(whole[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
            torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat(parts, 1)[:, 6:], whole[:, 6:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch, changes", ARCHS)
def test_padding_before_a_text_changes_nothing(arch, changes):
    model, ids = sharp(arch, **changes).eval(), torch.tensor([numbers(10)])
    padded = torch.cat((torch.full((1, 6), 9), ids), 1)
    mask = torch.tensor([[0] * 6 + [1] * 10])
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask)[0][:, 6:], model(ids)[0], rtol=0, atol=1e-4)


def test_with_a_cache_the_model_computes_each_token_once(model, monkeypatch):
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    generate(model, [PROMPT], 12, CPU)
    assert sizes == [3] + [1] * 11
    # From 16 on, a quarter of the context is dropped at once: 13 to 16 tokens are seen.
    sizes.clear()
    generate(model, [numbers(15)], 8, CPU)
    assert sizes == [15, 1, 13, 1, 1, 1, 13, 1]


@pytest.mark.parametrize(
    "length, start", [(1, 0), (16, 0), (17, 4), (20, 4), (21, 8), (24, 8), (1000, 984)]
)
def test_the_window_moves_by_quarters_of_the_context(length, start):
    assert window_start(length, 16) == start


def test_a_context_of_one_token_works():
    model = sharp(max_position_embeddings=1)
    assert len(generate(model, [PROMPT], 5, CPU)[0]) == 5


def test_a_full_cache_is_refused():
    cache, k = LayerCache(3), torch.zeros(1, 2, 2, 4)
    cache.append(k, k)
    with pytest.raises(ValueError, match="3 tokens holds no 2 more"):
        cache.append(k, k)


def test_the_cache_has_room_for_the_text_and_not_for_the_whole_context(model, monkeypatch):
    rooms = []
    monkeypatch.setattr(
        sampling_module, "KVCache", lambda *sizes: rooms.append(sizes[1]) or KVCache(*sizes)
    )
    generate(model, [PROMPT], 5, CPU, GREEDY)
    generate(model, [numbers(12)], 6, CPU, GREEDY)  # of 16 positions: it starts again once
    assert rooms == [8, 16, 16]


@pytest.mark.parametrize("penalty", [1e-320, 1e-40, 1e39, 1e300])
def test_the_strongest_repetition_penalties_give_probabilities(penalty):
    p = Sampling(0.5, 0, repetition_penalty=penalty).probabilities(
        torch.tensor([[1.0, 0.0, -2.0, 0.5]]), [[0, 1, 2]]
    )
    # Below 1 it favours token 0, the only one of those that occurred with a positive logit; above
    # 1 the tokens that have not occurred, and 0 and 1, whose logits become 0.
    expected = [1, 0, 0, 0] if penalty < 1 else [1, 1, 0, torch.tensor(1.0).exp()]
    expected = torch.tensor([expected], dtype=torch.float32)
    torch.testing.assert_close(p, expected / expected.sum())


def test_draws_follow_the_predicted_probabilities(model):
    # 4000 draws of one token: the frequency of the likeliest is within 5 standard deviations.
    many = generate(model, [PROMPT] * 4000, 1, CPU, Sampling(1.0, top_k=0), range(4000))
    p = model.eval()(torch.tensor([PROMPT]))[0][0, -1].softmax(-1)
    best = int(p.argmax())
    share = sum(new == [best] for new in many) / 4000
    assert abs(share - p[best].item()) < 5 * (p[best].item() * (1 - p[best].item()) / 4000) ** 0.5


def test_top_k_and_the_allowed_ids_limit_the_draws(model):
    many, seeds = [PROMPT] * 500, range(500)
    top = model.eval()(torch.tensor([PROMPT]))[0][0, -1].topk(3).indices
    drawn = generate(model, many, 1, CPU, Sampling(5.0, top_k=3), seeds)
    assert {new for (new,) in drawn} == set(top.tolist())
    allowed = torch.zeros(30, dtype=torch.bool)
    allowed[10:20] = True
    drawn = generate(model, many, 1, CPU, Sampling(9.0, top_k=0), seeds, allowed)
    assert {new for (new,) in drawn} == set(range(10, 20))


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.7},
        {"top_p": 0.02},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_probabilities_are_those_of_hugging_face(options):
    from transformers.generation import logits_process as theirs

    logits = 3 * torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    occurred = torch.tensor([numbers(12, seed=i) for i in range(5)]) % 97
    options = {"temperature": 0.9, "top_k": 0, **options}
    steps = [theirs.RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
    steps.append(theirs.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        steps.append(theirs.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(theirs.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(theirs.MinPLogitsWarper(options["min_p"]))
    wanted = logits.clone()
    for step in steps:
        wanted = step(occurred, wanted)
    found = Sampling(**options).probabilities(logits, occurred.tolist())
    torch.testing.assert_close(found, wanted.softmax(-1), rtol=1e-5, atol=1e-7)


def test_the_seed_decides_and_the_global_random_state_is_left_alone(model):
    state = torch.get_rng_state()
    first, second, third = (generate(model, [PROMPT], 9, CPU, seeds=[s]) for s in (1, 1, 2))
    assert first == second != third
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_is_left_as_it_was(model):
    generate(model.train(), [PROMPT], 1, CPU)
    assert model.training


def test_empty_prompt(model):
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [PROMPT, []], 1, CPU, seeds=[0, 1])
    assert written(model, "")


def written(model, *prompts, new=3, **options):
    options = {"seeds": range(len(prompts)), **options}
    found = continue_texts(model, build_tokenizer("bytes"), prompts, CPU, new, **options)
    return [prompt + str(text) for prompt, text in zip(prompts, found, strict=True)]


def test_text_starts_with_the_prompt(model):
    assert written(model, "Every effort")[0].startswith("Every effort")


@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-37])
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_coldest_draws_are_the_likeliest_tokens(model, temperature, top_k):
    cold = Sampling(temperature, top_k)
    assert generate(model, [PROMPT], 8, CPU, cold) == generate(model, [PROMPT], 8, CPU, GREEDY)


@pytest.mark.parametrize("narrow", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}], ids=str)
def test_the_narrowest_limits_leave_the_likeliest_token(model, narrow):
    draws = generate(model, [PROMPT], 8, CPU, Sampling(**narrow))
    assert draws == generate(model, [PROMPT], 8, CPU, GREEDY)


def test_the_hottest_draws_are_even_among_the_top_k(model):
    hot = Sampling(temperature=1e300, top_k=4)
    drawn = torch.tensor(generate(model, [PROMPT] * 500, 1, CPU, hot, range(500)))
    # 125 of each are expected, with a standard deviation of 9.7.
    counts = drawn.unique(return_counts=True)[1].tolist()
    assert len(counts) == 4 and all(abs(n - 125) < 5 * 9.7 for n in counts)


class Script:
    """In place of a model: row i writes the ids rows[i] one by one, whatever it is given."""

    training, compiled, config = False, False, tiny(vocab_size=257)

    def __init__(self, *rows):
        self.rows = [list(ids) for ids in rows]

    def eval(self):
        pass

    def train(self, mode):
        pass


@pytest.fixture
def scripted(monkeypatch):
    """Has `generate` take the next ids from a `Script`."""

    def logits(self, rows):
        found = torch.zeros(len(rows), 257)
        for place, i in enumerate(rows):
            found[place, self.model.rows[i].pop(0)] = 9.0
        return found

    monkeypatch.setattr(sampling_module._Window, "logits", logits)


def test_a_sample_ends_with_its_document_and_shows_it(scripted):
    model = Script([*b"ends", 256, *b"next"])
    assert written(model, "it ", new=9, sampling=GREEDY) == ["it ends<|endoftext|>"]
    assert written(Script(b"goes on"), "", new=4, sampling=GREEDY) == ["goes"]


def test_rows_end_on_their_own(scripted):
    model = Script([7, 8, 256], [256], [1, 2, 3, 4, 5])
    ended = []

    def on_token(row, new):
        ended.append((row, new))
        return new == 3

    out = generate(
        model, [[256], [3], [4]], 4, CPU, GREEDY, [0, 1, 2], end_token=256, on_token=on_token
    )
    assert out == [[7, 8, 256], [256], [1, 2, 3]]
    assert ended == [(0, 7), (1, 256), (2, 1), (0, 8), (2, 2), (0, 256), (2, 3)]


def test_a_stop_string_ends_a_text_and_is_not_shown(scripted):
    text = b"one\ntwo</end>three"
    for stop, shown, end in (
        (["</end>"], "one\ntwo", "stop"),
        (["zzz", "\n", "</end>"], "one", "stop"),
        (["</End>"], text.decode(), "length"),
        (["e", "one"], "", "stop"),
        (["e", "two"], "on", "stop"),
    ):
        pieces = []
        (found,) = continue_texts(
            Script(text), build_tokenizer("bytes"), ["> "], CPU, len(text), GREEDY, stop=stop,
            on_text=lambda row, piece, seen=pieces: seen.append(piece),
        )  # fmt: skip
        assert (found.text, found.end) == (shown, end) and "".join(pieces) == shown


def test_no_unfinished_character_is_shown(scripted):
    text, pieces = "aé世🌹\r\nz", []
    (found,) = continue_texts(
        Script(text.encode()), build_tokenizer("bytes"), [""], CPU, len(text.encode()), GREEDY,
        on_text=lambda row, piece: pieces.append(piece),
    )  # fmt: skip
    assert pieces == ["a", "é", "世", "🌹", "\r\n", "z"] and found.text == text


def test_a_stream_of_any_ids_is_the_text_of_all(gpt2_files):
    bytes_, gpt2 = build_tokenizer("bytes"), build_tokenizer("gpt2")
    broken = [*"né".encode()[:-1], 0xF0, 0x9F, *b"ok", 0xFF, 0x80, *"世".encode()]
    text = "Ein Satz, 世界 🌹🌹 and   e\u0301\n\n"
    for tokenizer, ids in ((bytes_, broken), (gpt2, gpt2.encode(text).tolist())):
        for cut in range(len(ids)):
            stream = TextStream(tokenizer, ids[:cut])
            shown = "".join(stream.add(i) for i in ids[cut:]) + stream.finish()
            whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
            if not before.endswith("\ufffd"):  # else the prompt ends inside of a character
                assert before + shown == whole


def test_ids_that_stand_for_nothing_are_never_drawn(model):
    bytes_ = build_tokenizer("bytes")
    gaps = dataclasses.make_dataclass("Gaps", ["is_text", "end_token"])
    allowed = drawable(gaps(bytes_.is_text & (torch.arange(257).numpy() % 2 > 0), 256))
    assert allowed.nonzero().flatten().tolist() == [*range(1, 257, 2), 256]


@pytest.mark.parametrize(
    "content, prompt",
    [
        (
            "half a line\n\nGREMIO:\nGood morrow, neighbour Baptista.\n" * 9,
            "Good morrow, neighbour",
        ),
        ("世界 你好\none\n" * 9, "世界"),
        ("a\nb\n" * 9, ""),
    ],
)
def test_the_suggested_prompt_is_of_the_data(tmp_path, content, prompt):
    (tmp_path / "a.txt").write_text(content)
    data = TextDatasetForCausalLM([tmp_path / "a.txt"], build_tokenizer("bytes"), 16, tmp_path)
    assert fitting_prompt(data) == prompt


def test_the_suggested_prompt_starts_as_a_document_does(tmp_path):
    lines = "".join(f'{{"text": "Number {i} is a nice one."}}\n' for i in range(9))
    (tmp_path / "a.jsonl").write_text(lines)
    data = TextDatasetForCausalLM([tmp_path / "a.jsonl"], build_tokenizer("bytes"), 16, tmp_path)
    assert fitting_prompt(data) == "Number 1 is"


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_layout_of_weights_for_generation_changes_no_prediction(arch):
    plain, laid_out = sharp(arch).eval(), sharp(arch).eval()
    lay_out_for_generation(laid_out, CPU)
    strides = {p.stride()[0] for p in laid_out.parameters() if p.ndim == 2}
    assert 1 in strides and all(
        p.equal(q) for p, q in zip(plain.parameters(), laid_out.parameters(), strict=True)
    )
    ids = torch.tensor([numbers(16)])
    with torch.no_grad():
        torch.testing.assert_close(laid_out(ids)[0], plain(ids)[0], rtol=0, atol=1e-4)
    assert generate(laid_out, [PROMPT], 30, CPU) == generate(plain, [PROMPT], 30, CPU)
