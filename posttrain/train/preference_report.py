"""What a stage that learned from answers says of itself: metrics, headline, warnings."""

from __future__ import annotations

import numpy as np

from posttrain.evaluate.shares import wilson
from posttrain.stages.program import StageResult
from posttrain.train.adapters import Trainable
from posttrain.train.held_out_answers import HeldOutAnswers, Scores
from posttrain.train.history import History
from posttrain.train.run import training_result

_FALL = 0.25
"""Nats a token by which chosen answers may become less likely before it is said: then each of their
tokens is, in the geometric mean, less than 0.78 times as likely as before."""


def preference_result(
    history: History, trainable: Trainable, tokens_per_second: float, scores: Scores
) -> StageResult:
    """Metrics and headline, from the run and from the held-out scores of the kept checkpoint."""
    usual = training_result(history, trainable, tokens_per_second, "preferences")
    # A loss of answers compared is not one of tokens.
    metrics = {k: v for k, v in usual.metrics.items() if not k.startswith("held_out_perplexity")}
    before, after = history.held_out[0].values, history.best.values
    for name, metric in (("rewards/margins", "held_out_margin"), ("kl", "held_out_kl")):
        if name in after:
            metrics |= {f"{metric}_before": before.get(name, 0.0), metric: after[name]}
    margin = f"margin {metrics['held_out_margin']:.3g}" if "held_out_margin" in metrics else ""
    right = ""
    if "chosen_reward" in scores:
        right = _accuracy(scores, metrics)
    # Half a hundredth is much for such a loss, which begins at a known number.
    gain = f"held-out loss {history.before:.4g} -> {history.best.loss:.4g}"
    size = usual.headline.partition(" in ")[2]
    said = ", ".join(part for part in (right, margin) if part)
    return StageResult(
        headline=f"{gain}, {said} in {size}" if said else f"{gain} in {size}", metrics=metrics
    )


def warn_of_answers(history: History, held_out: HeldOutAnswers, scores: Scores) -> list[str]:
    """What a person should look at before using the model."""
    warnings = []
    if history.best.loss >= history.before:
        warnings.append("the held-out loss did not fall; training made the model no better")
    if "reference_chosen_logp" in scores:
        warnings += _fallen(history, held_out)
    return warnings


def _accuracy(scores: Scores, metrics: dict[str, float]) -> str:
    """Share of held-out pairs whose chosen answer has the larger reward, with Wilson's interval."""
    right = int(np.sum(scores["chosen_reward"] > scores["rejected_reward"]))
    pairs = len(scores["chosen_reward"])
    share = wilson(right, pairs)
    metrics |= {
        "held_out_accuracy": right / pairs,
        "held_out_accuracy_low": share.low,
        "held_out_accuracy_high": share.high,
    }
    return f"{right / pairs:.0%} of {pairs} pairs right ({share.low:.0%} to {share.high:.0%})"


def _fallen(history: History, held_out: HeldOutAnswers) -> list[str]:
    """Pairs can be told apart by making both answers unlikely, the rejected one more so."""
    tokens = float(np.mean([len(ids) for ids in held_out.table.dataset["chosen_ids"]]))
    before, after = (
        evaluation.values["logps/chosen"] for evaluation in (history.held_out[0], history.best)
    )
    fall = (before - after) / tokens
    if fall < _FALL:
        return []
    return [
        f"the chosen answers became less likely as well, by {fall:.2f} nats a token (from "
        f"{before:.0f} to {after:.0f} nats an answer): the model is leaving both answers behind; "
        "raise `beta`, lower `optimization.learning_rate`, or train an `sft` stage on the chosen "
        "answers first"
    ]
