"""What a card says of measurements, and of what was not measured."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.evaluate.results import (
    Check,
    EvaluationResults,
    PerplexityCheck,
    Verdict,
    WinRateCheck,
    three_digits,
)
from posttrain.model_card.facts import NOT_STATED, Facts
from posttrain.model_card.tables import table

_LEAST_ITEMS = 200
"""Below this, an interval is wider than most differences that matter."""


def evaluation_lines(facts: Facts) -> Iterator[str]:
    """Benchmarks with intervals beside base and champion, perplexity, and the gate's reasons."""
    if facts.judged is not None:
        against = str(facts.judged.gate.manifest.config.get("against") or "base")
        yield from _verdict(facts.judged.verdict, against)
    elif facts.results is not None:
        yield "No gate has judged this model. Measured by itself:\n"
        yield from _results(facts.results)
    else:
        yield "Not measured."
    if facts.results is not None:
        yield f"\n{_settings(facts.results)}"


def limit_lines(facts: Facts) -> Iterator[str]:
    """What these numbers do not say."""
    yield from _measured(facts)
    yield (
        "- Nothing beyond the table above was measured: not safety, bias or truthfulness, unless "
        "one of its tasks is about it, and no other language than that of the tasks."
    )
    yield f"- Languages of the training data: {_languages(facts)}."
    if facts.datasets:
        yield (
            "- Held-out rows come from the same sources as the training rows: they show how well "
            "the model predicts such texts, not others."
        )
    unlicensed = [one.name for one in facts.datasets if one.license == NOT_STATED]
    if unlicensed:
        listed = ", ".join(f"`{name}`" for name in unlicensed)
        yield f"- The licence of {listed} is not stated in the recipe."
    verdict = facts.judged.verdict if facts.judged else None
    for watched in verdict.watched if verdict else ():
        yield f"- {watched.sentence}"


def _verdict(verdict: Verdict, against: str) -> Iterator[str]:
    yield f"Gate: **{verdict.verdict}**\n"
    yield from (f"- {reason}" for reason in verdict.reasons)
    if verdict.checks:
        yield ""
        yield from _checks(verdict, against)
        yield (
            "\nDifferences are this model minus the other one, on the same items; positive is "
            f"better. Brackets hold one-sided bounds at {verdict.confidence:.1%} confidence each. "
            "The detectable drop is the one that this many items show with a chance of 80%."
        )
    for one in (verdict.perplexity, *verdict.other_perplexities):
        if one is not None:
            yield f"\n{_perplexity(one, against)}"
    if verdict.win_rate is not None and verdict.win_rate.win_rate is not None:
        yield f"\n{_win_rate(verdict.win_rate, verdict.win_rate.win_rate)}"
    if verdict.champion is not None:
        yield f"\nBeside {verdict.champion.opponent}: **{verdict.champion.verdict}**\n"
        yield from (f"- {reason}" for reason in verdict.champion.reasons)


def _checks(verdict: Verdict, against: str) -> Iterator[str]:
    champion = {check.task: check for check in verdict.champion.checks} if verdict.champion else {}
    beside_it, to_it = (["champion"], ["to champion"]) if champion else ([], [])
    heads = ["task", "metric", against, *beside_it, "this model", f"to {against}", *to_it]
    heads += ["items", "detectable drop"]
    rows = []
    for check in verdict.checks:
        beside = champion.get(check.task)
        values = [f"{check.base:.3f}"]
        differences = [_difference(check)]
        if champion:
            values.append(f"{beside.base:.3f}" if beside else "")
            differences.append(_difference(beside) if beside else "")
        values.append(f"{check.candidate:.3f}")
        tail = [f"{check.n:,}", f"{check.smallest_detectable_drop:.3f}"]
        rows.append([check.task, check.metric, *values, *differences, *tail])
    return table(heads, rows, numbers_from=2)


def _difference(check: Check) -> str:
    return f"{check.difference:+.3f} [{check.low:+.3f}, {check.high:+.3f}]"


def _perplexity(check: PerplexityCheck, against: str) -> str:
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f" [{check.low:+.3f}, {check.high:+.3f}]"
    on = f" on `{check.dataset}`" if check.dataset else ""
    return (
        f"Held-out perplexity{on}: {three_digits(check.base)} ({against}), "
        f"{three_digits(check.candidate)} (this model); {check.difference:+.3f}{bounds} nats a "
        f"{check.unit} better, {check.rows:,} rows."
    )


def _win_rate(check: WinRateCheck, rate: float) -> str:
    bounds = ""
    if check.low is not None and check.high is not None:
        bounds = f" [{check.low:.0%}, {check.high:.0%}]"
    return (
        f"Answers preferred to those of `{check.opponent}`: {rate:.0%}{bounds} of "
        f"{check.prompts:,} prompts, judged by {check.judge}."
    )


def _results(results: EvaluationResults) -> Iterator[str]:
    if results.tasks:
        rows = []
        for task in results.tasks:
            error = "" if task.standard_error is None else f" ± {task.standard_error:.3f}"
            rows.append([task.task, task.metric, f"{task.value:.3f}{error}", f"{task.n:,}"])
        yield from table(("task", "metric", "value ± standard error", "items"), rows, 2)
    if results.perplexity is not None:
        one = results.perplexity
        yield (
            f"\nHeld-out perplexity: {three_digits(one.perplexity)} "
            f"({one.bits_per_byte:.3f} bits a byte), {one.rows:,} rows."
        )


def _settings(results: EvaluationResults) -> str:
    settings = results.settings
    shots = sorted({task.num_fewshot for task in settings.tasks})
    said = [f"lm-eval {settings.lm_eval}", f"weights in {settings.dtype}"]
    if shots:
        said.append(f"examples before a question: {', '.join(map(str, shots))}")
    if settings.questions_in_chat_template:
        said.append("questions in the chat template")
    if settings.limit is not None:
        said.append(f"at most {settings.limit:,} items a task, drawn with seed {settings.seed}")
    return f"Measured with {'; '.join(said)}."


def _measured(facts: Facts) -> Iterator[str]:
    results = facts.results
    if results is None or not results.tasks:
        yield "- No benchmark was run: nothing is known of what the training made it forget."
        return
    few = [task for task in results.tasks if task.n < _LEAST_ITEMS]
    if few:
        listed = ", ".join(f"`{task.task}` ({task.n:,})" for task in few)
        yield f"- Few items, so wide intervals: {listed}."
    checks = facts.judged.verdict.checks if facts.judged else ()
    blind = [check for check in checks if check.smallest_detectable_drop > check.max_drop > 0]
    for check in blind:
        yield (
            f"- `{check.task}`: a drop of less than {check.smallest_detectable_drop:.3f} may not "
            f"show on {check.n:,} items."
        )


def _languages(facts: Facts) -> str:
    if not facts.datasets:
        return NOT_STATED
    said = []
    for one in facts.datasets:
        kept = ", ".join(one.languages)
        said.append(f"{kept} (`{one.name}`)" if kept else f"not checked (`{one.name}`)")
    return "; ".join(said)
