"""`orpo`: learning the chosen answers and the preference for them at once, by TRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.recipe.orpo import OrpoConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.pairs import AnswerTable
from posttrain.train.preference_learning import Method, train

if TYPE_CHECKING:
    from posttrain.train.preference_trainers import AnswerTrainer


@dataclass(frozen=True)
class Orpo(Method[OrpoConfig]):
    """Odds ratio preference optimization."""

    def arguments(self, table: AnswerTable) -> dict[str, object]:
        """ORPOConfig's fields."""
        del table
        config = self.context.config
        # The length is TRL's to know, not to cut to: rows come in their final length.
        return {"beta": config.beta, "max_length": config.batching.max_length}

    def trainer(self, arguments: Mapping[str, Any]) -> AnswerTrainer:
        """TRL's ORPOTrainer."""
        from posttrain.train.orpo import OrpoStageTrainer

        return OrpoStageTrainer(**arguments)


def main(context: StageContext[OrpoConfig]) -> StageResult | None:
    """Train on the dataset's pairs. See `train`."""
    return train(Orpo(context))


if __name__ == "__main__":
    run_program(OrpoConfig, main)
