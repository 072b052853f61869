"""A sweep: a recipe trained with several values of its keys, and which of them to take."""

from __future__ import annotations

from pathlib import Path

from prefect import State, flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed

from posttrain.home import Home
from posttrain.sweeping.page import headline, table_markdown
from posttrain.sweeping.plan import SweepRequest, plan_sweep
from posttrain.sweeping.run import SweepRun
from tasks import STAGE_TASKS
from tasks.stage import untracked
from tasks.sweep import trial


@flow(name="sweep", persist_result=False)
def sweep(
    recipe: str,
    over: list[str],
    overrides: list[str] | None = None,
    metric: str | None = None,
    maximize: bool = False,
    trials: int | None = None,
    seeds: int = 1,
    prune: bool = True,
) -> State[None]:
    """Train a recipe with several values of its keys, up to the number that decides.

    Args:
        recipe: The recipe's file.
        over: Keys with their values, each as KEY=A,B,C or KEY=LOW..HIGH, such as
            sft.adapter.rank=4,8,16,32.
        overrides: Other values to change, each as key=value.
        metric: The number that decides, as STAGE.METRIC, or a gate's name. Default: the held-out
            loss of the last training stage that the keys change, or the gate where only a merge is
            swept.
        maximize: Whether more of it is better.
        trials: Combinations to try where a key has a range; lists are tried in full.
        seeds: Runs of each trial with different seeds.
        prune: Stop trials early that are hopeless.
    """
    home = Home.find()
    request = SweepRequest(
        Path(recipe), tuple(over), tuple(overrides or ()), metric, maximize, trials, seeds, prune
    )
    plan = plan_sweep(request, home.store)
    with SweepRun(home, plan, flow_run.id) as run:
        for step in plan.shared_steps():
            STAGE_TASKS[step.stage](step, run.inputs_of(step), untracked(run))
        shared = list(run.outcomes.values())
        for proposal in run.proposals():
            state = trial(proposal, shared, untracked(run), return_state=True)
            if proposal.number not in run.tried:  # not the trial failed but the sweep
                state.result()
        _keep_table(run)
        run.finish()
    return Completed(message=headline(run.result))


def _keep_table(run: SweepRun) -> None:
    """The table, and where the page with the plot is."""
    page = f"\nThe plot: `{run.page}`"
    create_markdown_artifact(table_markdown(run.result) + page, key="sweep")
    address = run.tracker.artifacts_page()
    if address is not None:
        create_link_artifact(address, "sweep.html in MLflow", key="sweep-page")
