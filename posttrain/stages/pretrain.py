"""`pretrain`: continued pretraining by TRL, on documents packed into blocks."""

from __future__ import annotations

from posttrain.recipe.pretrain import PretrainConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.language_modeling import train


def main(context: StageContext[PretrainConfig]) -> StageResult | None:
    """Train on every token of the dataset's documents. See `train`."""
    return train(context)


if __name__ == "__main__":
    run_program(PretrainConfig, main)
