"""Personal data and secrets: what is found, what is not, and what becomes of the rows."""

from __future__ import annotations

import json
import pickle
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.data.batch import RowBatch
from posttrain.data.operations.base import Decisions
from posttrain.data.operations.pii import PLACEHOLDERS, PiiFilter, find, finders_of, scrub
from posttrain.data.rows import Chat, Document, KtoExample, Message, Preference, Row
from posttrain.recipe.base import RowFamily
from posttrain.recipe.prepare import Pii

ALNUM = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY" * 5


def _found(text: str, **settings_: Any) -> list[tuple[str, str]]:
    """Kind and text of each finding."""
    findings = find(text, finders_of(Pii(**settings_)))
    return [(kind, text[start:end]) for start, end, kind in findings]


def _only(kind: str, text: str, **settings_: Any) -> list[str]:
    return [what for found, what in _found(text, **settings_) if found == kind]


def _document(text: str, number: int = 1) -> Document:
    return Document(
        id=f"{number:016x}", file="f.txt", row=number, text=text, category="c", score=0.5
    )


def _apply(family: RowFamily, rows: list[Row], **settings_: Any) -> Decisions:
    return PiiFilter(Pii(**settings_)).apply(RowBatch.of(family, rows))


# ------------------------------------------------------------------------------------- emails


@pytest.mark.parametrize(
    ("text", "email"),
    [
        ("Write to anna.lee+news@mail.example.co.uk.", "anna.lee+news@mail.example.co.uk"),
        ("<bob@example.com>", "bob@example.com"),
        ("'bob@example.com'", "bob@example.com"),
        ("mailto:bob@example.com?subject=Hi", "bob@example.com"),
        ("https://shop.example/?email=bob@example.com&x=1", "bob@example.com"),
        ("O'NEIL@EXAMPLE.ORG", "O'NEIL@EXAMPLE.ORG"),
        ("Bob@Gmail.Com", "Bob@Gmail.Com"),
        ("jörg@müller.de", "jörg@müller.de"),
        ("请联系bob@example.com谢谢", "bob@example.com"),
        ("Ask bob@example.com.Then wait.", "bob@example.com"),
        ("bob@xn--mller-kva.de", "bob@xn--mller-kva.de"),
        ("a@b.io,c", "a@b.io"),
        ("bob@example.photography", "bob@example.photography"),
    ],
)
def test_an_email_is_found_whole_and_nothing_around_it(text: str, email: str) -> None:
    assert _found(text) == [("email", email)]


@pytest.mark.parametrize(
    "text",
    [
        "@app.route('/users')\ndef users(): ...",
        "@pytest.mark.parametrize",
        "root@localhost:~$ ls",
        "git clone git@github.com:owner/name.git",
        "git clone git@example.org:name.git",
        "ssh://git@github.com/owner/name",
        "https://user@host.example.org/path",
        "lodash@4.17.21 and @types/node@18.0.0",
        "icon@2x.png",
        "scores = q@k.transpose(-2, -1)",
        "A@B.T",
        "follow @name.surname on Mastodon: @ann@fosstodon.org",
        "12345@N00",
        "x @ y.com",
        "uses: actions/checkout@v4.2",
        f"{'a' * 90}@example.com",
    ],
)
def test_what_only_looks_like_an_email_stays(text: str) -> None:
    assert _only("email", text) == []


# --------------------------------------------------------------------------------------- IPs


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("The client 93.184.216.34 asked twice.", "93.184.216.34"),
        ("from IP 8.8.8.8.", "8.8.8.8"),
        ("Its IP address is 5.9.1.2, he said", "5.9.1.2"),
        ("ping 1.1.1.1", "1.1.1.1"),
        ("http://5.9.1.2/index.html", "5.9.1.2"),
        ("connect to 5.9.1.2:8080", "5.9.1.2"),
        ("block 5.9.1.0/24", "5.9.1.0"),
        ("地址93.184.216.34登录", "93.184.216.34"),
        ("update: the attack came from 93.184.216.34", "93.184.216.34"),
        ("Resolver 2001:4860:4860::8888: fast", "2001:4860:4860::8888"),
        ("[2a00:1450:4001:82b::200e]:443", "2a00:1450:4001:82b::200e"),
        ("IPv6 2606:4700::1111", "2606:4700::1111"),
    ],
)
def test_a_public_address_is_found(text: str, address: str) -> None:
    assert _found(text) == [("ip_address", address)]


