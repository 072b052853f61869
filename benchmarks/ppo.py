"""The alignment stages: PPO beside TRL's last PPOTrainer, DPO beside a plain TRL script.

    python benchmarks/ppo.py --pairs pairs.json --model MODEL_FOLDER

All contestants work on the same cores with the same rows, models and settings, in turns (A B A B),
each in a process of its own. The first update or step is not counted. The last line of output is
one JSON object:

    vs_trl            answers a second of `ppo`, writing them and learning from them, over those of
                      TRL 1.12's PPOTrainer, to prompts as different in length as real ones
    vs_trl_equal_prompts
                      the same to prompts of one length, where nothing is padded
    dpo_ratio         tokens a second of `dpo`'s steps over those of a plain script's
    dpo_cached_ratio  seconds of `dpo`'s steps with `reference: computed` for two epochs, over those
                      with `reference: cached` and those that compute the cache

and, under `ppo`, `dpo` and `machine`, what these were computed from. Every figure is the median
over the rounds of the ratio within a round; the least and the greatest stand beside it, and the
ratios of whole processes, imports and saving included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made import (
    MOST_PROMPT_TOKENS,
    made_prompts,
    make_model,
    make_reward_model,
    parameters,
    short_pairs,
)
from measure import machine, use_cores
from turns import (
    ROOT,
    Run,
    as_json,
    events,
    middle,
    paired,
    program,
    progress,
    rounds,
    spread,
    stage,
)

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, plain_messages
from posttrain.events import Phase
from posttrain.hardware import resolve_dtype
from posttrain.stages.program import StageInput

PEERS = Path(__file__).parent / "peers"
SECTIONS = ("ppo", "dpo")
HELD_OUT = 4
"""Rows on the validation side, of which one is looked at."""
PASSES, TEMPERATURE, PPO_RATE = 4, 1.0, 3e-6
PROMPTS = ("varied", "equal")
DPO_RATE = 2e-4
"""What a plain script's `arguments` say."""


def main() -> None:
    """Measure and print."""
    given = arguments()
    use_cores(given.cores)
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="posttrain-ppo-") as name:
        folder = Path(name)
        if "ppo" in given.only:
            figures |= ppo_figures(folder, given)
        if "dpo" in given.only:
            figures |= dpo_figures(folder, given)
    print(json.dumps({key: figures[key] for key in sorted(figures, key=is_detail)}))


