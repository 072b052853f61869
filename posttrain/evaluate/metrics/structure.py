"""Answers that programs shall read: valid JSON, and what a schema says of it."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import regex  # type: ignore[import-untyped]

from posttrain.evaluate.metrics.base import Case, Scores, Tell
from posttrain.recipe.test_sets import Json

_FENCE = regex.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", regex.DOTALL | regex.MULTILINE)


class JsonMetric:
    """Whether an answer is JSON, as RFC 8259 has it, and conforms to a schema."""

    packages: tuple[str, ...] = ("jsonschema",)

    def __init__(self, config: Json) -> None:
        self._config = config
        self._title = config.title
        self._validator = None
        if config.json_schema is not None:
            from jsonschema.validators import (  # type: ignore[import-untyped]
                Draft202012Validator,
                validator_for,
            )
            from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

            kind = validator_for(config.json_schema, default=Draft202012Validator)
            # This registry fetches nothing from the network, unlike the default one.
            self._validator = kind(config.json_schema, registry=REGISTRY)

    def refuse(self, reference: str) -> str | None:
        """Any reference will do: it does not count."""
        del reference
        return None

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """1 or 0 each; with a schema `..._valid` beside it: valid JSON, conforming or not."""
        del tell
        found = [self._read(case.answers[0]) for case in cases]
        valid = tuple(float(text is not None) for text in found)
        if self._validator is None:
            return Scores(valid)
        conforms = tuple(float(text is not None and self._conforms(text)) for text in found)
        return Scores(conforms, also={f"{self._title}_valid": valid})

    def _read(self, answer: str) -> bytes | None:
        """The JSON in the answer, None where there is none."""
        if self._config.allow_fence:
            answer = first_fence(answer) or answer
        text = answer.strip().encode(errors="surrogatepass")
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError:
            return None
        return text

    def _conforms(self, text: bytes) -> bool:
        assert self._validator is not None
        try:
            return bool(self._validator.is_valid(orjson.loads(text)))
        except RecursionError:  # nested deeper than anything that a schema describes
            return False


def first_fence(text: str) -> str | None:
    """Content of the first Markdown code block, None without one that is closed."""
    found = _FENCE.search(text)
    return str(found[1]) if found else None
