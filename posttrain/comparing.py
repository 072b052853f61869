"""Two models beside each other, outside a recipe: the same questions, paired item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import DataError, UsageError
from posttrain.evaluate.page.differences import Against, compute
from posttrain.evaluate.page.measured import Measured
from posttrain.evaluate.report_page import REPORT_PAGE, comparison_report
from posttrain.evaluate.results import EvaluationResults
from posttrain.evaluation import evaluate_model
from posttrain.execute import StageObserver
from posttrain.finding import find_model
from posttrain.lineage import Graph
from posttrain.lineage.graph import SHORT, label
from posttrain.model_reference import ARTIFACT
from posttrain.store import Artifact, Store
from posttrain.store.files import write_bytes


@dataclass(frozen=True)
class Compared:
    """What two models' evaluations say of each other."""

    measured: tuple[Measured, Measured]
    """The model that is compared with, and the one that is compared."""
    evaluations: tuple[Artifact, Artifact]
    against: Against
    """Second less first, positive is better."""
    max_drop: float

    @property
    def name(self) -> str:
        """The same for the same two evaluations."""
        return "-".join(one.fingerprint[:SHORT] for one in self.evaluations)

    def write_report(self, folder: Path) -> Path:
        """Leave `report.html` in a folder, which is made."""
        folders = {
            one.label: artifact.path
            for one, artifact in zip(self.measured, self.evaluations, strict=True)
        }
        page = comparison_report(folders, max_drop=self.max_drop)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / REPORT_PAGE, page.encode())
        return folder / REPORT_PAGE


def compare_models(
    first: str,
    second: str,
    *,
    tasks: tuple[str, ...],
    offline_root: str | None,
    limit: int | None,
    max_drop: float,
    store: Store,
    observer: StageObserver,
) -> Compared:
    """Evaluate two models alike, or take evaluations that are in the store, and pair them.

    Args:
        first: The model that is compared with: what `model` of a recipe may be, or one in the
            store by a path, a fingerprint's first digits, STAGE or RECIPE/STAGE.
        second: The model that is compared.
        tasks: lm-eval tasks to ask both; without any, the newest evaluations that both have in
            common are taken.
        offline_root: Folder laid out like the Hub to read benchmarks from instead of it.
        limit: Items a task; None asks all.
        max_drop: The drop that `items_needed` and the report's margin are about.
        store: Where models and evaluations are looked up, and results kept.
        observer: Told of all that happens.

    Raises:
        UsageError: a name means nothing, both are one model, or nothing was asked of both.
        DataError: the two did not answer the same items.
        StageFailed: an evaluation failed.
    """
    if not 0 < max_drop < 1:
        raise UsageError(f"--max-drop {max_drop:g}: write a share between 0 and 1, such as 0.02")
    if tasks:
        pair = tuple(
            evaluate_model(
                model,
                tasks,
                offline_root=offline_root,
                limit=limit,
                store=store,
                observer=observer,
            )[1]
            for model in (first, second)
        )
    else:
        pair = _stored_pair(first, second, store)
    before, after = pair
    if before.fingerprint == after.fingerprint:
        raise UsageError(f"{first} and {second} are one model: name two")
    names = _labels((first, second), (before, after), Graph.read(store))
    measured = (Measured.read(names[0], before.path), Measured.read(names[1], after.path))
    against = compute(*measured, max_drop=max_drop)
    return Compared(measured, (before, after), against, max_drop)


def _stored_pair(first: str, second: str, store: Store) -> tuple[Artifact, Artifact]:
    """The newest evaluations of two models that asked the same in the same way."""
    graph = Graph.read(store)
    found = [_evaluations(model, graph, store) for model in (first, second)]
    pairs = [
        (one, other)
        for one, results in found[0]
        for other, theirs in found[1]
        if results.settings_digest == theirs.settings_digest and _asked(one) == _asked(other)
    ]
    if not pairs:
        said = "; ".join(
            f"{model}: {_names([results for _, results in of_model])}"
            for model, of_model in zip((first, second), found, strict=True)
        )
        raise UsageError(
            f"{first} and {second} have no evaluations in the store that can be compared ({said}); "
            f"name what to ask both: posttrain compare {first} {second} --tasks hellaswag"
        )
    return max(
        pairs,
        key=lambda pair: (
            sorted(one.manifest.created for one in pair),
            [one.fingerprint for one in pair],
        ),
    )


def _evaluations(
    reference: str, graph: Graph, store: Store
) -> list[tuple[Artifact, EvaluationResults]]:
    """What a model was asked, as far as this version can read it."""
    found = []
    for artifact in _of_model(reference, graph, store):
        try:
            results = EvaluationResults.load(artifact.path)
        except DataError:
            continue
        if results.tasks or results.perplexity:
            found.append((artifact, results))
    return found


def _of_model(reference: str, graph: Graph, store: Store) -> list[Artifact]:
    model = _in_store(reference, graph)
    if model is not None:
        users = graph.users(model)
        return [user for name, user in users if name == "model" and user.kind == "evaluation"]
    digest = find_model(reference, store).digest
    return [
        artifact
        for artifact in graph.artifacts.values()
        if artifact.kind == "evaluation"
        and "model" in artifact.manifest.inputs
        and artifact.manifest.inputs["model"].digest == digest
    ]


def _in_store(reference: str, graph: Graph) -> Artifact | None:
    """The model or adapter of this name.

    Raises:
        UsageError: it is something else, or `artifact:` names nothing.
    """
    name = reference.removeprefix(ARTIFACT)
    try:
        artifact = graph.find(name)
    except UsageError:
        if name != reference:
            raise
        return None
    if artifact.kind not in ("model", "adapter"):
        raise UsageError(f"{reference}: {label(artifact)} ({artifact.kind}) is not a model")
    return artifact


def _asked(evaluation: Artifact) -> dict[str, str]:
    """What the model was asked, by content: benchmarks, datasets, test sets."""
    inputs = evaluation.manifest.inputs.items()
    return {name: record.digest for name, record in inputs if name != "model"}


def _names(every: Sequence[EvaluationResults]) -> str:
    """What was asked in evaluations, in a few words."""
    if not every:
        return "none"
    asked = [", ".join(task.task for task in one.tasks) or "perplexity" for one in every]
    return " and ".join(dict.fromkeys(asked))


def _labels(
    references: tuple[str, str], evaluations: tuple[Artifact, Artifact], graph: Graph
) -> tuple[str, str]:
    """Names for the page, without paths; digits of the content where two would be equal."""
    names = [_label(reference, graph) for reference in references]
    if names[0] == names[1]:
        digests = [one.manifest.inputs["model"].digest[:SHORT] for one in evaluations]
        names = [f"{name} ({digest})" for name, digest in zip(names, digests, strict=True)]
    return names[0], names[1]


def _label(reference: str, graph: Graph) -> str:
    artifact = _in_store(reference, graph)
    if artifact is not None:
        return label(artifact)
    path = Path(reference.removeprefix("gguf:")).expanduser()
    return path.resolve().name if path.exists() else reference
