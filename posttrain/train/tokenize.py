"""Rows as token ids with labels: which tokens a model is trained on, and which it only reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@dataclass(frozen=True)
class _Token:
    """A token and the characters of the text that it covers, from `first` up to `last`."""

    id: int
    first: int
    last: int


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
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer does not say which characters a token "
            "covers; use a model with a fast tokenizer (tokenizer.json)"
        )
    template = _template(tokenizer)
    marked = _GENERATION_MARKER.search(template) is not None
    text, spans = (_marked if marked else _by_prefixes)(tokenizer, template, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [
        _Token(token, first, last)
        for token, (first, last) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]
    special = set(tokenizer.all_special_ids)
    ends = [_end_of_turn(text, tokens, special, *span) for span in spans]
    turns = [(start, end) for (start, _), end in zip(spans, ends, strict=True)]
    # A token that begins in the header belongs to the prompt when generating, too.
    trained = [
        any(start <= token.first < token.last <= end for start, end in turns) for token in tokens
    ]
    return _truncate([token.id for token in tokens], trained, max_length, tokenizer.bos_token_id)


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None
) -> Encoded:
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


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and what its `{% generation %}` markers enclose, in characters.

    The tokenizer's own mask is made of these, but leaves out the last bytes of a character that
    is split over several tokens.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with _template_errors(tokenizer, messages):
        texts, spans = render_jinja_template(
            [_plain(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and what each assistant turn adds to the rendering of what precedes it."""
    del template  # the tokenizer knows it
    text = render_chat(tokenizer, messages)
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    return text, [_turn_span(tokenizer, messages, turn, text) for turn in turns]


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, text: str
) -> tuple[int, int]:
    """Characters of `text` that the model would write for `messages[turn]`."""
    prompt = render_chat(tokenizer, messages[:turn], add_generation_prompt=True)
    answered = render_chat(tokenizer, messages[: turn + 1])
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
    text: str, tokens: Sequence[_Token], special: set[int], start: int, end: int
) -> int:
    """Where the special token that ends the turn ends; `end` where there is none.

    Templates write a line break after the end-of-turn token, and generation stops before it; and
    some templates' markers leave the token out, though without it nothing would teach the model
    to stop.
    """
    inside = [token for token in tokens if start <= token.first and token.last <= end]
    closing = [token for token in inside if token.id in special]
    if closing and not text[closing[-1].last : end].strip():
        return closing[-1].last
    following = [token for token in tokens if token.first == end and token.id in special]
    return following[0].last if following else end


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    """A chat as the template writes it; with a prompt, up to where the next answer begins.

    Raises:
        ModelError: there is no template, or it cannot write these turns.
    """
    _template(tokenizer)
    with _template_errors(tokenizer, messages):
        return str(
            tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


@contextmanager
def _template_errors(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> Iterator[None]:
    """Say which turns a template could not write, and what it said."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, IndexError) as error:
        roles = ", ".join(message.role for message in messages) or "no turn at all"
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template cannot write a chat of these turns: "
            f"{roles}: {error}"
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _truncate(
    ids: list[int], trained: list[bool], max_length: int, bos_token_id: int | None
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
    if dropped and ids[0] == bos_token_id:
        keep = [0, *range(dropped + 1, len(ids))][:max_length]
    else:
        keep = list(range(dropped, len(ids)))[:max_length]
    return Encoded([ids[i] for i in keep], [labels[i] for i in keep], cut=excess)