@pytest.mark.parametrize(
    "text",
    [
        "Upgrade to version 1.2.3.4 now.",
        "Version: 125.125.125.125",
        "versions 1.2.3.4 and 1.2.3.5",
        "v10.0.0.1",
        "v125.125.125.125",
        "Firefox 1.5.0.7 fixed it",
        "see 12.34.56.78",
        "Mozilla/5.0 Chrome/114.0.0.0 Safari/537.36",
        "Chrome/114.112.110.100",
        "see section 1.2.3.4",
        "1.2.3.4 Scope of the agreement",
        "pip install pkg==125.125.125.125",
        'npm "pkg": "^125.125.125.125"',
        "lib-125.125.125.125.tar.gz",
        "OID 1.3.6.1.4.1.311",
        "125.125.125.125.125",
        "93.184.216.340",
        "93.184.216.034",
        "93.184.216.34beta",
        "firewall rule 1.2.3.4",
        # No one's in particular: private, loopback, documentation, multicast.
        "The router's IP is 192.168.100.200.",
        "ping 127.0.0.1",
        "IP 10.120.130.140",
        "IP 203.0.113.195 and 198.51.100.178",
        "IP 224.0.0.251",
        "IPv6 ::1, fe80::1ff:fe23:4567:890a and 2001:db8:85a3::8a2e:370:7334",
        # Colons.
        "at 12:30:45",
        "MAC 00:1b:44:11:3a:b7",
        "std::vector<int>::iterator",
        "x[2000::2]",
        "2023:10:12 13:14:15",
        "dead::beef:cafe:1:2",
    ],
)
def test_versions_sections_and_addresses_that_are_nobodys_stay(text: str) -> None:
    assert _found(text) == []


# ------------------------------------------------------------------------------------ phones


@pytest.mark.parametrize(
    ("text", "phone"),
    [
        ("Call +1 415-555-2671.", "+1 415-555-2671"),
        ("+442079460958", "+442079460958"),
        ("Tel. +49 (0)30 901820", "+49 (0)30 901820"),
        ("(+33 1 42 68 53 00)", "+33 1 42 68 53 00"),
        ("tel:+14155552671", "+14155552671"),
        ("+1 (555) 123-4567", "+1 (555) 123-4567"),
        ("\uff0b81 3-1234-5678", "\uff0b81 3-1234-5678"),
    ],
)
def test_a_number_with_a_plus_is_found_without_a_region(text: str, phone: str) -> None:
    assert _found(text) == [("phone", phone)]


@pytest.mark.parametrize(
    ("text", "region", "phone"),
    [
        ("Ring (415) 555-2671 today", "US", "(415) 555-2671"),
        ("or 951-704-3374.", "US", "951-704-3374"),
        ("fax 9517043374", "US", "9517043374"),
        ("(555) 123-4567", "US", "(555) 123-4567"),
        ("the centre (1-800-222-1222) helps", "US", "1-800-222-1222"),
        ("020 7946 0958", "GB", "020 7946 0958"),
        ("Tel.: 030 901820", "DE", "030 901820"),
        ("01 42 68 53 00", "FR", "01 42 68 53 00"),
    ],
)
def test_a_national_number_is_found_where_its_region_is_given(
    text: str, region: str, phone: str
) -> None:
    assert _found(text) == []
    assert _found(text, phone_region=region) == [("phone", phone)]


@pytest.mark.parametrize("region", [None, "US", "GB", "DE"])
@pytest.mark.parametrize(
    "text",
    [
        "Order 4155552671 was shipped.",
        "order no. 415-555-2671",
        "ISBN 978-0-306-40615-7",
        "ISBN: 0-306-40615-2",
        "#4155552671",
        "on 2023-10-12 and 12.10.2023",
        "Beethoven (1770–1827)",  # noqa: RUF001
        "the 2014-2018 telecasts",
        "0.9235687435",
        "pi is 3.14159265358979",
        "9778474 / 743",
        "(223905 - 1858) / 1387",
        "4600 - 1286 + 4983 + 1010 - 3622",
        "3600000000000 + 62426244000",
        "3600 +62426244000",
        "a profit of +49 500 000 000",
        "+1234",
        "C++11 2023 1234567",
        "1,234,567,890",
        "https://example.org/4155552671/415-555-2671",
        "550e8400-e29b-41d4-a716-446655440000",
        "timestamp 1690000000",
    ],
)
def test_other_numbers_are_no_phone_numbers(text: str, region: str | None) -> None:
    assert _only("phone", text, phone_region=region) == []


