"""Right or wrong by comparing text: the same, the same number, a pattern."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from decimal import Decimal

import regex  # type: ignore[import-untyped]

from posttrain.errors import DataError
from posttrain.evaluate.metrics.base import Case, Metric, Scores, Tell, share
from posttrain.recipe.test_sets import ExactMatch, Numbers, Regex

PATIENCE_S = 1.0
"""Longest search of one answer for a pattern: some patterns would take for ever."""

_SYMBOLS = regex.compile(r"[\p{P}\p{S}]")
_NUMBER = regex.compile(
    r"""(?<![\w.])              # the minus of 5-3 is no sign, and v2 is no number
        ([-+\u2212]?)\ ?\p{Sc}?\ ?
        (\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)
        (?:[eE]([-+]?\d{1,3})(?!\w))?""",
    regex.VERBOSE,
)


def make(config: ExactMatch | Numbers | Regex) -> Metric:
    """The metric of a recipe."""
    match config:
        case ExactMatch():
            return ExactMatchMetric(config)
        case Numbers():
            return NumbersMetric(config)
        case Regex():
            return RegexMetric(config)


class ExactMatchMetric:
    """Whether an answer is the reference, after what the settings say does not count."""

    packages: tuple[str, ...] = ()

    def __init__(self, config: ExactMatch) -> None:
        self._config = config

    def refuse(self, reference: str) -> str | None:
        """Nothing left to compare would make every empty answer right."""
        found = last_group(self._config.extract, reference)
        return None if self._plain(reference if found is None else found) else "has no text"

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """1 or 0 each; `not_found` is the share of answers without what `extract` looks for."""
        del tell  # it takes no time
        pattern = self._config.extract
        found = [last_group(pattern, case.answers[0]) for case in cases]
        wanted = [last_group(pattern, case.reference) for case in cases]
        values = tuple(
            float(
                answer is not None
                and self._plain(answer)
                == self._plain(case.reference if reference is None else reference)
            )
            for case, answer, reference in zip(cases, found, wanted, strict=True)
        )
        missing = share([answer is None for answer in found])
        return Scores(values, corpus={"not_found": missing} if pattern else {})

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self._config.ignore_case:
            text = text.casefold()
        if self._config.ignore_punctuation:
            text = _SYMBOLS.sub("", text)
        return " ".join(text.split())


class NumbersMetric:
    """Whether the last number of an answer is that of the reference."""

    packages: tuple[str, ...] = ()

    def __init__(self, config: Numbers) -> None:
        self._tolerance = Decimal(str(config.tolerance))

    def refuse(self, reference: str) -> str | None:
        """It needs a number."""
        return "has no number" if last_number(reference) is None else None

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """1 or 0 each; `not_found` is the share of answers without a number."""
        del tell
        found = [last_number(case.answers[0]) for case in cases]
        values = tuple(
            float(number is not None and self._near(number, last_number(case.reference)))
            for case, number in zip(cases, found, strict=True)
        )
        return Scores(values, corpus={"not_found": share([number is None for number in found])})

    def _near(self, number: Decimal, wanted: Decimal | None) -> bool:
        return wanted is not None and abs(number - wanted) <= self._tolerance


class RegexMetric:
    """Whether an answer matches a pattern."""

    packages: tuple[str, ...] = ("regex",)

    def __init__(self, config: Regex) -> None:
        self._config = config
        self._pattern = regex.compile(config.pattern, regex.IGNORECASE if config.ignore_case else 0)

    def refuse(self, reference: str) -> str | None:
        """Any reference will do: it does not count."""
        del reference
        return None

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """1 or 0 each."""
        del tell
        return Scores(tuple(float(self._matches(case.answers[0].strip())) for case in cases))

    def _matches(self, answer: str) -> bool:
        look = self._pattern.fullmatch if self._config.full else self._pattern.search
        try:
            return look(answer, timeout=PATIENCE_S) is not None
        except TimeoutError:
            raise _endless(self._config.pattern) from None


def last_group(pattern: str | None, text: str) -> str | None:
    """What the group of the pattern's last match holds; the whole text without a pattern.

    Raises:
        DataError: the search would take too long.
    """
    groups = all_groups(pattern, text) if pattern else [text]
    return groups[-1] if groups else None


def all_groups(pattern: str, text: str) -> list[str]:
    """What the group of each match holds.

    Raises:
        DataError: the search would take too long.
    """
    try:
        return [found or "" for found in regex.findall(pattern, text, timeout=PATIENCE_S)]
    except TimeoutError:
        raise _endless(pattern) from None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, such as -1234.5 of `about -$1,234.50.`; no fractions."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007  # the last one
        pass
    if found is None:
        return None
    sign, digits, exponent = found.groups()
    number = Decimal(f"{digits.replace(',', '')}e{exponent or 0}")
    return number if sign in ("", "+") else -number


def _endless(pattern: str) -> DataError:
    return DataError(
        f"the pattern `{pattern}` takes more than {PATIENCE_S:.0f} s on one answer: avoid a "
        "repetition inside a repetition, such as `(a+)+`"
    )
