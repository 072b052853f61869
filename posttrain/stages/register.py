"""`register`: the model that passed becomes a version in MLflow's Model Registry.

Inputs: `verdict`; and `model`, or `model:NAME` for each candidate that the verdict may have chosen,
NAME being that of its `evaluate` stage.

Output: `registration.json` and the model card, `README.md`. A repeated attempt finds the version
that a killed one made. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import DataError
from posttrain.evaluate.results import Verdict
from posttrain.home import Home
from posttrain.lineage import Graph
from posttrain.lineage.graph import label
from posttrain.model_card import write_card
from posttrain.recipe.register import CHOICE, VERDICT, RegisterConfig
from posttrain.registry import Entry, Judged, Registration, Registry, judgement
from posttrain.registry.connection import PATIENT
from posttrain.stages.program import StageContext, StageResult, run_program
from posttrain.store import Artifact
from posttrain.store.files import write_bytes


def main(context: StageContext[RegisterConfig]) -> StageResult:
    """Register the model, write its card.

    Raises:
        PosttrainError: the gate did not pass the model.
        DataError: the verdict is about other models.
        StoreError: the registry cannot be reached for about a minute.
    """
    folder = _chosen(context)
    # The store lies in the home, so both are found wherever this program was started.
    home = Home(folder.parents[2])
    graph = Graph.read(home.store)
    model = graph.find(str(folder))
    judged = _judged(context, graph, model)
    config = context.config
    card = write_card(
        graph,
        model,
        name=config.name,
        judged=judged,
        license=config.license,
        licenses=config.licenses,
    )
    context.events.phase(f"registering {label(model)} as {config.name}")
    done = Registry(home, PATIENT).register(
        config.name, Entry.of(graph, model, judged), alias=config.alias
    )
    if done.note:
        context.events.warning(done.note)
    done.save(context.output)
    write_bytes(context.output / "README.md", card.encode())
    return StageResult(
        metrics={"version": float(done.version)},
        headline=_headline(done),
        details=done.model_dump(mode="json"),
    )


def _chosen(context: StageContext[RegisterConfig]) -> Path:
    """The folder of the model, which a gate over several candidates chose."""
    inputs = context.job.inputs
    if "model" in inputs:
        return Path(inputs["model"].path)
    verdict = Verdict.load(Path(context.input(VERDICT).path))
    if verdict.choice is None:
        raise DataError(f"the gate chose none of the candidates: it says `{verdict.verdict}`")
    return Path(inputs[f"{CHOICE}{verdict.choice}"].path)


def _judged(context: StageContext[RegisterConfig], graph: Graph, model: Artifact) -> Judged | None:
    if VERDICT not in context.job.inputs:
        return None
    gate = graph.find(context.input(VERDICT).path)
    judged = judgement(graph, gate, model)
    if judged is None:
        raise DataError(
            f"{label(gate)} has not judged {label(model)}: put an `evaluate` and a `gate` after "
            "the stage that makes the model to be registered"
        )
    return judged


def _headline(done: Registration) -> str:
    was = f" (was v{done.before})" if done.before not in (None, done.version) else ""
    return f"{done.name} v{done.version}, {done.alias}{was}"


if __name__ == "__main__":
    run_program(RegisterConfig, main)