# --------------------------------------------------------------------------- cards and IBANs


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("card 5500-0000-0000-0004, thanks", "5500-0000-0000-0004"),
        ("2223003122003222", "2223003122003222"),
        ("Amex 3782 822463 10005 12/27 123", "3782 822463 10005"),
        ("4111 1111 1111 1111 12/27 123", "4111 1111 1111 1111"),
        ("4111111111111111,123", "4111111111111111"),
        ("6011111111111117.", "6011111111111117"),
    ],
)
def test_a_card_number_is_found(text: str, card: str) -> None:
    assert _found(text) == [("credit_card", card)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # wrong check digit
        "9999999999999995",  # right check digit, no issuer
        "94111111111111111",  # part of a longer number
        "41111111111111110",
        "1234 4111 1111 1111 1111",
        "4111-1111-1111-1111-1111",
        "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        "4111 1111-1111 1111",
        "0.4111111111111111",
        "4111111111111111.5",
        "id4111111111111111",
        "a4111111111111111f",
        "/status/4111111111111111",
        "4006381333931",  # a product's EAN-13
    ],
)
def test_other_long_numbers_are_no_cards(text: str) -> None:
    assert _found(text) == []


@pytest.mark.parametrize(
    ("text", "iban"),
    [
        ("DE89 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130 00"),
        ("pay to GB29NWBK60161331926819.", "GB29NWBK60161331926819"),
        ("NO93 8601 1117 947 is mine", "NO93 8601 1117 947"),
        ("BE68 5390 0754 7034 THAT WAS IT", "BE68 5390 0754 7034"),
        (
            "NL91\u00a0ABNA\u00a00417\u00a01643\u00a000",
            "NL91\u00a0ABNA\u00a00417\u00a01643\u00a000",
        ),
    ],
)
def test_an_iban_is_found_without_the_word_after_it(text: str, iban: str) -> None:
    assert _found(text) == [("iban", iban)]


@pytest.mark.parametrize(
    "text",
    [
        "DE88 3704 0044 0532 0130 00",
        "ZZ89 3704 0044 0532 0130 00",
        "XDE89370400440532013000",
        "GB29NWBK60161331926819X",
        "AB12 CDEF GHIJ KLMN",
        "SECTION AA00 BBBB CCCC DDDD",
    ],
)
def test_what_only_looks_like_an_iban_stays(text: str) -> None:
    assert _found(text) == []


# ----------------------------------------------------------------------------------- secrets

_JWT = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"
    ".eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0"
    ".dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
)
_KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "\n".join(["MIIEpAIBAAKCAQEA7x8v" + ALNUM[:44]] * 3)
    + "\n-----END RSA PRIVATE KEY-----"
)


