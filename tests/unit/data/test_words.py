from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import kernels, minhash
from posttrain.data.words import Words, hash_words, ngram_hashes

# Letters, marks, scripts without spaces, planes beyond the first, what is no letter at all.
ALPHABET = (
    "aAbß_9 .,!\n-éÉe\u0301\u0130\u017f你好ไทยເກົ\u1000かカ한д\u202e\u200d\u00ad😀𝒜𠀀𠀁\U000f0000"
)
TEXT = st.text(ALPHABET, max_size=40) | st.text(max_size=20)
SEGMENTED = st.text("aAbßé_9 .,!\n-д\u0301한", max_size=40)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "use_numba", lambda: False)


def by_numpy(function: object, *arguments: object) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "use_numba", lambda: False)
        return function(*arguments)  # type: ignore[operator]


def equal(one: Words, other: Words) -> bool:
    return bool(
        np.array_equal(one.hashes, other.hashes) and np.array_equal(one.offsets, other.offsets)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=6))
def test_compiled_and_numpy_words_are_equal(texts: list[str]) -> None:
    assert kernels.use_numba()
    compiled, plain = hash_words(texts), by_numpy(hash_words, texts)
    assert equal(compiled, plain)  # type: ignore[arg-type]
    for n in (1, 2, 5, 13):
        assert equal(ngram_hashes(compiled, n), by_numpy(ngram_hashes, compiled, n))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_compiled_and_numpy_signatures_and_sets_are_equal(texts: list[str]) -> None:
    grams, counts = minhash.shingles(texts)
    plain, plain_counts = by_numpy(minhash.shingles, texts)  # type: ignore[misc]
    assert equal(grams, plain)
    assert np.array_equal(counts, plain_counts)
    assert np.array_equal(minhash.signatures(grams), by_numpy(minhash.signatures, grams))  # type: ignore[arg-type]
    sets = minhash.shingle_sets(texts)
    assert equal(sets, by_numpy(minhash.shingle_sets, texts))  # type: ignore[arg-type]
    left = np.zeros(len(texts), np.int64)
    right = np.arange(len(texts))
    assert np.allclose(
        minhash.jaccard(sets, left, right),
        by_numpy(minhash.jaccard, sets, left, right),  # type: ignore[arg-type]
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(SEGMENTED, min_size=1, max_size=5))
def test_words_are_those_of_the_regular_expression(texts: list[str]) -> None:
    """Two words have equal hashes if and only if they are equal; texts have as many as `\\w+`."""
    words = hash_words(texts)
    found = [re.findall(r"\w+", unicodedata.normalize("NFC", t).lower()) for t in texts]
    assert words.counts.tolist() == [len(one) for one in found]
    flat = [word for one in found for word in one]
    of_word: dict[str, int] = {}
    for word, value in zip(flat, words.hashes.tolist(), strict=True):
        assert of_word.setdefault(word, value) == value
    assert len(set(of_word.values())) == len(of_word)


def test_numbers_stay_as_they_are() -> None:
    one, other = hash_words(["2 + 2 = 4", "2 + 3 = 5"]), hash_words(["2 + 2 = 4", "2 + 2 = 4"])
    assert one.hashes[:3].tolist() != one.hashes[3:].tolist()
    assert other.hashes[:3].tolist() == other.hashes[3:].tolist()


@pytest.mark.parametrize("text", ["我喜欢学习中文", "ฉันชอบเรียนภาษาไทย", "日本語を勉強します"])
def test_scripts_without_spaces_give_character_ngrams(text: str) -> None:
    letters = [character for character in text if character.isalnum()]
    assert hash_words([text]).counts.tolist() == [len(letters)]
    # A few foreign words in a text change nothing about the rest of it.
    mixed = "The word for it is " + text[:3] + " and nothing else is like it at all"
    assert hash_words([mixed]).counts.tolist() == [len(re.findall(r"\w+", mixed))]


def test_unicode_forms_and_case_do_not_matter() -> None:
    words = hash_words(["Café ÉTÉ", "cafe\u0301 e\u0301te\u0301"])
    assert words.hashes[:2].tolist() == words.hashes[2:].tolist()


def test_a_text_shorter_than_a_shingle_is_compared_whole() -> None:
    texts = ["one two", "one  TWO!", "two one", "one two three", "", "...", "!!!", " ... "]
    grams, counts = minhash.shingles(texts)
    assert np.diff(grams.offsets).tolist() == [1] * len(texts)
    assert counts.tolist() == [2, 2, 2, 3, 0, 0, 0, 0]
    one, same, turned, longer, empty, dots, marks, spaced = grams.hashes.tolist()
    assert one == same
    assert dots == spaced
    assert len({one, turned, longer, empty, dots, marks}) == 6


def test_a_word_of_a_hundred_thousand_letters() -> None:
    texts = ["x" * 100_000, "x" * 100_001, "x" * 100_000]
    hashes = hash_words(texts).hashes.tolist()
    assert hashes[0] == hashes[2] != hashes[1]
    assert by_numpy(hash_words, texts).hashes.tolist() == hashes  # type: ignore[attr-defined]


def test_jaccard_is_exact() -> None:
    words = [f"w{n}" for n in range(104)]
    left, right = " ".join(words), " ".join(words[10:] + [f"v{n}" for n in range(10)])
    sets = minhash.shingle_sets([left, right])
    a = {tuple(words[i : i + 5]) for i in range(100)}
    tokens = right.split()
    b = {tuple(tokens[i : i + 5]) for i in range(100)}
    expected = len(a & b) / len(a | b)
    assert minhash.jaccard(sets, np.array([0]), np.array([1]))[0] == pytest.approx(expected)


def test_estimates_of_signatures_are_unbiased() -> None:
    """Over many pairs of known similarity the share of equal MinHash values is the similarity."""
    estimates, truth = [], []
    for pair in range(60):
        words = [f"{pair}w{n}" for n in range(160)]
        changed = words[: 160 - pair * 2] + [f"{pair}v{n}" for n in range(pair * 2)]
        texts = [" ".join(words), " ".join(changed)]
        values = minhash.signatures(minhash.shingles(texts)[0])
        estimates.append(float((values[0] == values[1]).mean()))
        sets = minhash.shingle_sets(texts)
        truth.append(float(minhash.jaccard(sets, np.array([0]), np.array([1]))[0]))
    error = np.array(estimates) - np.array(truth)
    # The standard error of one estimate is at most 0.5 / sqrt(128) = 0.044.
    assert abs(error.mean()) < 0.02
    assert np.abs(error).max() < 0.17
