"""Benchmarks by lm-eval, with every single answer kept.

lm-eval's own tasks, prompts and metrics are used as they are. Added here: a limit that draws items
by a seed instead of taking the first ones, benchmarks from a local folder, the words of each item,
and errors that say what to do. Who answers: `posttrain.evaluate.language_models`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError
from posttrain.evaluate.item_texts import texts_of
from posttrain.evaluate.items import Item
from posttrain.evaluate.language_models import Backend, RememberingLM, load_transformers
from posttrain.evaluate.results import TaskResult, TaskSettings
from posttrain.evaluate.shares import mean, standard_error
from posttrain.events import EventWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Benchmarks:
    """What lm-eval shall ask."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags."""
    task_folders: tuple[Path, ...] = ()
    """Folders with further task YAMLs; they win over lm-eval's own. Where `offline_root` is given,
    relative paths of data files in them start there."""
    limit: int | None = None
    """Items a leaf task, drawn with `seed`; None takes all. A larger limit draws the same items and
    more."""
    num_fewshot: int | None = None
    """Examples before each question; None leaves it to the task."""
    chat_template: bool = False
    """Wrap each question in the tokenizer's chat template."""
    offline_root: Path | None = None
    """Folder laid out like the Hub, read instead of it."""
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Answers of one model to all benchmarks."""

    results: tuple[TaskResult, ...]
    items: tuple[Item, ...]
    settings: tuple[TaskSettings, ...]


@dataclass(frozen=True)
class LoadedBenchmarks:
    """Benchmarks whose data have been read."""

    asked: Benchmarks
    leaves: dict[str, dict[str, Any]]
    """The leaf tasks behind each name: `{name: {leaf name: lm-eval Task}}`."""


def load_benchmarks(benchmarks: Benchmarks) -> LoadedBenchmarks:
    """Find the tasks and read their data; takes no model, so that mistakes show at once.

    Raises:
        DataError: an unknown task, or a benchmark that cannot be read.
    """
    if not benchmarks.tasks:
        return LoadedBenchmarks(benchmarks, {})
    _quieten()
    names = list(dict.fromkeys(benchmarks.tasks))
    manager = _task_manager(names, benchmarks.task_folders)
    leaves = {name: _load_task(manager, name, benchmarks.offline_root) for name in names}
    return LoadedBenchmarks(benchmarks, leaves)


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: LoadedBenchmarks,
    batch_size: int,
    events: EventWriter,
    backend: Backend = "hf",
) -> Measured:
    """Ask a loaded model all benchmarks; nothing is remembered.

    Raises:
        DataError: a task without a score for each single item.
    """
    language_model = RememberingLM(
        lambda: load_transformers(backend, model, tokenizer, batch_size),
        events,
        seed=benchmarks.asked.seed,
    )
    return ask_benchmarks(language_model, benchmarks)


def ask_benchmarks(language_model: RememberingLM, benchmarks: LoadedBenchmarks) -> Measured:
    """Ask all benchmarks.

    Raises:
        DataError: a task without a score for each single item.
    """
    if not benchmarks.leaves:
        return Measured((), (), ())
    answers = _evaluate(language_model, benchmarks)
    items: list[Item] = []
    results: list[TaskResult] = []
    for name, tasks in benchmarks.leaves.items():
        answered = [item for leaf in tasks for item in _items(name, leaf, tasks[leaf], answers)]
        items += answered
        results.append(_summarise(name, answered, answers))
    return Measured(tuple(results), tuple(items), _task_settings(answers))


def _quieten() -> None:
    """Errors only: lm-eval explains itself in dozens of lines a task."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _task_manager(names: Sequence[str], task_folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in task_folders]
    own = TaskManager(include_path=folders, include_defaults=False)
    # Indexing lm-eval's thousands of tasks takes seconds. A group may reach into them.
    if set(names) <= set(own.all_subtasks):
        return own
    manager = TaskManager(include_path=folders)
    _check_names(names, manager.all_tasks)
    return manager


def _load_task(manager: Any, name: str, root: Path | None) -> dict[str, Any]:
    with _datasets_from(root):
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except (OSError, ValueError) as error:
            where = f"`{root}` holds no copy of it" if root else "the Hub cannot be reached"
            raise DataError(
                f"evaluate.tasks: the data of `{name}` cannot be read: {error}\n  {where}; give a "
                "folder laid out like the Hub as `offline_root` (on the command line "
                "--offline-root), or run once with a connection to the Hub"
            ) from error
        except ImportError as error:
            raise DataError(
                f"evaluate.tasks: `{name}` needs a package that is not installed: {error}"
            ) from error
    return tasks


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(f'`{word}`' for word in near)}?" if near else ""
        lines.append(f"evaluate.tasks: there is no task `{name}`{hint}")
    lines.append(
        "  tasks of your own are found through `task_folders`; `lm-eval ls tasks` lists all"
    )
    raise DataError("\n".join(lines))


@contextlib.contextmanager
def _datasets_from(root: Path | None) -> Iterator[None]:
    """Let `datasets` find `OWNER/NAME` below `root`: it prefers a local directory of that name."""
    if root is None:
        yield
        return
    if not root.is_dir():
        raise DataError(f"evaluate.offline_root: {root} is no folder")
    with contextlib.chdir(root):
        yield


