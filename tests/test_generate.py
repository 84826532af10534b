import pytest
import torch
from conftest import CPU, tiny

from corpus.tokenizer import build_tokenizer
from dataset import TextDatasetForCausalLM
from model import GPTModel
from training.sampling import continue_text, fitting_prompt, generate


@pytest.fixture
def model():
    model = GPTModel(tiny(vocab_size=257), seed=1)
    with torch.no_grad():
        model.wte.weight.mul_(8)
    return model


PROMPT = torch.tensor([[5, 6, 7]])


def test_greedy_takes_the_likeliest_token_each_time(model):
    out = generate(model, PROMPT, 8, CPU, temperature=0)
    for t in range(3, 11):
        assert out[0, t] == model(out[:, :t])[0][0, -1].argmax()


def test_draws_follow_the_predicted_probabilities(model):
    # 4000 draws of one token: the frequency of the likeliest is within 5 standard deviations.
    out = generate(model, PROMPT.expand(4000, 3), 1, CPU, temperature=1.0, top_k=0)
    p = model(PROMPT)[0][0, -1].softmax(-1)
    best = int(p.argmax())
    share = (out[:, -1] == best).double().mean().item()
    assert abs(share - p[best].item()) < 5 * (p[best].item() * (1 - p[best].item()) / 4000) ** 0.5


def test_top_k_and_vocabulary_limit_the_draws(model):
    many = PROMPT.expand(500, 3)
    top = model(PROMPT)[0][0, -1].topk(3).indices
    drawn = generate(model, many, 1, CPU, temperature=5.0, top_k=3)[:, -1]
    assert set(drawn.tolist()) == set(top.tolist())
    assert generate(model, many, 1, CPU, temperature=9.0, top_k=0, vocab_size=20)[:, -1].max() < 20


def test_the_seed_decides_and_the_global_random_state_is_left_alone(model):
    state = torch.get_rng_state()
    first = generate(model, PROMPT, 9, CPU, seed=1)
    assert torch.equal(first, generate(model, PROMPT, 9, CPU, seed=1))
    assert not torch.equal(first, generate(model, PROMPT, 9, CPU, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_longer_than_the_positions_works(model):
    assert generate(model, PROMPT, 40, CPU).shape == (1, 43)  # 16 positions


def test_mode_is_left_as_it_was(model):
    generate(model.train(), PROMPT, 1, CPU)
    assert model.training


def test_empty_prompt(model):
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, PROMPT[:, :0], 1, CPU)
    assert continue_text(model, build_tokenizer("bytes"), "", CPU, max_new_tokens=2) is not None


def test_text_starts_with_the_prompt(model):
    text = continue_text(model, build_tokenizer("bytes"), "Every effort", CPU, max_new_tokens=3)
    assert text.startswith("Every effort")


@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-37])
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_coldest_draws_are_the_likeliest_tokens(model, temperature, top_k):
    greedy = generate(model, PROMPT, 8, CPU, temperature=0)
    assert torch.equal(generate(model, PROMPT, 8, CPU, temperature, top_k), greedy)


def test_the_hottest_draws_are_even_among_the_top_k(model):
    many = PROMPT.expand(500, 3)
    drawn = generate(model, many, 1, CPU, temperature=1e300, top_k=4)[:, -1]
    # 125 of each are expected, with a standard deviation of 9.7.
    assert (
        sorted(abs(n - 125) < 5 * 9.7 for n in drawn.unique(return_counts=True)[1].tolist())
        == [True] * 4
    )


class Script:
    """In place of a model: writes these ids, one after the other, whatever it is given."""

    training, compiled = False, False

    def __init__(self, ids):
        self.ids, self.config = list(ids), tiny(vocab_size=257)

    def eval(self):
        pass

    def train(self, mode):
        pass

    def __call__(self, seen, logits_to_keep):
        logits = torch.zeros(seen.shape[0], 1, 257)
        for row, new in enumerate(torch.as_tensor(self.ids.pop(0)).expand(seen.shape[0]).tolist()):
            logits[row, 0, new] = 9.0
        return logits, None


def test_a_sample_ends_with_its_document_and_shows_it():
    bytes_ = build_tokenizer("bytes")
    model = Script([*b"ends", 256, *b"next"])
    written = continue_text(model, bytes_, "it ", CPU, max_new_tokens=9, temperature=0)
    assert written == "it ends<|endoftext|>"
    cut = continue_text(Script([*b"goes on"]), bytes_, "", CPU, max_new_tokens=4, temperature=0)
    assert cut == "goes"


def test_rows_end_on_their_own():
    model = Script([[7, 256], [8, 9], [256, 9], [1, 1]])
    out = generate(model, torch.tensor([[256], [3]]), 4, CPU, temperature=0, end_token=256)
    assert out.tolist() == [[256, 7, 8, 256], [3, 256, 256, 256]]


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
