"""Drops rows whose answer is not worth learning: empty, refused, cut off, echoed or looping.

Judged are only the turns that training teaches the model to write: every assistant turn of a
chat, `chosen` of a preference, the completion of a KTO row that is marked as wanted. A rejected
or unwanted answer may be bad in any way; being bad is what it is there for.

The rules are ours. They look at form alone and are made to miss a bad answer rather than to drop a
good one: a short answer, a list, a poem, code and a table are never called cut off.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions, Drop
from posttrain.data.rows import Chat, KtoExample, Messages, Preference, Row
from posttrain.data.text import normalise
from posttrain.errors import DataError
from posttrain.recipe.prepare import AnswerQuality


class AnswerQualityFilter:
    """Drops rows by their answers, with the reasons of `AnswerQuality`.

    Of preferences it also counts in how many of those that stay `chosen` or `rejected` has more
    words (`chosen longer`, `rejected longer`, `equal length`): a reward model can learn length
    alone (Singhal et al. 2023, arXiv:2310.03716).
    """

    name: ClassVar[str] = "answer_quality"

    def __init__(self, config: AnswerQuality) -> None:
        self.config = config

    def apply(self, batch: RowBatch) -> Decisions:
        """Judge the answers of a batch.

        Raises:
            DataError: The rows are documents, which have no answers.
        """
        if batch.family == "documents":
            raise DataError(
                "`answer_quality` judges answers, and documents have none; "
                "write `document_quality` for this dataset"
            )
        decisions = Decisions()
        for position, row in enumerate(batch.rows):
            drop = self._judge(row)
            if drop:
                decisions.drops[position] = drop
            elif isinstance(row, Preference):
                decisions.found[_longer(row)] += 1
        return decisions

    def _judge(self, row: Row) -> Drop | None:
        """Why a row is dropped: the first of its answers that breaks a rule."""
        for before, answer in _taught(row):
            drop = self._judge_answer(before, answer)
            if drop:
                return drop
        if self.config.echo and isinstance(row, Preference) and _same(row.chosen, row.rejected):
            return Drop("same answers", "chosen and rejected differ in nothing but white space")
        return None

    def _judge_answer(self, before: Messages, answer: str) -> Drop | None:
        config = self.config
        if config.empty and is_empty(answer, before):
            return Drop("empty answer", _beginning(answer))
        words = answer.split()
        if config.echo and _echoes(answer, len(words), before):
            return Drop("answer repeats question", _beginning(answer))
        refusal = refusal_in(answer, _question(before)) if config.refusals else None
        if refusal:
            return Drop("refusal", refusal)
        cut = cut_off(answer) if config.truncated else None
        if cut:
            return Drop("truncated answer", cut)
        if config.max_repetition is not None:
            share = repeated_share(words if answer.isascii() else _words(answer))
            if share > config.max_repetition:
                limit = config.max_repetition
                return Drop("repetitive answer", f"{share:.0%} repeated; at most {limit:.0%}")
        return None


def _taught(row: Row) -> Iterator[tuple[Messages, str]]:
    """The answers that training teaches, each with the turns before it."""
    before: Messages = ()
    replies: Messages = ()
    match row:
        case Chat():
            replies = row.messages
        case Preference():
            before, replies = row.prompt, row.chosen
        case KtoExample():
            before, replies = row.prompt, row.completion if row.label else ()
    for index, message in enumerate(replies):
        if message.role == "assistant":
            yield before + replies[:index], message.content


def _question(before: Messages) -> str:
    """The last user turn."""
    return next((turn.content for turn in reversed(before) if turn.role == "user"), "")


def _beginning(text: str) -> str:
    """The first characters, for a ledger line."""
    return " ".join(text[:80].split())


# --- empty ------------------------------------------------------------------------------------

_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff\ufffd\"'`]+")
_FILLER = re.compile(r"[.…·]*|[-‐‑‒–—―]*|_*|\?\?+")  # noqa: RUF001
_PLACEHOLDERS = frozenset(
    {"n/a", "nan", "tbd", "todo", "<nooutput>", "nooutput", "<noinput>", "noinput", "[blank]"}
)


def is_empty(answer: str, before: Messages = ()) -> bool:
    """Whether an answer says nothing.

    Empty are: white space and quotes, a run of dots, of dashes or of underscores, several
    question marks (what a lost encoding leaves), and a placeholder such as `N/A` or `nan` that
    nothing before it mentions. Not empty are other symbols without a letter or digit (an emoji,
    `+`, `✓`, `[]`, a single `?`), dots mixed with dashes (Morse code) and words such as `None`:
    all of them answer questions that people ask.
    """
    if len(answer) > 200 and any(map(str.isalnum, answer[:200])):
        return False
    bare = _INVISIBLE.sub("", answer)
    if _FILLER.fullmatch(bare):
        return True
    placeholder = bare.lower().rstrip(".")
    if placeholder not in _PLACEHOLDERS:
        return False
    return not any(placeholder in message.content.lower() for message in before)


# --- echo -------------------------------------------------------------------------------------

_SHORTEST_ECHO = 4
"""Words. A greeting may be answered by the same greeting."""


def _echoes(answer: str, words: int, before: Messages) -> bool:
    """Whether an answer is the last user turn again, but for case and white space."""
    if words < _SHORTEST_ECHO:
        return False
    question = _question(before)
    if len(question.split()) != words:
        return False
    return normalise(question, ignore_case=True) == normalise(answer, ignore_case=True)


def _same(first: Messages, second: Messages) -> bool:
    """Whether two continuations say the same, but for white space.

    Case counts: a pair may be there to teach it.
    """
    return len(first) == len(second) and all(
        one.role == other.role and normalise(one.content) == normalise(other.content)
        for one, other in zip(first, second, strict=True)
    )


def _longer(row: Preference) -> str:
    chosen, rejected = (
        sum(len(turn.content.split()) for turn in side if turn.role == "assistant")
        for side in (row.chosen, row.rejected)
    )
    if chosen == rejected:
        return "equal length"
    return "chosen longer" if chosen > rejected else "rejected longer"


# --- refusals ---------------------------------------------------------------------------------

_HEAD = 400
"""Characters of an answer in which its first two sentences are looked for."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")  # noqa: RUF001
_APOSTROPHES = str.maketrans("’ʼ`´", "''''")  # noqa: RUF001
_LETTER = re.compile(r"\W*(?:dear|subject|to:|from:)\b")

