"""Prefect tasks, one file a stage: a step in, an artifact out."""

from tasks.contamination import contamination
from tasks.convert import convert
from tasks.dpo import dpo
from tasks.evaluate import evaluate
from tasks.gate import gate
from tasks.grpo import grpo
from tasks.judge import judge
from tasks.kto import kto
from tasks.merge import merge
from tasks.mix import mix
from tasks.orpo import orpo
from tasks.ppo import ppo
from tasks.preflight import preflight
from tasks.prepare import prepare
from tasks.pretrain import pretrain
from tasks.reference import reference
from tasks.register import register
from tasks.reward import reward
from tasks.rloo import rloo
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
        reward,
        ppo,
        grpo,
        rloo,
        reference,
        dpo,
        orpo,
        kto,
        merge,
        evaluate,
        judge,
        gate,
        register,
    )
}
"""The task of each kind of stage."""

__all__ = ["STAGE_TASKS"]
