"""Do two models compute the same? The largest difference of their logits, and how large it may
be.
"""

from __future__ import annotations

from typing import Any

import torch

from model import GPTModel
from runtime.setting_fields import UserError

# The largest logit difference, as part of the largest logit. Both models compute in float32, in
# another order: that made up to 2.1e-6 of it (GPT-2 small to XL and modern of three widths, 1024
# positions, large random weights). The smallest mistake tried made 4.8e-4: exact GELU for its tanh
# form. RMSNorm with an epsilon of 1e-6 made 2.5e-5.
BOUND = 2e-5
_MOST_WORK = 2e12  # parameters x tokens: about a minute on two cores
_MOST_LOGITS = 2**26
_MOST_TOKENS = 8192  # whose attention may take the square of them


@torch.no_grad()
def largest_difference(ours: GPTModel, theirs: Any) -> tuple[float, float, int]:
    """The largest difference between the logits of two models on a row of random ids, the largest
    logit, and the number of tokens in the row: the model's context, if that takes no more than
    about a minute. theirs: a model of transformers.
    """
    config = ours.config
    work = int(_MOST_WORK / ours.num_parameters())
    tokens = max(1, min(config.max_position_embeddings, _MOST_TOKENS, work))
    keep = max(1, min(tokens, _MOST_LOGITS // config.vocab_size))  # the last positions
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=draw)
    logits = ours(ids, logits_to_keep=keep)[0]
    other = theirs(ids, logits_to_keep=keep, use_cache=False).logits
    return float((logits - other).abs().max()), float(other.abs().max()), tokens


def check_agreement(ours: GPTModel, theirs: Any) -> str:
    """A line about how well two models agree. Raises UserError if they don't."""
    difference, largest, tokens = largest_difference(ours, theirs)
    name = type(theirs).__name__
    if not difference <= BOUND * largest:
        raise UserError(
            f"the logits are up to {difference:.3g} from those of transformers' {name}, whose "
            f"largest is {largest:.3g}; more than {BOUND:g} of that is no rounding, so nothing was "
            "written"
        )
    return (
        f"largest logit difference to transformers' {name}: {difference:.2g} (largest logit "
        f"{largest:.3g}; {tokens} random ids, float32)"
    )
