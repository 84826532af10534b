"""Trains a GPT on one device: `python train_minimal.py` (`--help` shows all flags)."""

import settings.before_torch  # noqa: F401  # before torch loads

from checkpointing.manager import CheckpointManager
from checkpointing.resuming import resumable_settings
from config import Settings
from conversion.start import restore, settings_of_weights
from dataset import data_record, open_data
from model import GPTModel
from parallel.rendezvous import is_first_reporter, must_be_alone
from reporting.dry_run import dry_run
from reporting.run_log import RunLog
from runtime.device import pick_device, tune, use_threads
from runtime.run_script import run_script
from runtime.signals import StopSignals
from settings.command_line import parse_settings
from training.activation_recompute import recompute_activations
from training.compilation import compile_model
from training.deadline import Deadline
from training.evaluation import evaluate, starts_with_evaluation
from training.memory import fit_micro_batch
from training.optimizers import make_optimizer
from training.prefetch import Prefetch
from training.step import RunState, check_finite, due, train_step
from training.text_generation import sample
from training.time_budget import fit_to_time


def main(args: Settings, signals: StopSignals) -> int:
    device = pick_device(args.device, args.precision)
    tune(device, args.model.use_activation_checkpoint, args.deterministic)
    train, val, args = open_data(args)  # fills in args.vocab_size
    args = fit_micro_batch(args, device)  # fills in batch_size with --micro-batch auto
    data = data_record(train, val)
    state = RunState.fresh(device)
    model = GPTModel(args.model, seed=args.seed).to(device.torch_device)
    state.pending_messages += compile_model(model, args, device)
    recompute_activations(model)  # saves fewer activations for the backward pass
    optimizer = make_optimizer(model, args)
    if args.dry_run:
        return dry_run(model, optimizer, args, device, train, val)
    checkpoints = CheckpointManager(args, model, optimizer, state, data, device)
    if args.resume or args.init_from:
        restore(checkpoints, train.tokenizer)  # the run at its path, or given weights
    log = RunLog("train_minimal", args, state, device, model, train, val)
    batches, deadline = Prefetch(train, args, device), Deadline(args, state, val)
    if starts_with_evaluation(state.step, val, args, device):
        log.eval(state, evaluate(model, val, args.batch_size, device))
    checkpoints.begin()  # from here on the checkpoint path belongs to this run
    signals.install()  # a signal now ends the run after its step, with a checkpoint
    while state.step < args.num_steps and not state.stop:  # step = finished updates, everywhere
        batch = batches(state.step)  # depends on nothing but the seed and the step
        stats = train_step(model, optimizer, batch, args, state, device)
        log.after_step(state)
        state.stop, save, near = signals.signal, checkpoints.overdue, deadline.near()
        args = deadline.settled(checkpoints.changed, log.changed) if near else args  # --minutes
        now = due(state, args, save)
        if now.log:
            log.train(state, stats, batches.waited)
            check_finite(state, args, checkpoints.way_back)
        if now.eval:
            result = evaluate(model, val, args.batch_size, device)
            state.update_best(result.loss)
            log.eval(state, result)
        if now.sample:
            log.sample(state, sample(model, train.tokenizer, args, device))
        if now.save:
            log.saved(checkpoints.save())
        elif state.is_best:
            log.saved(checkpoints.keep_best())  # in memory, if there is room, until the next save
    checkpoints.finish()
    log.finish(state)
    return state.exit_code(args)


def launch(argv: list[str]) -> int:
    """Trains as the command line says; returns the exit code."""
    must_be_alone()
    args = parse_settings(
        "train_minimal", argv, saved=resumable_settings, weights=settings_of_weights
    )
    use_threads(args.threads, local_world=1)
    with StopSignals() as signals:
        return main(fit_to_time("train_minimal", argv, args), signals)


if __name__ == "__main__":
    run_script(launch, is_first_reporter)
