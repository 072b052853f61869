"""What the trainers of answers add to TRL's: our tokens, exact held-out numbers, one reference.

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader

from posttrain.train.held_out_answers import HeldOutAnswers
from posttrain.train.stage_trainer import StageTrainer

Batch = dict[str, Any]


class AnswerTrainer(StageTrainer):
    """For a class that is one of TRL's trainers of answers, too, and comes before it.

    Transformers averages held-out numbers over batches, so that they change with the batches' size
    and with the number of processes. Here they are means over all held-out rows, which are also
    kept one by one.
    """

    model: Any
    data_collator: Any
    add_callback: Any
    get_train_dataloader: Any

    def __init__(self, *, held_out: HeldOutAnswers, **arguments: Any) -> None:
        super().__init__(eval_dataset=held_out.table.dataset, **arguments)
        self.held_out = held_out

    @abstractmethod
    def score(self, model: torch.nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """Loss of held-out entries, of shape [], and numbers of each, of shape [entries].

        The names are the columns of the account. Every process asks at the same time.
        """

    @abstractmethod
    def forget_numbers(self, mode: str) -> None:
        """Drop what TRL has gathered to log of passes in `train` or `eval`."""

    def prepare_scoring(self, model: torch.nn.Module) -> None:
        """What a method needs to know of all held-out rows before it scores any."""

    def measure_held_out(self, dataloader: DataLoader[Any], prefix: str) -> dict[str, float]:
        """Score every held-out row once, the longest first, and keep the scores."""
        del dataloader  # it has rows in another order, and fills them up
        model = self._wrap_model(self.model, training=False)  # type: ignore[attr-defined]
        model.eval()
        self.prepare_scoring(model)
        scores = self.over_held_out(lambda inputs: self.score(model, inputs))
        self.forget_numbers("eval")
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            self.held_out.keep(scores, Path(self.args.output_dir), self.state.global_step)
        return self.held_out.metrics(scores, prefix)

    def over_held_out(self, ask: Any) -> dict[str, np.ndarray]:
        """What `ask` says of each held-out entry, over all processes.

        Args:
            ask: From a collated batch to tensors of shape [entries], or [] for all of them alike.

        Returns:
            Arrays of float64 of shape (all entries,), by the same names.
        """
        table, width = self.held_out.table, self.args.per_device_eval_batch_size
        own, processes = self.accelerator.process_index, self.accelerator.num_processes
        found: dict[str, torch.Tensor] = {}
        for first in range(0, len(table), width * processes):
            mine = table.longest[first + own * width :][:width]
            if first + own * width >= len(table):
                mine = []
            # A process without rows goes along, because others wait for it.
            examples = [self._example(entry) for entry in mine or table.longest[:1]]
            inputs = self._prepare_inputs(self.data_collator(examples))  # type: ignore[attr-defined]
            context = self.compute_loss_context_manager()  # type: ignore[attr-defined]
            # TRL gathers numbers as it goes, which needs as many rows on each process.
            with torch.no_grad(), context, _alone(self.accelerator):
                answer = ask(inputs)
            for name, values in answer.items():
                column = found.setdefault(name, torch.zeros(len(table), dtype=torch.float64))
                if mine:
                    column[mine] = values.double().cpu().expand(len(mine))
        return {name: np.array(self.sum_over_processes(found[name])) for name in found}

    def _example(self, entry: int) -> Batch:
        """A held-out entry as the collator wants it."""
        example: Batch = self.held_out.table.dataset[entry]
        return example

    def loss_alone(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """Loss of a batch that belongs to no step, without a word to other processes."""
        with _alone(self.accelerator):
            loss: torch.Tensor = self.compute_loss(model, inputs)  # type: ignore[attr-defined]
        self.forget_numbers("train")
        return loss

    def count_tokens(self, batch: Batch) -> tuple[int, int]:
        """Tokens that are no padding, and those of the answers."""
        return int(batch["attention_mask"].sum()), int(batch["completion_mask"][:, 1:].sum())


class ReferencedTrainer(AnswerTrainer):
    """For TRL's trainers that compare with a reference.

    The reference is the model as it was: with the adapter off, or a second copy where all weights
    are trained. TRL would keep a second adapter, a copy of the first as it is now, which is for
    adapters that have been trained before; ours never have.

    What it says of held-out rows is asked once, and of training rows at each step, unless the rows
    bring it with them.
    """

    REFERENCES: dict[str, str]
    """Columns with the reference's log-probabilities, and their names in the account."""
    ref_model: Any
    precompute_ref_logps: bool

    def __init__(self, *, held_out: HeldOutAnswers, **arguments: Any) -> None:
        columns = held_out.table.dataset.column_names
        self.brought = all(name in columns for name in self.REFERENCES)
        self._of_held_out: dict[str, np.ndarray] | None = None
        args, model = arguments["args"], arguments["model"]
        # Else TRL would load a second copy that nobody asks.
        args.precompute_ref_log_probs = self.brought and not isinstance(model, PeftModel)
        with _no_second_adapter(model):
            super().__init__(held_out=held_out, **arguments)
        self.precompute_ref_logps = self.brought

    def prepare_scoring(self, model: torch.nn.Module) -> None:
        """Ask the reference, the first time."""
        del model
        if not self.brought and self._of_held_out is None:
            self._of_held_out = self.over_held_out(self.ask_reference)

    def ask_reference(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """The reference's log-probabilities of a batch, by the columns' names."""
        answers = self.compute_ref_log_probs(  # type: ignore[attr-defined]
            self.ref_model or self.model, inputs
        )
        return {
            name: values
            for name, values in zip(self.REFERENCES, answers, strict=True)
            if values is not None
        }

    @contextmanager
    def held_out_references(self) -> Iterator[None]:
        """Take the reference's log-probabilities from the batch."""
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = self.brought

    def _example(self, entry: int) -> Batch:
        known = self._of_held_out or {}
        # In 32 bits, as they were computed.
        return super()._example(entry) | {name: float(known[name][entry]) for name in known}

    def forget_numbers(self, mode: str) -> None:
        """TRL keeps them in `_metrics`."""
        self._metrics: dict[str, Any]
        self._metrics[mode].clear()

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """As it is: rows come tokenized."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: object) -> Dataset:
        """As it is: rows bring what the reference says, which is no business of a cache in HOME."""
        return dataset


class Recorder:
    """Calls a model for TRL and remembers the log-probabilities that it returned."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.log_probs = torch.empty(0)

    def __call__(self, **inputs: Any) -> Any:
        """The model's answer."""
        out = self._model(**inputs)
        # Virtual tokens come first; the last positions are the real tokens'.
        self.log_probs = out.log_probs[:, -(inputs["input_ids"].shape[1] - 1) :]
        return out


@contextmanager
def _no_second_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Keep TRL's constructor from copying the adapter.

    It adds an adapter and then copies each parameter of ours into the one of the same name. Both
    come to nothing here: some methods allow one adapter only, and PiSSA's changes the base.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    nowhere = SimpleNamespace(data=SimpleNamespace(copy_=lambda _: None))
    replaced = {"add_adapter": lambda *_: None, "get_parameter": lambda _: nowhere}
    vars(model).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(model)[name]


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Let what would be gathered from all processes be this one's."""
    replaced = ("gather", "gather_for_metrics", "reduce")
    for name in replaced:
        setattr(accelerator, name, lambda values, *_, **__: values)
    try:
        yield
    finally:
        for name in replaced:
            delattr(accelerator, name)
