"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from posttrain import __version__
from posttrain.commands import (
    advise,
    compare,
    data,
    generate,
    lineage,
    registry,
    repair,
    sweep,
)
from posttrain.errors import PosttrainError
from posttrain.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.console import OutcomeKeeper
    from posttrain.pipeline import Pipeline
    from posttrain.plan import Plan
    from posttrain.store import Artifact
    from posttrain.sweeping.plan import SweepRequest

Backend = Literal["shared_prefixes", "hf", "vllm"]

EXIT_GATE_SAID_NO = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="posttrain",
    help="From a base LLM and raw data to a fine-tuned model that is safe to ship.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 a gate said no.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
store_app = typer.Typer(
    help="Look after the store of finished stages.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data.app, name="data")
app.add_typer(lineage.app, name="lineage")
app.add_typer(registry.app, name="registry")
app.add_typer(store_app, name="store")

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as configs/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, such as sft.epochs=2 or "
        "datasets.chats.source=mine.jsonl. May be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def main() -> NoReturn:
    """Entry point: errors of posttrain are messages, not tracebacks."""
    try:
        app()
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the command line's own voice
        sys.exit(error.exit_code)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    from_stage: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Run this stage and all that follows from it again."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Prefect's log as well.")
    ] = False,
) -> None:
    """Run a recipe: reuse what the store has, do the rest, show what came out."""
    from posttrain import console as show
    from posttrain.repair.after_run import next_steps
    from posttrain.run import verdict_of

    pipeline = _open(recipe, overrides, from_stage)
    plan = _plan(pipeline, from_stage)
    console = make_console(stderr=as_json)
    keeper = show.OutcomeKeeper()
    if plan.nothing_to_do:
        console.print("Nothing to do: every stage is in the store.", style="bold")
        _record_reuse(pipeline, plan)
        artifacts = plan.artifacts()
    else:
        with _ctrl_c_is_no_accident():
            _run_flow(recipe, overrides, from_stage, console, keeper, verbose)
        artifacts = {name: outcome.artifact for name, outcome in keeper.outcomes.items()}
    if as_json:
        _print_json(_summary(pipeline, artifacts, keeper))
    else:
        show.show_summary(console, pipeline, artifacts, keeper.outcomes)
        show.show_next_steps(console, next_steps(pipeline, artifacts, str(recipe)))
        console.print("Runs and their history in a browser: posttrain ui", style="dim")

    if verdict_of(pipeline, artifacts) in ("fail", "not enough evidence"):
        raise typer.Exit(EXIT_GATE_SAID_NO)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="As for `run`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages would run or be reused, and why, and what training needs. Runs nothing."""
    from posttrain.console import show_plan
    from posttrain.estimate.planning import describe_estimate, estimate_plan
    from posttrain.home import Home

    made = _plan(_open(recipe, overrides, from_stage), from_stage)
    estimates = estimate_plan(made, Home.find().root / "architectures")
    if as_json:
        steps = [
            {
                "stage": planned.step.name,
                "action": planned.action,
                "reason": planned.reason,
                "fingerprint": planned.artifact.fingerprint if planned.artifact else None,
                "estimate": describe_estimate(estimates.get(planned.step.name)),
            }
            for planned in made.steps
        ]
        _print_json({"steps": steps})
    else:
        show_plan(make_console(), made, estimates)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe, its datasets and its model. Runs nothing."""
    pipeline = _open(recipe, overrides)
    names = ", ".join(step.name for step in pipeline.steps)
    typer.echo(f"{recipe}: valid; its stages: {names}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, Hub id, gguf:FILE, package:NAME, or RECIPE/STAGE of the store."
        ),
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks, such as mmlu,hellaswag.")
    ],
    offline_root: Annotated[
        Path | None,
        typer.Option(help="Folder laid out like the Hub to read benchmarks from."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items a task, drawn with a fixed seed.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap questions in the model's chat template.")
    ] = False,
    task_folder: Annotated[
        list[Path] | None, typer.Option(help="Folder with lm-eval task YAMLs of your own.")
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="Who answers: shared_prefixes, hf or vllm.")
    ] = "shared_prefixes",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Measure a model on benchmarks; what was measured before is not measured again."""
    from posttrain import console as show
    from posttrain.evaluation import evaluate_model
    from posttrain.home import Home

    console = make_console(stderr=as_json)
    with _ctrl_c_is_no_accident():
        results, artifact = evaluate_model(
            model,
            tuple(name.strip() for name in tasks.split(",") if name.strip()),
            offline_root=str(offline_root) if offline_root else None,
            limit=limit,
            num_fewshot=num_fewshot,
            chat_template=chat_template,
            task_folders=tuple(map(str, task_folder or ())),
            backend=backend,
            batch_size=batch_size,
            store=Home.find().store,
            observer=show.observer(console),
        )
    if as_json:
        _print_json({**results.model_dump(mode="json"), "path": str(artifact.path)})
    else:
        show.show_results(console, results, artifact)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's UI.")] = 5000,
) -> None:
    """Start Prefect's and MLflow's UI on this machine, on the databases that runs write to."""
    import signal

    from posttrain import servers
    from posttrain.home import Home

    home = Home.find()
    servers.prefer_quiet_prefect()
    prefect = servers.prefect_server(servers.free_port(prefect_port))
    mlflow = servers.mlflow_server(home, servers.free_port(mlflow_port))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    console = make_console()
    console.print("Starting Prefect and MLflow ...")
    with servers.running(home, [prefect, mlflow]):
        console.print(f"Prefect  {prefect.url}\nMLflow   {mlflow.url}\nCtrl-C stops both.")
        try:
            signal.pause()
        except KeyboardInterrupt:
            console.print("Stopping.")