_CANNOT = (
    r"\bi(?: (?:simply|just|really|currently|also))?"
    r"(?: can ?not| can't| could ?not| couldn't| will not| won't|(?: am|'m) (?:not able|unable) to"
    r"|(?: am|'m) not (?:comfortable|programmed|designed|capable of)(?: to)?| must decline to)"
)
_REFUSAL = re.compile(
    _CANNOT + r" (?:directly |ethically |in good conscience )?(?:"
    r"(?:assist|help)(?: you)? (?:with|in) (?:that|this|your request|the request|such|any)\b"
    r"|(?:fulfil?l|comply|complete|engage|do|answer|respond to|proceed)(?: with| in)?"
    r" (?:that|this|your (?:request|question)|the request|such)\b"
    r"|(?:provid|generat|creat|writ|produc|giv|offer|shar|discuss|support|promot|endors|condon"
    r"|encourag|facilitat|participat|engag|recommend|retriev|access|brows|draw|display|view)\w*\b"
    r"[^.!?]{0,60}?\b(?:that (?:information|content|kind)|such|personal (?:details|information)"
    r"|(?:medical|legal|financial) advice|content|images?|graphics?|graphical|visual\w*|opinions?"
    r"|illegal|harmful|unethical|violen\w+|explicit|hateful|dangerous|discriminat\w+|offensive"
    r"|real-time|external|internet|web|up-to-date)\b)"
)
_NOT = r"[^.!?]*(?:\bnot\b|n't\b|\bcannot\b|\bunable\b|\bincapable\b|\black\b|\bno\b)"
_BOILERPLATE = re.compile(
    r"\bas an? (?:ai |artificial intelligence |large )?language model\b"
    r"|\bi(?:'m| am) (?:just|only) an ai\b"
    r"|\b(?:as|i am|i'm) an? (?:ai|artificial intelligence|(?:ai |large )?language model)\b"
    rf"{_NOT}"
    r"|\bi (?:don't|do not) have (?:access to (?:real-time|external|current|up-to-date|live)"
    r"|personal (?:opinions|preferences|feelings|experiences|beliefs))"
    r"|\bals ki-(?:sprach)?modell\b|\ben tant que modèle de langage\b"
    r"|\bcomo modelo de (?:lenguaje|linguagem)\b|\bcome modello linguistico\b"
    r"|\bкак языковая модель\b|作为(?:一个|一名)?(?:人工智能|ai|语言模型)"  # noqa: RUF001
)
_ABOUT_ITSELF = re.compile(
    r"\b(?:who|what) (?:exactly )?are you\b|\bare you (?:an?|really|human|just)\b|\byourself\b"
    r"|\byour name\b|\blanguage model\b",
    re.IGNORECASE,
)


def refusal_in(answer: str, question: str = "") -> str | None:
    """The refusal or boilerplate in the first two sentences of an answer, or None.

    A refusal is "I cannot" with what assistants decline ("assist with that", "provide medical
    advice"), so that "I can't come tonight" and "I cannot determine the angle from two sides"
    stay. Boilerplate is "As an AI language model", or being an AI as an excuse ("As an AI, I do
    not have"); it stays where the question is about the assistant itself. Quotations and letters
    are not looked into. Refusals are known in English only, boilerplate in eight languages.
    """
    head = answer[:_HEAD].translate(_APOSTROPHES).lower()
    ends = [match.end() for match in _SENTENCE_END.finditer(head)]
    head = re.split('["“«]', head[: ends[1]] if len(ends) > 1 else head, maxsplit=1)[0]
    if _LETTER.match(head):
        return None
    found = _REFUSAL.search(head)
    if found is None:
        found = _BOILERPLATE.search(head)
        if found and _ABOUT_ITSELF.search(question):
            return None
    return _beginning(found.group()) if found else None


