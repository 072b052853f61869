"""A reference's log-probabilities, computed once: the `reference` stage, and reading what it left.

`reference.parquet` has one line for each pair, or each marked answer, that can be trained on or
measured, in the order of the tables of `posttrain.train.pairs`:

    id    the row's id, as in the dataset's ledger
    side  `train` or `held_out`

then of pairs `chosen_logp` and `rejected_logp`, and of marked answers `label`, `logp` and
`kl_logp`, that of another prompt's answer after this one's prompt. Log-probabilities are sums over
an answer's tokens, in nats.

They depend on the model, the rows and `max_length`, and on no batch: neither the seed nor the
micro-batch of the stage that reads them changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain.data.prepared import PreparedDataset
from posttrain.data.rows import Row
from posttrain.errors import DataError
from posttrain.hardware import resolve_dtype
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.recipe.reference import ReferenceConfig
from posttrain.stages.program import StageContext, StageResult
from posttrain.train.language_modeling import held_out_rows
from posttrain.train.pairs import AnswerTable, read_marked, read_pairs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from posttrain.train.branches import Entry

REFERENCE = "reference.parquet"
"""File of the stage's artifact."""

Side = Literal["train", "held_out"]

COLUMNS = {
    "dpo": {"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"},
    "kto": {"logp": "ref_logps", "kl_logp": "ref_KL_logps"},
}
"""By method: columns of the file, and what TRL's collators call them."""

_ANSWERS = {
    "dpo": {"chosen_logp": "chosen_ids", "rejected_logp": "rejected_ids"},
    "kto": {"logp": "completion_ids", "kl_logp": "KL_completion_ids"},
}
"""By method: columns of the file, and the table's columns with the answers."""


@dataclass(frozen=True)
class _Part:
    """Rows of one side."""

    side: Side
    rows: list[Row]
    table: AnswerTable