# Put together here, so that no scanner of this repository takes them for real.
@pytest.mark.parametrize(
    "secret",
    [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "ghp" + "_" + ALNUM[:36],
        "github" + "_pat_" + ALNUM[:22] + "_" + ALNUM[:59],
        "glpat" + "-" + ALNUM[:20],
        "xoxb" + "-123456789012-1234567890123-" + ALNUM[:24],
        "https://hooks.slack.com/services/" + "T0000AAAA/B0000BBBB/" + ALNUM[:24],
        "sk" + "_live_" + ALNUM[:24],
        "rk" + "_live_" + ALNUM[:99],
        "sk" + "-" + ALNUM[:48],
        "sk" + "-" + ALNUM[:20] + "T3BlbkFJ" + ALNUM[:20],
        "sk" + "-proj-" + ALNUM[:58] + "-_T3BlbkFJ" + ALNUM[:58],
        "sk" + "-ant-api03-" + ALNUM[:93] + "AA",
        "hf" + "_" + ALNUM[:34],
        "AIza" + ALNUM[:35],
        "npm" + "_" + ALNUM[:36],
        "pypi-" + "AgEIcHlwaS5vcmc" + ALNUM[:80],
        "SG" + "." + ALNUM[:22] + "." + ALNUM[:43],
        "123456789" + ":AA" + ALNUM[:33],
        "0123456789abcdef0123456789abcdef" + "-us12",
        "M" + ALNUM[:23] + "." + ALNUM[:6] + "." + ALNUM[:27],
        _JWT,
        _KEY,
        _KEY.replace("\n", "\\n"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "KEY={}", 'key: "{}",', "use {} now.", "({})"])
def test_a_key_or_token_is_found_whole(secret: str, around: str) -> None:
    assert _found(around.format(secret)) == [("secret", secret)]


def test_a_password_in_a_url_is_found_and_the_url_stays_readable() -> None:
    clean, found = scrub("postgres://anna:hunter2@db.example.com:5432/app", finders_of(Pii()))

    assert clean == "postgres://anna:<SECRET>@db.example.com:5432/app"
    assert found == {"secret": 1}


def test_an_aws_secret_is_found_by_the_name_before_it() -> None:
    key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"

    assert _found(f'aws_secret_access_key = "{key}"') == [("secret", key)]


def test_a_telegram_token_is_found_in_the_address_of_a_call() -> None:
    token = "123456789" + ":AA" + ALNUM[:33]

    assert _found(f"https://api.telegram.org/bot{token}/getMe") == [("secret", token)]


@pytest.mark.parametrize(
    "text",
    [
        "sk-short",
        "sk-" + "x" * 48,
        "ghp_" + "x" * 36,
        "hf_transfer and hf_hub_download_with_a_long_function_name",
        "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "550e8400-e29b-41d4-a716-446655440000",
        "MyCharacterMovementComponent::Server_SendRootMotion_Implementation",
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAKIAAKIA",
        "x" * 30 + "AKIAIOSFODNN7EXAMPLE" + "x" * 30,
        "-----BEGIN PRIVATE KEY-----\n(the lines of your key)\n-----END PRIVATE KEY-----"
        + "-" * 20,
        "-----BEGIN PUBLIC KEY-----\n" + ALNUM + "\n-----END PUBLIC KEY-----",
        "eyJhbGciOiJIUzI1NiJ9",
        "eyJnothinghere.eyJnothinghere.abcdefghijklmnopqrstuv",
        "postgres://user:password@localhost/db",
        "https://user:${TOKEN}@host/",
        "https://<user>:<password>@host/",
        "http://localhost:8080/@scope",
        "AC Milan and SK Brann",
    ],
)
def test_identifiers_digests_and_stand_ins_are_no_secrets(text: str) -> None:
    assert _only("secret", text) == []


# -------------------------------------------------------------------------------- overlaps


def test_an_email_inside_a_private_key_block_is_no_finding_of_its_own() -> None:
    block = _KEY.replace("-----\n", "-----\nComment: bob@example.com\n", 1)

    assert _found(f"a {block} b") == [("secret", block)]


def test_a_number_before_an_at_sign_is_part_of_the_email() -> None:
    assert _found("+14155552671@sms.example.com") == [("email", "14155552671@sms.example.com")]


def test_several_findings_are_all_replaced_in_their_places() -> None:
    text = "Mail a@b.org or c@d.org, call +1 415-555-2671, IBAN GB29NWBK60161331926819!"

    clean, found = scrub(text, finders_of(Pii()))

    assert clean == "Mail <EMAIL> or <EMAIL>, call <PHONE>, IBAN <IBAN>!"
    assert found == {"email": 2, "phone": 1, "iban": 1}


def test_what_only_a_neighbouring_finding_hid_is_replaced_too() -> None:
    text = "+14155552671+14155552672"

    assert len(_found(text)) == 1
    assert scrub(text, finders_of(Pii())) == ("<PHONE><PHONE>", {"phone": 2})


# ------------------------------------------------------------------------------------- rows


def test_a_documents_findings_are_replaced_and_all_else_of_the_row_stays() -> None:
    rows: list[Row] = [_document("nothing here"), _document("a@b.org, c@d.org +14155552671", 2)]

    decisions = _apply("documents", rows)

    assert decisions.drops == {}
    assert list(decisions.edits) == [1]
    edit = decisions.edits[1]
    assert edit.detail == "2 email, 1 phone"
    assert edit.row == Document(
        id=f"{2:016x}",
        file="f.txt",
        row=2,
        category="c",
        score=0.5,
        text="<EMAIL>, <EMAIL> <PHONE>",
    )
    assert decisions.found == {"email": 2, "phone": 1}


def test_drop_drops_the_row_and_says_what_it_held() -> None:
    rows: list[Row] = [_document("a@b.org +14155552671"), _document("nothing here", 2)]

    decisions = _apply("documents", rows, action="drop")

    assert decisions.edits == {}
    assert list(decisions.drops) == [0]
    assert decisions.drops[0].reason == "pii"
    assert decisions.drops[0].detail == "1 email, 1 phone"
    assert decisions.found == {"email": 1, "phone": 1}


_HELD = tuple(
    Message(role, f"{role} writes {role}@example.com")
    for role in ("system", "user", "assistant", "tool")
)
_SCRUBBED = tuple(Message(message.role, f"{message.role} writes <EMAIL>") for message in _HELD)
_PLAIN = (Message("user", "Hello"), Message("assistant", "Hello, you"))


@pytest.mark.parametrize(
    ("family", "row", "expected"),
    [
        (
            "chats",
            Chat(id="1", file="f", row=1, messages=_HELD),
            Chat(id="1", file="f", row=1, messages=_SCRUBBED),
        ),
        (
            "preferences",
            Preference(id="1", file="f", row=1, prompt=_HELD, chosen=_HELD, rejected=_HELD),
            Preference(
                id="1", file="f", row=1, prompt=_SCRUBBED, chosen=_SCRUBBED, rejected=_SCRUBBED
            ),
        ),
        (
            "kto",
            KtoExample(id="1", file="f", row=1, prompt=_HELD, completion=_HELD, label=False),
            KtoExample(
                id="1", file="f", row=1, prompt=_SCRUBBED, completion=_SCRUBBED, label=False
            ),
        ),
    ],
)
def test_every_turn_of_every_part_is_searched(family: RowFamily, row: Row, expected: Row) -> None:
    decisions = _apply(family, [row])

    assert decisions.edits[0].row == expected


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_one_part_with_a_finding_is_enough(part: str) -> None:
    parts = {"prompt": _PLAIN, "chosen": _PLAIN, "rejected": _PLAIN}
    clean = Preference(id="1", file="f", row=1, **parts)
    held = Preference(id="2", file="f", row=2, **{**parts, part: _HELD})

    decisions = _apply("preferences", [clean, held, clean])

    assert list(decisions.edits) == [1]
    assert decisions.edits[1].detail == "4 email"


def test_a_slice_of_a_table_is_read_from_its_own_first_row() -> None:
    rows: list[Row] = [Chat(id=str(n), file="f", row=n, messages=_PLAIN) for n in range(1, 4)]
    rows.append(Chat(id="4", file="f", row=4, messages=_HELD))
    batch = RowBatch.of("chats", rows)

    decisions = PiiFilter(Pii()).apply(RowBatch("chats", batch.table.slice(2, 2)))

    assert [edit.row.id for edit in decisions.edits.values()] == ["4"]
    assert list(decisions.edits) == [1]


def test_an_empty_batch_gives_no_decisions() -> None:
    assert _apply("documents", []) == Decisions()


def test_only_the_wanted_kinds_are_looked_for() -> None:
    text = "a@b.org +14155552671 4111111111111111"

    assert _found(text, kinds=("phone",)) == [("phone", "+14155552671")]


def test_the_operation_survives_pickling() -> None:
    operation = PiiFilter(Pii(phone_region="US"))
    batch = RowBatch.of("documents", [_document("fax 9517043374")])

    assert pickle.loads(pickle.dumps(operation)).apply(batch) == operation.apply(batch)
    assert operation.name == "pii"


def test_an_unknown_region_is_refused_with_an_example_of_a_known_one() -> None:
    with pytest.raises(ValidationError, match=r"'UK' is no country; write .* `GB`"):
        Pii(phone_region="UK")


# ------------------------------------------------------------------------------- invariants

_PIECES = st.sampled_from(
    [
        "a@b.org", "bob@example.com", "@", "git@github.com:a/b", "8.8.8.8", "93.184.216.34",
        "1.2.3.4", "version ", "IP ", "call ", "+14155552671", "415-555-2671", "(555) 123-4567",
        "4111111111111111", "4111 1111 1111 1111", "DE89370400440532013000", "2001:4860:4860::8888",
        "AKIA" + "IOSFODNN7EXAMPLE", _JWT, _KEY, "https://u:hunter2@h.org", "://", ":", "<EMAIL>",
        "<SECRET>", "1", "23", "4567", "+", "-", "/", ".", ",", " ", "\n", "x", "é", "中", "(", ")",
    ]
)  # fmt: skip
_TEXTS = st.lists(_PIECES | st.text(max_size=5), max_size=12).map("".join)
_MARKS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


@settings(max_examples=150, deadline=None)
@given(text=_TEXTS, region=st.sampled_from([None, "US", "DE"]))
def test_nothing_is_left_to_find_and_a_second_pass_changes_nothing(
    text: str, region: str | None
) -> None:
    finders = finders_of(Pii(phone_region=region))

    clean, _ = scrub(text, finders)

    assert find(clean, finders) == []
    assert scrub(clean, finders) == (clean, {})


@settings(max_examples=150, deadline=None)
@given(text=_TEXTS, region=st.sampled_from([None, "US", "DE"]))
def test_what_is_not_replaced_stays_byte_for_byte(text: str, region: str | None) -> None:
    clean, found = scrub(text, finders_of(Pii(phone_region=region)))

    # The text fits the pattern in which each placeholder stands for one character or more.
    pattern = "(?:.+)".join(map(re.escape, _MARKS.split(clean)))
    assert re.fullmatch(pattern, text, re.DOTALL)
    assert len(_MARKS.findall(clean)) - len(_MARKS.findall(text)) == sum(found.values())


@settings(max_examples=100, deadline=None)
@given(text=_TEXTS)
def test_findings_never_overlap_and_come_in_order(text: str) -> None:
    findings = find(text, finders_of(Pii(phone_region="US")))

    assert all(start < end for start, end, _ in findings)
    assert all(a[1] <= b[0] for a, b in pairwise(findings))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=6))
