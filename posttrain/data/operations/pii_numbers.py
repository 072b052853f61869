"""Where phone numbers, payment cards and bank accounts stand in a text."""

from __future__ import annotations

import re

from posttrain.data.operations.pii_spans import Span, has_digits, number_shape

_BETWEEN = r"[ \t().\-/\u00a0\u2010-\u2014]{0,3}"
_INTERNATIONAL = re.compile(rf"(?<![A-Za-z0-9_+\uff0b.,^])[+\uff0b]\(?\d(?:{_BETWEEN}\d){{6,19}}")
_NATIONAL = re.compile(rf"(?<![A-Za-z0-9_+\uff0b.#/-])(?<!\d,)\(?\d(?:{_BETWEEN}\d){{6,14}}(?!\d)")
_GOES_ON = re.compile(r"[A-Wa-wY-Zy-z_%]|[./:-]?\d|,\d{3}(?!\d)")
_PHONE_WORD = re.compile(
    r"(?:\b(?:phones?|tel|telephone|call(?:ing|ed)?|dial|fax|mobile|cell|cellphone|handy|sms"
    r"|whatsapp|hotline|helpline|contact|reach|ring)\b|[☎📞📱])[^\d\n]{0,20}$",
    re.IGNORECASE,
)
_NUMBER_WORD = re.compile(
    r"(?:\b(?:isbn(?:-?1[03])?|issn|doi|ean|upc|orders?|invoice|serial|part|model|id|ref|reference"
    r"|account|case|ticket|tracking|sku|no|nr)\b|#)[\s.:#=]*(?:number|no|nr)?[\s.:#=]*$",
    re.IGNORECASE,
)
_NOT_A_PHONE = re.compile(
    # Years, dates, decimals, differences.
    r"\(?(?:1\d|20)\d\d ?[-/\u2010-\u2014] ?(?:1\d|20)\d\d\)?"
    r"|\d{1,2}([./-])\d{1,2}\1\d{2,4}|\d{4}([./-])\d{1,2}\2\d{1,2}|\d+\.\d+|[1-9].* [-/] .*"
)
_AREA_CODE = re.compile(r"\(\d{2,5}\) ?\d")
_IN_A_SUM = re.compile(r"\d\s*$")
_GAP = re.compile(r"(?<=\d)\D+(?=\d)")
_THOUSANDS = re.compile(r"[+\uff0b]?\d{1,3}(?:([ .\u00a0])\d{3})(?:\1\d{3})+")
_FULL_WIDTH_PLUS = "\uff0b"
_FEWEST_DIGITS = 7
_CONTEXT = 40
"""Characters before a number in which a word may say what it is."""
_EXTENSION = 24
"""Characters after a number in which its extension may stand, such as `ext. 123`."""


def phones(text: str, region: str | None = None) -> list[Span]:
    """Phone numbers, judged by Google's libphonenumber (`phonenumbers`).

    A number with a leading + is one if it is valid in its country, or has at least a possible
    length and is written in three groups or after a word such as `call`: examples with 555.
    With a region, national numbers are found as well: valid ones that are written in groups or
    after such a word, and possible ones with the area code in brackets or after such a word. A
    valid number without groups or such a word may be an order's number as well, and stays.

    Args:
        text: Any text.
        region: ISO 3166 country code, or None for numbers with a leading + only.
    """
    found: list[Span] = []
    if "+" in text or _FULL_WIDTH_PLUS in text:
        for match in _INTERNATIONAL.finditer(text):
            found += _phones_at(text, match, None)
    if region is not None and has_digits(text, _FEWEST_DIGITS):
        for match in _NATIONAL.finditer(text):
            found += _phones_at(text, match, region)
    return found


