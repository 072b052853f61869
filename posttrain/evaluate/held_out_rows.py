"""What prepared datasets keep away from training: a perplexity of each, and sample prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.operations.base import Side
from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Chat, Document, Row
from posttrain.evaluate.items import PerplexityRow
from posttrain.evaluate.results import PerplexityResult
from posttrain.recipe.evaluate import OTHER, EvaluateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.evaluate.language_models import Weights
    from posttrain.evaluate.perplexity import EncodedRow
    from posttrain.evaluate.samples import Sample
    from posttrain.events import EventWriter
    from posttrain.stages.program import StageInput

_SCORED = ("chats", "documents")
"""Families whose rows have one right text."""

_MOST_GROUPS = 50
"""Categories above which they are no tasks, but something like a name for each row."""

REST = "(none)"
"""Group of the rows without a category, where others have one."""


@dataclass(frozen=True)
class HeldOut:
    """A dataset whose held-out rows are measured."""

    name: str
    """As in the recipe; empty for the one that the evaluation is about, if it was not named."""
    dataset: PreparedDataset

    def rows(self, limit: int) -> tuple[list[Row], list[str]]:
        """The first rows by content order, and the group of each.

        Of a mix that is the dataset that a row comes from; of others its category. Empty where all
        are of one.
        """
        rows = self.dataset.unseen(limit)
        side: Side = "test" if self.dataset.sizes["test"] else "validation"
        groups = self.dataset.origins(side) or [row.category or REST for row in rows]
        groups = groups[: len(rows)]
        several = 1 < len(set(groups)) <= _MOST_GROUPS
        return rows, groups if several else [""] * len(rows)


def open_held_out(
    inputs: Mapping[str, StageInput], config: EvaluateConfig
) -> tuple[HeldOut | None, list[HeldOut]]:
    """The dataset that an evaluation is about, if any, and the others.

    Raises:
        DataError: an input is no prepared dataset.
    """
    main = None
    if "dataset" in inputs:
        opened = PreparedDataset.open(Path(inputs["dataset"].path))
        main = HeldOut(config.dataset or "", opened)
    others = [
        HeldOut(key.removeprefix(OTHER), PreparedDataset.open(Path(value.path)))
        for key, value in inputs.items()
        if key.startswith(OTHER)
    ]
    return main, [other for other in others if main is None or other.name != main.name]


def score(
    datasets: Sequence[HeldOut],
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    max_length: int,
    events: EventWriter,
) -> list[PerplexityRow]:
    """Score the held-out rows of each dataset, answers of chats and whole documents.

    Each dataset by itself: what else is in a batch changes the last bits.

    Args:
        datasets: In the order in which they are scored.
        weights: The model.
        tokenizer: Its tokenizer.
        config: How many rows a dataset, and how many in a forward pass.
        max_length: Longest row, in tokens; longer ones are cut.
        events: Progress and warnings go here.

    Raises:
        ModelError: the chat template cannot write the rows.
    """
    from posttrain.evaluate.perplexity import score_rows

    scored: list[PerplexityRow] = []
    for one in datasets:
        of = f" of {one.name}" if one.name else ""
        if one.dataset.family not in _SCORED:
            family = one.dataset.family
            events.warning(f"no perplexity{of}: rows of {family} have no one right text")
            continue
        model = weights.load()
        events.phase(f"scoring held-out rows{of}")
        rows = _encode(tokenizer, one, config.max_perplexity_rows, max_length)
        found = score_rows(model, tokenizer, rows, config.batch_size, events)
        if len(found) < len(rows):
            missing = len(rows) - len(found)
            events.warning(f"{missing} held-out rows{of} have no token to score")
        scored += found
    return scored


def summaries(
    rows: Sequence[PerplexityRow], main: HeldOut | None, others: Sequence[HeldOut]
) -> tuple[PerplexityResult | None, dict[str, PerplexityResult]]:
    """Perplexity on the dataset that the evaluation is about, and on the others by name."""
    from posttrain.evaluate.perplexity import summarise

    names = [main.name] if main else []
    names += [other.name for other in others]
    by_name = {name: [row for row in rows if row.dataset == name] for name in names}
    found = {name: summarise(own) for name, own in by_name.items() if own}
    return found.pop(main.name, None) if main else None, found


def answer_samples(
    main: HeldOut | None,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    events: EventWriter,
) -> list[Sample]:
    """Answers to the first prompts of the dataset that the evaluation is about."""
    from posttrain.evaluate.samples import answer_prompts

    wanted = config.samples
    rows = main.dataset.unseen(wanted.count) if main and wanted.count else []
    answerable = [row for row in rows if isinstance(row, Chat | Document)]
    if not answerable:
        return []
    model = weights.load()
    events.phase("answering sample prompts")
    return answer_prompts(model, tokenizer, answerable, wanted.max_new_tokens)


def _encode(
    tokenizer: PreTrainedTokenizerBase, one: HeldOut, limit: int, max_length: int
) -> list[EncodedRow]:
    from posttrain.evaluate.perplexity import EncodedRow
    from posttrain.train.tokenize import encode_chat, encode_document

    rows = []
    for row, group in zip(*one.rows(limit), strict=True):
        if isinstance(row, Chat):
            encoded = encode_chat(tokenizer, row.messages, max_length)
        elif isinstance(row, Document):
            encoded = encode_document(tokenizer, row.text, max_length)
        else:
            continue
        rows.append(EncodedRow(row.id, encoded, one.name, group))
    return rows
