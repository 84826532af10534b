"""The names that other trainers give to settings, and what to give here instead."""

from __future__ import annotations

# Name of a flag in other trainers, with hyphens for underscores -> what to give here.
FOREIGN = {
    **dict.fromkeys(("learning-rate", "max-lr", "peak-lr"), "--lr"),
    **dict.fromkeys(
        ("epochs", "num-epochs", "num-train-epochs", "max-epochs"),
        "--num-steps: runs are counted in optimizer steps; the log says how many epochs they are",
    ),
    **dict.fromkeys(
        ("max-iters", "max-steps", "steps", "iters", "num-iterations", "lr-decay-iters"),
        "--num-steps",
    ),
    **dict.fromkeys(
        ("block-size", "context-length", "context-size", "sequence-length", "max-seq-len"),
        "--seq-len",
    ),
    **dict.fromkeys(("n-layer", "num-layers", "depth", "num-hidden-layers"), "--n-layers"),
    **dict.fromkeys(("n-head", "num-heads", "num-attention-heads"), "--n-heads"),
    **dict.fromkeys(("n-embd", "n-embed", "emb-dim", "embed-dim", "hidden-size"), "--d-model"),
    **dict.fromkeys(
        ("weight-tying", "tie-weights", "tie-word-embeddings"),
        "nothing: the embedding and the output head always share their weights",
    ),
    **dict.fromkeys(
        ("gradient-accumulation-steps", "accumulation-steps", "grad-accum"), "--grad-accum-steps"
    ),
    **dict.fromkeys(
        ("micro-batch-size", "device-batch-size", "per-device-train-batch-size"), "--batch-size"
    ),
    "total-batch-size": "--global-batch-size, which counts sequences",
    **dict.fromkeys(("grad-clip", "max-grad-norm", "clip-grad-norm"), "--grad-clip-norm"),
    **dict.fromkeys(("warmup-iters", "warmup"), "--warmup-steps"),
    **dict.fromkeys(("eval-interval", "eval-every"), "--eval-steps"),
    "log-interval": "--log-steps",
    **dict.fromkeys(("save-interval", "save-every"), "--save-steps"),
    **dict.fromkeys(("dtype", "amp", "mixed-precision", "fp16"), "--precision"),
    **dict.fromkeys(("out-dir", "output-dir"), "--checkpoint-path and --log-dir"),
    **dict.fromkeys(("data", "dataset", "data-dir", "input"), "--train-data or --train-npy"),
    **dict.fromkeys(("text-field", "dataset-text-field", "text-key"), "--text-column"),
    **dict.fromkeys(("ckpt", "checkpoint"), "--checkpoint-path"),
    "gradient-checkpointing": "--use-activation-checkpoint",
    "no-compile": "--compile off",
    **dict.fromkeys(("from-pretrained", "model-name-or-path", "pretrained"), "--init-from"),
    **dict.fromkeys(("wandb", "wandb-log"), "--use-wandb"),
    **dict.fromkeys(("num-tokens", "length"), "--max-new-tokens"),
}
