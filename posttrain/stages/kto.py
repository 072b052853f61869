"""`kto`: learning by TRL from answers that were marked, or from pairs taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.data.rows import Row
from posttrain.recipe.kto import KtoConfig
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.train.pairs import Answers, AnswerTable, read_marked
from posttrain.train.preference_learning import ReferencedMethod, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.train.preference_trainers import AnswerTrainer

_UNEQUAL = 4
"""One side this many times as large as the other is said to the user."""


@dataclass(frozen=True)
class Kto(ReferencedMethod[KtoConfig]):
    """Kahneman-Tversky optimization."""

    name = "kto"
    unit = "Loss of an answer"

    def read(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], fill: int) -> Answers:
        """Marked answers; a pair is a wanted and an unwanted one."""
        return read_marked(tokenizer, rows, self.context.config.batching.max_length, fill)

    def arguments(self, table: AnswerTable) -> dict[str, object]:
        """KTOConfig's fields."""
        from posttrain.train.kto import side_weights

        config, labels = self.context.config, table.dataset["label"][: table.distinct]
        wanted = sum(labels)
        weights = side_weights(config, labels)
        self._warn(wanted, len(labels) - wanted, weights)
        return {
            "beta": config.beta,
            "loss_type": config.loss,
            "desirable_weight": weights[0],
            "undesirable_weight": weights[1],
            # Rows come in their final length.
            "max_length": None,
            # TRL keeps the rows in their order, because it exchanges answers within a pass. Files
            # often have all wanted answers first, of which a step would learn one side alone.
            "train_sampling_strategy": "random",
        }

    def trainer(self, arguments: Mapping[str, Any]) -> AnswerTrainer:
        """TRL's KTOTrainer."""
        from posttrain.train.kto import KtoStageTrainer

        return KtoStageTrainer(ref_model=self.reference_model(), **arguments)

    def _warn(self, wanted: int, unwanted: int, weights: tuple[float, float]) -> None:
        """Say it where one side has few answers or none."""
        fewer, more = sorted((wanted, unwanted))
        if fewer * _UNEQUAL >= more or self.context.rank != 0:
            return
        side = "wanted" if wanted < unwanted else "unwanted"
        message = f"{fewer:,} of {fewer + more:,} answers are {side}"
        if fewer:
            weight = weights[0] if wanted < unwanted else weights[1]
            message += f" and count {weight:.3g} times each; more of them would teach more"
        else:
            other = "unwanted" if side == "wanted" else "wanted"
            message += f": the model learns from {other} ones alone, and may drift; add some"
        self.context.events.warning(message)


def main(context: StageContext[KtoConfig]) -> StageResult | None:
    """Train on the dataset's marked answers. See `train`."""
    return train(Kto(context))


if __name__ == "__main__":
    run_program(KtoConfig, main)
