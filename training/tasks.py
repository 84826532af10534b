"""Scores a model on tasks of lm-evaluation-harness (Gao et al. 2024), such as HellaSwag.

The harness prepares the questions and counts; here are the log-likelihoods and texts that it asks
for. They are those of its own `hf` backend, which `TaskModel` says where it differs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.tokenizer import Tokenizer
from model import GPTModel
from runtime.console import one_line, progress
from runtime.device import Device
from runtime.setting_fields import UserError
from training.sampling import Sampling
from training.text_generation import Continuation, continue_ids, prompt_ids

_LIMITS = ("max_gen_toks", "max_new_tokens")  # how tasks call the most tokens of a text
_MOST_NEW_TOKENS = 256  # of a text whose task names no limit; the harness's own default


@dataclass(frozen=True)
class TaskScores:
    """The results of one task. metrics: as the harness calls them, with `_stderr` of each; samples:
    the number of questions.
    """

    metrics: dict[str, float]
    samples: int = 0
    num_fewshot: int = 0
    version: str = ""
    details: list[dict[str, Any]] = field(default_factory=list, repr=False)  # of each question

    @property
    def values(self) -> dict[str, float]:
        """The metrics without their standard errors."""
        return {
            metric: value
            for metric, value in self.metrics.items()
            if not metric.split(",")[0].endswith("_stderr")
        }

    @property
    def record(self) -> dict[str, Any]:
        """The scores as a record of eval.jsonl, without the details."""
        names = ("metrics", "samples", "num_fewshot", "version")
        return {name: getattr(self, name) for name in names}

    def line(self, name: str) -> str:
        """What eval.py prints of the task of that name: each metric with its standard error."""
        shown = []
        for metric, value in self.values.items():
            label, comma, rest = metric.partition(",")
            error = self.metrics.get(f"{label}_stderr{comma}{rest}")
            shown.append(f"{metric} {value:.4f}" + (f" +- {error:.4f}" if error else ""))
        about = f"{self.samples} questions, {self.num_fewshot}-shot"
        return f"{name}: {', '.join(shown)} ({about})"


class TaskModel:
    """What the harness asks of a model: log-likelihoods of token ids, and texts.

    It differs from the `hf` backend of the harness in three points, where that fails or finds
    tokens that the text has not: special tokens that stand in a text are text; a continuation
    longer than the model's context is scored in parts, each of which sees at least half a context;
    and a text may become longer than the context.
    """

    def __init__(
        self, model: GPTModel, tokenizer: Tokenizer, device: Device, batch_size: int
    ) -> None:
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        self.batch_size, self.longest = batch_size, model.config.max_position_embeddings

    def log_likelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation) in token ids, neither of them empty: the log-probability
        of the continuation in nats, and whether each of its tokens is the likeliest one. Of a
        context that is too long for the model, the last tokens count.
        """
        parts, owners = [], []
        for owner, (context, continuation) in enumerate(pairs):
            for part in self._parts(context, continuation):
                parts.append(part)
                owners.append(owner)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        order = sorted(range(len(parts)), key=lambda i: -len(parts[i][0]))  # alike: less padding
        starts = range(0, len(parts), self.batch_size)
        for start in progress(starts, "scoring", len(starts)):
            chosen = order[start : start + self.batch_size]
            found = self._scored([parts[i] for i in chosen])
            for i, (total, likeliest) in zip(chosen, found, strict=True):
                totals[owners[i]] += total
                greedy[owners[i]] &= likeliest
        return list(zip(totals, greedy, strict=True))

    def _parts(
        self, context: list[int], continuation: list[int]
    ) -> list[tuple[list[int], list[int]]]:
        """The inputs of the model and the tokens to be predicted at their ends: one pair, but more
        for a continuation that is longer than the context of the model.
        """
        whole, size = context + continuation, len(continuation)
        step = size if size <= self.longest else max(1, self.longest // 2)
        ends = [*range(len(context) + step, len(whole), step), len(whole)]
        begins = [len(context), *ends[:-1]]
        return [
            (whole[max(0, end - 1 - self.longest) : end - 1], whole[begin:end])
            for begin, end in zip(begins, ends, strict=True)
        ]

    @torch.no_grad()
    def _scored(self, parts: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores one batch of inputs, padded on the right, where causal attention sees nothing."""
        longest, on = max(len(ids) for ids, _ in parts), self.device.torch_device
        inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in parts], device=on)
        with self.device.autocast():
            hidden = self.model.hidden_states(inputs)  # (B, T, C)
        found = []
        for row, (ids, wanted) in zip(hidden, parts, strict=True):
            with self.device.autocast():
                logits = F.linear(row[len(ids) - len(wanted) : len(ids)], self.model.output_weight)
            found.append(_of_tokens(logits.float(), torch.tensor(wanted, device=on)))
        return found

    def texts_after(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The text that the model writes after each context, up to one of the strings
        options["until"] or the end of the document. Greedy unless the options say do_sample. Raises
        UserError for an option that is not known here.
        """
        alike: dict[str, list[int]] = {}  # those with the same options are computed together
        for i, (_, options) in enumerate(asked):
            alike.setdefault(repr(sorted(options.items())), []).append(i)
        batches = [
            chosen[start : start + self.batch_size]
            for chosen in alike.values()
            for start in range(0, len(chosen), self.batch_size)
        ]
        texts = [""] * len(asked)
        for chosen in progress(batches, "writing", len(batches)):
            written = self._continued([asked[i][0] for i in chosen], asked[chosen[0]][1], chosen)
            for i, text in zip(chosen, written, strict=True):
                texts[i] = text.text
        return texts

    def _continued(
        self, contexts: list[str], options: dict[str, Any], seeds: list[int]
    ) -> list[Continuation]:
        sampling = _sampling_of(options)
        until = options.get("until") or []
        limits = [options[k] for k in _LIMITS if options.get(k)]
        most = int(limits[0]) if limits else _MOST_NEW_TOKENS
        prompts = [prompt_ids(self.tokenizer, context) for context in contexts]
        if self.longest > most:  # what the model sees is the same throughout, as in the harness
            prompts = [ids[-(self.longest - most) :] for ids in prompts]
        stop = [until] if isinstance(until, str) else list(until)
        where = self.model, self.tokenizer
        return continue_ids(*where, prompts, self.device, most, sampling, seeds, stop)


def _sampling_of(options: dict[str, Any]) -> Sampling:
    """How a task wants tokens to be drawn. Raises UserError for a wish that is not known here."""
    names = {f.name for f in dataclasses.fields(Sampling)}
    known = names | {"until", "do_sample", *_LIMITS}
    for name in sorted(options.keys() - known):
        raise UserError(
            f"a task wants {name}={options[name]!r} of the text to write, which is not known here; "
            f"known are {', '.join(sorted(known))}"
        )
    if not options.get("do_sample", options.get("temperature", 0) > 0):
        return Sampling(temperature=0)
    plain = {"temperature": 1.0, "top_k": 0}
    return Sampling(**{**plain, **{k: v for k, v in options.items() if k in names}})


def _of_tokens(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """The log-probability of the wanted tokens (n,) by their logits (n, V), and whether each is the
    likeliest.
    """
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())


def score_tasks(
    names: Sequence[str],
    scored: TaskModel,
    task_path: str = "",
    limit: int = 0,
    num_fewshot: int = -1,
) -> dict[str, TaskScores]:
    """The scores of a model on tasks of the harness, by their names. The data of its own tasks are
    downloaded, into the cache of `datasets`, where they are not there.

    task_path: a folder with more tasks, as YAML files. limit: of questions of each task; 0 = all.
    num_fewshot: examples before each question; -1 = as the task says. Raises UserError.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs a package: pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=task_path or None, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=task_path or None)  # its own take some seconds to list
    unknown = [n for n in names if n not in manager.all_tasks and not manager.match_tasks([n])]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]}: no task of that name is in lm_eval {lm_eval.__version__}"
            + (f" or in {task_path}" if task_path else "; --task-path names a folder with more")
        )
    try:
        found = lm_eval.simple_evaluate(
            _harness_model(scored),
            tasks=list(names),
            task_manager=manager,
            limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
        )
    except UserError:
        raise
    except Exception as reason:  # of many kinds: the hub, a YAML file, a template, a metric
        said = one_line(reason)
        raise UserError(
            f"--tasks {','.join(names)}: the harness can't do it ({type(reason).__name__}: {said})"
        ) from reason
    return {name: _scores(found, name) for name in found["results"]}


def _scores(found: dict[str, Any], name: str) -> TaskScores:
    """What the harness found of one task. It calls a metric `acc,none`, by the filter before it."""
    numbers = {}
    for metric, value in found["results"][name].items():
        label, _, filtered = metric.partition(",")
        if filtered and isinstance(value, (int, float)):
            numbers[label if filtered == "none" else f"{label},{filtered}"] = float(value)
    return TaskScores(
        numbers,
        found["n-samples"].get(name, {}).get("effective", 0),
        found["n-shot"].get(name) or 0,
        str(found["versions"].get(name, "")),
        found.get("samples", {}).get(name, []),
    )


def _harness_model(scored: TaskModel) -> Any:
    """The model as the harness wants it. The class is made here since the harness is optional."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return scored.tokenizer.end_token

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return scored.tokenizer.encode(string).tolist()

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            if before and after:
                return before, after
            # A token reaches over the boundary, so that nothing is left of a side.
            whole = self.tok_encode(context + continuation)
            return [self.eot_token_id], whole

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            return scored.log_likelihoods([(context, after) for _, context, after in requests])

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                ids, longest = self.tok_encode(text), scored.longest
                windows = get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(total for total, _ in scored.log_likelihoods(pairs)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return scored.texts_after([request.args for request in requests])

    return HarnessModel()
