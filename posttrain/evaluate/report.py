"""A verdict for people: one line for a log, a page of Markdown for everything else."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.evaluate.perplexity_check import PERPLEXITY_TOLERANCE
from posttrain.evaluate.results import (
    Check,
    PerplexityCheck,
    Verdict,
    Versus,
    Watched,
    WinRateCheck,
    three_digits,
)


def headline(verdict: Verdict) -> str:
    """Such as `pass: hellaswag +0.062 [+0.011, +0.113], perplexity 9.8 -> 5.1`.

    Of several candidates: `pass: evaluate-dpo, 1 of 2 candidates: ...`.
    """
    parts = [f"{check.task} {_difference(check)}" for check in verdict.checks]
    parts += [f"{_name(check)} {_values(check)}" for check in _perplexities(verdict)]
    if verdict.win_rate:
        parts.append(f"win rate {_rate(verdict.win_rate)}")
    if verdict.champion:
        parts.append(f"{verdict.champion.opponent} {verdict.champion.verdict}")
    parts += [f"{one.step} {one.hacking.text.partition(':')[0]}" for one in verdict.watched]
    if not verdict.candidates:
        return f"{verdict.verdict}: {', '.join(parts)}"
    passing = sum(one.verdict == "pass" for one in verdict.candidates.values())
    counted = f"{passing} of {len(verdict.candidates)} candidates"
    if verdict.choice is None:
        return f"{verdict.verdict}: {counted}"
    return f"{verdict.verdict}: {verdict.choice}, {counted}: {', '.join(parts)}"


def markdown(verdict: Verdict) -> str:
    """The verdict on top, then why, then every check in a table."""
    lines = [f"# {verdict.verdict}", ""]
    lines += [f"- {reason}" for reason in verdict.reasons]
    for name, one in verdict.candidates.items():
        chosen = " (the choice)" if name == verdict.choice else ""
        lines += ["", f"## {name}: {one.verdict}{chosen}", *_checks(one)]
    if not verdict.candidates:
        lines += _checks(verdict)
    lines += ["", _legend(verdict), ""]
    return "\n".join(lines)


def _perplexities(verdict: Verdict) -> list[PerplexityCheck]:
    return [check for check in (verdict.perplexity, *verdict.other_perplexities) if check]


def _checks(verdict: Verdict) -> list[str]:
    lines = _tables(verdict.checks, _perplexities(verdict), verdict.against)
    if verdict.win_rate:
        lines += ["", _win_rate_line(verdict.win_rate)]
    if verdict.champion:
        lines += _champion(verdict.champion)
    return [*lines, *_watch_lines(verdict.watched)]


def _champion(versus: Versus) -> list[str]:
    lines = ["", f"### Against {versus.opponent}: {versus.verdict}"]
    if versus.improvement:
        lines += ["", f"On the whole: {versus.improvement}"]
    return lines + _tables(versus.checks, versus.perplexities, versus.opponent)


def _tables(
    checks: Sequence[Check], perplexities: Sequence[PerplexityCheck], opponent: str
) -> list[str]:
    lines: list[str] = []
    if checks:
        lines += ["", *_task_table(checks, opponent)]
    if perplexities:
        lines += ["", *_perplexity_table(perplexities, opponent)]
    return lines


def _task_table(checks: Sequence[Check], opponent: str) -> list[str]:
    rows = [
        f"| task | metric | asked | {opponent} | candidate | difference | items | McNemar p "
        "| detectable | |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for check in checks:
        asked = f"no drop beyond {check.max_drop:g}"
        if check.requirement == "must_improve":
            asked = "better"
        p = "" if check.mcnemar_p is None else f"{check.mcnemar_p:.3f}"
        rows.append(
            f"| {check.task} | {check.metric} | {asked} | {check.base:.3f} "
            f"| {check.candidate:.3f} | {_difference(check)} | {check.n:,} | {p} "
            f"| {check.smallest_detectable_drop:.3f} "
            f"| {check.verdict}{_needed(check.items_needed, 'items')} |"
        )
    return rows


def _perplexity_table(checks: Sequence[PerplexityCheck], opponent: str) -> list[str]:
    rows = [
        f"| held-out rows | asked | {opponent} | candidate | difference | rows | detectable | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for check in checks:
        asked = f"no rise beyond {PERPLEXITY_TOLERANCE:.0%}"
        if check.requirement == "must_improve":
            asked = "better"
        bounds, detectable = "", ""
        if check.low is not None and check.high is not None:
            bounds = f" [{check.low:+.3f}, {check.high:+.3f}]"
        if check.smallest_detectable_rise is not None:
            detectable = f"{check.smallest_detectable_rise:.1%}"
        before, _, after = _values(check).partition(" -> ")
        unit = "nats a token" if check.unit == "token" else "bits a byte"
        rows.append(
            f"| {_name(check)} | {asked} | {before} | {after} "
            f"| {check.difference:+.3f}{bounds} {unit} | {check.rows:,} | {detectable} "
            f"| {check.verdict}{_needed(check.rows_needed, 'rows')} |"
        )
    return rows


def _needed(count: int | None, of: str) -> str:
    return f" (about {count:,} {of} needed)" if count else ""


def _win_rate_line(check: WinRateCheck) -> str:
    if check.win_rate is None:
        return f"W{check.sentence[1:]}: {check.verdict}"
    return (
        f"Win rate against {check.opponent}, more than {check.required:g} is asked: "
        f"{_rate(check)} on {check.prompts:,} prompts, judged by {check.judge}: {check.verdict}"
        f"{_needed(check.prompts_needed, 'prompts')}"
    )


def _watch_lines(watched: Sequence[Watched]) -> list[str]:
    """What the watches over the training found, with what changed in the form of the answers."""
    lines: list[str] = []
    for one in watched:
        lines += ["", f"Watch over {one.sentence}"]
        if one.hacking.warnings:
            lines += ["", "The form of the answers changed; no flag by itself:", ""]
            lines += [f"- {warning}" for warning in one.hacking.warnings]
    return lines


def _legend(verdict: Verdict) -> str:
    confidence = f"{verdict.confidence:.0%} confidence each"
    if verdict.candidates:
        levels = sorted({one.confidence for one in verdict.candidates.values()})
        shown = " or ".join(f"{level:.1%}" for level in levels)
        confidence = f"{shown} confidence each, raised for the number of candidates"
    return (
        f"Differences are candidate minus {verdict.against}, or minus the champion, on the same "
        f"items, positive is better. Brackets hold one-sided bounds at {confidence}. "
        "*Detectable* is the drop, or where better is asked the gain, that this many items show "
        "with a chance of 80%."
    )


def _name(check: PerplexityCheck) -> str:
    return f"perplexity of {check.dataset}" if check.dataset else "perplexity"


def _difference(check: Check) -> str:
    return f"{check.difference:+.3f} [{check.low:+.3f}, {check.high:+.3f}]"


def _values(check: PerplexityCheck) -> str:
    unit = " bits a byte" if check.unit == "byte" else ""
    return f"{three_digits(check.base)} -> {three_digits(check.candidate)}{unit}"


def _rate(check: WinRateCheck) -> str:
    if check.win_rate is None:
        return "not judged yet"
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f" [{check.low:.2f}, {check.high:.2f}]"
    return f"{check.win_rate:.2f}{bounds}"
