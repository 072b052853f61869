"""Where emails and IP addresses stand in a text.

Both have look-alikes that outnumber them in technical text: `git@github.com:owner/name`,
`q@k.transpose(1, 2)`, version 1.2.3.4, section 2.1.3.4. So what stands around a match decides.
"""

from __future__ import annotations

import ipaddress
import re

from posttrain.data.operations.pii_spans import Span, number_shape

# Latin letters with accents belong to names such as jörg@müller.de. Letters of other scripts do
# not: Chinese puts no space before an address, and the words before it must stay.
_LETTER = "A-Za-zÀ-ÖØ-öø-ɏ"

_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9_@])"
    rf"[{_LETTER}0-9_](?:[{_LETTER}0-9._%+'-]{{0,62}}[{_LETTER}0-9_%+-])?"
    rf"@(?:[{_LETTER}0-9](?:[{_LETTER}0-9-]{{0,61}}[{_LETTER}0-9])?\.)+"
    # A capitalised ending is the next sentence's first word, but for the few people write so.
    rf"(?:[a-z]{{2,24}}|[A-Z]{{2,24}}|xn--[a-z0-9]{{2,40}}|Com|Net|Org|Edu|Gov|Info)"
    rf"(?![{_LETTER}0-9_-])"
)
_URL_USER = re.compile(r"://[^\s/?#]*$")
_REMOTE_PATH = re.compile(r":[\w.~-]*/|:[\w.~-]+\.git\b")
_FILE_ENDING = re.compile(  # icon@2x.png; none of these is a top-level domain
    r"\.(?:avif|bmp|css|gif|html?|ico|ini|jpe?g|jsx?|json|log|pdf|png|svg|tar|toml|tsx?|txt|webp"
    r"|xml|ya?ml)$",
    re.IGNORECASE,
)


def emails(text: str) -> list[Span]:
    """Email addresses with a top-level domain, those at example.com included."""
    if "@" not in text:
        return []
    return [m.span() for m in _EMAIL.finditer(text) if _is_email(text, m)]


def _is_email(text: str, match: re.Match[str]) -> bool:
    start, end = match.span()
    if _FILE_ENDING.search(match.group()) or text.startswith("(", end):  # q@k.transpose(1, 2)
        return False
    if _REMOTE_PATH.match(text, end):  # git@github.com:owner/name.git
        return False
    return not _URL_USER.search(text, max(0, start - 100), start)  # https://user@host.org/


_DOTTED_SHAPE = re.compile(rb"\.0{1,3}\.0{1,3}\.0")
_IPV4 = re.compile(
    # Not inside a longer number or name, and not after a path, a comparison or a product's name:
    # 1.2.3.4.5, v1.2.3.4, lib-1.2.3.4, Chrome/114.0.0.0, ==1.2.3.4, ~1.2.3.4
    r"(?<![A-Za-z0-9_.~^])(?<![A-Za-z][-/])(?<![=<>~!]=)"
    r"\d{1,3}(?:\.\d{1,3}){3}"
    r"(?![A-Za-z0-9_]|\.\w|-[A-Za-z])"
)
_IPV6 = re.compile(
    # 2000::/3 is all that IANA has given out for public use.
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9_:]|\.\d)"
)
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|versions?|releases?|released|builds?|firmware|drivers?|revisions?|rev|updates?"
    r"|upgraded?|patch|sections?|chapters?|clauses?|articles?|paragraphs?|appendix|figures?|tables?"
    r"|rules?|items?|steps?|chrome|chromium|firefox|safari|edge|opera)\b|§)"
    r"(?:[\s:=.(]+(?:is|was|to|from|of|number|no)\b)*[\s:=.(\"'`*]*$",
    re.IGNORECASE,
)
_NETWORK_WORD = re.compile(
    r"\b(?:ips?|ipv[46]|address(?:es)?|addr|hosts?|hostname|ping(?:ed|ing)?|ssh|scp|telnet|dig"
    r"|traceroute|tracert|nslookup|whois|dns|nameservers?|resolvers?|gateway|subnet|netmask|proxy"
    r"|firewall|inet6?)\b",
    re.IGNORECASE,
)
_PORT_OR_PREFIX = re.compile(r":\d{2,5}\b|/(?:[89]|[12]\d|3[0-2])\b")
_CONTEXT = 40
"""Characters before an address in which a word may say what it is."""
_DIGITS_THAT_CONVINCE = 9
_GROUPS_THAT_CONVINCE = 4


def ip_addresses(text: str) -> list[Span]:
    """Public IP addresses, version 4 and 6.

    Private, loopback, documentation and other addresses that are not globally routable are no
    one's in particular and stay (IANA special-purpose registries, by the standard library's
    `ipaddress`). A dotted quad right after a word such as `version` or `section` is none. Any
    other is one if its four numbers have nine digits or more, as 19 of 20 random addresses have
    and hardly a version has; or if a word such as `IP`, `address` or `ping` stands within 40
    characters before it on the line; or if a URL's `//` stands before it, or a port or prefix
    length after it. An IPv6 address needs four written groups or such a word: `x[2000::2]` is
    a slice.
    """
    found: list[Span] = []
    if _DOTTED_SHAPE.search(number_shape(text)):
        found += [m.span() for m in _IPV4.finditer(text) if _is_ipv4(text, *m.span())]
    if _COLONS.search(text):
        for match in _IPV6.finditer(text):
            start, end = match.span()
            if text[end - 1] == ":" and text[end - 2] != ":":
                end -= 1  # the colon of a sentence
            if _is_ipv6(text, start, end):
                found.append((start, end))
    return found


def _is_ipv4(text: str, start: int, end: int) -> bool:
    try:
        address = ipaddress.IPv4Address(text[start:end])
    except ValueError:
        return False
    before = _line_before(text, start)
    if not address.is_global or address.is_multicast or _VERSION_BEFORE.search(before):
        return False
    if end - start - 3 >= _DIGITS_THAT_CONVINCE or before.endswith("//"):
        return True
    return bool(_NETWORK_WORD.search(before) or _PORT_OR_PREFIX.match(text, end))


def _is_ipv6(text: str, start: int, end: int) -> bool:
    try:
        address = ipaddress.IPv6Address(text[start:end])
    except ValueError:
        return False
    if not address.is_global:
        return False
    groups = sum(map(bool, text[start:end].split(":")))
    return groups >= _GROUPS_THAT_CONVINCE or bool(_NETWORK_WORD.search(_line_before(text, start)))


def _line_before(text: str, start: int) -> str:
    return text[max(0, start - _CONTEXT) : start].rpartition("\n")[2]