@app.command()
def join(
    stage_dir: Annotated[
        Path, typer.Argument(metavar="STAGE_DIR", help="Folder that the first machine names.")
    ],
) -> None:
    """Take part in a stage that runs on several machines."""
    from posttrain.launch.join import join as take_part

    take_part(stage_dir)


app.command("compare")(compare.compare)
app.command("repair")(repair.repair)
app.command("sweep")(sweep.sweep)
app.command("advise")(advise.advise)
app.command("generate")(generate.generate)
app.command("adapters")(generate.adapters)


@store_app.command("ls")
def store_ls(as_json: AsJson = False) -> None:
    """List finished stages, oldest first."""
    from posttrain.console import show_artifacts
    from posttrain.home import Home

    artifacts = list(Home.find().store.artifacts())
    if as_json:
        _print_json({"artifacts": [item.manifest.model_dump(mode="json") for item in artifacts]})
    else:
        show_artifacts(make_console(), artifacts)


@store_app.command("verify")
def store_verify(
    set_aside: Annotated[
        bool, typer.Option(help="Move damaged artifacts aside, so that the next run rebuilds them.")
    ] = True,
) -> None:
    """Hash every file again and compare; exit 1 if anything is damaged."""
    from posttrain.home import Home

    store = Home.find().store
    checked = damaged = 0
    for path, damage in store.verify():
        checked += 1
        if damage is None:
            continue
        damaged += 1
        typer.echo(f"damaged: {damage.reason}", err=True)
        if set_aside:
            typer.echo(f"  moved to {store.set_aside(path)}", err=True)
    typer.echo(f"{checked} artifacts checked, {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    keep_runs: Annotated[int, typer.Option(help="Runs of each recipe whose results stay.")] = 10,
    keep_days: Annotated[float, typer.Option(help="Days for which everything stays.")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    ignore_registry: Annotated[
        bool,
        typer.Option(
            "--ignore-registry",
            help="Go on where the model registry cannot be reached: registered models may go.",
        ),
    ] = False,
) -> None:
    """Remove artifacts that no recent run needs, and what killed runs left."""
    from posttrain.errors import StoreError
    from posttrain.home import Home
    from posttrain.registry import registered_fingerprints
    from posttrain.store.gc import collect, find_garbage

    home = Home.find()
    store = home.store
    try:
        needed = set() if ignore_registry else registered_fingerprints(home)
    except StoreError as error:
        raise StoreError(f"{error}; --ignore-registry goes on without it") from error
    garbage = find_garbage(store, keep_runs=keep_runs, keep_days=keep_days, needed=needed)
    for item in garbage:
        relative = item.path.relative_to(store.root)
        typer.echo(f"{item.size / 1e6:10.1f} MB  {relative}  ({item.reason})")
    if dry_run:
        typer.echo(f"would free {sum(item.size for item in garbage) / 1e6:.1f} MB")
    else:
        typer.echo(f"freed {collect(store, garbage) / 1e6:.1f} MB")


@contextmanager
def _ctrl_c_is_no_accident() -> Iterator[None]:
    """Say what a person who stopped a run wants to know."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; the next run goes on from here", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _open(recipe: Path, overrides: list[str] | None, from_stage: str | None = None) -> Pipeline:
    from posttrain.errors import UsageError
    from posttrain.home import Home
    from posttrain.opening import open_pipeline

    pipeline = open_pipeline(recipe, overrides or [], Home.find().store)
    names = [step.name for step in pipeline.steps]
    if from_stage is not None and from_stage not in names:
        raise UsageError(f"--from {from_stage}: the stages are {', '.join(names)}")
    return pipeline


def _plan(pipeline: Pipeline, from_stage: str | None) -> Plan:
    from posttrain.home import Home
    from posttrain.plan import make_plan

    return make_plan(pipeline, Home.find().store, from_stage)


def _run_flow(
    recipe: Path,
    overrides: list[str] | None,
    from_stage: str | None,
    console: Console,
    keeper: OutcomeKeeper,
    verbose: bool,
) -> None:
    """Run the Prefect flow in this process; raises what a stage raised."""
    from posttrain import console as show
    from posttrain import run as runs

    _prepare_prefect(console, verbose)
    from flows.post_training import post_training

    runs.console_observers[:] = [show.observer(console), keeper]
    state = post_training(str(recipe), overrides or [], from_stage, return_state=True)
    if not state.is_completed() and state.name != "Rejected":
        state.result()  # raises the stage's own error


def run_sweep_flow(request: SweepRequest, console: Console, verbose: bool) -> None:
    """Run a sweep's Prefect flow in this process; raises what stopped it."""
    with _ctrl_c_is_no_accident():
        _prepare_prefect(console, verbose)
        from flows.sweep import sweep as flow

        flow(
            *(str(request.file), list(request.over), list(request.overrides), request.metric),
            *(request.maximize, request.trials, request.seeds, request.prune),
        )


def _prepare_prefect(console: Console, verbose: bool) -> None:
    """Settings that Prefect needs before it is imported, and a running server if there is one."""
    from posttrain import servers
    from posttrain.home import Home

    servers.prefer_quiet_prefect()
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_ROOT_LEVEL", "ERROR")
    if servers.use_running_prefect(Home.find()) is None:
        console.print("Starting a Prefect server for this run ...", style="dim")


def _record_reuse(pipeline: Pipeline, plan: Plan) -> None:
    """A run in which nothing was done still protects what it used from garbage collection."""
    from posttrain.home import Home
    from posttrain.run import PipelineRun

    run = PipelineRun(Home.find(), pipeline)
    run.record(plan.artifacts())


def _summary(
    pipeline: Pipeline, artifacts: dict[str, Artifact], keeper: OutcomeKeeper
) -> dict[str, object]:
    from posttrain.console import final_model
    from posttrain.run import stage_rows, verdict_of

    model = final_model(pipeline, artifacts)
    return {
        "recipe": pipeline.recipe.name,
        "verdict": verdict_of(pipeline, artifacts),
        "model": str(model.path) if model else None,
        "stages": stage_rows(pipeline, artifacts, keeper.outcomes),
    }


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))
