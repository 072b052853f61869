"""Where keys, tokens and private keys stand in a text.

Only forms that carry their issuer's mark are looked for. Random-looking strings without one are
commit ids, digests and UUIDs far more often than secrets.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from posttrain.data.operations.pii_spans import Span, has_token


@dataclass(frozen=True)
class _Form:
    marks: tuple[str, ...]
    """A text without any of these holds no such secret: far cheaper than the pattern."""
    pattern: re.Pattern[str]
    check: Callable[[str], bool] | None = None
    """Whether what was found is one, and no stand-in; by default it needs six characters."""
    group: int = 0
    """Group of the pattern that is the secret."""


_SHORTEST_TOKEN = 20
"""Characters of the shortest key looked for, an AWS key id; only passwords in URLs are shorter."""


def secrets(text: str) -> list[Span]:
    """Keys and tokens of known services, passwords in URLs, JSON Web Tokens, private keys."""
    found: list[Span] = []
    if "://" not in text and not has_token(text, _SHORTEST_TOKEN):
        return found
    for form in _forms():
        for mark in form.marks:
            if mark in text:
                found += _found_of(form, text)
                break
    return found


def _found_of(form: _Form, text: str) -> list[Span]:
    check = form.check or _varied
    return [
        match.span(form.group)
        for match in form.pattern.finditer(text)
        if check(match.group(form.group))
    ]


def _varied(secret: str) -> bool:
    return len(set(secret[4:])) >= 6  # ghp_xxxxxxxx is a stand-in


@cache
def _forms() -> tuple[_Form, ...]:
    """Forms of secrets, detect-secrets' patterns where they take a secret whole."""
    from detect_secrets.plugins.aws import AWSKeyDetector
    from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
    from detect_secrets.plugins.basic_auth import BasicAuthDetector
    from detect_secrets.plugins.discord import DiscordBotTokenDetector
    from detect_secrets.plugins.github_token import GitHubTokenDetector
    from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
    from detect_secrets.plugins.mailchimp import MailchimpDetector
    from detect_secrets.plugins.pypi_token import PypiTokenDetector
    from detect_secrets.plugins.sendgrid import SendGridDetector
    from detect_secrets.plugins.slack import SlackDetector
    from detect_secrets.plugins.square_oauth import SquareOAuthDetector
    from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
    from detect_secrets.plugins.twilio import TwilioKeyDetector

    aws_id, aws_secret = AWSKeyDetector.denylist
    (password,) = BasicAuthDetector.denylist
    bounded = [
        (("AKIA", "ASIA", "ABIA", "ACCA", "A3T"), [aws_id]),
        (("AccountKey=",), AzureStorageKeyDetector.denylist),
        ((".",), DiscordBotTokenDetector.denylist),
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), GitHubTokenDetector.denylist),
        (("gl", "GR1348941"), GitLabTokenDetector.denylist),
        (("-us",), MailchimpDetector.denylist),
        (("pypi-Ag",), PypiTokenDetector.denylist),
        (("SG.",), SendGridDetector.denylist),
        (("xox", "hooks.slack.com"), SlackDetector.denylist),
        (("sq0csp-",), SquareOAuthDetector.denylist),
        (("AC", "SK"), TwilioKeyDetector.denylist),
    ]
    return (
        *(_Form(marks, _bounded(p)) for marks, patterns in bounded for p in patterns),
        # In the address of a call the token stands right after the word `bot`.
        *(_Form((":AA",), p) for p in TelegramBotTokenDetector.denylist),
        _Form(("aws", "AWS", "Aws"), aws_secret, group=1),
        _Form(("://",), password, check=_is_password, group=1),
        *_OWN_FORMS,
    )


def _bounded(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """The pattern where it is a word of its own, and no piece of a longer one or of base64 text."""
    return re.compile(rf"(?<![A-Za-z0-9_+])(?:{pattern.pattern})(?![A-Za-z0-9_])", pattern.flags)


_STAND_INS = frozenset({"pass", "passwd", "password", "pwd", "secret", "token", "key"})


def _is_password(password: str) -> bool:
    return (
        password.lower() not in _STAND_INS
        and not set("<>{}%") & set(password)  # a placeholder, or another word's percent code
        and len(set(password)) > 2  # xxx, ***
    )


def _has_letter_and_digit(key: str) -> bool:
    return _varied(key) and any(map(str.isdigit, key[3:])) and any(map(str.isalpha, key[3:]))


def _is_web_token(token: str) -> bool:
    """Whether the header decodes to a JSON object (RFC 7519, section 3)."""
    header = token.partition(".")[0]
    try:
        decoded = base64.urlsafe_b64decode(header + "=" * (-len(header) % 4))
    except (ValueError, binascii.Error):
        return False
    return decoded.startswith(b"{") and decoded.rstrip().endswith(b"}")


_BASE64_LINE = re.compile(r"[A-Za-z0-9+/=]{40}")


def _is_private_key(block: str) -> bool:
    return bool(_BASE64_LINE.search(block))  # none in `-----BEGIN PRIVATE KEY----- ...`


_OWN_FORMS = (
    # A whole key, or a header and the lines after it where the end is cut off. detect-secrets
    # marks the header alone.
    _Form(
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:(?!-----BEGIN )[\s\S]){0,20000}?"
            r"-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:\s|\\[nr]|[A-Za-z0-9+/=]){40,20000})"
        ),
        check=_is_private_key,
    ),
    # detect-secrets leaves the signature standing.
    _Form(
        ("eyJ",),
        re.compile(
            r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,2000}"
            r"\.[A-Za-z0-9_-]{10,10000}\.[A-Za-z0-9_-]{16,2000}(?![A-Za-z0-9_])"
        ),
        check=_is_web_token,
    ),
    # Stripe, whose newer keys are longer than detect-secrets' pattern.
    _Form(
        ("k_live_",),
        re.compile(r"(?<![A-Za-z0-9_])[rs]k_live_[A-Za-z0-9]{24,200}(?![A-Za-z0-9_])"),
    ),
    # OpenAI's project keys, Anthropic, and the providers that took over OpenAI's form.
    _Form(
        ("sk-",),
        re.compile(
            r"(?<![A-Za-z0-9_-])sk-(?:"
            r"(?:(?:proj|svcacct|admin|None)-)?[A-Za-z0-9_-]{20,120}T3BlbkFJ[A-Za-z0-9_-]{20,120}"
            r"|ant-[a-z]{3,5}\d\d-[A-Za-z0-9_-]{80,120}"
            r"|(?:or-v1-)?[A-Za-z0-9]{32,100}"
            r")(?![A-Za-z0-9_-])"
        ),
        check=_has_letter_and_digit,
    ),
    _Form(
        ("github_pat_",),
        re.compile(r"(?<![A-Za-z0-9_])github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}(?![A-Za-z0-9_])"),
    ),
    _Form(  # Hugging Face
        ("hf_",),
        re.compile(r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{34,40}(?![A-Za-z0-9_])"),
        check=_has_letter_and_digit,
    ),
    _Form(  # Google
        ("AIza",),
        re.compile(r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    ),
    _Form(  # npm; detect-secrets takes the rest of the line with it
        ("npm_",),
        re.compile(r"(?<![A-Za-z0-9_])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9_])"),
        check=_has_letter_and_digit,
    ),
)
