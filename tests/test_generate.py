import pytest
import torch
from conftest import CPU, tiny

from generate import continue_text, generate
from model import GPTModel
from tokenizer import build_tokenizer


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
