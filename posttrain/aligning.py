"""From a model that was fine-tuned and a file of preferences to the recipe that aligns it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from posttrain.errors import UsageError
from posttrain.store.files import write_bytes

Method = Literal["dpo", "orpo", "kto", "ppo", "grpo", "rloo"]

_ONLINE = ("ppo", "grpo", "rloo")
_DATASET, _TEXTS = "preferences", "held-out"

Stage = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Alignment:
    """What is to be aligned, with what, and how it is judged."""

    model: str
    """As a recipe's `model`: `artifact:NAME`, a folder or a Hub id."""
    data: str
    """File of pairs, or for KTO of marked answers; online methods ask its prompts."""
    methods: tuple[Method, ...] = ("dpo",)
    """Several are tried side by side, and one gate chooses."""
    reward: str | None = None
    """FILE.py:NAME for the online methods. Default: a reward model is trained on the pairs."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks that the gate compares on."""
    limit: int | None = None
    """Items a task."""
    texts: str | None = None
    """File of chats whose held-out perplexity the gate compares, too."""
    offline_root: str | None = None
    """Folder laid out like the Hub to read the tasks from."""
    name: str = "align"
    """Of the recipe."""


def alignment_recipe(alignment: Alignment) -> dict[str, object]:
    """The recipe, as a person would write it: a branch for each method, and one gate.

    Raises:
        UsageError: a method is named twice, or there is nothing to judge by.
    """
    if len(set(alignment.methods)) != len(alignment.methods):
        raise UsageError("a method is named twice; compare different ones")
    if not alignment.tasks and alignment.texts is None:
        raise UsageError(
            "there is nothing to judge the aligned model by: name `tasks` of lm-eval, or `texts`, "
            "a file of chats for held-out perplexity"
        )
    datasets: dict[str, object] = {_DATASET: {"source": alignment.data}}
    if alignment.texts is not None:
        datasets[_TEXTS] = {"source": alignment.texts}
    stages = [*_reward(alignment)]
    for method in alignment.methods:
        stages += _branch(alignment, method)
    candidates = [f"evaluate-{method}" for method in alignment.methods]
    stages.append({"gate": {"candidates": candidates} if len(candidates) > 1 else {}})
    return {
        "name": alignment.name,
        "model": alignment.model,
        "datasets": datasets,
        "stages": stages,
    }


def write_recipe(recipe: dict[str, object], folder: Path) -> Path:
    """Keep a recipe under a name that says its content; equal recipes are one file."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{recipe['name']}-{digest}.yaml"
    write_bytes(file, text.encode())
    return file


def _reward(alignment: Alignment) -> Sequence[Stage]:
    """The reward model that the online methods share."""
    if alignment.reward is not None or not set(alignment.methods) & set(_ONLINE):
        return []
    return [{"reward": {"dataset": _DATASET, "model": "base"}}]


def _branch(alignment: Alignment, method: Method) -> list[Stage]:
    """One method from the base to its numbers; what is merged is what would be served."""
    settings: dict[str, object] = {"dataset": _DATASET, "model": "base"}
    if method in _ONLINE:
        settings["reward"] = alignment.reward or "reward"
    evaluate: dict[str, object] = {"name": f"evaluate-{method}", "tasks": list(alignment.tasks)}
    if alignment.limit is not None:
        evaluate["limit"] = alignment.limit
    if alignment.texts is not None:
        evaluate["dataset"] = _TEXTS
    if alignment.offline_root is not None:
        evaluate["offline_root"] = alignment.offline_root
    merge: dict[str, object] = {"name": f"merge-{method}", "model": method}
    return [{method: settings}, {"merge": merge}, {"evaluate": evaluate}]