def score_answers(context: StageContext[ReferenceConfig]) -> StageResult:
    """Score every training and held-out answer; leave `reference.parquet`.

    Inputs: `model`, a model folder, and `dataset`, a prepared dataset.

    Raises:
        DataError: the dataset has rows of another kind.
        ModelError: the model has no chat template or cannot be loaded.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = context.config
    context.events.phase("tokenizing")
    parts = _read(context)
    context.events.phase("loading the model")
    model = _load(context)
    entries = _entries(parts, config.method)
    found = _log_probs(context, model, entries)
    table: dict[str, pa.Array] = {
        "id": pa.array([part.rows[row].id for part in parts for (row,) in part.table.rows]),
        "side": pa.array([part.side for part in parts for _ in part.table.rows]),
    }
    if config.method == "kto":
        table["label"] = pa.array([v for part in parts for v in part.table.dataset["label"]])
    table |= {
        name: pa.array(values, pa.float32())
        for name, values in zip(_ANSWERS[config.method], found.T, strict=True)
    }
    pq.write_table(pa.table(table), context.output / REFERENCE, compression="zstd", version="2.6")
    tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in entries)
    what = "pairs" if config.method == "dpo" else "answers"
    return StageResult(
        headline=f"{len(entries):,} {what} scored ({tokens:,} tokens)",
        metrics={"entries": len(entries), "tokens": tokens},
    )


def with_reference(
    table: AnswerTable, rows: Sequence[Row], method: Literal["dpo", "kto"], side: Side, folder: Path
) -> AnswerTable:
    """The table with columns of the reference's log-probabilities, by TRL's names.

    Args:
        table: Of the rows.
        rows: Those of that side.
        method: Whose columns.
        side: Which lines of the file.
        folder: The artifact of the `reference` stage.

    Raises:
        DataError: the file is of other rows.
    """
    import pyarrow.parquet as pq

    own = pq.read_table(folder / REFERENCE, filters=[("side", "=", side)])
    ids = [rows[row].id for (row,) in table.rows[: table.distinct]]
    if own.column("id").to_pylist() != ids:
        raise DataError(
            f"{folder / REFERENCE} is of other rows than those read here; remove that artifact, "
            "and the next run makes it again"
        )
    columns = {ours: own.column(name).to_pylist() for name, ours in COLUMNS[method].items()}
    return add_columns(table, columns)


def without_reference(table: AnswerTable, method: Literal["dpo", "kto"]) -> AnswerTable:
    """The table with log-probabilities of zero: as if the reference held all answers alike."""
    zeros = [0.0] * table.distinct
    return add_columns(table, dict.fromkeys(COLUMNS[method].values(), zeros))


def add_columns(table: AnswerTable, columns: dict[str, list[float]]) -> AnswerTable:
    """The table with columns of 32-bit numbers, given for its distinct entries."""
    import pyarrow as pa
    from datasets import Dataset

    added = table.dataset.data.table
    for name, values in columns.items():
        filled = [values[entry % table.distinct] for entry in range(len(table))]
        added = added.append_column(name, pa.array(filled, pa.float32()))
    return replace(table, dataset=Dataset(added))


def _read(context: StageContext[ReferenceConfig]) -> list[_Part]:
    config = context.config
    prepared = PreparedDataset.open(Path(context.input("dataset").path))
    tokenizer = load_tokenizer(context.input("model"))
    groups = held_out_rows(prepared, "", config.max_held_out_rows)
    sides: dict[Side, list[Row]] = {
        "train": prepared.train(),
        "held_out": [row for group in groups.values() for row in group],
    }
    read = read_pairs if config.method == "dpo" else read_marked
    return [
        _Part(side, rows, read(tokenizer, rows, config.max_length, 1).table)
        for side, rows in sides.items()
    ]


def _load(context: StageContext[ReferenceConfig]) -> PreTrainedModel:
    """The model in the form in which training would ask it."""
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.train.head import prefer_plain_head
    from posttrain.train.quantization import load_quantized

    config, source = context.config, context.input("model")
    dtype = resolve_dtype(config.dtype)
    if config.quantization is not None:
        model = load_quantized(source, config.quantization, dtype)
    else:
        model = load_causal_lm(source, dtype)
    prefer_plain_head()
    add_fused_lm_head(model)
    return model.eval()


def _entries(parts: Sequence[_Part], method: Literal["dpo", "kto"]) -> list[Entry]:
    """Every prompt with the answers that are scored after it, in the order of `_ANSWERS`."""
    columns = ("prompt_ids", *_ANSWERS[method].values())
    return [
        (prompt, answers)
        for part in parts
        for prompt, *answers in zip(*(part.table.dataset[name] for name in columns), strict=True)
    ]


def _log_probs(
    context: StageContext[ReferenceConfig], model: PreTrainedModel, entries: Sequence[Entry]
) -> np.ndarray:
    """Log-probability of each answer after its prompt, of shape [entries, answers].

    Entries of about the same length share a pass, so that little of it is padding, and a prompt is
    read once for its answers: that makes it cheaper than the same in each step of training.
    """
    import torch

    context.events.phase("scoring")
    dtype = resolve_dtype(context.config.dtype)
    lengths = np.array([len(prompt) + sum(map(len, answers)) for prompt, answers in entries])
    order = np.argsort(-lengths, kind="stable")
    width = context.config.micro_batch_size
    found = np.zeros((len(entries), len(_ANSWERS[context.config.method])))
    with torch.inference_mode(), _computing_in(dtype, model.device):
        score = _scorer(model, entries[order[-1]])
        for first in range(0, len(order), width):
            own = order[first : first + width]
            found[own] = score(model, [entries[number] for number in own]).float().cpu().numpy()
            done = first + len(own)
            if first // width % 10 == 0 or done == len(order):
                context.events.progress(done, len(order), unit="prompt")
    return found


def _scorer(
    model: PreTrainedModel, shortest: Entry
) -> Callable[[PreTrainedModel, Sequence[Entry]], torch.Tensor]:
    """How the model is asked: several answers in a row where it is able to."""
    from posttrain.train.branches import can_branch, score_branches

    alone = _one_by_one(model, [shortest])
    return score_branches if can_branch(model, shortest, alone[0]) else _one_by_one


def _one_by_one(model: PreTrainedModel, entries: Sequence[Entry]) -> torch.Tensor:
    """A sequence for each answer; of shape [entries, answers]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sequences = [(prompt, answer) for prompt, answers in entries for answer in answers]
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in sequences]
    labels = [torch.tensor([-100] * len(prompt) + [*answer]) for prompt, answer in sequences]
    out = model(
        input_ids=pad_sequence(ids, batch_first=True).to(model.device),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(
            model.device
        ),
        labels=pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device),
        use_cache=False,
        fused_lm_head=True,
    )
    sums: torch.Tensor = out.log_probs.sum(1)
    return sums.view(len(entries), -1)


def _computing_in(dtype: str, device: torch.device) -> torch.autocast:
    """Mixed precision as in training."""
    import torch

    enabled = dtype != "float32"
    return torch.autocast(
        device.type, getattr(torch, dtype) if enabled else torch.bfloat16, enabled=enabled
    )
