"""`prepare`: rows in, a clean, split dataset and a ledger of every row out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from posttrain.recipe.base import ArtifactKind, StageConfig, Strict

# Cheap and certain first. Personal data after deduplication, so that placeholders make no
# duplicates; decontamination last, on the text that will be trained on.
OperationName = Literal[
    "length",
    "document_quality",
    "answer_quality",
    "language",
    "exact_dedup",
    "near_dedup",
    "pii",
    "decontaminate",
]

AGAINST = "against:"
"""Begins the names of inputs that are other prepared datasets."""

DEFAULT_ORDER: tuple[OperationName, ...] = get_args(OperationName)


class Split(Strict):
    """Which rows are kept away from training. Decided by content, so adding rows moves none."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of rows that the loss is measured on during training."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of rows that nothing looks at before the final evaluation."""
    test_dataset: str | None = None
    """Name of a dataset that is the test set, all of it; rows here that repeat it are dropped."""
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] | None = 0.8
    """Rows at least this similar stay on one side (Jaccard similarity of word 5-grams)."""

    @model_validator(mode="after")
    def _something_left(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test leave nothing to train on")
        if self.test and self.test_dataset:
            raise ValueError("write either `test` (a share) or `test_dataset` (a dataset's name)")
        return self


class LengthBounds(Strict):
    """Rows outside these bounds are dropped, with the reason in the ledger."""

    min_characters: Annotated[int, Field(ge=0)] = 1
    """Shortest trainable text (the answers of a chat, the whole of a document), in characters."""
    max_characters: Annotated[int, Field(ge=1)] = 1_000_000
    """Longest whole row, prompt included, in characters."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest whole row in tokens of the recipe's model."""


class ExactDedup(Strict):
    """Drops rows whose normalised text was seen before; the first one in source order stays."""

    ignore_case: bool = False
    """Treat texts that differ only in upper and lower case as equal."""
    against: tuple[str, ...] = ()
    """Names of other datasets: a row that repeats one of theirs is dropped here."""


class NearDedup(Strict):
    """Drops rows that are nearly the same as one that stays: MinHash, then exact Jaccard."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of word 5-grams from which two rows count as the same."""
    bands: Literal[16, 32] = 32
    """Bands of the 128 MinHash values. 32 find 99.9% of all pairs above 0.8, 16 find 99% and
    compare fewer rows."""
    keep: Literal["longest", "newest", "best"] = "longest"
    """Which row of a cluster stays: `longest` in words, `newest` by the column `date`, `best` by
    the column `score`."""
    against: tuple[str, ...] = ()
    """Names of other datasets: a row nearly the same as one of theirs is dropped here."""


class DocumentQuality(Strict):
    """The published rules for web documents. For documents only: chats would lose half."""

    gopher: bool = True
    """Gopher's quality rules (Rae et al. 2021, arXiv:2112.11446, appendix A1.1)."""
    gopher_repetition: bool = True
    """Gopher's repetition rules (the same paper, table A1)."""
    c4: bool = True
    """C4's line and page rules (Raffel et al. 2020, arXiv:1910.10683, section 2.2)."""
    fineweb: bool = True
    """FineWeb's own rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6)."""


class AnswerQuality(Strict):
    """What makes an answer useless: for chats, preferences and KTO rows."""

    empty: bool = True
    """Drop answers that say nothing: dots, dashes, `N/A` that nobody asked for."""
    truncated: bool = True
    """Drop answers that stop in the middle of a sentence or of a code block."""
    refusals: bool = True
    """Drop refusals and boilerplate such as "As an AI language model"."""
    echo: bool = True
    """Drop answers that repeat the question, and pairs whose two answers say the same."""
    max_repetition: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    """Largest share of an answer's words inside a word 5-gram that it used before. Answers stuck
    in a loop come close to 1; good ones that quote, tabulate or compare reach 0.4."""


