"""Pairs as JSON lines of the format `preference`, and beside them what made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from posttrain import __version__
from posttrain.preferences.key import Turns
from posttrain.preferences.pairing import Pair, PairReport, PairSettings
from posttrain.preferences.sampling import Sampling
from posttrain.preferences.sources import Source, short_name
from posttrain.store.files import file_sha256, write_bytes, write_json
from posttrain.store.manifest import package_versions


class Named(BaseModel):
    """A model or a reward, by name and content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str


class PairsRecord(BaseModel):
    """What the file beside the pairs says: `NAME.jsonl.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    """Of the pairs."""
    answers_sha256: str
    """Of the sampled answers."""
    model: Named
    reward: Named
    prompts: tuple[str, ...]
    """As they were named, without folders."""
    sampling: dict[str, float | int | str]
    pairing: PairSettings
    report: PairReport
    packages: dict[str, str]
    posttrain_version: str = __version__


def answers_file(out: Path) -> Path:
    """Where the sampled answers of some pairs stand."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.answers.jsonl")


def record_file(out: Path) -> Path:
    """Where it stands what made some pairs."""
    return out.with_name(f"{out.name}.json")


def write_pairs(
    out: Path,
    pairs: Sequence[Pair],
    report: PairReport,
    model: Source,
    reward: Source,
    prompts: Sequence[str],
    sampling: Sampling,
    pairing: PairSettings,
) -> PairsRecord:
    """Write the pairs and their record, each whole or not at all; equal input gives equal bytes."""
    lines = [
        json.dumps(_row(pair, reward.label, sampling.seed), ensure_ascii=False) for pair in pairs
    ]
    write_bytes(out, "".join(f"{line}\n" for line in lines).encode())
    settings = sampling.rollout.model_dump(mode="json")
    record = PairsRecord(
        sha256=file_sha256(out),
        answers_sha256=file_sha256(answers_file(out)),
        model=Named(name=model.name, digest=model.digest),
        reward=Named(name=reward.name, digest=reward.digest),
        prompts=tuple(short_name(name) for name in prompts),
        sampling={"answers": sampling.answers, "seed": sampling.seed, **settings},
        pairing=pairing,
        report=report,
        packages=package_versions(),
    )
    write_json(record_file(out), record.model_dump(mode="json"))
    return record


def _row(pair: Pair, reward: str, seed: int) -> dict[str, object]:
    return {
        "prompt": _plain(pair.answers.prompt),
        "chosen": _answer(pair.chosen.text),
        "rejected": _answer(pair.rejected.text),
        "margin": pair.margin,
        "scores": pair.scores,
        "ranks": pair.ranks,
        "model": pair.answers.model,
        "reward": reward,
        "seed": seed,
        "source": pair.answers.source,
    }


def _plain(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
