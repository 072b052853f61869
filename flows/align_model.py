"""Alignment: from a fine-tuned model and people's preferences to a model that may be shipped."""

from __future__ import annotations

from typing import Any, Literal

from prefect import State, flow

from flows.post_training import post_training
from posttrain.aligning import Alignment, alignment_recipe, write_recipe
from posttrain.home import Home

Method = Literal["dpo", "orpo", "kto", "ppo", "grpo", "rloo"]


@flow(name="align-model", persist_result=False)
def align_model(
    model: str,
    data: str,
    method: Method = "dpo",
    compare_with: Method | None = None,
    reward: str | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    texts: str | None = None,
    offline_root: str | None = None,
    overrides: list[str] | None = None,
) -> State[Any]:
    """Align a fine-tuned model by one method, or by two side by side with one gate.

    Args:
        model: Where to start, as a recipe's `model`: artifact:NAME for a model in the store, such
            as artifact:quickstart/merge, a folder or a Hub id.
        data: File of pairs (prompt, chosen, rejected), or for kto of marked answers. The online
            methods ppo, grpo and rloo ask its prompts.
        method: How to align it.
        compare_with: A second method on the same data; the gate chooses.
        reward: FILE.py:NAME of a reward function for the online methods. Default: a reward model
            is trained on the pairs first.
        tasks: lm-eval tasks that the gate compares on, such as hellaswag.
        limit: Items a task.
        texts: File of chats whose held-out perplexity the gate compares, too.
        offline_root: Folder laid out like the Hub to read the tasks from.
        overrides: Other values to change, each as key=value, such as dpo.beta=0.3.
    """
    home = Home.find()
    alignment = Alignment(
        model=model,
        data=data,
        methods=(method,) if compare_with is None else (method, compare_with),
        reward=reward,
        tasks=tuple(tasks or ()),
        limit=limit,
        texts=texts,
        offline_root=offline_root,
    )
    recipe = alignment_recipe(alignment)
    file = write_recipe(recipe, home.root / "recipes")
    done = post_training(str(file), overrides, return_state=True)
    # A state of its own: of another flow's Prefect would only say whether it completed.
    return State(type=done.type, name=done.name, message=done.message)
