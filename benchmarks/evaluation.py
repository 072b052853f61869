"""Benchmarks with shared prefixes, beside lm-eval's own Hugging Face model.

    python benchmarks/evaluation.py --model MODEL_FOLDER --hub FOLDER_LAID_OUT_LIKE_THE_HUB

Both answer the same real items with the same weights in float32 on the same cores, in turns, in one
process that has loaded everything before. lm-eval's `hf` model gets the batch size that is fastest
for it on a few of the items, found first for each benchmark; ours has the default of `evaluate`.
Time is that of `loglikelihood`: tokenizing and the model. The last line of output is one JSON
object:

    hellaswag_ratio   seconds of `hf` over ours on HellaSwag, 0-shot: the median over the rounds
    mmlu_5shot_ratio  the same on all items of some subjects of MMLU, each after its five examples,
                      as `evaluate` asks them with `limit: 400`
    max_loglikelihood_difference
                      the greatest between the two, of any choice of any item

and, under `hellaswag`, `mmlu_5shot` and `machine`, what these were computed from: items, accuracies
of both (HellaSwag's with its 95% Wilson interval), batch sizes tried, seconds of every round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine, use_cores
from turns import spread

from posttrain.evaluate.harness import Benchmarks, load_benchmarks
from posttrain.evaluate.shares import wilson
from posttrain.recipe.evaluate import EvaluateConfig

PARTS = ("hellaswag", "mmlu_5shot")
BATCH_SIZES = (1, 4, 8, 16, 32)
LIMIT = 400
"""Items a subject; most recipes under configs/ have it."""
TRIED = {"hellaswag": 24, "mmlu_5shot": 8}
"""Items on which batch sizes are tried."""


@dataclass(frozen=True)
class Part:
    """Items of one benchmark."""

    name: str
    tasks: dict[str, Any]
    """lm-eval's, by name."""
    drawn: dict[str, list[int]]
    """Indices of the items, for each task."""
    metrics: tuple[str, ...]

    @property
    def items(self) -> int:
        """Over all tasks."""
        return sum(map(len, self.drawn.values()))

    def beginning(self, items: int) -> Part:
        """The first items of its first task alone."""
        leaf = next(iter(self.tasks))
        return Part(
            self.name, {leaf: self.tasks[leaf]}, {leaf: self.drawn[leaf][:items]}, self.metrics
        )


@dataclass(frozen=True)
class Answers:
    """What a contestant said, and how long it took."""

    seconds: float
    accuracies: dict[str, float]
    log_likelihoods: tuple[float, ...]


def main() -> None:
    """Measure and print."""
    given = arguments()
    use_cores(given.cores)
    figures: dict[str, Any] = {"machine": machine()}
    contestants = Contestants(given.model, given.cores)
    parts = [part for part in read_parts(given) if part.name in given.only]
    details = {part.name: compare(part, contestants, given.rounds) for part in parts}
    ratios = {f"{name}_ratio": found["ratio"]["median"] for name, found in details.items()}
    difference = max(found["max_loglikelihood_difference"] for found in details.values())
    print(json.dumps({**ratios, "max_loglikelihood_difference": difference, **details, **figures}))


def arguments() -> argparse.Namespace:
    """What the user asked for, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", type=Path, required=True, help="folder of a causal language model")
    option("--hub", type=Path, required=True,
           help="folder with Rowan/hellaswag and cais/mmlu, laid out like the Hub")  # fmt: skip
    option("--items", type=int, default=400, help="of HellaSwag, drawn with seed 0")
    option("--mmlu-subjects", type=int, default=4, help="spread evenly over their names")
    option("--mmlu-items", type=int, default=LIMIT, help="of each subject at most")
    option("--rounds", type=int, default=3)
    option("--cores", type=int, default=2)
    option("--only", type=lambda text: set(text.split(",")), default=set(PARTS),
           help=f"some of {','.join(PARTS)}")  # fmt: skip
    given = parser.parse_args()
    given.hub = given.hub.absolute()
    if unknown := given.only - set(PARTS):
        parser.error(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return given


# ----------------------------------------------------------------------------------- questions


def read_parts(given: argparse.Namespace) -> tuple[Part, Part]:
    """HellaSwag and the subjects, read as `evaluate` reads them."""
    subjects = sorted(folder.name for folder in (given.hub / "cais/mmlu").iterdir()
                      if folder.is_dir())  # fmt: skip
    step = max(1, len(subjects) // given.mmlu_subjects)
    chosen = [f"mmlu_{subject}" for subject in subjects[::step][: given.mmlu_subjects]]
    asked = Benchmarks(tasks=("hellaswag", *chosen), offline_root=given.hub)
    leaves = {leaf: task for group in load_benchmarks(asked).leaves.values()
              for leaf, task in group.items()}  # fmt: skip
    hellaswag = {"hellaswag": leaves.pop("hellaswag")}
    for task in leaves.values():
        task.set_config(key="num_fewshot", value=5)
    for task in (*hellaswag.values(), *leaves.values()):
        task.set_fewshot_seed(seed=0)
    return (
        Part("hellaswag", hellaswag, draw(hellaswag, given.items), ("acc", "acc_norm")),
        Part("mmlu_5shot", leaves, draw(leaves, given.mmlu_items), ("acc",)),
    )


def draw(tasks: dict[str, Any], limit: int) -> dict[str, list[int]]:
    """Items of each task, as `evaluate` draws them with seed 0."""
    sizes = {leaf: len(task.eval_docs) for leaf, task in tasks.items()}
    return {
        leaf: sorted(random.Random(f"0:{leaf}").sample(range(size), min(size, limit)))
        for leaf, size in sizes.items()
    }


# --------------------------------------------------------------------------------- contestants


class Contestants:
    """Both, over the same weights."""

    def __init__(self, model: Path, cores: int) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from posttrain.evaluate.shared_prefixes import SharedPrefixLM

        torch.set_num_threads(cores)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._classes = {"ours": SharedPrefixLM, "hf": HFLM}

    def answer(self, name: str, part: Part, batch_size: int) -> Answers:
        """Ask one of them all items."""
        import lm_eval

        language_model = self._classes[name](
            pretrained=self._model, tokenizer=self._tokenizer, batch_size=batch_size
        )
        if name == "ours" and language_model.fallback_reason:
            sys.exit(f"this model is asked in lm-eval's way: {language_model.fallback_reason}")
        timed = Timed(language_model.loglikelihood)
        language_model.loglikelihood = timed
        found = lm_eval.evaluate(
            lm=language_model,
            task_dict={"tasks": part.tasks},
            samples=part.drawn,
            bootstrap_iters=0,
            log_samples=True,
        )
        samples = [sample for leaf in part.tasks for sample in found["samples"][leaf]]
        return Answers(
            seconds=timed.seconds,
            accuracies={
                metric: sum(sample[metric] for sample in samples) / len(samples)
                for metric in part.metrics
            },
            log_likelihoods=tuple(
                score for sample in samples for score, _ in sample["filtered_resps"]
            ),
        )


class Timed:
    """A method of a language model, and how long it took."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.seconds = 0.0

    def __call__(self, requests: Sequence[Any], **options: Any) -> Any:
        """Call it, without a bar of progress."""
        begin = time.perf_counter()
        answers = self._method(requests, **{**options, "disable_tqdm": True})
        self.seconds += time.perf_counter() - begin
        return answers