def arguments() -> argparse.Namespace:
    """What the user asked for, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--peers-python", type=Path, default=ROOT / ".venv-peers-ppo/bin/python",
           help="interpreter with benchmarks/peers/requirements-ppo.txt")  # fmt: skip
    option("--rounds", type=int, default=3)
    option("--cores", type=int, default=2)
    option("--only", type=lambda text: set(text.split(",")), default=set(SECTIONS),
           help=f"some of {','.join(SECTIONS)}")  # fmt: skip
    option("--updates", type=int, default=4, help="of PPO; the first is not timed")
    option("--batch", type=int, default=32, help="answers of an update")
    option("--micro-batch", type=int, default=8, help="answers of a forward pass that learns")
    option("--answer-tokens", type=int, default=53, help="length of every answer; TRL's default")
    option("--pairs", type=Path, help="file of preferences; else pairs are made")
    option("--model", type=Path, help="model folder for DPO; else a random one is made")
    option("--dpo-rows", type=int, help="pairs; default 64, and 16 with --model")
    option("--dpo-batch", type=int, default=4, help="pairs of a step")
    option("--max-length", type=int, default=256, help="pairs with longer answers are not taken")
    given = parser.parse_args()
    given.peers_python = given.peers_python.absolute()
    if unknown := given.only - set(SECTIONS):
        parser.error(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if "ppo" in given.only and not given.peers_python.exists():
        parser.error(
            f"--peers-python: {given.peers_python} does not exist; make it as "
            "benchmarks/peers/requirements-ppo.txt says, or leave PPO out by --only dpo"
        )
    return given


def is_detail(key: str) -> bool:
    """Whether a figure is there to look up, and so stands last."""
    return key in {"machine", "ppo", "dpo"}


# ------------------------------------------------------------------------------------- PPO


def ppo_figures(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Answers a second of both, in turns."""
    model, reward = folder / "policy", folder / "reward"
    make_model(model)
    make_reward_model(model, reward)
    prompts = {kind: made_prompts(kind, model, given.updates * given.batch) for kind in PROMPTS}
    settings = {
        "parameters": parameters(model),
        "updates": given.updates,
        "answers_an_update": given.batch,
        "answers_a_pass": given.micro_batch,
        "answer_tokens": given.answer_tokens,
        "passes": PASSES,
        "temperature": TEMPERATURE,
        "dtype": "float32",
    }
    details: dict[str, Any] = {"settings": settings}
    for kind in PROMPTS:
        case = PpoCase(folder, model, reward, prompts[kind])
        contestants = {
            "theirs": lambda case=case: ppo_theirs(case, given),
            "ours": lambda case=case: ppo_ours(case, given),
        }
        runs = rounds(contestants, given.rounds, f"answers/s to {kind} prompts")
        both = paired(runs, "ours", "theirs")
        details[kind] = {
            "ratio": spread([ours.speed / theirs.speed for ours, theirs in both]),
            "whole_process_ratio": spread([theirs.whole_s / ours.whole_s for ours, theirs in both]),
            "runs": as_json(runs, "answers_per_s"),
        }
    return {
        "vs_trl": details["varied"]["ratio"]["median"],
        "vs_trl_equal_prompts": details["equal"]["ratio"]["median"],
        "ppo": details,
    }


@dataclass(frozen=True)
class PpoCase:
    """What both learn from."""

    folder: Path
    model: Path
    reward: Path
    prompts: Sequence[Chat]


def ppo_theirs(case: PpoCase, given: argparse.Namespace) -> Run:
    """TRL's trainer."""
    own = Path(tempfile.mkdtemp(dir=case.folder, prefix="ppo-theirs"))
    rows = [json.dumps(plain_messages(row.messages)) for row in case.prompts]
    (own / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model": str(case.model),
        "reward": str(case.reward),
        "prompts": str(own / "prompts.jsonl"),
        "output": str(own / "model"),
        "batch_size": given.batch,
        "micro_batch_size": given.micro_batch,
        "updates": given.updates,
        "passes": PASSES,
        "answer_tokens": given.answer_tokens,
        "temperature": TEMPERATURE,
        "learning_rate": PPO_RATE,
    }
    cost = program([given.peers_python, PEERS / "with_trl_ppo.py", json.dumps(settings)])
    found = json.loads(cost.stdout.splitlines()[-1])
    if found["ends"]:
        sys.exit(f"{found['ends']} answers of TRL's ended early: the work is not the same")
    return Run(found["answers"], found["train_s"], cost.wall_s, cost.cpu_s)


