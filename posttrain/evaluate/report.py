"""A verdict for people: one line for a log, a page of Markdown for everything else."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.evaluate.results import Check, PerplexityCheck, Verdict, Watched, three_digits


def headline(verdict: Verdict) -> str:
    """Such as `pass: hellaswag +0.062 [+0.011, +0.113], perplexity 9.8 -> 5.1`.

    Of several candidates: `pass: evaluate-dpo, 1 of 2 candidates: ...`.
    """
    parts = [f"{check.task} {_difference(check)}" for check in verdict.checks]
    if verdict.perplexity:
        parts.append(f"perplexity {_values(verdict.perplexity)}")
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


def _checks(verdict: Verdict) -> list[str]:
    lines: list[str] = []
    if verdict.checks:
        lines += ["", *_table(verdict.checks)]
    if verdict.perplexity:
        lines += ["", _perplexity_line(verdict.perplexity)]
    return [*lines, *_watch_lines(verdict.watched)]


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
        "Differences are candidate minus base on the same items, positive is better. Brackets "
        f"hold one-sided bounds at {confidence}; a drop of up to "
        f"{verdict.max_drop:g} is accepted. *Detectable* is the drop that this many items show "
        "with a chance of 80%."
    )


def _table(checks: tuple[Check, ...]) -> list[str]:
    rows = [
        "| task | metric | base | candidate | difference | items | McNemar p | detectable | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for check in checks:
        p = "" if check.mcnemar_p is None else f"{check.mcnemar_p:.3f}"
        needed = f" (about {check.items_needed:,} items needed)" if check.items_needed else ""
        rows.append(
            f"| {check.task} | {check.metric} | {check.base:.3f} | {check.candidate:.3f} "
            f"| {_difference(check)} | {check.n:,} | {p} | {check.smallest_detectable_drop:.3f} "
            f"| {check.verdict}{needed} |"
        )
    return rows


def _perplexity_line(check: PerplexityCheck) -> str:
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f" [{check.low:+.3f}, {check.high:+.3f}]"
    requirement = check.requirement.replace("_", " ")
    return (
        f"Held-out perplexity {requirement}: {_values(check)}, "
        f"{check.difference:+.3f}{bounds} nats a token on {check.rows:,} rows: "
        f"{check.verdict}"
    )


def _difference(check: Check) -> str:
    return f"{check.difference:+.3f} [{check.low:+.3f}, {check.high:+.3f}]"


def _values(check: PerplexityCheck) -> str:
    return f"{three_digits(check.base)} -> {three_digits(check.candidate)}"
