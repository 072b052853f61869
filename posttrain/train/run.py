"""From a trainer that is ready to a stage's output: the part that all training stages share."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.recipe.base import RowFamily
from posttrain.stages.program import StageResult
from posttrain.store.files import write_json
from posttrain.train.adapters import Trainable
from posttrain.train.checkpoints import is_last
from posttrain.train.history import History
from posttrain.train.sharding import check_division, divide_untrained

if TYPE_CHECKING:
    from transformers import Trainer


def run_to_end(trainer: Trainer, checkpoint: Path | None) -> History:
    """Train from the checkpoint, or from the start, and restore the best weights.

    A checkpoint of a run that had already ended, killed before its output was published, is not
    trained any further.

    Args:
        trainer: Made with `load_best_model_at_end`.
        checkpoint: The newest complete checkpoint, or None.
    """
    if checkpoint is not None:
        check_division(trainer, checkpoint)
    if checkpoint is None:
        trainer.train()
    elif is_last(checkpoint):
        from transformers import TrainerState

        trainer.state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        divide_untrained(trainer)
        trainer.restore_best()
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return History.from_log(trainer.state.log_history)


def write_training_record(history: History, trainable: Trainable, folder: Path) -> None:
    """Leave `training.json`: every loss of the run, without anything that a second run changes."""
    record = {
        "best_step": history.best.step,
        "trainable_parameters": trainable.count,
        "parameters": trainable.total,
        "held_out": [asdict(evaluation) for evaluation in history.held_out],
        "steps": [asdict(step) for step in history.steps],
    }
    write_json(folder / "training.json", record)


def training_result(
    history: History, trainable: Trainable, tokens_per_second: float, family: RowFamily
) -> StageResult:
    """Metrics and headline of a training stage: for documents in perplexity, else in nats."""
    best, steps = history.best, len(history.steps)
    before, after = history.before, best.loss
    gain = f"held-out loss {before:.2f} -> {after:.2f}"
    if family == "documents":
        gain = f"held-out perplexity {_perplexity(before):.4g} -> {_perplexity(after):.4g}"
    first = history.held_out[0].tasks
    by_task = {f"held_out_loss_before/{task}": loss for task, loss in first.items()}
    by_task |= {f"held_out_loss/{task}": loss for task, loss in best.tasks.items()}
    return StageResult(
        headline=f"{gain} in {steps} steps ({_short(history.tokens)} tokens)",
        metrics={
            **by_task,
            "held_out_perplexity_before": _perplexity(before),
            "held_out_perplexity": _perplexity(after),
            "train_loss": history.train_loss,
            "held_out_loss_before": history.before,
            "held_out_loss": best.loss,
            "best_step": best.step,
            "steps": steps,
            "tokens": history.tokens,
            "trained_tokens": history.trained_tokens,
            "tokens_per_second": tokens_per_second,
            "trainable_parameters": trainable.count,
            "trainable_share": trainable.share,
        },
    )


def _perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats a token; of a hopeless model it is cut to a finite number."""
    return math.exp(min(loss, 700.0))


def _short(count: int) -> str:
    if count < 1_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"
