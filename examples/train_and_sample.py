"""The toolkit as a library: trains the quickstart's model, evaluates it, draws its loss, samples.

`python examples/train_and_sample.py` takes half a minute; its flags are those of train_minimal.py.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_model, save_checkpoint
from dataset import data_record, open_data
from model import GPTModel
from runtime.device import pick_device
from settings.command_line import parse_settings
from training.evaluation import evaluate
from training.optimizers import make_optimizer
from training.step import RunState, train_step

args = parse_settings("train_minimal", ["--num-steps", "400", *sys.argv[1:]])
device = pick_device(args.device, args.precision)
train, val, args = open_data(args)  # with no data named: the source of Python's library, as bytes
model = GPTModel(args.model, seed=args.seed).to(device.torch_device)
optimizer, state, losses = make_optimizer(model, args), RunState.fresh(device), []
while state.step < args.num_steps:
    batch = train.global_batch(state.step, args)
    stats = train_step(model, optimizer, batch, args, state, device)
    losses.append(float(stats.nll_sum) / stats.n_tokens)  # nats per token
result = evaluate(model, val, args.batch_size, device)
print(f"validation loss {result.loss:.3f}, perplexity {result.ppl:.2f}; see example.png")

plt.plot(losses)
plt.axhline(result.loss, linestyle="--", label="validation")
plt.legend()
plt.savefig("example.png")

save_checkpoint("example.pt", model, optimizer, state, args, data_record(train, val))
run = load_model("example.pt")  # model and tokenizer, ready for use
print(run.continue_text("def main(", max_new_tokens=200))