# ----------------------------------------------------------------------------------- comparing


def compare(part: Part, contestants: Contestants, count: int) -> dict[str, Any]:
    """Both in turns, the one that begins changing from round to round."""
    tried = try_batch_sizes(part, contestants)
    batch_sizes = {
        "ours": int(EvaluateConfig.model_fields["batch_size"].default),
        "hf": min(tried, key=lambda size: tried[size]),
    }
    runs: dict[str, list[Answers]] = {name: [] for name in batch_sizes}
    for number in range(count):
        for name in sorted(batch_sizes, reverse=bool(number % 2)):
            answers = contestants.answer(name, part, batch_sizes[name])
            runs[name].append(answers)
            say(f"{part.name}, round {number + 1}, {name}: {answers.seconds:.1f} s")
    turns = list(zip(runs["hf"], runs["ours"], strict=True))
    details: dict[str, Any] = {
        "ratio": spread([theirs.seconds / ours.seconds for theirs, ours in turns]),
        "max_loglikelihood_difference": max(map(difference, *zip(*turns, strict=True))),
        "items": part.items,
        "items_a_task": {leaf: len(indices) for leaf, indices in part.drawn.items()},
        "seconds": {name: [round(run.seconds, 2) for run in own] for name, own in runs.items()},
        "accuracies": {name: own[0].accuracies for name, own in runs.items()},
        "batch_sizes": batch_sizes,
        "hf_seconds_by_batch_size": tried,
    }
    if "acc_norm" in part.metrics:
        right = runs["ours"][0].accuracies["acc_norm"] * part.items
        share = wilson(right, part.items)
        details["acc_norm_interval"] = [round(share.low, 4), round(share.high, 4)]
    show(part, details)
    return details


def try_batch_sizes(part: Part, contestants: Contestants) -> dict[int, float]:
    """Seconds of `hf` on a few items by batch size; the first items are asked once to warm up."""
    few = part.beginning(TRIED[part.name])
    for name in ("ours", "hf"):
        contestants.answer(name, part.beginning(2), 1)
    tried = {size: contestants.answer("hf", few, size).seconds for size in BATCH_SIZES}
    for size, seconds in tried.items():
        say(f"{part.name}, hf with batch size {size}: {seconds:.1f} s for {few.items} items")
    return {size: round(seconds, 2) for size, seconds in tried.items()}


def difference(one: Answers, other: Answers) -> float:
    """The greatest between log-likelihoods of the same choice."""
    both = zip(one.log_likelihoods, other.log_likelihoods, strict=True)
    return max(abs(mine - yours) for mine, yours in both)


def show(part: Part, details: dict[str, Any]) -> None:
    """A part's figures as a table."""
    say(f"\n{part.name}: {part.items} items")
    say(f"  {'':6}{'batch':>6}{'seconds':>10}" + "".join(f"{name:>10}" for name in part.metrics))
    for name, seconds in details["seconds"].items():
        accuracies = "".join(f"{details['accuracies'][name][key]:10.4f}" for key in part.metrics)
        middle = sorted(seconds)[len(seconds) // 2]
        say(f"  {name:6}{details['batch_sizes'][name]:6}{middle:10.1f}{accuracies}")
    say(
        f"  {details['ratio']['median']} times as fast, log-likelihoods equal to "
        f"{details['max_loglikelihood_difference']:.1g}\n"
    )


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
