"""The watch on reward hacking, from within a stage that learns from rewards.

At every evaluation the stage shows the watch its answers to the held-out prompts; before and after
training the watch asks benchmarks. At the end it says whether the reward rose while an independent
signal fell: see `posttrain.evaluate.hacking`. In the stage's output it leaves

    answers.parquet  the answers before training, at the kept step and at the last one
    watch.json       the finding, which the gate reads
    watch.html       the finding, the curves, and the answers that changed most

Every method is for one process: call them on rank 0, where the answers have been gathered.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain.errors import DataError
from posttrain.evaluate.answers import describe
from posttrain.evaluate.hacking import Benchmark, find_hacking
from posttrain.evaluate.items import read_items, write_items
from posttrain.evaluate.looks import Look, keep_look, read_looks, write_looks
from posttrain.evaluate.pairing import paired_items
from posttrain.evaluate.results import Hacking
from posttrain.evaluate.watch_page import WATCH_PAGE, write_watch_page
from posttrain.recipe.online import OnlineConfig
from posttrain.store.files import sync_tree, write_json
from posttrain.train.prompts import Prompt
from posttrain.train.rewards import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.evaluate.harness import Measured
    from posttrain.events import EventWriter

ANSWERS = "answers.parquet"

Moment = Literal["before", "after"]

_MOMENTS: tuple[Moment, Moment] = ("before", "after")
_BETTER = "higher_is_better.json"
"""Beside a moment's items: of each task, whether a higher score is a better one."""


@dataclass(frozen=True)
class Written:
    """An answer that the model wrote to a held-out prompt."""

    text: str
    tokens: int
    """Its length, the end of the turn counted."""
    ended: bool
    """Whether it ended by itself, and not for want of tokens."""
    kl: float
    """Sum over its tokens of log pi - log ref, in nats; 0 before training."""


