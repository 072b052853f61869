"""A verdict for people: one line for a log, a page of Markdown for everything else."""

from __future__ import annotations

from posttrain.evaluate.results import Check, PerplexityCheck, Verdict, three_digits


def headline(verdict: Verdict) -> str:
    """Such as `pass: hellaswag +0.062 [+0.011, +0.113], perplexity 9.8 -> 5.1`."""
    parts = [f"{check.task} {_difference(check)}" for check in verdict.checks]
    if verdict.perplexity:
        parts.append(f"perplexity {_values(verdict.perplexity)}")
    return f"{verdict.verdict}: {', '.join(parts)}"


def markdown(verdict: Verdict) -> str:
    """The verdict on top, then why, then every check in a table."""
    lines = [f"# {verdict.verdict}", ""]
    lines += [f"- {reason}" for reason in verdict.reasons]
    if verdict.checks:
        lines += ["", *_table(verdict.checks)]
    if verdict.perplexity:
        lines += ["", _perplexity_line(verdict.perplexity)]
    lines += ["", _legend(verdict), ""]
    return "\n".join(lines)


def _legend(verdict: Verdict) -> str:
    return (
        "Differences are candidate minus base on the same items, positive is better. Brackets "
        f"hold one-sided bounds at {verdict.confidence:.0%} confidence each; a drop of up to "
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
