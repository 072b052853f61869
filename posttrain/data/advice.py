"""Whether a dataset is large, varied and balanced enough for what it is used for.

Numbers in, sentences out: nothing here reads a row or stops a run. The row counts are the figures
that guides to fine-tuning agree on, not laws; `SIZES` is the table. Every other threshold is
written beside the rule that uses it, with its source or as our own choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from posttrain.data.report_data import Advice
from posttrain.data.rows import Chat, Document, KtoExample, Preference, Row
from posttrain.recipe.base import RowFamily

Method = Literal["sft-lora", "sft-full", "dpo", "reward", "kto", "pretrain"]


@dataclass(frozen=True)
class Size:
    """How many rows a training method wants."""

    title: str
    rows: str
    """What its rows are called."""
    minimum: int
    usual: tuple[int, int]
    """The range most projects do well with."""
    beyond: str | None = None
    """What to consider above `too_many` rows."""
    too_many: int | None = None


SIZES: dict[Method, Size] = {
    "sft-lora": Size(
        "SFT with LoRA", "examples", 500, (2_000, 10_000), "full fine-tuning", too_many=50_000
    ),
    "sft-full": Size(
        "full SFT", "examples", 1_000, (10_000, 100_000), "continued pretraining", too_many=500_000
    ),
    "reward": Size("a reward model", "pairs", 5_000, (20_000, 100_000)),
    "dpo": Size("DPO", "pairs", 3_000, (10_000, 50_000)),
    # No figure of its own is in use. A pair makes two KTO rows (arXiv:2402.01306).
    "kto": Size("KTO", "rows", 6_000, (20_000, 100_000)),
}
"""Rows of the training side, by method."""

FAMILY_METHODS: dict[RowFamily, tuple[Method, ...]] = {
    "chats": ("sft-lora", "sft-full"),
    "preferences": ("dpo", "reward"),
    "kto": ("kto",),
    "documents": ("pretrain",),
}
"""What each family is used for where the recipe does not say."""

TOKENS_PER_WORD = 4 / 3
"""Rule of thumb for English prose and byte-pair tokenizers of 30,000 entries and more: a token is
three quarters of a word. Code and other languages need more."""

_CORPUS_TOKENS = 250_000_000
"""About one gigabyte of English text at four characters a token: where the gigabytes begin that
continued pretraining is said to need."""


@dataclass(frozen=True)
class Diversity:
    """How varied rows are, by how they begin (see `opening`)."""

    rows: int
    distinct: int
    """Different openings."""
    effective: float
    """The number of equally frequent openings that would be as varied: exp of Shannon's entropy,
    the Hill number of order 1 (Hill 1973, Jost 2006). Unlike `distinct` it does not grow with
    every opening that occurs once."""
    commonest: str
    share: float
    """Share of rows that begin with `commonest`."""

    @classmethod
    def of(cls, openings: Mapping[str, int]) -> Diversity | None:
        """From the number of rows by opening; None where there are none.

        Counting a few ten thousand rows is enough, if they are drawn without regard to order.
        """
        counts = [count for count in openings.values() if count > 0]
        rows = sum(counts)
        if not rows:
            return None
        entropy = -sum(count / rows * math.log(count / rows) for count in counts)
        commonest = max(sorted(openings), key=lambda text: openings[text])
        share = openings[commonest] / rows
        return cls(rows, len(counts), math.exp(entropy), commonest, share)


def opening(row: Row) -> str:
    """The first three words of a document, or of a row's first question, in lower case.

    They hold what an instruction asks for ("write a poem", "what is the"): a cheap stand-in for
    the verb and object by which Self-Instruct shows its variety (Wang et al. 2022,
    arXiv:2212.10560), and one that needs no parser of any language.
    """
    match row:
        case Document():
            text = row.text
        case Chat():
            text = next((turn.content for turn in row.messages if turn.role == "user"), "")
        case Preference() | KtoExample():
            text = next((turn.content for turn in row.prompt if turn.role == "user"), "")
    return first_words(text)


def first_words(text: str) -> str:
    """The first three words in lower case."""
    return " ".join(text[:200].lower().split()[:3])


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is known of a prepared dataset. Shares are between 0 and 1; None is "not measured"."""

    family: RowFamily
    rows: int
    """Training rows, after balancing."""
    words: int
    """Words of the training rows."""
    validation_rows: int
    methods: tuple[Method, ...] = ()
    """Training methods that the recipe uses it for; empty: judge for all usual ones."""
    exact_duplicates: float | None = None
    """Share of the rows read that exact deduplication dropped."""
    near_duplicates: float | None = None
    """Share of the rows read that near deduplication dropped."""
    diversity: Diversity | None = None
    """Of the training rows."""
    chosen_words: float | None = None
    """Mean words of `chosen`, of preferences."""
    rejected_words: float | None = None
    """Mean words of `rejected`, of preferences."""
    chosen_longer: float | None = None
    """Of the pairs of unequal length, the share whose `chosen` has more words."""
    wanted: int | None = None
    """KTO rows whose label is true."""
    unwanted: int | None = None
    """KTO rows whose label is false."""
    desirable_weight: float = 1.0
    """KTO's weight of wanted rows."""
    undesirable_weight: float = 1.0
    """KTO's weight of unwanted rows."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Training rows by label, where rows have labels, after balancing."""


