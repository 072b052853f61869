"""Corpora with planted duplicates, made from the documentation of the running Python.

    python benchmarks/corpus.py --docs 100000 --out DIR

Four fifths of the documents are unique: sentences of docstrings and of the language reference,
drawn at random. A tenth are exact copies and a tenth near copies; each has a source of its own, so
a cluster has two members. One seed and one Python build always give the same bytes.

    part-K.jsonl   {"id": 17, "text": "..."}; ids count the lines over all parts
    truth.jsonl    one line a copy: id, src, kind, mode, rate, n_words, j_word5

Any document can be made again from its number alone, so memory grows by 20 bytes a document.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import AnyStr

import numpy as np

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
MARKUP = re.compile(r">>>|\.\. |::|---|===|[{}<>|\\*`]")
WORDS_A_SENTENCE = range(6, 41)
SENTENCES_A_PARAGRAPH = 4
SHARDS = 4
BLOCK = 10_000
"""Documents made at a time."""

# How a near copy differs from its source, in rotation. An edit at a random place spoils five
# 5-grams, so `scatter` reaches low similarities with few edits.
EDITS = (
    ("scatter", 0.005), ("scatter", 0.01), ("scatter", 0.02), ("scatter", 0.03), ("scatter", 0.10),
    ("block", 0.02), ("block", 0.05), ("block", 0.08), ("block", 0.15), ("block", 0.30),
    ("format", 0.0),
)  # fmt: skip


def main() -> None:
    """Write a corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mean-words", type=int, default=150)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--no-truth", action="store_true", help="leave out the similarities: faster"
    )
    given = parser.parse_args()
    write_corpus(given.out, given.docs, given.mean_words, given.seed, truth=not given.no_truth)


def write_corpus(
    folder: Path, docs: int, mean_words: int = 150, seed: int = 7, *, truth: bool = True
) -> None:
    """Write `part-K.jsonl` and, with `truth`, `truth.jsonl` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan.of(docs, mean_words, seed)
    a_shard = -(-docs // SHARDS)
    for shard in range(SHARDS):
        with (folder / f"part-{shard}.jsonl").open("wb") as part:
            end = min((shard + 1) * a_shard, docs)
            for begin in range(shard * a_shard, end, BLOCK):
                part.writelines(plan.lines(begin, min(begin + BLOCK, end)))
    if truth:
        with (folder / "truth.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in plan.truth())


@dataclass(frozen=True)
class Plan:
    """Which document stands where. Unique ones have the lowest numbers, near copies the highest."""

    mean_words: int
    seed: int
    unique: int
    near_from: int
    number_at: np.ndarray
    """By position in the corpus: the document's number."""
    source_of: np.ndarray
    """By number of a copy, counted from `unique`: the number of its source."""

    @classmethod
    def of(cls, docs: int, mean_words: int, seed: int) -> Plan:
        """Shuffled positions; every copy with a source of its own."""
        draw = np.random.default_rng(seed)
        copies = docs // 10
        unique = docs - 2 * copies
        number_at = draw.permutation(docs).astype(np.int32)
        source_of = draw.permutation(unique)[: 2 * copies].astype(np.int32)
        return cls(mean_words, seed, unique, unique + copies, number_at, source_of)

    def lines(self, begin: int, end: int) -> Iterator[bytes]:
        """The JSON lines of positions from `begin` up to `end`."""
        numbers = self.number_at[begin:end].astype(np.int64)
        is_copy = numbers >= self.unique
        origins = numbers.copy()
        origins[is_copy] = self.source_of[numbers[is_copy] - self.unique]
        escaped = sentences().escaped
        for position, number, chosen in zip(
            range(begin, end), numbers.tolist(), self._chosen(origins), strict=True
        ):
            if number < self.near_from:
                text = paragraphs(escaped, chosen, b" ", b"\\n")
            else:
                text = json.dumps(self._near_copy(number, chosen), ensure_ascii=False)[
                    1:-1
                ].encode()
            yield b'{"id": %d, "text": "%b"}\n' % (position, text)

    def truth(self) -> Iterator[dict[str, object]]:
        """What was planted, in the order of positions, with similarities counted from the texts."""
        position_of = np.argsort(self.number_at)
        copies = np.flatnonzero(self.number_at >= self.unique)
        for begin in range(0, len(copies), BLOCK):
            positions = copies[begin : begin + BLOCK]
            numbers = self.number_at[positions].astype(np.int64)
            origins = self.source_of[numbers - self.unique]
            for position, number, origin, chosen in zip(
                positions.tolist(), numbers.tolist(), origins.tolist(),
                self._chosen(origins.astype(np.int64)), strict=True,
            ):  # fmt: skip
                source = paragraphs(sentences().plain, chosen, " ", "\n")
                kind, (mode, rate) = "exact", ("copy", 0.0)
                text = source
                if number >= self.near_from:
                    kind, (mode, rate) = "near", self._edit_of(number)
                    text = self._near_copy(number, chosen)
                yield {
                    "id": position, "src": int(position_of[origin]),
                    "kind": kind, "mode": mode, "rate": rate, "n_words": len(WORD.findall(text)),
                    "j_word5": round(jaccard(word_ngrams(text), word_ngrams(source)), 4),
                }  # fmt: skip

    def _chosen(self, numbers: np.ndarray) -> list[list[int]]:
        """For each unique document the sentences it is made of."""
        pool = sentences()
        columns = self.mean_words // 5 + 2
        index = numbers.astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(
            columns, dtype=np.uint64
        )
        drawn = scramble(index + (np.uint64(self.seed) << np.uint64(40)))
        chosen = (drawn[:, 1:] % np.uint64(len(pool.plain))).astype(np.int64)
        # From half to one and a half times the mean; half a sentence less, since the last one
        # goes beyond the target.
        target = self.mean_words * (0.5 + (drawn[:, 0] >> np.uint64(11)) / 2.0**53)
        total = np.cumsum(pool.words[chosen], axis=1)
        counts = (total < (target - pool.words.mean() / 2)[:, None]).sum(axis=1) + 1
        return [row[:count] for row, count in zip(chosen.tolist(), counts.tolist(), strict=True)]

    def _edit_of(self, number: int) -> tuple[str, float]:
        return EDITS[number % len(EDITS)]

    def _near_copy(self, number: int, chosen: list[int]) -> str:
        mode, rate = self._edit_of(number)
        draw = random.Random(self.seed * 1_000_003 + number)
        return edited(paragraphs(sentences().plain, chosen, " ", "\n"), mode, rate, draw)


