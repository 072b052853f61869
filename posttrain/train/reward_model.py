"""A trained reward model: what is written beside its weights, and how it is used.

`reward.json` of the artifact says how it reads and what its scores are relative to:

    max_length  longest sequence, in tokens
    mean, std   of its scores on answers that it was trained on, chosen and rejected alike
    pairs       how many pairs these are from

Scores are only defined up to a constant: a pair's loss does not change when both move. Those that
`RewardModel` returns are less `mean`, so that an answer like the average one it was trained on
scores 0 (Huang et al., 2024, arXiv:2403.17031, and Stiennon et al., 2020, arXiv:2009.01325, shift
reference answers to 0). They are not divided by `std`: the scale says how sure the model is, since
sigmoid(difference) is the probability that people prefer the one answer.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.data.rows import KtoExample, Messages
from posttrain.errors import DataError, ModelError
from posttrain.hardware import ResolvedDType
from posttrain.models import load_tokenizer, put_adapter_on
from posttrain.stages.program import StageInput
from posttrain.store.files import write_json
from posttrain.train.pairs import encode_marked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REWARD_RECORD = "reward.json"

_log = logging.getLogger(__name__)


class RewardRecord(BaseModel):
    """What `reward.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: int
    mean: float
    std: float
    pairs: int

    def write(self, folder: Path) -> None:
        """Leave the record in an artifact."""
        write_json(folder / REWARD_RECORD, self.model_dump())

    @classmethod
    def read(cls, folder: Path) -> RewardRecord:
        """The record of an artifact.

        Raises:
            ModelError: it has none.
        """
        try:
            return cls.model_validate_json((folder / REWARD_RECORD).read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelError(f"{folder}: not what a `reward` stage leaves: {error}") from error


@dataclass(frozen=True)
class RewardModel:
    """Scores answers. Nothing of it is trained, and dropout is off."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: RewardRecord
    batch_size: int = 16
    """Chats a forward pass; those of about the same length go together."""

    def scores(self, chats: Sequence[Messages]) -> np.ndarray:
        """The score of each chat's last turn, which is the assistant's; more is better.

        A chat is written by the reward model's own chat template and cut as in training: a long
        prompt loses its oldest tokens, and only an answer of more than half of `max_length` can
        lose its end, where it would be scored; a warning in the log counts those. In float32 a
        score differs by less than 1e-5 whatever else is scored with it.

        Returns:
            float64 of shape (chats,).

        Raises:
            DataError: a chat does not end with the assistant's turn.
            ModelError: the chat template cannot write a chat.
        """
        encoded = self._encode(chats)
        order = sorted(range(len(encoded)), key=lambda chat: len(encoded[chat]))
        scores = np.zeros(len(encoded))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._score([encoded[chat] for chat in batch])
        return scores - self.record.mean

    def _encode(self, chats: Sequence[Messages]) -> list[list[int]]:
        for number, chat in enumerate(chats):
            if not chat or chat[-1].role != "assistant":
                raise DataError(f"chat {number + 1} does not end with an answer of the assistant's")
        rows = [
            KtoExample(id="", file="chat", row=n, prompt=c[:-1], completion=c[-1:], label=True)
            for n, c in enumerate(chats, 1)
        ]
        longest = self.record.max_length
        marked = encode_marked(self.tokenizer, rows, longest)
        endless = sum(m.cut > 0 and len(m.prompt_ids) <= longest // 2 for m in marked)
        if endless:
            _log.warning(
                "%d of %d answers are scored without their end: prompt and answer are longer than "
                "the %d tokens that the reward model was trained with (`batching.max_length`)",
                endless,
                len(chats),
                longest,
            )
        return [
            answer.prompt_ids + answer.completion_ids or self._whole(chat)
            for answer, chat in zip(marked, chats, strict=True)
        ]

    def _whole(self, chat: Messages) -> list[int]:
        """The last tokens of a chat whose template leaves no trace of an empty answer."""
        from posttrain.train.tokenize import render_chat

        text = render_chat(self.tokenizer, chat)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[-self.record.max_length :]

    def _score(self, sequences: Sequence[list[int]]) -> np.ndarray:
        """Scores before the shift, of sequences that are padded to the longest on the right."""
        import torch

        width = max(len(ids) for ids in sequences)
        filler = self.tokenizer.pad_token_id
        ids = torch.tensor([own + [filler] * (width - len(own)) for own in sequences])
        lengths = torch.tensor([len(own) for own in sequences])
        mask = (torch.arange(width) < lengths[:, None]).long()
        device = self.model.device
        with torch.no_grad():
            out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        scores: np.ndarray = out.logits[:, 0].double().cpu().numpy()
        return scores


def load_reward_model(source: StageInput, dtype: ResolvedDType) -> RewardModel:
    """What a `reward` stage left, ready to score.

    Args:
        source: Of kind `reward`; with `base`, where an adapter was trained, the model under it.
            That is loaded in `dtype` also where the adapter was trained on its 4-bit form.
        dtype: Precision of the weights; the head computes in float32.

    Raises:
        ModelError: it is no reward model, or not of this base.
    """
    import torch

    from posttrain.train.reward_head import load_body

    folder = Path(source.path)
    record = RewardRecord.read(folder)
    tokenizer = load_tokenizer(source)
    adapted = (folder / "adapter_config.json").exists()
    if adapted and source.base is None:
        raise ModelError(f"{source.path}: an adapter without the model it was trained on")
    weights = source.base if adapted else source.path
    model = load_body(source.model_copy(update={"path": weights}), dtype)
    if adapted:
        model = put_adapter_on(model, source.path)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if torch.cuda.is_available():
        model = model.cuda()
    return RewardModel(model.eval().requires_grad_(False), tokenizer, record)