def _phones_at(text: str, candidate: re.Match[str], region: str | None) -> list[Span]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    start, end = candidate.span()
    before = text[max(0, start - _CONTEXT) : start].rpartition("\n")[2]
    says_so = bool(_PHONE_WORD.search(before))
    accept = _is_national if region else _is_world
    if not says_so and (_NUMBER_WORD if region else _IN_A_SUM).search(before):
        return []
    if region and not says_so and not _GAP.search(candidate.group()):
        return []
    # The matcher takes a tenth of a millisecond and more: it sees the candidate, not the page.
    window = text[start : end + _EXTENSION]
    hopeful = region is None or says_so or "(" in window
    for leniency in (Leniency.VALID, Leniency.POSSIBLE)[: 1 + hopeful]:
        found: list[Span] = []
        for match in PhoneNumberMatcher(window, region, leniency=leniency):
            alone = match.raw_string.startswith("(") and ")" not in match.raw_string
            begin, stop = start + match.start + alone, start + match.end
            raw = text[begin:stop]
            fits = begin < end and not _GOES_ON.match(text, stop)
            if fits and accept(raw, says_so, leniency == Leniency.VALID):
                found.append((begin, stop))
        if found:
            return found
    return []


def _is_world(raw: str, says_so: bool, valid: bool) -> bool:
    if says_so or (valid and " - " not in raw):
        return True
    return len(_GAP.findall(raw)) > 1 and not _THOUSANDS.fullmatch(raw) and " - " not in raw


def _is_national(raw: str, says_so: bool, valid: bool) -> bool:
    if _NOT_A_PHONE.fullmatch(raw):
        return False
    return says_so or bool(_GAP.search(raw) if valid else _AREA_CODE.match(raw))


_CARD = re.compile(
    # Whole or in the printed groups. Not part of a longer number, a decimal, a name or a path; a
    # date of expiry or a security code may follow.
    r"(?<![A-Za-z0-9_/#.-])(?<!\d{4} )(?<!\b0,)"
    r"(?:\d{14,16}|\d{19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5})"
    r"(?![A-Za-z0-9_]|[.-]\d| \d{4}(?!\d))"
)
_ISSUERS = (
    # First digits and length, ISO/IEC 7812 as the networks publish them: Visa, Mastercard,
    # American Express, Discover, Diners Club, JCB, UnionPay.
    re.compile(r"4(?:\d{15}|\d{18})"),
    re.compile(r"(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"),
    re.compile(r"3[47]\d{13}"),
    re.compile(r"6(?:011\d\d|5\d{4}|4[4-9]\d{3})\d{10}"),
    re.compile(r"3(?:0[0-5]|[689]\d)\d{11}"),
    re.compile(r"35(?:2[89]|[3-8]\d)\d{12}"),
    re.compile(r"62\d{14}(?:\d{3})?"),
)
_FEWEST_CARD_DIGITS = 14


def credit_cards(text: str) -> list[Span]:
    """Payment card numbers: an issuer's first digits and length, and a correct Luhn digit."""
    if not has_digits(text, _FEWEST_CARD_DIGITS):
        return []
    return [m.span() for m in _CARD.finditer(text) if _is_card(m.group())]


def _is_card(number: str) -> bool:
    from stdnum import luhn

    digits = number.replace(" ", "").replace("-", "")
    return any(issuer.fullmatch(digits) for issuer in _ISSUERS) and luhn.is_valid(digits)


_IBAN = re.compile(
    r"(?<![A-Za-z0-9_])[A-Z]{2}\d{2}(?:[ \u00a0]?[A-Z0-9]{4}){2,7}(?:[ \u00a0]?[A-Z0-9]{1,3})?"
)
_GROUP = re.compile(r"[ \u00a0]")


def ibans(text: str) -> list[Span]:
    """Bank account numbers with a country's form and right check digits, mod 97 (ISO 13616)."""
    found: list[Span] = []
    if b"AA00" not in number_shape(text):
        return found
    for match in _IBAN.finditer(text):
        start, end = match.span()
        # The next word may look like one more group: `BE68 5390 0754 7034 THAT`.
        breaks = [start + gap.start() for gap in _GROUP.finditer(match.group())]
        for stop in [end, *reversed(breaks)]:
            if _is_iban(text, start, stop):
                found.append((start, stop))
                break
    return found


def _is_iban(text: str, start: int, end: int) -> bool:
    from stdnum import iban

    # Not the countries' own rules: some reject banks that are too new for the library's list.
    number = text[start:end]
    return not text[end : end + 1].isalnum() and iban.is_valid(number, check_country=False)