def test_a_row_gets_the_same_decision_in_any_batch(texts: list[str]) -> None:
    rows: list[Row] = [_document(text, number) for number, text in enumerate(texts, 1)]

    together = _apply("documents", rows)
    alone = [_apply("documents", [row]) for row in rows]

    assert [together.edits.get(n) for n in range(len(rows))] == [d.edits.get(0) for d in alone]


@pytest.mark.parametrize(
    "piece",
    [
        "a", "a.", "a@", "@a.", "1.1.1.1.", "2001:", "AA00 AAAA ", "eyJaaaaaaaaaa.", "glagent-",
        "-----BEGIN PRIVATE KEY-----", "://a:", "aws key '", "sk-aT3BlbkFJ", "M" * 24 + ".",
    ],
)  # fmt: skip
def test_hostile_text_takes_time_in_proportion_to_its_length(piece: str) -> None:
    finders = finders_of(Pii())
    find("warm up a@b.org AKIA", finders)

    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece)) + " @ + :// aws AKIA xoxb- :AA glpat- sk- eyJ"
        begin = time.process_time()
        find(text, finders)
        return time.process_time() - begin

    # Quadratic work would take sixteen times as long on four times the text, and minutes here.
    assert seconds(80_000) < 10 * seconds(20_000) + 0.2


# ------------------------------------------------------------------------------- real data


def test_what_is_found_in_real_samples_is_what_a_reader_finds_there(real_data: Path) -> None:
    answers = {"alpaca_en_demo.json": 5, "dpo_en_demo.json": 3, "kto_en_demo.json": 0}
    finders = finders_of(Pii())

    for name, emails in answers.items():
        records = json.loads((real_data / name).read_text())
        found = [k for text in _strings(records) for _, _, k in find(text, finders)]
        assert found == ["email"] * emails, name


def _strings(value: object) -> list[str]:
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.values() for text in _strings(item)]
        case list():
            return [text for item in value for text in _strings(item)]
        case _:
            return []
