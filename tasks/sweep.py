"""`trial`: one combination of a sweep's values, as far as its objective."""

from __future__ import annotations

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from posttrain.execute import Outcome
from posttrain.sweeping.page import ending
from posttrain.sweeping.record import Trial
from posttrain.sweeping.run import Proposal, SweepRun
from tasks.stage import FlowObserver


@task(name="trial", task_run_name="{proposal.label}", cache_policy=NO_CACHE, persist_result=False)
def trial(proposal: Proposal, shared: list[Outcome], run: SweepRun) -> State[Trial]:
    """Train with one combination of values; the state's name says how it ended.

    `shared` are the outcomes that all trials take, for Prefect to draw the graph by. A failed
    trial is a failed task and no failed sweep.
    """
    del shared
    done = run.run_trial(proposal, FlowObserver)
    if done.status == "failed":
        return Failed(message=done.message)
    if done.status == "pruned":
        return Completed(name="Pruned", message=done.message, data=done)
    message = f"{run.plan.objective.name} {done.value:.4f}, {ending(done)}"
    return Completed(name="Cached" if done.reused else "Completed", message=message, data=done)
