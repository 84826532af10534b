"""Trains the same GPT on many processes: `torchrun --nproc-per-node=N train_ddp.py`.

The page of train_minimal.py and what makes it distributed: see the `diff` of the two.
"""

from checkpoint import resumable_settings
from cli import parse_settings, run_script
from config import Settings
from dataset import Prefetch, open_data, record_of
from device import compile_model, pick_device, tune
from distributed import (
    Ranks,
    divide,
    process_group,
    ranks_of_torchrun,
    restarted,
    sum_ranks,
    summed,
    wrap,
)
from eval import evaluate
from generate import sample
from memory import fit_micro_batch
from model import GPTModel
from optim import make_optimizer
from run_log import RunLog
from saver import Saver
from step import RunState, check_finite, due, rehearse, train_step
from watch import Watch


def main(args: Settings, watch: Watch, ranks: Ranks) -> int:
    rank, world = ranks.rank, ranks.world
    device = pick_device(args.device, args.precision, ranks.local_rank)
    tune(device, sparing=args.model.use_activation_checkpoint)
    train, val, args = open_data(args)  # fills in vocab_size,
    args = fit_micro_batch(args, device, world, ranks.local_world, ranks.agree)
    data = record_of(train, val)
    model = GPTModel(args.model, seed=args.seed).to(device.torch)
    optimizer = make_optimizer(model, args, divide)
    state = RunState.fresh(device)
    saver = Saver(args, model, optimizer, state, data, device, rank, world)
    if args.resume:
        saver.load()
        ranks.must_agree("what they resume", (state.run_id, state.step))
    ddp = wrap(model, device, args)  # the same weights, but its backward pass averages over ranks
    state.notes += compile_model(model, args.compile, device, lambda: rehearse(ddp, args, device))
    log = RunLog("train_ddp", args, state, device, model, train, val, rank, world)
    batches = Prefetch(train, args, device, rank, world)
    if state.step == 0:
        log.eval(state, evaluate(model, val, args.batch_size, device, rank, world, sum_ranks))
    saver.begin()  # from here on the checkpoint path is this run's,
    watch.begin()  # and a signal ends the run after its step, with a checkpoint
    while state.step < args.num_steps and not state.stop:  # step = updates finished, everywhere
        batch = batches(state.step)  # this rank's rows of it
        stats = train_step(ddp, optimizer, batch, args, state, device, rank, world, ddp.no_sync)
        log.tick(state)
        state.stop, save = ranks.agree(watch.signal, saver.overdue)
        now = due(state, args, save)
        if now.log:
            log.train(state, summed(stats))
            check_finite(state, args)
        if now.eval:
            log.eval(state, evaluate(model, val, args.batch_size, device, rank, world, sum_ranks))
        if now.sample:
            log.sample(sample(model, train.tokenizer, args, device))
        if now.save or state.at_best:
            log.saved(saver.save())
            ranks.meet()
    saver.finish()
    ranks.meet()
    log.finish(state)
    return state.exit_code(args)


def launch(argv: list[str]) -> int:
    world, again = ranks_of_torchrun().world, restarted()
    args = parse_settings("train_ddp", argv, world, resumable_settings, again)
    with Watch() as watch, process_group(args.device, args.timeout_seconds, alone=True) as ranks:
        return main(args, watch, ranks)


if __name__ == "__main__":
    run_script(launch)
