"""Puts a model card together: `README.md` of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from posttrain.lineage import Graph
from posttrain.lineage.graph import SHORT, gets_in, label
from posttrain.model_card.evaluation import evaluation_lines, limit_lines
from posttrain.model_card.facts import NOT_STATED, Facts, settings_of
from posttrain.model_card.header import header
from posttrain.model_card.tables import table
from posttrain.registry.judged import Judged
from posttrain.store import Artifact


def write_card(
    graph: Graph,
    model: Artifact,
    *,
    name: str | None = None,
    judged: Judged | None = None,
    license: str | None = None,
    licenses: Mapping[str, str] | None = None,
) -> str:
    """The card of a model in the store, as Markdown with a YAML header.

    Args:
        graph: The store's.
        model: Complete weights.
        name: What the model is called. Default: its recipe's name.
        judged: What a gate said of it.
        license: Of the model.
        licenses: Of the datasets, by name; one that is missing is read from the job that prepared
            the dataset.
    """
    facts = Facts.collect(graph, model, judged, licenses or {})
    name = name or model.manifest.recipe
    parts = [
        f"---\n{header(facts, name, license)}\n---",
        f"# {name}",
        _summary(facts, name, license),
        _section("How to use it", _usage(facts)),
        _section("Evaluation", evaluation_lines(facts)),
        _section("Limits", limit_lines(facts)),
        _section("Data", _data(facts)),
        _section("Training", _training(facts)),
        _section("Lineage", _lineage(graph, facts)),
        _section("Software", _software(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: Iterator[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _summary(facts: Facts, name: str, license: str | None) -> str:
    base = " and ".join(f"`{base}`" for base in facts.bases) or "a model that is not known"
    stages = ", ".join(f"`{one.manifest.name}`" for one in facts.trainings)
    verdict = facts.judged.verdict.verdict if facts.judged else "not judged by a gate"
    lines = [f"`{name}` comes from {base}"]
    lines[0] += f", by the stages {stages}." if stages else "; nothing was trained."
    lines += ["", f"- Gate: **{verdict}**", f"- Licence: {license or NOT_STATED}"]
    parameters = [one.manifest.metrics["parameters"] for one in facts.steps if _counted(one)]
    if parameters:
        lines.append(f"- Parameters: {parameters[-1]:,.0f}")
    return "\n".join(lines)


def _counted(step: Artifact) -> bool:
    return step.kind == "model" and "parameters" in step.manifest.metrics


def _usage(facts: Facts) -> Iterator[str]:
    yield from (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
    )
    if facts.chats:
        yield from (
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        )
    else:
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    yield from (
        "output = model.generate(**inputs, max_new_tokens=64)",
        'answer = output[0][inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        "```",
    )


def _data(facts: Facts) -> Iterator[str]:
    if not facts.datasets:
        yield "No dataset of this store got into the model."
        return
    rows = []
    for one in facts.datasets:
        counts = one.counts
        numbers = ["?"] * 4
        if counts is not None:
            held_out = counts.validation + counts.test
            dropped = counts.rows_dropped + counts.bad
            numbers = [f"{value:,}" for value in (counts.rows_in, counts.train, held_out, dropped)]
        rows.append([one.name, one.source, one.license, *numbers])
    heads = ("dataset", "source", "licence", "rows in", "train", "held out", "dropped")
    yield from table(heads, rows, numbers_from=3)
    for one in facts.datasets:
        if one.counts is None or not one.counts.dropped:
            continue
        listed = ", ".join(
            f"{count:,} {reason}"
            for reasons in one.counts.dropped.values()
            for reason, count in sorted(reasons.items())
        )
        yield f"\nDropped from `{one.name}`: {listed}."


def _training(facts: Facts) -> Iterator[str]:
    if not facts.trainings:
        yield "None."
    for position, step in enumerate(facts.trainings):
        manifest = step.manifest
        kind = "" if manifest.name == manifest.stage else f" ({manifest.stage})"
        yield ("" if position == 0 else "\n") + f"### {manifest.name}{kind}"
        yield f"\n{manifest.headline}\n"
        settings = settings_of(step)
        if settings:
            yield from table(
                ("setting", "value"),
                [[f"`{key}`", _value(value)] for key, value in settings.items()],
            )


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lineage(graph: Graph, facts: Facts) -> Iterator[str]:
    judged = facts.judged
    seen = [*facts.steps, *([judged.evaluation, judged.gate] if judged else [])]
    yield from table(
        ("stage", "kind", "fingerprint", "content"),
        [
            [label(one), one.kind, f"`{one.fingerprint[:SHORT]}`", f"`{one.digest[:SHORT]}`"]
            for one in seen
        ],
    )
    yield "\n```mermaid"
    yield "graph LR"
    yield from _diagram(graph, facts, seen)
    yield "```"
    yield (
        f"\nFrom the store, `posttrain lineage rows {facts.model.fingerprint[:SHORT]}` lists every "
        "row behind this model."
    )


def _diagram(graph: Graph, facts: Facts, seen: Sequence[Artifact]) -> Iterator[str]:
    """Boxes and arrows, in the language of Mermaid."""
    numbers = {one.fingerprint: f"s{number}" for number, one in enumerate(seen)}
    made = {one.fingerprint for one in facts.steps}
    for one in seen:
        text = f"{one.manifest.name}<br>{one.fingerprint[:SHORT]}"
        yield f'  {numbers[one.fingerprint]}["{text}"]'
    for one in seen:
        sources = dict.fromkeys(
            source.fingerprint
            for name, source in graph.inputs(one)
            if one.fingerprint not in made or gets_in(one.manifest.stage, name)
        )
        for fingerprint in sorted(sources, key=lambda key: numbers.get(key, "")):
            if fingerprint in numbers:
                arrow = "-->" if one.fingerprint in made else "-.->"
                yield f"  {numbers[fingerprint]} {arrow} {numbers[one.fingerprint]}"


def _software(facts: Facts) -> Iterator[str]:
    packages = facts.model.manifest.packages
    yield f"posttrain {facts.model.manifest.posttrain_version}" + "".join(
        f", {name} {packages[name]}" for name in sorted(packages)
    )