def sufficiency(facts: DatasetFacts) -> tuple[Advice, ...]:
    """What a practitioner would say to these numbers, warnings first. Never an error.

    Without `methods`, rows too few for one of the usual methods are a note as long as they are
    enough for another.
    """
    if facts.rows == 0:
        return (_warn("No training rows are left. The funnel shows which operation dropped them."),)
    advice = [
        *_size(facts),
        *_validation(facts),
        *_duplicates(facts),
        *_diversity(facts),
        *_length_bias(facts),
        *_kto_balance(facts),
        *_label_balance(facts),
    ]
    order = {"warning": 0, "note": 1, "good": 2}
    return tuple(sorted(advice, key=lambda one: order[one.level]))


def tokens_of(words: int) -> int:
    """Tokens of so many words, estimated by `TOKENS_PER_WORD`."""
    return round(words * TOKENS_PER_WORD)


def _rounded(number: int) -> str:
    """An estimate to two digits."""
    return f"{round(number, 2 - len(str(number))):,}"


def _warn(text: str) -> Advice:
    return Advice(level="warning", text=text)


def _note(text: str) -> Advice:
    return Advice(level="note", text=text)


def _good(text: str) -> Advice:
    return Advice(level="good", text=text)


# --- size -------------------------------------------------------------------------------------


def _size(facts: DatasetFacts) -> Iterator[Advice]:
    methods = facts.methods or FAMILY_METHODS[facts.family]
    sizes = [SIZES[method] for method in methods if method in SIZES]
    enough_for_one = any(facts.rows >= size.minimum for size in sizes)
    for size in sizes:
        yield _rows(facts, size, lenient=enough_for_one and not facts.methods)
    if "pretrain" in methods:
        yield _corpus(facts.words)


def _rows(facts: DatasetFacts, size: Size, *, lenient: bool) -> Advice:
    low, high = size.usual
    have = (
        f"{facts.rows:,} training {size.rows} (about {_rounded(tokens_of(facts.words))} tokens, "
        "estimated at 4/3 a word)"
    )
    if facts.rows < size.minimum:
        say = _note if lenient else _warn
        return say(
            f"{have} are few for {size.title}: {size.minimum:,} are the usual minimum, "
            f"{low:,} to {high:,} the usual range. Models learn so few {size.rows} by heart. Add "
            "varied ones, and stop at the lowest validation loss."
        )
    if facts.rows < low:
        return _note(
            f"{have} are enough to try {size.title} (minimum {size.minimum:,}); "
            f"{low:,} to {high:,} are the usual range. Varied and correct {size.rows} do more than "
            "many."
        )
    if size.too_many is not None and facts.rows > size.too_many:
        return _note(
            f"{have} are more than {size.title} gains from (about {size.too_many:,}); "
            f"consider {size.beyond}, or keep the best ones."
        )
    return _good(f"{have} are in the range that {size.title} works well with.")


def _corpus(words: int) -> Advice:
    tokens = tokens_of(words)
    have = f"About {_rounded(tokens)} tokens ({words:,} words, estimated at 4/3 a word)"
    if tokens < _CORPUS_TOKENS:
        return _warn(
            f"{have} are little for continued pretraining, which is said to need gigabytes of text "
            f"(1 GB is about {_CORPUS_TOKENS:,} tokens). Facts will not stick well: train few "
            "epochs, replay general text against forgetting, and consider retrieval or turning "
            "the documents into questions and answers for SFT."
        )
    return _good(f"{have} are a corpus of the size that continued pretraining is done with.")


def _validation(facts: DatasetFacts) -> Iterator[Advice]:
    """Our threshold: from 100 rows on a share is known to within ten points."""
    rows = facts.validation_rows
    if rows == 0:
        yield _warn(
            "No validation rows: nothing will show when the model begins to learn by heart. "
            "Raise `split.validation`."
        )
    elif rows < 100:
        # Half the 95% interval of a share of 50%: 1.96 * sqrt(0.25 / n).
        points = 100 * 1.96 * math.sqrt(0.25 / rows)
        yield _warn(
            f"{rows} validation rows are few: a share of 50% measured on them is only known to "
            f"within {points:.0f} percentage points (95% interval), and their loss will be as "
            "noisy. Raise `split.validation`, or do not choose between checkpoints by it."
        )


# --- variety ----------------------------------------------------------------------------------


