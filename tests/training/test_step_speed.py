"""The measured seconds of a step, and the batches that it is measured on."""

import dataclasses
import time

import torch
from conftest import CPU, toy_settings

from dataset import open_data
from parallel.context import SINGLE_PROCESS
from parallel.process_group import Ranks
from training import step_speed
from training.step_speed import seconds_of_step


def test_a_step_that_takes_longer_is_measured_longer(monkeypatch):
    args = toy_settings()
    train, _, args = open_data(args)
    given, real = [], step_speed.train_step

    def slow(net, optimizer, batch, *rest):
        given.append(tuple(batch.shape))
        time.sleep(0.05)
        return real(net, optimizer, batch, *rest)

    monkeypatch.setattr(step_speed, "train_step", slow)
    longer = dataclasses.replace(args, seq_len=24, model=dataclasses.replace(
        args.model, max_position_embeddings=24))  # fmt: skip
    seconds = seconds_of_step(longer, train, CPU, Ranks(), None, limit=0.3)
    assert 0.05 <= seconds < 0.5
    assert set(given) == {(4, 24)} and 6 <= len(given) <= 9  # two, one, and what fits


def test_batches_of_another_length_are_text_of_the_data_in_its_order():
    args = toy_settings()
    train, _, args = open_data(args)
    windows = train.samples(0, 6, 0).flatten()
    shorter = dataclasses.replace(args, seq_len=12)
    batch = step_speed._batch(train, 0, shorter, SINGLE_PROCESS)
    assert torch.equal(batch.flatten(), windows[: 4 * 12])
    assert not torch.equal(batch, step_speed._batch(train, 1, shorter, SINGLE_PROCESS))
