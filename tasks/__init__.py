"""Prefect tasks, one file a stage: a step in, an artifact out."""

from tasks.contamination import contamination
from tasks.convert import convert
from tasks.evaluate import evaluate
from tasks.gate import gate
from tasks.merge import merge
from tasks.mix import mix
from tasks.preflight import preflight
from tasks.prepare import prepare
from tasks.pretrain import pretrain
from tasks.sft import sft

STAGE_TASKS = {
    task.name: task
    for task in (
        convert,
        preflight,
        contamination,
        prepare,
        mix,
        pretrain,
        sft,
        merge,
        evaluate,
        gate,
    )
}
"""The task of each kind of stage."""

__all__ = ["STAGE_TASKS"]