def _duplicates(facts: DatasetFacts) -> Iterator[Advice]:
    """Our thresholds: a tenth of the rows is worth a word, a third a warning."""
    dropped = (facts.exact_duplicates or 0.0) + (facts.near_duplicates or 0.0)
    if dropped >= 0.1:
        say = _warn if dropped >= 1 / 3 else _note
        yield say(
            f"{dropped:.0%} of the rows read were duplicates of others and were left out. A source "
            "that repeats itself this much is less varied than its size says; look at the largest "
            "clusters, and count only the rows that are left."
        )
    if facts.near_duplicates is None and facts.rows >= 100:
        yield _note(
            "Near duplicates were not looked for. Rows that differ in a name or a number count "
            "as many and teach as one: switch on `near_dedup`."
        )


def _diversity(facts: DatasetFacts) -> Iterator[Advice]:
    """Our thresholds: a third of the rows alike, or fewer than 20 effective openings."""
    found = facts.diversity
    if found is None or found.rows < 100:
        return
    what = "documents" if facts.family == "documents" else "prompts"
    if found.share >= 1 / 3:
        fix = (
            "Take boilerplate off the documents"
            if facts.family == "documents"
            else "That is right for a single task. For an assistant, phrase the task in many ways "
            "and mix in other tasks (5% to 10% general instructions also work against forgetting)"
        )
        yield _warn(f'{found.share:.0%} of the {what} begin with "{found.commonest}". {fix}.')
    elif found.effective < 20:
        yield _warn(
            f"The {what} begin in few ways: {found.effective:.0f} effective openings among "
            f"{found.rows:,} rows ({found.distinct:,} different ones, unevenly used). Add other "
            "phrasings and edge cases."
        )


# --- balance ----------------------------------------------------------------------------------


def _length_bias(facts: DatasetFacts) -> Iterator[Advice]:
    """A reward model can score by length alone (Singhal et al. 2023, arXiv:2310.03716).

    Our threshold: 65% of pairs, well outside the noise of some hundred pairs.
    """
    longer = facts.chosen_longer
    if longer is None or max(longer, 1 - longer) < 0.65:
        return
    side = "longer" if longer >= 0.5 else "shorter"
    share = max(longer, 1 - longer)
    means = ""
    if facts.chosen_words is not None and facts.rejected_words:
        ratio = facts.chosen_words / facts.rejected_words
        means = (
            f" ({facts.chosen_words:.0f} words on average against {facts.rejected_words:.0f}, "
            f"{ratio:.2f} times as long)"
        )
    yield _warn(
        f"Of the pairs of unequal length {share:.0%} have the {side} answer as chosen{means}. "
        f'"The {side} answer wins" is right that often without reading: a reward model must beat '
        f"{share:.0%} accuracy to have learnt more, and DPO may learn to write {side} answers. "
        f"Add pairs in which the {side} answer is the worse one."
    )


def _kto_balance(facts: DatasetFacts) -> Iterator[Advice]:
    """Weighted wanted to unwanted rows within 1:1 and 4:3 (TRL's `KTOTrainer`, its bounds)."""
    if facts.family != "kto" or facts.wanted is None or facts.unwanted is None:
        return
    if not facts.wanted or not facts.unwanted:
        missing = "wanted" if not facts.wanted else "unwanted"
        yield _warn(f"No {missing} rows (`label`): KTO needs both. Add some, or use SFT instead.")
        return
    wanted = facts.wanted * facts.desirable_weight
    unwanted = facts.unwanted * facts.undesirable_weight
    ratio = wanted / unwanted
    if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:  # what was advised is rounded
        return
    if ratio > 4 / 3:
        weight, high = "undesirable_weight", wanted / facts.unwanted
    else:
        weight, high = "desirable_weight", 4 / 3 * unwanted / facts.wanted
    # Rounded inwards, so that what is advised is in the range.
    low = _three_digits(3 / 4 * high, math.ceil)
    yield _warn(
        f"{facts.wanted:,} wanted to {facts.unwanted:,} unwanted rows weigh {ratio:.3g}:1; KTO "
        f"wants 1:1 to 4:3. Set `{weight}` between {low:g} and {_three_digits(high, math.floor):g}."
    )


def _three_digits(number: float, towards: Callable[[float], int]) -> float:
    scale = 10.0 ** (2 - math.floor(math.log10(number)))
    return towards(number * scale) / scale


def _label_balance(facts: DatasetFacts) -> Iterator[Advice]:
    """Our threshold: ten times as many rows of the commonest label as of the rarest."""
    counts = {label: count for label, count in facts.labels.items() if count > 0}
    if len(counts) < 2:
        return
    largest = max(sorted(counts), key=lambda label: counts[label])
    smallest = min(sorted(counts), key=lambda label: counts[label])
    times = counts[largest] / counts[smallest]
    if times > 10:
        yield _warn(
            f'The label "{largest}" has {counts[largest]:,} rows, "{smallest}" has '
            f"{counts[smallest]:,}: {times:.0f} times as many. Collect more of the rare one, or "
            "even them out with `balance: {temperature: 2}`."
        )