def _evaluate(language_model: RememberingLM, benchmarks: LoadedBenchmarks) -> dict[str, Any]:
    """lm-eval's answers; `simple_evaluate` would spend seconds on a survey of the machine."""
    import lm_eval
    from transformers import set_seed

    asked = benchmarks.asked
    # `mmlu` and `mmlu_anatomy` in one recipe share the anatomy task, which is asked once.
    tasks = {leaf: task for group in benchmarks.leaves.values() for leaf, task in group.items()}
    for task in tasks.values():
        _set_fewshot(task, asked)
    drawn = {
        leaf: indices
        for leaf, task in tasks.items()
        if (indices := _draw(leaf, len(task.eval_docs), asked)) is not None
    }
    set_seed(asked.seed)
    answers: dict[str, Any] = lm_eval.evaluate(
        lm=language_model,
        task_dict={"tasks": tasks},
        samples=drawn or None,
        apply_chat_template=asked.chat_template,
        fewshot_as_multiturn=asked.chat_template,
        bootstrap_iters=0,
        log_samples=True,
    )
    return answers


def _set_fewshot(task: Any, benchmarks: Benchmarks) -> None:
    """As on lm-eval's command line: a task that says zero in its own YAML stays at zero."""
    stated = task.get_config("num_fewshot")
    if stated is None or (stated != 0 and benchmarks.num_fewshot is not None):
        task.set_config(key="num_fewshot", value=benchmarks.num_fewshot or 0)
    task.set_fewshot_seed(seed=benchmarks.seed)


def _draw(task: str, size: int, benchmarks: Benchmarks) -> list[int] | None:
    """Indices of the items to ask, ascending; None for all of them.

    The order in which items are drawn depends on the task's name, the seed and the benchmark's
    size, and not on how many are: so a larger limit adds items and takes none away.
    """
    if benchmarks.limit is None or size <= benchmarks.limit:
        return None
    # All of them and then the first: `sample` draws few items in another way than many.
    order = random.Random(f"{benchmarks.seed}:{task}").sample(range(size), size)
    return sorted(order[: benchmarks.limit])


def _items(name: str, leaf: str, task: Any, answers: dict[str, Any]) -> list[Item]:
    """The answered items of one leaf task, in the benchmark's order."""
    samples = answers["samples"][leaf]
    # A task may score each answer several times, through different filters; the first counts.
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metric = _primary_metric(name, _numbers(samples[0]))
    samples.sort(key=lambda sample: int(sample["doc_id"]))
    return [_item(name, leaf, task, sample, metric) for sample in samples]


def _item(name: str, leaf: str, task: Any, sample: dict[str, Any], metric: str) -> Item:
    texts = texts_of(task, sample, metric)
    return Item(
        task=name,
        group=leaf,
        item_id=int(sample["doc_id"]),
        item_digest=_item_digest(sample),
        metric=metric,
        value=_numbers(sample)[metric],
        metrics=_numbers(sample),
        log_likelihoods=_log_likelihoods(sample),
        question=texts.question,
        choices=texts.choices,
        target=texts.target,
        answer=texts.answer,
    )


def _primary_metric(name: str, scores: dict[str, float]) -> str:
    for metric in ("acc_norm", "acc", *scores):
        if metric in scores:
            return metric
    raise DataError(
        f"evaluate.tasks: `{name}` gives no score for a single item, so that two models could not "
        "be compared item by item; leave it out"
    )


def _numbers(sample: dict[str, Any]) -> dict[str, float]:
    scores = {metric: sample[metric] for metric in sample["metrics"]}
    return {
        metric: float(score)
        for metric, score in scores.items()
        # Some corpus metrics keep tuples an item, which only make sense together.
        if isinstance(score, (bool, int, float)) or hasattr(score, "__float__")
        if math.isfinite(float(score))
    }


def _item_digest(sample: dict[str, Any]) -> str:
    parts = (sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _log_likelihoods(sample: dict[str, Any]) -> tuple[float, ...]:
    """Of each choice; a generated answer is text and has none."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, (tuple, list)) and len(answer) == 2 for answer in answers):
        return ()
    return tuple(round(float(answer[0]), 6) for answer in answers)


def _summarise(name: str, items: Sequence[Item], answers: dict[str, Any]) -> TaskResult:
    """Means over a task's items; a group weighs its subtasks by size, as lm-eval does for MMLU."""
    metric, leaf = items[0].metric, items[0].group
    values = [item.value for item in items]
    groups = list(dict.fromkeys(item.group for item in items))
    return TaskResult(
        task=name,
        metric=metric,
        value=mean(values),
        standard_error=standard_error(values),
        n=len(items),
        higher_is_better=answers["higher_is_better"][leaf].get(metric) is not False,
        metrics={
            key: mean([item.metrics[key] for item in items if key in item.metrics])
            for key in items[0].metrics
        },
        groups={
            group: mean([item.value for item in items if item.group == group]) for group in groups
        }
        if len(groups) > 1
        else {},
    )


def _task_settings(answers: dict[str, Any]) -> tuple[TaskSettings, ...]:
    return tuple(
        TaskSettings(
            name=leaf,
            version=str(answers["versions"].get(leaf)),
            num_fewshot=int(answers["n-shot"].get(leaf) or 0),
        )
        for leaf in sorted(answers["samples"])
    )
