"""`reference`: score a dataset's answers once, for the stages that compare with the model."""

from __future__ import annotations

from posttrain.recipe.reference import ReferenceConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.processes import prepare_libraries
from posttrain.train.reference import score_answers


def main(context: StageContext[ReferenceConfig]) -> StageResult:
    """Leave the log-probability of every answer. See `score_answers`."""
    prepare_libraries()
    return score_answers(context)


if __name__ == "__main__":
    run_program(ReferenceConfig, main)
