"""Trains the same GPT on many processes: `torchrun --nproc-per-node=N train_ddp.py`.

It is train_minimal.py and what makes that distributed: see `diff train_minimal.py train_ddp.py`.
"""

import settings.before_torch  # noqa: F401  # before torch loads

from checkpointing.manager import CheckpointManager
from checkpointing.resuming import resumable_settings
from config import Settings
from conversion.start import restore, settings_of_weights
from dataset import data_record, open_data
from model import GPTModel
from parallel.parallel_model import ParallelModel
from parallel.process_group import Ranks, identity, process_group
from parallel.rendezvous import is_first_reporter, mark_started, rendezvous
from reporting.dry_run import dry_run
from reporting.run_log import open_log
from runtime.device import pick_device, tune
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


def main(args: Settings, signals: StopSignals, ranks: Ranks) -> int:
    device = pick_device(args.device, args.precision, ranks.local_rank)
    tune(device, args.model.use_activation_checkpoint, args.deterministic)
    train, val, args = ranks.each(open_data, args)  # fills in args.vocab_size
    args = fit_micro_batch(args, device, ranks.local_world, ranks.agree)
    data = data_record(train, val)
    state = RunState.fresh(device)
    model = GPTModel(args.model, seed=args.seed)
    ranks.must_agree(identity(args, data, model))
    state.pending_messages += compile_model(model, args, device, ranks.agree)
    parallel = ParallelModel(model, args, device, ranks)  # parallel.net: the model, spread out
    recompute_activations(model)  # saves fewer activations for the backward pass
    optimizer = make_optimizer(model, args, parallel)
    if args.dry_run:
        return dry_run(model, optimizer, args, device, train, val, parallel, ranks, parallel.net)
    checkpoints = CheckpointManager(args, model, optimizer, state, data, device, ranks, parallel)
    if args.resume or args.init_from:
        restore(checkpoints, train.tokenizer)  # the run at its path, or given weights
    log = open_log(ranks, "train_ddp", args, state, device, model, train, val)
    batches, deadline = Prefetch(train, args, device, parallel), Deadline(args, state, val, ranks)
    if starts_with_evaluation(state.step, val, args, device):
        log.eval(state, evaluate(model, val, args.batch_size, device, parallel))
    checkpoints.begin()  # from here on the checkpoint path belongs to this run
    signals.install()  # a signal to any rank ends the run after its step, with a checkpoint
    mark_started()  # torchrun --max-restarts continues the run from now on
    while state.step < args.num_steps and not state.stop:  # step = finished updates, everywhere
        batch = batches(state.step)  # this rank's rows of the global batch
        stats = train_step(parallel.net, optimizer, batch, args, state, device, parallel)
        log.after_step(state)
        state.stop, save, near = ranks.agree(signals.signal, checkpoints.overdue, deadline.near())
        args = deadline.settled(checkpoints.changed, log.changed) if near else args  # --minutes
        now = due(state, args, save)
        if now.log:
            log.train(state, stats.summed(parallel), batches.waited)
            check_finite(state, args, checkpoints.way_back)
        if now.eval:
            result = evaluate(model, val, args.batch_size, device, parallel)
            state.update_best(result.loss)
            log.eval(state, result)
        if now.sample:
            log.sample(state, sample(model, train.tokenizer, args, device, parallel))
        if now.save:
            log.saved(checkpoints.save())
        elif state.is_best:
            log.saved(checkpoints.keep_best())  # in memory, if there is room, until the next save
    checkpoints.finish()
    log.finish(state)
    return state.exit_code(args)


def launch(argv: list[str]) -> int:
    """Trains as the command line says, once all ranks are there; returns the exit code."""
    start = rendezvous()  # waits for all ranks
    args = parse_settings(
        "train_ddp", argv, start.world, resumable_settings, settings_of_weights, start.restarted
    )
    with StopSignals() as signals, process_group(args, start, alone=True) as ranks:
        args = fit_to_time("train_ddp", argv, args, ranks, ParallelModel)
        return main(args, signals, ranks)


if __name__ == "__main__":
    run_script(launch, is_first_reporter)
