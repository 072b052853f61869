"""The page that a person reads before a dataset is trained on: one HTML file, no script.

Everything that comes from rows is hostile: it is cut, its invisible characters are made visible,
and it is escaped. The page asks nothing of any server, and says so to the browser (a content
security policy), so that no row can make it do so.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from posttrain.data.report_charts import bar, format_number, length_charts
from posttrain.data.report_data import Advice, Cluster, Example, ReportData

TEXT_LIMIT = 600
"""Characters shown of a row's text."""
LINE_LIMIT = 20
"""Lines shown of a row's text."""
_CUT = "…"
NAME_LIMIT = 160
"""Characters shown of anything short: a label, a reason, a file's name."""
TABLE_ROWS = 20
"""Rows of a table of counts; all others are one row."""
EXAMPLE_GROUPS = 60
"""Reasons that examples are shown for."""
EXAMPLES_A_REASON = 4
CLUSTERS = 8
DROPPED_A_CLUSTER = 3


def write_report(path: Path, data: ReportData) -> None:
    """Write the page: HTML in UTF-8 that needs no other file.

    Raises:
        OSError: The file cannot be written.
    """
    path.write_text(report_html(data), encoding="utf-8", newline="\n")


def report_html(data: ReportData) -> str:
    """The page as text. Its size is bounded however many examples there are."""
    return _template().render(
        data=data,
        sections=_sections(data),
        headline=headline(data),
        mismatch=_mismatch(data),
        dropped=_dropped(data),
        outcome=_outcome(data),
        widest=max([data.rows_in, *(step.rows for step in data.funnel)]),
        charts=length_charts(data.lengths_before, data.lengths_after),
        advice=_by_urgency(data.advice),
        labels=_labels(data.labels),
        clusters=[_cluster_view(cluster) for cluster in data.clusters[:CLUSTERS]],
        examples=_example_groups(data),
        text_limit=TEXT_LIMIT,
        line_limit=LINE_LIMIT,
    )


def report_markdown(data: ReportData) -> str:
    """The page in short, as Markdown that holds no raw HTML: for Prefect's artifact page."""
    lines = [f"**{_plain(headline(data))}**", ""]
    lines += [f"- {item.level.title()}: {_plain(item.text)}" for item in _by_urgency(data.advice)]
    lines += ["", "| Operation | Rows | Dropped | Edited | Most frequent reason |"]
    lines += ["|---|---:|---:|---:|---|"]
    for step in data.funnel:
        reason = max(step.dropped, key=lambda name: step.dropped[name], default="")
        dropped = sum(step.dropped.values())
        lines.append(
            f"| {_plain(step.operation)} | {step.rows:,} | {dropped:,} "
            f"| {step.edited:,} | {_plain(reason)} |"
        )
    lines += ["", "| Side | Rows | Words |", "|---|---:|---:|"]
    lines += [f"| {_plain(s.side)} | {s.rows:,} | {s.words:,} |" for s in data.sides]
    if data.leak_check:
        lines += ["", _plain(data.leak_check)]
    return "\n".join(lines) + "\n"


def headline(data: ReportData) -> str:
    """What happened, in one sentence."""
    purposes = {"train": "for training", "validation": "for validation", "test": "for testing"}
    parts = [f"{side.rows:,} {purposes.get(side.side, 'for ' + side.side)}" for side in data.sides]
    kept = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + "".join(parts[-1:])
    dropped = _dropped(data)
    share = f" ({format_share(dropped, data.rows_in)})" if dropped else ""
    rows = "row" if data.rows_in == 1 else "rows"
    return f"{data.rows_in:,} {rows} read: {kept or 'none stays'}; {dropped:,} dropped{share}."


def format_share(part: float, whole: float) -> str:
    """A share in percent: `43.2%`, `0.42%`, `<0.01%`; 0% and 100% only where they are exact."""
    if not whole:
        return "–"  # noqa: RUF001 - a dash for what has no value
    percent = 100 * part / whole
    if part in (0, whole):
        return f"{percent:.0f}%"
    if 0 < percent < 0.01:
        return "<0.01%"
    if 99.95 <= percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2f}%"


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


