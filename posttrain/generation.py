"""Asking a model, and adapters on it: one base in memory, and each adapter put on it in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.data.records import BadRecord
from posttrain.data.rows import Message, Messages
from posttrain.errors import DataError, ModelError, PosttrainError
from posttrain.finding import BASE, Adapter, Base

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TextStreamer,
    )


@dataclass(frozen=True)
class Settings:
    """How an answer is written."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn from softmax(logits / T)."""
    seed: int = 0
    """Of the draws. Each answer starts from it, so that none depends on the ones before."""


@dataclass(frozen=True)
class Answer:
    """What one model says to one prompt."""

    prompt: Messages
    adapter: str
    """Or `base`."""
    text: str
    tokens: int
    """Written, with the one that ends the answer."""
    ended: Literal["end", "length"]
    """Whether the model ended it or `max_new_tokens` did."""


# Prompts


def read_prompts(path: Path) -> list[Messages]:
    """The prompts in a file.

    A line of a `.txt` file is a prompt. A record of a `.jsonl` file has a `prompt`, a text or turns
    up to the user's, or `messages`, whose last turn is left out if it is the assistant's.

    Raises:
        DataError: the file cannot be read, a record has neither, or there is no prompt in it.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    reader = _prompts_of_lines if path.suffix.lower() == ".txt" else _prompts_of_records
    prompts = list(reader(path))
    if not prompts:
        raise DataError(f"{path}: there is no prompt in it")
    return prompts


def _prompts_of_lines(path: Path) -> Iterator[Messages]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for line in text.splitlines():
        if line.strip():
            yield (Message("user", line),)


def _prompts_of_records(path: Path) -> Iterator[Messages]:
    from posttrain.data.files import read_file
    from posttrain.data.messages import NotARow, check_prompt, parse_messages, parse_prompt

    for record in read_file(path, str(path)):
        if isinstance(record, BadRecord):
            raise DataError(str(record))
        try:
            if record.fields.get("prompt") is not None:
                yield parse_prompt(record.fields["prompt"], "`prompt`")
                continue
            turns = parse_messages(record.fields.get("messages", ()), "`messages`")
            answered = turns[-1].role == "assistant"
            yield check_prompt(turns[:-1] if answered else turns, "`messages`")
        except NotARow as error:
            raise DataError(
                f"{record.file}:{record.row}: {error}; a record needs a `prompt`, or `messages`"
            ) from error


# Answering


class Generator:
    """One base in memory, and adapters that are put on it and taken off again."""

    def __init__(self, base: Base) -> None:
        """Load the base.

        Raises:
            ModelError: it cannot be loaded.
        """
        from posttrain.hardware import resolve_dtype
        from posttrain.models import load_causal_lm, load_tokenizer
        from posttrain.stages.program import StageInput

        source = StageInput(kind="model", path=str(base.path), digest=base.digest)
        self._model = load_causal_lm(source, resolve_dtype("auto"))
        self._tokenizer = load_tokenizer(source)

    def answers(
        self,
        prompts: Sequence[Messages],
        adapter: Adapter | None,
        settings: Settings,
        listen: Callable[[str], None] | None = None,
    ) -> Iterator[Answer]:
        """What the base, or an adapter on it, says to each prompt.

        Chats are written by the chat template; without one a prompt is text to be continued.

        Args:
            prompts: Each ends with the user's turn.
            adapter: One that `find_adapters` gave for this base, or None for the base alone.
            settings: Length, temperature and seed.
            listen: Told each piece of text as soon as it is written.

        Raises:
            ModelError: the adapter cannot be loaded on this base, or the chat template cannot
                write a prompt.
            DataError: a prompt is longer than the model reads.
        """
        with self._with_adapter(adapter) as (model, tokenizer):
            for number, prompt in enumerate(prompts, start=1):
                try:
                    yield _answer(model, tokenizer, prompt, adapter, settings, listen)
                except PosttrainError as error:
                    raise type(error)(f"prompt {number}: {error}") from error

    @contextmanager
    def _with_adapter(
        self, adapter: Adapter | None
    ) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        if adapter is None:
            yield self._model, self._tokenizer
            return
        from posttrain.models import load_tokenizer, put_adapter_on
        from posttrain.stages.program import StageInput

        tokenizer = self._tokenizer
        if (adapter.path / "tokenizer_config.json").exists():
            source = StageInput(kind="adapter", path=str(adapter.path), digest="")
            tokenizer = load_tokenizer(source)
        adapted = put_adapter_on(self._model, str(adapter.path))
        try:
            yield adapted.eval(), tokenizer
        finally:
            # Prompts and prefixes stand before the model and are no part of it.
            if not adapted.active_peft_config.is_prompt_learning:
                self._model = adapted.unload()


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    adapter: Adapter | None,
    settings: Settings,
    listen: Callable[[str], None] | None,
) -> Answer:
    import torch

    ids = torch.tensor([_encode(tokenizer, prompt)], device=model.device)
    length = ids.shape[1]
    config = _generation_config(model, tokenizer, length, settings)
    torch.manual_seed(settings.seed)
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_streamer(tokenizer, listen) if listen else None,
        )[0, length:]
    return Answer(
        prompt=prompt,
        adapter=adapter.name if adapter else BASE,
        text=str(tokenizer.decode(written, skip_special_tokens=True)).strip(),
        tokens=len(written),
        ended="end" if int(written[-1]) in config.eos_token_id else "length",
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    from jinja2 import TemplateError

    from posttrain.data.rows import plain_messages

    if not tokenizer.chat_template:
        if len(prompt) > 1:
            raise ModelError(
                "has several turns, and the model has no chat template to write them with; give "
                "the text that it is to continue"
            )
        return list(tokenizer(prompt[0].content)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            plain_messages(prompt), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ModelError(f"the model's chat template cannot write it: {error}") from error
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, settings: Settings
) -> GenerationConfig:
    """The settings alone: what the model's own ones would add is left out, top-k and top-p too."""
    from transformers import GenerationConfig

    from posttrain.evaluate.samples import end_tokens

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = longest - length if longest else settings.max_new_tokens
    if room < 1:
        raise DataError(f"has {length:,} tokens, and the model reads {longest:,} at most")
    draws = settings.temperature > 0
    return GenerationConfig(
        max_new_tokens=min(settings.max_new_tokens, room),
        do_sample=draws,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if draws else {}),
    )


def _streamer(tokenizer: PreTrainedTokenizerBase, listen: Callable[[str], None]) -> TextStreamer:
    from transformers import TextStreamer

    class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            listen(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
