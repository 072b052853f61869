"""The data stage: how fast, how right, how much memory; beside datasketch and datatrove.

    python benchmarks/data.py --peers-python .venv-peers/bin/python

All contestants do the same work on two cores, JSONL to JSONL, in turns (A B C A B C). The last
line of output is one JSON object:

    docs_per_s           removal of near duplicates, 16 bands of 8 values
    docs_per_s_32x4      the same with 32 bands of 4 values
    vs_datasketch        how many times as fast as datasketch with xxHash and 16 bands, which works
                         in one process (vs_datasketch_2_processes: with sketches made in two)
    vs_datatrove         the same for datatrove with words split at white space
    vs_datatrove_stock   the same for datatrove as it comes, measured on fewer documents
    recall               share of planted pairs found, of those with a similarity of at least 0.8
    false_drops          documents removed though nothing is as similar as 0.8
    stage_docs_per_s     the whole of `posttrain data prepare`, start-up included
    peak_gib_1m          most memory the stage takes for a million documents, all processes summed

and, under `near`, `stage`, `memory` and `machine`, what these were computed from. Speed is the best
of all rounds, from the opening of the input to the closing of the output; a stage's is the wall
time of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from corpus import write_corpus
from judge import Judge
from measure import Cost, machine, run, use_cores

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
SECTIONS = ("near", "peers", "stage", "memory")
MILLION = 1_000_000

Command: TypeAlias = list[str | Path]


def main() -> None:
    """Measure and print."""
    given = arguments()
    use_cores(given.cores)
    figures: dict[str, object] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="posttrain-data-") as folder:
        corpus = given.corpus
        if corpus is None and given.only != {"memory"}:
            corpus = made_corpus(Path(folder) / "corpus", given.docs, truth=True)
        if {"near", "peers"} & given.only:
            figures |= near_figures(corpus, Path(folder), given)
        if "stage" in given.only:
            figures |= stage_figures(corpus, Path(folder), given)
        if "memory" in given.only:
            figures |= memory_figures(given.memory_docs, Path(folder), given)
    print(json.dumps({key: figures[key] for key in sorted(figures, key=is_detail)}))


def arguments() -> argparse.Namespace:
    """What the user asked for, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--corpus", type=Path, help="folder with part-*.jsonl and truth.jsonl; else one is made")
    option("--docs", type=int, default=100_000, help="documents of the corpus that is made")
    option("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python",
           help="interpreter with benchmarks/peers/requirements.txt")  # fmt: skip
    option("--rounds", type=int, default=2)
    option("--cores", type=int, default=2)
    option("--stock-docs", type=int, default=5_000, help="documents for datatrove as it comes")
    option("--memory-docs", type=integers, default=(20_000, 100_000, MILLION))
    option("--hub", type=Path, help="folder laid out like the Hub, with mmlu and hellaswag; "
           "without it the stage does not decontaminate")  # fmt: skip
    option("--only", type=lambda text: set(text.split(",")), default=set(SECTIONS),
           help=f"some of {','.join(SECTIONS)}")  # fmt: skip
    given = parser.parse_args()
    if unknown := given.only - set(SECTIONS):
        parser.error(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if "peers" in given.only and not given.peers_python.exists():
        parser.error(
            f"--peers-python: {given.peers_python} does not exist; make it as "
            "benchmarks/peers/requirements.txt says, or leave the peers out by --only near,stage"
        )
    return given


def integers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them, ascending."""
    return tuple(sorted(int(number) for number in text.split(",")))


def is_detail(key: str) -> bool:
    """Whether a figure is there to look up, and so stands last."""
    return key in {"machine", "near", "stage", "memory"}


# ------------------------------------------------------------------------- near duplicates


@dataclass
class Contestant:
    """A program that removes near duplicates, and its results round by round."""

    name: str
    command: Command
    corpus: Path
    judge: Judge
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    verdict: dict[str, object] = field(default_factory=dict)

    def compete(self, cores: int) -> None:
        """Run once; judge what was kept the first time."""
        with tempfile.TemporaryDirectory(prefix="posttrain-kept-") as kept:
            options: Command = ["--corpus", self.corpus, "--out", kept]
            if "--processes" not in self.command:
                options += ["--processes", str(cores)]
            cost = run([*self.command, *options])
            self.costs.append(cost)
            timing = json.loads(cost.stdout.splitlines()[-1])
            self.seconds.append(timing["seconds"])
            self.cpu_s.append(timing["cpu_s"])
            self.verdict = self.verdict or self.judge.verdict(Path(kept))
        seconds = self.seconds[-1]
        say(f"{self.name}: {seconds:.2f} s, {len(self.judge) / seconds:,.0f} documents/s")

    @property
    def docs_per_s(self) -> float:
        """Of the best round."""
        return len(self.judge) / min(self.seconds)

    def details(self) -> dict[str, object]:
        """All that was measured."""
        return {
            "docs": len(self.judge),
            "docs_per_s": round(self.docs_per_s),
            "seconds": self.seconds,
            "cpu_s": self.cpu_s,
            "process_wall_s": [round(cost.wall_s, 2) for cost in self.costs],
            "process_cpu_s": [round(cost.cpu_s, 2) for cost in self.costs],
            **self.verdict,
        }


def near_figures(corpus: Path, folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """All contestants in turns, on the same documents."""
    contestants = contestants_of(corpus, folder, given)
    for _ in range(given.rounds):
        for contestant in contestants:
            contestant.compete(given.cores)
    speed = {contestant.name: contestant.docs_per_s for contestant in contestants}
    verdicts = {contestant.name: contestant.verdict for contestant in contestants}
    ours = ("ours_16x8", "ours_32x4")
    compared = ("datasketch", "datasketch_2_processes", "datatrove", "datatrove_stock")
    return {
        "docs_per_s": round(speed["ours_16x8"]),
        "docs_per_s_32x4": round(speed["ours_32x4"]),
        **{
            f"vs_{peer}": round(speed["ours_16x8"] / speed[peer], 2)
            for peer in compared
            if peer in speed
        },
        "recall": {name.removeprefix("ours_"): verdicts[name]["recall"] for name in ours},
        "false_drops": sum(int(str(verdicts[name]["false_drops"])) for name in ours),
        "near": {contestant.name: contestant.details() for contestant in contestants},
    }


def contestants_of(corpus: Path, folder: Path, given: argparse.Namespace) -> list[Contestant]:
    """Ours, and the peers where they are asked for."""
    judge = Judge(corpus)
    ours: Command = [sys.executable, PEERS / "ours.py", "--bands"]
    contestants = [
        Contestant("ours_16x8", [*ours, "16"], corpus, judge),
        Contestant("ours_32x4", [*ours, "32"], corpus, judge),
    ]
    if "peers" not in given.only:
        return contestants
    small = write_sample(corpus, folder / "sample", given.stock_docs)
    datasketch: Command = [given.peers_python, PEERS / "with_datasketch.py"]
    datatrove: Command = [given.peers_python, PEERS / "with_datatrove.py"]
    one = ["--processes", "1"]
    return [
        *contestants,
        Contestant("datasketch", [*datasketch, *one], corpus, judge),
        Contestant("datasketch_2_processes", datasketch, corpus, judge),
        Contestant("datatrove", datatrove, corpus, judge),
        Contestant("datatrove_stock", [*datatrove, "--stock"], small, Judge(small)),
    ]


def write_sample(corpus: Path, folder: Path, docs: int) -> Path:
    """Fewer documents of a corpus, with the same share of planted pairs, under their old ids."""
    folder.mkdir()
    planted = [json.loads(line) for line in (corpus / "truth.jsonl").open()]
    parts = sorted(corpus.glob("part-*.jsonl"))
    total = sum(1 for part in parts for _ in part.open("rb"))
    step = max(1, total // docs)
    chosen = planted[::step]
    copies = {pair["id"] for pair in planted}
    wanted = {pair[end] for pair in chosen for end in ("id", "src")}
    others = (number for number in range(total) if number not in copies and number not in wanted)
    wanted |= set(list(others)[: max(0, docs - len(wanted))])
    for part in parts:
        with part.open("rb") as lines, (folder / part.name).open("wb") as copy:
            copy.writelines(line for line in lines if json.loads(line)["id"] in wanted)
    with (folder / "truth.jsonl").open("w") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in chosen)
    return folder


# --------------------------------------------------------------------------- the whole stage


def stage_figures(corpus: Path, folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """The whole stage on the corpus, best of all rounds."""
    docs = count_lines(corpus)
    costs, reports = [], []
    for _ in range(given.rounds):
        cost, report = prepared(corpus, folder, given.hub)
        costs.append(cost)
        reports.append(report)
        say(f"stage: {cost.wall_s:.1f} s, {docs / cost.wall_s:,.0f} documents/s")
    best = min(range(given.rounds), key=lambda number: costs[number].wall_s)
    return {
        "stage_docs_per_s": round(docs / costs[best].wall_s),
        "stage": {
            "docs": docs,
            "process_wall_s": [round(cost.wall_s, 2) for cost in costs],
            "process_cpu_s": [round(cost.cpu_s, 2) for cost in costs],
            "decontaminated": given.hub is not None,
            **reports[best],
        },
    }


def memory_figures(
    sizes: Sequence[int], folder: Path, given: argparse.Namespace
) -> dict[str, object]:
    """Memory of the stage by number of documents, of 150 words each."""
    runs: list[dict[str, object]] = []
    peaks: dict[int, int] = {}
    for docs in sizes:
        with removed_after(folder / f"corpus-{docs}") as corpus:
            made_corpus(corpus, docs, truth=False)
            cost, report = prepared(corpus, folder, given.hub, sample_memory=True)
        say(f"memory, {docs:,} documents: {cost.peak_bytes / 2**30:.2f} GiB, {cost.wall_s:.0f} s")
        peaks[docs] = cost.peak_bytes
        runs.append(
            {
                "docs": docs,
                "peak_bytes": cost.peak_bytes,
                "peak_anonymous_bytes": cost.peak_anonymous_bytes,
                "process_wall_s": round(cost.wall_s, 2),
                "process_cpu_s": round(cost.cpu_s, 2),
                "docs_per_s": round(docs / cost.wall_s),
                **report,
            }
        )
    memory: dict[str, object] = {"runs": runs}
    if len(sizes) > 1:
        fewer, more = sizes[-2:]
        memory["bytes_per_document"] = round((peaks[more] - peaks[fewer]) / (more - fewer))
    million = {"peak_gib_1m": round(peaks[MILLION] / 2**30, 2)} if MILLION in peaks else {}
    return {**million, "memory": memory}


def prepared(
    corpus: Path, folder: Path, hub: Path | None, *, sample_memory: bool = False
) -> tuple[Cost, dict[str, object]]:
    """One run of the stage, and what its report says.

    Runs share a home, so that the index of the benchmarks' items is made once, as in daily use: the
    first round holds it, the others do not.
    """
    home = folder / "home"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "out"
        command: Command = [
            sys.executable,
            "-m",
            "posttrain",
            "data",
            "prepare",
            corpus / "part-*.jsonl",
        ]
        command += ["--near-dedup", "0.8", "--quality", "--pii", "replace", "--language", "en"]
        if hub:
            command += ["--decontaminate", "mmlu,hellaswag", "--offline-root", hub.resolve()]
        environment = {**os.environ, "POSTTRAIN_HOME": str(home)}
        cost = run([*command, "--out", out], environment=environment, sample_memory=sample_memory)
        return cost, summary(json.loads((out / "report.json").read_text()))


def summary(report: dict[str, Any]) -> dict[str, object]:
    """Of a stage's report: seconds by phase, and rows dropped and edited by each operation."""
    return {
        "phases_s": {phase: round(seconds, 2) for phase, seconds in report["seconds"].items()},
        "operations": {
            step["operation"]: {
                "rows": step["rows"],
                "dropped": sum(step["dropped"].values()),
                "edited": step["edited"],
            }
            for step in report["funnel"]
        },
    }


# ----------------------------------------------------------------------------------- corpora


def made_corpus(folder: Path, docs: int, *, truth: bool) -> Path:
    """A corpus of documents of 150 words."""
    begin = time.perf_counter()
    write_corpus(folder, docs, truth=truth)
    say(f"corpus of {docs:,} documents written in {time.perf_counter() - begin:.0f} s")
    return folder


def count_lines(corpus: Path) -> int:
    """Documents of a corpus."""
    return sum(1 for part in corpus.glob("part-*.jsonl") for _ in part.open("rb"))


@contextmanager
def removed_after(folder: Path) -> Iterator[Path]:
    """A folder that is removed with all that is in it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as made:
        yield Path(made)


def say(line: str) -> None:
    """Progress, beside the figures."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