# What a reader would not see, or what would turn the text around it: controls, bidirectional
# marks, zero-width spaces, byte order marks, half surrogates, noncharacters. The zero-width
# joiners stay, for emoji and Persian need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def visible(text: str) -> str:
    r"""Invisible characters as escapes such as `\x00`, line ends as `\n`."""
    text = text.replace("\r\n", "\n")
    return _INVISIBLE.sub(lambda found: ascii(found.group())[1:-1], text)


def cut_text(text: str) -> str:
    """The beginning of a row's text, at most `TEXT_LIMIT` characters and `LINE_LIMIT` lines."""
    shown = visible(text[: TEXT_LIMIT + 1])
    cut = "\n".join(shown[:TEXT_LIMIT].split("\n")[:LINE_LIMIT])
    return cut if cut == shown else f"{cut.rstrip()} {_CUT}"


def cut_name(text: str) -> str:
    """Something short in one line, at most `NAME_LIMIT` characters."""
    shown = " ".join(visible(text[: 4 * NAME_LIMIT]).split())
    return shown if len(shown) <= NAME_LIMIT else shown[:NAME_LIMIT] + _CUT


def prose(text: str) -> Markup:
    """A sentence of our own, whose `code` is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(cut_text(text)))))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "number": format_number,
        "share": format_share,
        "duration": format_seconds,
        "name": cut_name,
        "text": cut_text,
        "prose": prose,
        "breakable": lambda value: escape(value).replace("_", Markup("_<wbr>")),
        "largest": _largest,
        "by_size": _by_size,
    }
    environment.globals["bar"] = bar
    source = files("posttrain.data").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _sections(data: ReportData) -> dict[str, str]:
    """Anchor and title of each section that has something to show, in reading order."""
    sections: list[tuple[str, str, object]] = [
        ("advice", "Advice", data.advice),
        ("operations", "Rows by operation", data.funnel),
        ("lengths", "Length", any(data.lengths_before.counts + data.lengths_after.counts)),
        ("split", "Split", data.sides),
        ("preferences", "Preferences", data.preference_lengths),
        ("languages", "Languages", data.languages),
        ("labels", "Labels", any(data.labels.values())),
        ("contamination", "Contamination", data.contamination),
        ("duplicates", "Near duplicates", data.clusters or data.cluster_sizes),
        ("examples", "Examples", data.examples),
        ("files", "Files", data.files),
        ("time", "Time", data.seconds),
    ]
    return {anchor: title for anchor, title, content in sections if content}


def _dropped(data: ReportData) -> int:
    return sum(sum(step.dropped.values()) for step in data.funnel)


def _outcome(data: ReportData) -> list[tuple[str, int, str]]:
    """Where the rows went: a name, how many, and the class of its colour."""
    shades = {"validation": "validation", "test": "test"}
    sides = [(side.side, side.rows, shades.get(side.side, "stay")) for side in data.sides]
    return [*sides, ("dropped", _dropped(data), "gone")]


def _mismatch(data: ReportData) -> str:
    """Says so if the sides are not exactly the rows that stay."""
    stay = data.rows_in - _dropped(data)
    more = sum(side.rows for side in data.sides) - stay
    if not more or not data.sides:
        return ""
    if more > 0:
        return (
            f"The sides hold {more:,} rows more than the {stay:,} that stay of this source: "
            "those come from another dataset."
        )
    return f"The sides hold {-more:,} rows fewer than the {stay:,} that the operations left."


def _by_urgency(advice: Iterable[Advice]) -> list[Advice]:
    return sorted(advice, key=lambda item: ("warning", "note", "good").index(item.level))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(cut_name(text), quote=False))


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The largest counts first, and all that are left as one."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, others = ranked[:TABLE_ROWS], ranked[TABLE_ROWS:]
    if others:
        shown.append((f"{len(others):,} others", sum(count for _, count in others)))
    return shown


def _by_size(sizes: Mapping[int, int]) -> list[tuple[str, int]]:
    """Clusters by size; from the twelfth size on, all larger ones as one."""
    ranked = sorted(sizes.items())
    named = [(f"{size:,}", count) for size, count in ranked[:11]]
    if ranked[11:]:
        named.append((f"{ranked[11][0]:,} or more", sum(count for _, count in ranked[11:])))
    return named


def _labels(labels: Mapping[str, Mapping[str, int]]) -> list[tuple[str, int, int]]:
    """Each label with its rows before and after balancing; the most frequent first."""
    after = labels.get("after", {})
    before = labels.get("before", after)
    order = sorted({*before, *after}, key=lambda name: (-before.get(name, 0), name))
    lines = [(name, before.get(name, 0), after.get(name, 0)) for name in order[:TABLE_ROWS]]
    if others := order[TABLE_ROWS:]:
        sums = [sum(side.get(name, 0) for name in others) for side in (before, after)]
        lines.append((f"{len(others):,} others", sums[0], sums[1]))
    return lines


@dataclass(frozen=True)
class _ExampleGroup:
    operation: str
    reason: str
    rows: int
    """Rows dropped for the reason; 0 where the funnel does not count it."""
    examples: Sequence[Example]


def _example_groups(data: ReportData) -> list[tuple[str, list[_ExampleGroup]]]:
    """Examples by operation in the order of the funnel, and by reason, frequent ones first."""
    grouped: dict[tuple[str, str], list[Example]] = {}
    for example in data.examples:
        grouped.setdefault((example.operation, example.reason), []).append(example)
    rows = {(step.operation, key): n for step in data.funnel for key, n in step.dropped.items()}
    place = {step.operation: number for number, step in enumerate(data.funnel)}
    groups = [
        _ExampleGroup(*key, rows.get(key, 0), examples[:EXAMPLES_A_REASON])
        for key, examples in grouped.items()
    ]
    groups.sort(key=lambda g: (place.get(g.operation, len(place)), g.operation, -g.rows, g.reason))
    by_operation = groupby(groups[:EXAMPLE_GROUPS], lambda group: group.operation)
    return [(operation, list(members)) for operation, members in by_operation]


@dataclass(frozen=True)
class _ClusterView:
    size: int
    kept: Example
    kept_text: Markup
    dropped: list[tuple[Example, Markup]]
    same: bool
    """No word differs in what is shown."""


def _cluster_view(cluster: Cluster) -> _ClusterView:
    kept = _words(cluster.kept.text)
    only_kept: set[int] = set()
    only_dropped: set[int] = set()
    dropped = []
    for example in cluster.dropped[:DROPPED_A_CLUSTER]:
        words = _words(example.text)
        missing, added = differing_words(kept, words)
        only_kept |= missing
        only_dropped |= added
        dropped.append((example, _mark(words, added)))
    same = not only_kept and not only_dropped
    return _ClusterView(cluster.size, cluster.kept, _mark(kept, only_kept), dropped, same)


def _words(text: str) -> list[str]:
    """The text as shown, in words that each carry the white space around them."""
    return re.findall(r"\s*\S+\s*", cut_text(text))


def differing_words(left: Sequence[str], right: Sequence[str]) -> tuple[set[int], set[int]]:
    """Positions of the words of each text that the other does not have in that place.

    What comes after the last word that both have does not differ if a text is cut: the words may
    only stand on the other side of the cut.
    """
    a, b = ([word.strip() for word in words] for words in (left, right))
    cut_a, cut_b = (words[-1:] == [_CUT] for words in (a, b))
    a, b = a[: len(a) - cut_a], b[: len(b) - cut_b]
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    if (cut_a or cut_b) and len(blocks) > 1:  # the last one is always empty and at the end
        a, b = a[: blocks[-2].a + blocks[-2].size], b[: blocks[-2].b + blocks[-2].size]
    only_left, only_right = set(range(len(a))), set(range(len(b)))
    for block in blocks:
        only_left -= set(range(block.a, block.a + block.size))
        only_right -= set(range(block.b, block.b + block.size))
    return only_left, only_right


def _mark(words: Sequence[str], marked: set[int]) -> Markup:
    """The text with each run of marked words in a `<mark>`."""
    parts = []
    for is_marked, run in groupby(range(len(words)), lambda number: number in marked):
        text = "".join(words[number] for number in run)
        body = text.rstrip()
        after = text[len(body) :]
        parts.append(Markup("<mark>{}</mark>{}").format(body, after) if is_marked else text)
    return Markup("").join(parts)
