"""`sft`: supervised fine-tuning by TRL, resumable, with the best checkpoint restored at the end."""

from __future__ import annotations

from posttrain.recipe.sft import SftConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.language_modeling import train


def main(context: StageContext[SftConfig]) -> StageResult | None:
    """Train on the assistant's turns of the dataset's chats. See `train`."""
    return train(context)


if __name__ == "__main__":
    run_program(SftConfig, main)
