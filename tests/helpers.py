"""Small runs and files that several tests use."""

import dataclasses

import numpy as np
import torch
from conftest import CPU, toy_settings

from checkpoint import build_checkpoint
from dataset import open_data
from model import GPTModel
from reporting.run_log import RunLog
from runtime.device import Device
from training.activation_recompute import recompute_activations
from training.optimizers import make_optimizer
from training.step import RunState, StepStats, train_step

DATA = {"train": {"fingerprint": "a", "tokens": 9}, "val": {"fingerprint": "b"}, "tokenizer": ""}
FP16 = Device(torch.device("cpu"), "fp16", "test")


class Run:
    """A training run without files."""

    def __init__(self, *flags, device=CPU, **changes):
        args = toy_settings(*flags, **changes)
        self.train, _, self.args = open_data(args)
        self.model = GPTModel(self.args.model, seed=args.seed)
        recompute_activations(self.model)
        self.optimizer = make_optimizer(self.model, self.args)
        self.device, self.state = device, RunState.fresh(device)

    def step(self, model=None):
        batch = self.train.global_batch(self.state.step, self.args)
        return train_step(
            model or self.model, self.optimizer, batch, self.args, self.state, self.device
        )

    def steps(self, n):
        return [float((s := self.step()).nll_sum) / s.n_tokens for _ in range(n)]

    def weights(self):
        return {k: v.clone() for k, v in self.model.state_dict().items()}


def logged_run(*flags, state=None, model=None):
    """The log of a run that computes nothing, and its state, which a given one resumes."""
    train, val, args = open_data(toy_settings(*flags, resume=state is not None))
    state = state or RunState()
    model = model or GPTModel(args.model, seed=0)
    return RunLog("train_minimal", args, state, CPU, model, train, val), state


def update(log, state, loss=2.0, norm=0.5):
    """Tells the log of one more update."""
    state.step += 1
    state.tokens += 60
    log.train(state, StepStats(torch.tensor(loss * 60), 60, torch.tensor(norm), 3.3e-5), waited=0.0)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def content(run, **changes):
    args = dataclasses.replace(run.args, **changes)
    return build_checkpoint(
        run.model, run.optimizer, run.state, args, DATA, {"python": "3", "cpus": 2}
    )


TINY = (
    "--use-toy-data --vocab-size 97 --seq-len 16 --n-layers 2 --n-heads 2 --d-model 16 --device cpu"
)


def npy(path, ids, dtype="<u2"):
    np.save(path, np.asarray(ids, dtype))
    return path


def llmc(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path
