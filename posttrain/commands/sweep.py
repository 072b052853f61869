"""`posttrain sweep`: one recipe, several values, and which of them to take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.terminal import make_console

if TYPE_CHECKING:
    pass


def sweep(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as configs/quickstart.yaml.")
    ],
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            metavar="KEY=VALUES",
            help="Values to try, such as sft.adapter.rank=4,8,16,32, or a range to draw from, such "
            "as sft.optimization.learning_rate=1e-5..1e-3. Several keys: all combinations.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As for `run`; the same in all trials."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE.METRIC",
            help="The number that decides, or the name of a gate: its largest improvement. Where a "
            "gate decides on the number, only trials that pass it are chosen. Default: the "
            "held-out loss of the last training stage that the keys change, or for keys of a merge "
            "the gate. Trials go no further than they have to.",
        ),
    ] = None,
    maximize: Annotated[
        bool, typer.Option("--maximize", help="More of --metric is better.")
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Trials to draw where a key has a range. Default: 20."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="K", help="Run each trial with K seeds.")] = 1,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop hopeless trials early.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Prefect's log as well.")
    ] = False,
) -> None:
    """Train RECIPE with several values of its keys, and choose among them.

    Stages before the first one that a key reaches are run once. Of keys such as a rank the smallest
    value within one standard error of the best is chosen. A sweep that was stopped goes on.

    How far to go back towards the base, by the gate: --over merge.weight=0.3,0.5,0.7,0.9,1.0
    """
    from posttrain import cli
    from posttrain.home import Home
    from posttrain.run import console_observers
    from posttrain.sweeping.board import board, show_result
    from posttrain.sweeping.gating import NothingPasses
    from posttrain.sweeping.plan import SweepRequest, plan_sweep
    from posttrain.sweeping.run import console_watchers

    request = SweepRequest(
        recipe, tuple(over), tuple(overrides or ()), metric, maximize, trials, seeds, prune
    )
    home = Home.find()
    plan = plan_sweep(request, home.store)
    console = make_console(stderr=as_json)
    watch = board(console, plan)
    console_observers[:], console_watchers[:] = [watch], [watch]
    rejected = False
    try:
        cli.run_sweep_flow(request, console, verbose)
    except NothingPasses:
        rejected = True
    finally:
        watch.close()
    if as_json:
        typer.echo(watch.record.model_dump_json(indent=2))
    else:
        show_result(console, watch.record, plan.folder(home.root))
    if rejected:
        raise typer.Exit(NothingPasses.exit_code)
