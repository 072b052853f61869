"""Rows as token ids with labels: which tokens a model is trained on, and which it only reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.rows import Message
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that adds nothing to the loss, as torch's cross-entropy expects it."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One sequence, ready for a causal language model."""

    input_ids: list[int]
    labels: list[int]
    """As `input_ids` where the token is trained on, else -100. Same length, not shifted."""
    cut: int = 0
    """Tokens that were left out to stay within the longest sequence."""

    @property
    def trainable(self) -> int:
        """Tokens that add to the loss. The first one never does: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> Encoded:
    """A chat as the model's template writes it, with labels on the assistant's turns only.

    Labelled are the content of each assistant turn and the token that ends the turn, so that the
    model learns to stop; its header is not. `{% generation %}` markers of the template decide
    where it has them. Otherwise the template is rendered up to and including each assistant turn.

    A chat longer than `max_length` is cut so that an answer always stays: see `_truncate`.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Turns in order.
        max_length: Longest sequence in tokens, at least 2.

    Raises:
        ModelError: the template cannot render this chat, or rewrites earlier turns when later
            ones follow, so that what the model would be trained on is not what it would say.
    """
    if _GENERATION_MARKER.search(_template(tokenizer)):
        ids, trained = _encode_marked(tokenizer, messages)
    else:
        ids, trained = _encode_by_prefixes(tokenizer, messages)
    return _truncate(tokenizer, ids, trained, max_length)


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> Encoded:
    """A document and the end-of-sequence token, all of it trained on; cut from the right."""
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids = [*ids, end]
    kept = ids[:max_length]
    return Encoded(kept, list(kept), cut=len(ids) - len(kept))


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if not template:
        raise ModelError(
            f"{tokenizer.name_or_path}: the model has no chat template, so it cannot be trained on "
            "chats; start from a chat model, or put a chat_template.jinja in its folder"
        )
    # Several named templates come as a mapping; the one without tools is `default`.
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Let the template's own markers say what the assistant wrote."""
    encoded = tokenizer.apply_chat_template(
        _plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids: list[int] = encoded["input_ids"]
    trained = [bool(flag) for flag in encoded["assistant_masks"]]
    special = set(tokenizer.all_special_ids)
    # Some templates mark the content but leave out the token that ends the turn; without it the
    # model would never learn to stop.
    for index in range(1, len(ids)):
        if trained[index - 1] and ids[index - 1] not in special and ids[index] in special:
            trained[index] = True
    return ids, trained


def _encode_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Find each assistant turn as what its rendering adds to the rendering of what precedes it."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer does not say which characters a token "
            "covers; use a model with a fast tokenizer (tokenizer.json)"
        )
    text = _render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            start, end = _turn_span(tokenizer, messages, turn, text)
            end = _end_of_turn(tokenizer, text, ids, offsets, start, end)
            for index, (first, last) in enumerate(offsets):
                # A token that begins in the header belongs to the prompt when generating too.
                trained[index] |= start <= first < last <= end
    return ids, trained


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, text: str
) -> tuple[int, int]:
    """Characters of `text` that the model would write for `messages[turn]`."""
    prompt = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    answered = _render(tokenizer, messages[: turn + 1])
    if not answered.startswith(prompt) or not text.startswith(answered):
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template writes turn {turn + 1} of "
            f"{len(messages)} differently once the chat goes on (templates that drop earlier "
            "thinking do), so what the assistant said there is unclear; mark it with "
            "{% generation %} in the template, or split such chats so that each ends with its "
            "first assistant turn"
        )
    return len(prompt), len(answered)


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    end: int,
) -> int:
    """Where the turn's last special token ends, if nothing but white space follows it.

    Templates write a line break after the end-of-turn token; generation stops before it.
    """
    special = set(tokenizer.all_special_ids)
    for token, (first, last) in zip(reversed(ids), reversed(offsets), strict=True):
        if start <= first < last <= end and token in special:
            return last if not text[last:end].strip() else end
    return end


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, IndexError) as error:
        roles = ", ".join(message.role for message in messages) or "no turn at all"
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template cannot write a chat of these turns: "
            f"{roles}: {error}"
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _truncate(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool], max_length: int
) -> Encoded:
    """Cut to `max_length` without losing the answer or, where that can be helped, the question.

    The prompt is all before the first trained token, the answer all from there on. The answer
    gets what the prompt leaves, and half of the length at least. So a prompt of up to half the
    length is never cut; a longer one loses its oldest tokens as far as the answer needs room
    (a leading beginning-of-sequence token stays); then the answer is cut from the right.
    """
    labels = [token if flag else IGNORED for token, flag in zip(ids, trained, strict=True)]
    excess = len(ids) - max_length
    if excess <= 0:
        return Encoded(ids, labels)
    if not any(trained):
        return Encoded(ids[:max_length], labels[:max_length], cut=excess)
    prompt = trained.index(True)
    room = max(max_length // 2, max_length - (len(ids) - prompt))
    dropped = max(0, prompt - room)
    if dropped and ids[0] == tokenizer.bos_token_id:
        keep = [0, *range(dropped + 1, len(ids))][:max_length]
    else:
        keep = list(range(dropped, len(ids)))[:max_length]
    return Encoded([ids[i] for i in keep], [labels[i] for i in keep], cut=excess)