def ppo_ours(case: PpoCase, given: argparse.Namespace) -> Run:
    """Our stage's program."""
    own = Path(tempfile.mkdtemp(dir=case.folder, prefix="ppo-ours"))
    sides = {"train": case.prompts, "validation": case.prompts[:HELD_OUT]}
    write_dataset(own / "prompts", "chats", sides)  # type: ignore[arg-type]
    config: dict[str, object] = {
        "dataset": "prompts",
        "reward": "reward",
        "adapter": None,
        "max_steps": given.updates,
        "passes": PASSES,
        "minibatches": 1,
        "optimization": {"learning_rate": PPO_RATE},
        "batching": {"batch_size": given.batch, "micro_batch_size": given.micro_batch},
        "rollout": {
            "temperature": TEMPERATURE,
            "max_prompt_tokens": MOST_PROMPT_TOKENS,
            "max_new_tokens": given.answer_tokens,
            "batch_size": given.batch,
        },
        # TRL has no such bound: all passes are made.
        "clip": {"max_update_kl": None},
        "shaping": {"missing_eos_penalty": 0},
        "validation": {"every_steps": given.updates, "patience": None, "max_rows": 1},
        "dtype": "float32",
    }
    inputs = {
        "model": StageInput(kind="model", path=str(case.model), digest="model"),
        "dataset": StageInput(kind="dataset", path=str(own / "prompts"), digest="dataset"),
        "reward:reward": StageInput(kind="reward", path=str(case.reward), digest="reward"),
    }
    cost = stage(own / "stage", "ppo", config, inputs)
    steps = progress(own / "stage")
    for step in steps:
        if (step.values["length"], step.values["steps_taken"]) != (given.answer_tokens, PASSES):
            sys.exit(f"answers ended early or passes were left out: {step.values}")
    seconds = steps[-1].time - steps[0].time
    return Run(given.batch * (len(steps) - 1), seconds, cost.wall_s, cost.cpu_s)


# ------------------------------------------------------------------------------------- DPO