# --- truncation -------------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
_OPEN_ENDINGS = frozenset(",([{-‐–—")  # noqa: RUF001
_CONNECTING = "the an and or but nor because although whereas whether und oder weil"
_DANGLING = frozenset(_CONNECTING.split())
"""Words that no sentence ends with."""
_NOT_PROSE = re.compile(r"[{}<>=;|\\_`$#@^~]|://")
_ITEM = re.compile(r"^\s*(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z])[.)])\s")  # noqa: RUF001
_SENTENCE_BREAK = re.compile(r"[.!?][\"')\]”’]*\s+(?=[^\W\d_a-z])")  # noqa: RUF001
_SHORTEST_PROSE = 40
"""Words of the whole answer from which a missing full stop means anything."""
_SHORTEST_LAST_LINE = 8
"""Words. Shorter last lines are signatures, sign-offs, headings, verses and list items."""


def cut_off(answer: str) -> str | None:
    """What shows that an answer stops in the middle, or None.

    - A code block that is opened and never closed.
    - A last line of at least 8 words that ends in a comma, an opening bracket, a dash, or a word
      such as `the` or `and`.
    - In an answer of at least 40 words: a last line of at least 8 words that ends in a letter,
      where its author ends sentences with a full stop. That is known from an earlier sentence of
      the same line, or from three sentences in the other items of its list, or, of a line outside
      lists, in the other lines of at least 8 words, if they all end so.

    A line with signs of code, tables, formulas, addresses or tags is never called cut off. Texts
    in scripts without spaces between words are seen through their code blocks alone.
    """
    text = answer.rstrip()
    if ("```" in text or "~~~" in text) and _open_fence(text):
        return "code block never closed"
    end = text[-1:]
    if not (end.isalpha() or end in _OPEN_ENDINGS):
        return None
    *lines, last = filter(str.strip, text.splitlines())
    words = last.split()
    if len(words) < _SHORTEST_LAST_LINE or _NOT_PROSE.search(last):
        return None
    if end in _OPEN_ENDINGS or words[-1] in _DANGLING:
        return f"ends with `{words[-1][-40:]}`"
    if len(text.split()) < _SHORTEST_PROSE:
        return None
    if _SENTENCE_BREAK.search(_ITEM.sub("", last, count=1)) or _others_end(lines, last):
        return f"no end of sentence after `{' '.join(words[-5:])}`"
    return None


def _others_end(lines: Sequence[str], last: str) -> bool:
    """Whether the lines that the last one is like all end like sentences, at least three."""
    if _ITEM.match(last):
        others = list(itertools.takewhile(_ITEM.match, reversed(lines)))
    else:
        others = [line for line in lines if len(line.split()) >= _SHORTEST_LAST_LINE]
    sentences = sum(1 + len(_SENTENCE_BREAK.findall(line)) for line in others)
    return sentences >= 3 and all(line.rstrip()[-1] in ".!?…" for line in others)


def _open_fence(text: str) -> bool:
    """Whether a fenced code block is open at the end (CommonMark 0.31, section 4.5).

    More is asked for than there: an odd number of fences, since answers nest blocks in blocks of
    as many backticks, and text after the last one, since a stray fence at the end cuts nothing off.
    """
    fence = ""
    count = end = 0
    for match in _FENCE.finditer(text):
        marks, info = match.groups()
        count, end = count + 1, match.end()
        if not fence:
            fence = marks
        elif marks.startswith(fence) and not info.strip():
            fence = ""
    return bool(fence) and count % 2 == 1 and end < len(text)


# --- repetition -------------------------------------------------------------------------------

_NGRAM = 5
_SHORTEST_LOOP = 20
"""Words. Shorter answers repeat themselves on purpose."""
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_CJK = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")


def _words(text: str) -> list[str]:
    """Words between white space; of Chinese and Japanese, which write none, the characters."""
    return _CJK.findall(text)


def repeated_share(words: Sequence[str]) -> float:
    """Share of words inside a 5-gram that occurred before; 0 below 20 words.

    The count of duplicate n-grams of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1), over
    words in place of characters, every word once. A first occurrence does not count: it says
    something.
    """
    if len(words) < _SHORTEST_LOOP:
        return 0.0
    grams = list(zip(*(words[start:] for start in range(_NGRAM)), strict=False))
    if len(set(grams)) == len(grams):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for start, gram in enumerate(grams):
        if gram in seen:
            repeated[start : start + _NGRAM] = b"\1" * _NGRAM
        seen.add(gram)
    return sum(repeated) / len(words)