def paragraphs(pool: list[AnyStr], chosen: list[int], space: AnyStr, newline: AnyStr) -> AnyStr:
    """Sentences as a text of a few paragraphs; text or bytes, as the pool is."""
    picked = [pool[index] for index in chosen]
    return newline.join(
        [
            space.join(picked[at : at + SENTENCES_A_PARAGRAPH])
            for at in range(0, len(picked), SENTENCES_A_PARAGRAPH)
        ]
    )


def in_json(text: str) -> bytes:
    """A text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def edited(text: str, mode: str, rate: float, draw: random.Random) -> str:
    """A near copy of a text."""
    if mode == "format":
        return (text.upper() if draw.random() < 0.3 else text.lower()).replace(". ", " . ") + " !!"
    vocabulary = sentences().vocabulary
    pieces = re.split(r"(\s+)", text)  # words at even positions
    words = range(0, len(pieces), 2)
    count = max(1, round(rate * len(words)))
    if mode == "block":
        begin = draw.randrange(len(words) - count + 1)
        for at in words[begin : begin + count]:
            pieces[at] = draw.choice(vocabulary)
        return "".join(pieces)
    for at in draw.sample(words, count):
        kind = draw.random()
        if kind < 0.6:
            pieces[at] = draw.choice(vocabulary)
        elif kind < 0.8:
            pieces[at] = ""
        else:
            pieces[at] += " " + draw.choice(vocabulary)
    return "".join(pieces)


def scramble(index: np.ndarray) -> np.ndarray:
    """Random-looking 64 bits for each index: splitmix64 (Steele et al. 2014)."""
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Sentences:
    """What documents are made of."""

    plain: list[str]
    escaped: list[bytes]
    """The same as they stand inside a JSON string."""
    words: np.ndarray
    vocabulary: list[str]
    """What edits put in place of words."""


@cache
def sentences() -> Sentences:
    """All different sentences of 6 to 40 words, in a fixed order."""
    found: dict[str, str] = {}
    for documentation in python_documentation():
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(documentation)):
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                words = WORD.findall(sentence.lower())
                if (
                    len(words) in WORDS_A_SENTENCE
                    and sentence[-1] in ".!?"
                    and not MARKUP.search(sentence)
                ):
                    found.setdefault(" ".join(words), sentence)
    plain = list(found.values())
    escaped = [in_json(sentence) for sentence in plain]
    counts = np.array([len(key.split()) for key in found])
    vocabulary = sorted({word for key in found for word in key.split() if len(word) > 3})
    return Sentences(plain, escaped, counts, vocabulary)


def python_documentation() -> Iterator[str]:
    """Docstrings of the standard library, read and not imported, and the language reference."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    ours = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for file in sorted(library.rglob("*.py")):
        if ours.isdisjoint(file.relative_to(library).parts):
            yield from docstrings(file)


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of a module and of everything in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 keeps files of other Pythons
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def word_ngrams(text: str, size: int = 5) -> set[str]:
    """Word n-grams of a text in lower case; a shorter text is its own only n-gram."""
    words = WORD.findall(text.lower())
    grams = {" ".join(words[at : at + size]) for at in range(len(words) - size + 1)}
    return grams or {" ".join(words)}


def jaccard(one: set[str], other: set[str]) -> float:
    """Shared elements over all elements."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


if __name__ == "__main__":
    main()