class Language(Strict):
    """Keeps rows in the wanted languages, by a language identifier that needs no network."""

    keep: Annotated[tuple[str, ...], Field(min_length=1)] = ("en",)
    """ISO 639-1 codes, such as `[en, de]`."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.65
    """Rows whose language is less certain than this are dropped. FineWeb uses 0.65."""
    min_characters: Annotated[int, Field(ge=0)] = 40
    """Shorter rows are kept unseen: no identifier is right about a few words."""


PiiKind = Literal["email", "phone", "ip_address", "credit_card", "iban", "secret"]


class Pii(Strict):
    """Personal data and secrets: replaced by `<EMAIL>`, `<PHONE>` and the like, or dropped."""

    action: Literal["replace", "drop"] = "replace"
    """Replace each finding by a placeholder of its kind, or drop the row."""
    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = (
        "email",
        "phone",
        "ip_address",
        "credit_card",
        "iban",
        "secret",
    )
    """What to look for. `secret` stands for keys, tokens and private keys."""
    phone_region: str | None = None
    """Country (ISO 3166, such as `US`) whose national phone numbers are found as well; numbers
    with a leading + are always found."""

    @model_validator(mode="after")
    def _region_is_known(self) -> Pii:
        from phonenumbers import SUPPORTED_REGIONS

        if self.phone_region is not None and self.phone_region not in SUPPORTED_REGIONS:
            raise ValueError(
                f"phone_region {self.phone_region!r} is no country; write an ISO 3166 code in"
                " capitals, such as `US` or `GB`"
            )
        return self


class Decontaminate(Strict):
    """Drops rows that share an n-gram with an item of an evaluation set."""

    benchmarks: tuple[str, ...] | None = None
    """lm-eval tasks; left out, those that the recipe's `evaluate` stages ask."""
    ngram: Annotated[int, Field(ge=5, le=50)] = 13
    """Words in a row that must not be shared (GPT-3, arXiv:2005.14165, appendix C, uses 13)."""
    short_ngram: Annotated[int, Field(ge=3, le=50)] = 8
    """The same for items shorter than `ngram` words."""
    task_folders: tuple[str, ...] = ()
    """Folders with further lm-eval task YAMLs; left out, those of the `evaluate` stages."""
    offline_root: str | None = None
    """Folder laid out like the Hub; left out, that of the `evaluate` stages."""

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return {"benchmarks": value} if isinstance(value, list | tuple) else value


class Balance(Strict):
    """Evens out how often labels occur among the training rows, by leaving rows out."""

    by: Literal["category", "answer", "label", "file", "subject"] = "category"
    """What counts as the label: the column `category`, the answer's text (classification by
    chats), KTO's `label`, the file, or the subject."""
    cap: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows a label."""
    temperature: Annotated[float, Field(ge=1)] | None = None
    """Shares become proportional to count ** (1 / temperature): 1 changes nothing, large numbers
    make labels equal."""

    @model_validator(mode="after")
    def _one_way(self) -> Balance:
        if (self.cap is None) == (self.temperature is None):
            raise ValueError("write either `cap` or `temperature`")
        return self


class PrepareConfig(StageConfig):
    """Cleans a dataset, splits it, and says of every row what became of it."""

    produces: ClassVar[ArtifactKind] = "dataset"
    accounts: ClassVar[frozenset[str]] = frozenset({"ledger.parquet", "report.html", "report.json"})
    code_version: ClassVar[int] = 3

    stage: Literal["prepare"] = "prepare"
    dataset: str
    """Name of the dataset, as written under `datasets`."""
    split: Split = Split()
    """Training, validation and test rows."""
    length: LengthBounds | None = LengthBounds()
    """Bounds on the length of rows."""
    document_quality: DocumentQuality | None = None
    """Published quality rules for documents; off by default."""
    answer_quality: AnswerQuality | None = None
    """Rules for answers of chats, preferences and KTO rows; off by default."""
    language: Language | None = None
    """Languages to keep; off by default."""
    exact_dedup: ExactDedup | None = ExactDedup()
    """Removal of exact duplicates; `null` switches it off."""
    near_dedup: NearDedup | None = None
    """Removal of near duplicates; off by default."""
    pii: Pii | None = None
    """Personal data and secrets; off by default."""
    decontaminate: Decontaminate | None = Decontaminate()
    """Removal of rows that give away an evaluation's items; `null` switches it off."""
    balance: Balance | None = None
    """Evening out of labels among the training rows; off by default."""
    order: tuple[OperationName, ...] = DEFAULT_ORDER
    """Order in which the operations run; one that is switched off may be left out."""

    @model_validator(mode="after")
    def _order_is_complete(self) -> PrepareConfig:
        missing = [n for n in DEFAULT_ORDER if n not in self.order and getattr(self, n) is not None]
        if missing:
            names = ", ".join(missing)
            raise ValueError(f"`order` leaves out {names}; add it, or switch it off with `null`")
        if len(set(self.order)) < len(self.order):
            raise ValueError("`order` names an operation twice")
        return self
