"""Labels that answers name: right or wrong each, precision, recall and F1 over all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex  # type: ignore[import-untyped]

from posttrain.evaluate.metrics.base import Case, Scores, Tell, share
from posttrain.evaluate.metrics.matching import all_groups, last_group
from posttrain.recipe.test_sets import Labels


class LabelMetric:
    """The labels of an answer against those of its reference."""

    packages: tuple[str, ...] = ("regex", "scikit-learn")

    def __init__(self, config: Labels) -> None:
        self._config = config
        self._choices = {_plain(choice): choice for choice in config.choices}
        # Longest first: `feature request` is not also `feature`.
        ordered = sorted(self._choices, key=lambda choice: (-len(choice), choice))
        alternatives = "|".join(regex.escape(choice) for choice in ordered)
        self._mentioned = regex.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])")

    def refuse(self, reference: str) -> str | None:
        """It has to name a choice, and without `multi` one alone."""
        found = self.labels_of_reference(reference)
        if found and (self._config.multi or len(found) == 1):
            return None
        known = ", ".join(self._config.choices)
        if found:
            return f"names {len(found)} of the choices ({known}): write `multi: true`"
        return f"names none of the choices: {known}"

    def score(self, cases: Sequence[Case], tell: Tell) -> Scores:
        """1 or 0 each, with `multi` the F1 of the two sets of labels.

        Over all: `no_label`, the share of answers without a label; `precision`, `recall` and `f1`,
        averaged as the recipe says over the labels that occur; and of each label by itself.
        """
        del tell
        said = [self.labels_of_answer(case.answers[0]) for case in cases]
        wanted = [self.labels_of_reference(case.reference) for case in cases]
        values = tuple(
            2 * len(a & b) / (len(a) + len(b)) if a else 0.0
            for a, b in zip(said, wanted, strict=True)
        )
        corpus = {"no_label": share([not labels for labels in said])}
        return Scores(values, corpus=corpus | self._over_all(wanted, said))

    def labels_of_answer(self, text: str) -> frozenset[str]:
        """The choices that an answer names; none where it names several and may name one."""
        found = self._labels(text)
        return found if self._config.multi or len(found) == 1 else frozenset()

    def labels_of_reference(self, text: str) -> frozenset[str]:
        """Those of a reference, which may be the bare label even if answers are to say more."""
        return self._labels(text) or self._mentions(text)

    def _labels(self, text: str) -> frozenset[str]:
        pattern = self._config.extract
        if pattern is None:
            return self._mentions(text)
        if self._config.multi:
            return self._mentions("\n".join(all_groups(pattern, text)))
        found = last_group(pattern, text)
        return self._mentions(found) if found is not None else frozenset()

    def _mentions(self, text: str) -> frozenset[str]:
        return frozenset(self._choices[found] for found in self._mentioned.findall(_plain(text)))

    def _over_all(
        self, wanted: Sequence[frozenset[str]], said: Sequence[frozenset[str]]
    ) -> dict[str, float]:
        from sklearn.metrics import (  # type: ignore[import-untyped]
            precision_recall_fscore_support,
        )

        choices = self._config.choices
        true, guessed = (
            np.array([[choice in labels for choice in choices] for labels in side], np.int8)
            for side in (wanted, said)
        )
        # A choice that nobody names is no label that was missed.
        present = np.flatnonzero((true | guessed).any(0))
        names = ("precision", "recall", "f1")
        mean = precision_recall_fscore_support(
            true, guessed, labels=present, average=self._config.average, zero_division=0
        )
        found = {name: float(value) for name, value in zip(names, mean, strict=False)}
        each = precision_recall_fscore_support(
            true, guessed, labels=present, average=None, zero_division=0
        )
        for name, values in zip(names, each, strict=False):
            for position, value in zip(present, values, strict=True):
                found[f"{name}/{choices[position]}"] = float(value)
        return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
