"""What a plain TRL or transformers script does: the peer of `pretrain` and `sft`.

As their documentation has it: rows padded to the longest of the batch, loss on the completion,
LoRA by peft. Run as a program with a JSON object of settings; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGIN = time.time()


def main() -> None:
    """Train, save, and say how long it took."""
    settings = json.loads(sys.argv[1])
    trainer = (sft if settings["stage"] == "sft" else pretrain)(settings)
    clock = make_clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(settings["output"])
    print(
        json.dumps(
            {
                # Without the first step, in which kernels are chosen and memory is taken.
                "train_s": clock.steps[-1] - clock.steps[0],
                "tokens": tokens_after_the_first_step(trainer, settings),
                "total_s": time.time() - BEGIN,
                "loss": trainer.state.log_history[-2].get("loss"),
                "steps": len(clock.steps),
            }
        )
    )


def sft(settings: dict):  # type: ignore[no-untyped-def,type-arg]
    """TRL's own example: conversational prompt and completion, LoRA by peft."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    adapter = None
    if settings["adapter"]:
        adapter = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(settings), max_length=settings["max_length"]),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
    )


def pretrain(settings: dict):  # type: ignore[no-untyped-def,type-arg]
    """Transformers' own language modeling script: texts joined and cut into equal blocks."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    length, ids = settings["max_length"], []
    for line in Path(settings["rows"]).read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    blocks = blocks[: settings["entries"]]
    table = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(settings)),
        train_dataset=table,
        data_collator=default_data_collator,
    )


def arguments(settings: dict) -> dict[str, object]:  # type: ignore[type-arg]
    """What both scripts pass to the trainer."""
    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["batch_size"] // settings["micro_batch_size"],
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "bf16": settings["dtype"] == "bfloat16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def tokens_after_the_first_step(trainer, settings: dict) -> int:  # type: ignore[no-untyped-def,type-arg]
    """Tokens that are no padding: TRL counts them, and blocks are full."""
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    if counted:
        return int(counted[-1] - counted[0])
    return settings["batch_size"] * settings["max_length"] * (trainer.state.global_step - 1)


def make_clock():  # type: ignore[no-untyped-def]
    """A callback that notes when each step ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each optimizer step ended."""

        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            self.steps.append(time.time())

    return Clock()


if __name__ == "__main__":
    main()