class RewardWatch:
    """Keeps what is seen of the answers, and judges it at the end."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        reward: Reward,
        judge: Reward | None,
        folder: Path,
        config: OnlineConfig,
    ) -> None:
        """Begin to watch, or go on.

        Args:
            prompts: The held-out prompts, the same ones in the same order at every look.
            reward: What the stage learns for.
            judge: What `watch.judge` names, loaded in the same way; None without one.
            folder: Where looks are kept until the end: the stage's checkpoints.
            config: The stage's recipe.
        """
        self._prompts = prompts
        self._reward = reward
        self._judge = judge
        self._folder = folder
        self._config = config

    def look(self, step: int, written: Sequence[Written]) -> dict[str, float]:
        """Score the answers at a step and keep them; a step seen before is seen anew.

        Args:
            step: Optimizer steps taken; 0 is before training.
            written: An answer to each prompt, in the prompts' order.

        Returns:
            Means over the answers: `eval_reward`, `eval_reward/TERM`, `eval_judge` where there is
            a judge, `eval_kl` and `eval_length` an answer, `eval_ended`, and the measures of
            `posttrain.evaluate.answers`, each with `eval_` before its name.

        Raises:
            ValueError: there is not one answer to each prompt, or no prompt.
            UsageError: a reward function failed.
        """
        look = self._scored(step, written)
        keep_look(look, self._folder)
        values = {"reward": float(look.reward.mean())}
        values |= {f"reward/{name}": float(scores.mean()) for name, scores in look.terms.items()}
        if look.judge is not None:
            values["judge"] = float(look.judge.mean())
        values["kl"] = float(look.kl.mean())
        values["length"] = float(look.tokens.mean())
        values["ended"] = float(look.ended.mean())
        values |= describe(look.answers)
        return {f"eval_{name}": value for name, value in values.items()}

    def ask(
        self,
        moment: Moment,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        events: EventWriter,
    ) -> None:
        """Ask the benchmarks of `watch.tasks` and keep every item.

        Nothing is done without tasks, or for a moment at which they were asked in an earlier
        attempt. Where `watch.offline_root` is set, the program calls
        `posttrain.evaluate.offline.stay_local` before it imports any library.

        Raises:
            DataError: an unknown task, or one that cannot be read or has no score for an item.
        """
        folder = self._asked(moment)
        if not self._config.watch.tasks or folder.exists():
            return
        with _as_it_was(model):
            measured = self._measure(moment, model, tokenizer, events)
        _keep_items(measured, folder)

    def leave(self, output: Path, best_step: int, title: str) -> Hacking:
        """Judge what was seen, and write the answers, the finding and the page.

        Args:
            output: The stage's output folder.
            best_step: The step whose weights are kept; it was looked at.
            title: Heads the page.

        Raises:
            DataError: `watch.tasks` were not asked at both moments, or there is no look at step 0
                or at `best_step`.
        """
        looks = read_looks(self._folder)
        seen = {look.step: look for look in looks}
        for step in (0, best_step):
            if step not in seen:
                raise DataError(f"the watch was shown no answers at step {step}; train again")
        finding = find_hacking(
            seen[0],
            seen[best_step],
            self._benchmarks(),
            confidence=self._config.watch.confidence,
            seed=self._config.seed,
        )
        kept = sorted({0, best_step, looks[-1].step})
        write_looks([seen[step] for step in kept], output / ANSWERS)
        finding.save(output)
        prompts = [prompt.messages for prompt in self._prompts]
        write_watch_page(finding, looks, prompts, title, output / WATCH_PAGE)
        return finding

    def _measure(
        self,
        moment: Moment,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        events: EventWriter,
    ) -> Measured:
        from posttrain.evaluate.harness import Benchmarks, load_benchmarks, run_benchmarks

        watch, config = self._config.watch, self._config
        root = watch.offline_root
        asked = Benchmarks(
            tasks=watch.tasks,
            limit=watch.limit,
            offline_root=Path(root).resolve() if root else None,
            seed=config.seed,
        )
        benchmarks = load_benchmarks(asked)
        events.phase(f"asking {', '.join(watch.tasks)} {moment} training")
        return run_benchmarks(model, tokenizer, benchmarks, config.rollout.batch_size, events)

    def _benchmarks(self) -> list[Benchmark]:
        if not self._config.watch.tasks:
            return []
        for moment in _MOMENTS:
            if not self._asked(moment).exists():
                raise DataError(f"`watch.tasks` were not asked {moment} training; train again")
        before, after = (self._asked(moment) for moment in _MOMENTS)
        rises: dict[str, bool] = json.loads((before / _BETTER).read_bytes())
        pairs = paired_items(read_items(before), read_items(after))
        return [Benchmark(task, rises[task], items) for task, items in pairs.items()]

    def _scored(self, step: int, written: Sequence[Written]) -> Look:
        if not written or len(written) != len(self._prompts):
            raise ValueError(f"{len(written)} answers to {len(self._prompts)} held-out prompts")
        answers = tuple(answer.text for answer in written)
        scores = self._reward(self._prompts, answers)
        return Look(
            step=step,
            ids=tuple(prompt.row.id for prompt in self._prompts),
            answers=answers,
            tokens=np.array([answer.tokens for answer in written], np.int64),
            ended=np.array([answer.ended for answer in written], bool),
            kl=np.array([answer.kl for answer in written], np.float64),
            reward=scores.total,
            terms=scores.terms,
            judge=self._judge(self._prompts, answers).total if self._judge else None,
        )

    def _asked(self, moment: Moment) -> Path:
        return self._folder / f"benchmarks-{moment}"


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model's mode and all random states as they are found.

    lm-eval seeds generators and draws from them, and a resumed run does not ask again: it would go
    on with other numbers than a run that was never killed.
    """
    import torch

    training = model.training
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _keep_items(measured: Measured, folder: Path) -> None:
    """Write all or nothing: a moment that is there is not asked again."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_items(temporary, measured.items)
    write_json(temporary / _BETTER, {task.task: task.higher_is_better for task in measured.results})
    sync_tree(temporary)
    temporary.rename(folder)
