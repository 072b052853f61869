"""`dpo`: learning from pairs by TRL, with the reference computed, cached or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.recipe.dpo import DpoConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.pairs import AnswerTable
from posttrain.train.preference_learning import ReferencedMethod, train

if TYPE_CHECKING:
    from posttrain.train.preference_trainers import AnswerTrainer


@dataclass(frozen=True)
class Dpo(ReferencedMethod[DpoConfig]):
    """Direct preference optimization."""

    name = "dpo"

    def arguments(self, table: AnswerTable) -> dict[str, object]:
        """DPOConfig's fields."""
        del table
        config = self.context.config
        return {
            "beta": config.beta,
            "loss_type": [config.loss],
            "label_smoothing": config.label_smoothing,
            # Rows come in their final length.
            "max_length": None,
        }

    def trainer(self, arguments: Mapping[str, Any]) -> AnswerTrainer:
        """TRL's DPOTrainer."""
        from posttrain.train.dpo import DpoStageTrainer

        return DpoStageTrainer(ref_model=self.reference_model(), **arguments)


def main(context: StageContext[DpoConfig]) -> StageResult | None:
    """Train on the dataset's pairs. See `train`."""
    return train(Dpo(context))


if __name__ == "__main__":
    run_program(DpoConfig, main)