def dpo_figures(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both, and what a cached reference saves, in turns."""
    model = given.model
    if model is None:
        model = folder / "dpo-model"
        make_model(model)
    case = DpoCase.write(folder, model, given)
    runs = rounds(
        {
            "theirs": lambda: dpo_theirs(case),
            "ours": lambda: dpo_ours(case, None),
            "ours_cached": lambda: dpo_cached(case),
        },
        given.rounds,
        "tokens/s",
    )
    beside = paired(runs, "ours", "theirs")
    check_same_work(beside)
    saved = paired(runs, "ours", "ours_cached")
    speed = [ours.speed / theirs.speed for ours, theirs in beside]
    cached = [computed.seconds / cached.seconds for computed, cached in saved]
    details = {
        "ratio": spread(speed),
        "whole_process_ratio": spread([theirs.whole_s / ours.whole_s for ours, theirs in beside]),
        "cached_ratio": spread(cached),
        "cached_whole_process_ratio": spread([one.whole_s / two.whole_s for one, two in saved]),
        "settings": {
            "parameters": parameters(model),
            "pairs": case.rows,
            "epochs": 2,
            "pairs_a_step": case.batch_size,
            "max_length": case.max_length,
            "lora_rank": 16,
            "dtype": case.dtype,
        },
        "runs": as_json(runs, "tokens_per_s"),
    }
    return {"dpo_ratio": middle(speed), "dpo_cached_ratio": middle(cached), "dpo": details}


@dataclass(frozen=True)
class DpoCase:
    """Rows, model and settings of the comparison."""

    folder: Path
    model: Path
    rows: int
    batch_size: int
    max_length: int
    dtype: str

    @classmethod
    def write(cls, folder: Path, model: Path, given: argparse.Namespace) -> DpoCase:
        """Write the pairs under `folder` in both forms."""
        rows = given.dpo_rows or (16 if given.model else 64)
        pairs = short_pairs(given.pairs, model, given.max_length, rows + HELD_OUT)
        rows = min(rows, len(pairs) - HELD_OUT) // given.dpo_batch * given.dpo_batch
        sides = {"train": pairs[:rows], "validation": pairs[-HELD_OUT:]}
        write_dataset(folder / "pairs", "preferences", sides)  # type: ignore[arg-type]
        plain = [
            {part: plain_messages(getattr(row, part)) for part in ("prompt", "chosen", "rejected")}
            for row in pairs[:rows]
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
        return cls(folder, model, rows, given.dpo_batch, given.max_length, resolve_dtype("auto"))

    @property
    def steps(self) -> int:
        """Optimizer steps of two epochs."""
        return 2 * self.rows // self.batch_size

    @property
    def inputs(self) -> dict[str, StageInput]:
        """Of the stages that read the pairs."""
        dataset = str(self.folder / "pairs")
        return {
            "model": StageInput(kind="model", path=str(self.model), digest="model"),
            "dataset": StageInput(kind="dataset", path=dataset, digest="dataset"),
        }


def check_same_work(runs: Sequence[tuple[Run, Run]]) -> None:
    """Refuse to compare runs over other rows.

    A few tokens differ: TRL's sequences end with what the template writes behind an answer, and
    ours with the token that ends it.
    """
    for ours, theirs in runs:
        if abs(ours.done / theirs.done - 1) > 0.03:
            sys.exit(f"posttrain read {ours.done} tokens, TRL {theirs.done}: not the same work")


def dpo_theirs(case: DpoCase) -> Run:
    """The plain script."""
    own = Path(tempfile.mkdtemp(dir=case.folder, prefix="dpo-theirs"))
    settings = {
        "model": str(case.model),
        "rows": str(case.folder / "pairs.jsonl"),
        "dtype": case.dtype,
        "epochs": 2,
        "batch_size": case.batch_size,
        "micro_batch_size": case.batch_size,
        "max_length": case.max_length,
        "output": str(own / "model"),
    }
    cost = program([sys.executable, PEERS / "with_trl_dpo.py", json.dumps(settings)])
    found = json.loads(cost.stdout.splitlines()[-1])
    return Run(found["tokens"], found["train_s"], cost.wall_s, cost.cpu_s)


def dpo_ours(case: DpoCase, cache: Path | None) -> Run:
    """Our stage's program, with the reference's log-probabilities from a cache if there is one."""
    own = Path(tempfile.mkdtemp(dir=case.folder, prefix="dpo-ours"))
    config: dict[str, object] = {
        "dataset": "pairs",
        "adapter": {"dropout": 0.0},
        "epochs": 2,
        "reference": "computed" if cache is None else "cached",
        "optimization": {"learning_rate": DPO_RATE},
        "batching": {
            "batch_size": case.batch_size,
            "micro_batch_size": case.batch_size,
            "max_length": case.max_length,
            "padding_free": False,
        },
        "validation": {"every_steps": case.steps, "patience": None, "max_rows": 1},
        "dtype": case.dtype,
    }
    inputs = case.inputs
    if cache is not None:
        inputs["reference"] = StageInput(kind="report", path=str(cache), digest="reference")
    cost = stage(own, "dpo", config, inputs)
    steps = progress(own)
    record = json.loads((own / "output/training.json").read_text())
    tokens = sum(step["tokens"] for step in record["steps"][1:])
    return Run(tokens, steps[-1].time - steps[0].time, cost.wall_s, cost.cpu_s)


def dpo_cached(case: DpoCase) -> Run:
    """The `reference` stage, then our program with what it left."""
    own = Path(tempfile.mkdtemp(dir=case.folder, prefix="reference"))
    config: dict[str, object] = {
        "method": "dpo",
        "max_length": case.max_length,
        "max_held_out_rows": 1,
        "dtype": case.dtype,
        "micro_batch_size": case.batch_size,
    }
    cost = stage(own, "reference", config, case.inputs)
    trained = dpo_ours(case, own / "output")
    # Steps are timed from the end of the first: as much of the cache is charged to the others.
    share = (case.steps - 1) / case.steps
    seconds = trained.seconds + share * scoring_seconds(own)
    whole_s, cpu_s = cost.wall_s + trained.whole_s, cost.cpu_s + trained.cpu_s
    return Run(trained.done, seconds, whole_s, cpu_s)


def scoring_seconds(stage_dir: Path) -> float:
    """Of the `reference` stage without start-up: from the last phase it announced to its end."""
    begin = [event.time for event in events(stage_dir) if isinstance(event, Phase)][-1]
    return (stage_dir / "result.json").stat().st_mtime - begin


if __name__ == "__main__":
    main()
