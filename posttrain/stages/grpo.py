"""`grpo`: group relative policy optimization by TRL, on answers that the model writes."""

from __future__ import annotations

from posttrain.recipe.grpo import GrpoConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.group_learning import learn


def main(context: StageContext[GrpoConfig]) -> StageResult | None:
    """Measure each answer by the mean of those to the same prompt. See `learn`."""
    return learn(context)


if __name__ == "__main__":
    run_program(GrpoConfig, main)
