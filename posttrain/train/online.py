"""What the stages share that learn from answers to prompts: reading them, and what is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Row
from posttrain.errors import DataError
from posttrain.models import load_tokenizer
from posttrain.recipe.online import OnlineConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.adapters import Trainable
from posttrain.train.attempts import say
from posttrain.train.history import History
from posttrain.train.language_modeling import held_out_rows
from posttrain.train.loss_page import LOSS_PAGE, write_loss_page
from posttrain.train.prompts import Prompt, encode_prompts, write_prompt_account
from posttrain.train.rewards import Reward, load_reward
from posttrain.train.rows import ROW_ACCOUNT
from posttrain.train.run import write_training_record
from posttrain.train.watch import RewardWatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = TypeVar("Config", bound=OnlineConfig)


@dataclass(frozen=True)
class PromptData:
    """The prompts of both sides, and what their answers are worth."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The training side of the dataset, all of it."""
    prompts: list[Prompt | None]
    """Of each row; None for one that is left out."""
    held_out: list[Prompt]
    reward: Reward
    watch: RewardWatch

    @property
    def asked(self) -> list[Prompt]:
        """The prompts that can be asked."""
        return [prompt for prompt in self.prompts if prompt is not None]

    @property
    def left_out(self) -> int:
        """Rows without a prompt, or with too long a one."""
        return len(self.prompts) - len(self.asked)


def read_prompts(context: StageContext[Config]) -> PromptData:
    """Read and tokenize the prompts of both sides, and load what scores the answers."""
    config = context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    say(context, "tokenizing")
    tokenizer = load_tokenizer(context.input("model"))
    rows = prepared.train()
    prompts = _encode(context, tokenizer, rows, "training")
    groups = held_out_rows(prepared, config.dataset, config.validation.max_rows)
    every = [row for group in groups.values() for row in group]
    held_out = [p for p in _encode(context, tokenizer, every, "held-out") if p is not None]
    say(context, "loading the reward")
    reward = load_reward(context, config.reward)
    judge = load_reward(context, [config.watch.judge]) if config.watch.judge else None
    watch = RewardWatch(held_out, reward, judge, context.checkpoints, config)
    return PromptData(tokenizer, rows, prompts, held_out, reward, watch)


def leave_online_output(
    context: StageContext[Config],
    data: PromptData,
    history: History,
    trainable: Trainable,
    asked: np.ndarray | None,
    *,
    tokens_per_second: float,
    unit: str,
    counted: str,
) -> StageResult:
    """Leave the losses, the account of the prompts, the pages and what the watch found.

    Args:
        context: The stage.
        data: Its prompts.
        history: Of the run.
        trainable: Of the policy.
        asked: How often each prompt was asked on the way to the saved weights, int64 of shape
            (prompts,); None where that is not known.
        tokens_per_second: For the metrics.
        unit: What loss.html shows, as the beginning of a sentence.
        counted: What the history's steps are called.
    """
    write_training_record(history, trainable, context.output)
    write_prompt_account(context.output / ROW_ACCOUNT, data.rows, data.prompts, asked)
    if history.best.loss >= history.before:
        context.events.warning(
            "held-out reward less the price of KL did not rise; training made the model no better"
        )
    result = _result(history, data, counted)
    title = f"{context.job.name}: {result.headline}"
    write_loss_page(history, title, context.output / LOSS_PAGE, unit)
    found = data.watch.leave(context.output, history.best.step, title)
    if found.flagged:
        context.events.warning(f"reward hacking: {found.text} See watch.html")
    metrics = {
        **result.metrics,
        "reward_hacking": float(found.flagged),
        "tokens_per_second": tokens_per_second,
        "trainable_parameters": trainable.count,
        "trainable_share": trainable.share,
    }
    return result.model_copy(update={"metrics": metrics})


def _encode(
    context: StageContext[Config],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    side: str,
) -> list[Prompt | None]:
    longest = context.config.rollout.max_prompt_tokens
    prompts = encode_prompts(tokenizer, rows, longest)
    left_out = sum(prompt is None for prompt in prompts)
    if left_out == len(prompts):
        raise DataError(
            f"{context.config.dataset}: none of the {len(rows)} {side} rows has a prompt of at "
            f"most {longest} tokens; raise `rollout.max_prompt_tokens`"
        )
    if left_out and context.rank == 0:
        context.events.warning(
            f"{left_out} {side} rows have no prompt, or one of more than {longest} tokens "
            "(`rollout.max_prompt_tokens`), and are left out"
        )
    return prompts


def _result(history: History, data: PromptData, counted: str) -> StageResult:
    before, best, steps = history.held_out[0], history.best, len(history.steps)
    first, last = before.values["reward"], best.values["reward"]
    # Added to zero, a negative number that rounds to zero has no sign.
    kl = round(best.values["kl"], 1) + 0.0
    by_name = {f"held_out_{name}": value for name, value in best.values.items() if name != "reward"}
    gain = f"held-out reward {first:.2f} -> {last:.2f}"
    return StageResult(
        headline=f"{gain} at {kl:.1f} nats of KL in {steps} {counted}",
        metrics={
            **by_name,
            "held_out_reward_before": first,
            "held_out_reward_after": last,
            "held_out_loss_before": before.loss,
            "held_out_loss": best.loss,
            "best_step": best.step,
            "steps": steps,
            "tokens": history.tokens,
            "trained_tokens": history.trained_tokens,
            "prompts": len(data.asked),
            "prompts_left_out": data.left_out,
        },
    )
