"""`reward`: a model that scores answers, learned from pairs by TRL's RewardTrainer."""

from __future__ import annotations

from posttrain.recipe.reward import RewardConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.reward_modeling import train


def main(context: StageContext[RewardConfig]) -> StageResult | None:
    """Learn to score chosen answers above rejected ones. See `train`."""
    return train(context)


if __name__ == "__main__":
    run_program(RewardConfig, main)
