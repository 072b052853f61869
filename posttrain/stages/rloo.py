"""`rloo`: REINFORCE leave-one-out by TRL, on answers that the model writes."""

from __future__ import annotations

from posttrain.recipe.rloo import RlooConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.group_learning import learn


def main(context: StageContext[RlooConfig]) -> StageResult | None:
    """Measure each answer by the others to the same prompt. See `learn`."""
    return learn(context)


if __name__ == "__main__":
    run_program(RlooConfig, main)
