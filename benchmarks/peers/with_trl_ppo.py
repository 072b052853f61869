"""TRL 1.12's PPOTrainer, the last release's that had one: the peer of `ppo`.

As its documentation has it: policy, reference, value model and reward model side by side. Run by
the interpreter of benchmarks/peers/requirements-ppo.txt with a JSON object of settings; prints one
JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from with_trl import make_clock

BEGIN = time.time()


def main() -> None:
    """Train, save, and say how long it took."""
    settings = json.loads(sys.argv[1])
    trainer = ppo(settings)
    clock = make_clock()  # type: ignore[no-untyped-call]
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(settings["output"])
    print(
        json.dumps(
            {
                # Without the first update, in which kernels are chosen and memory is taken.
                "train_s": clock.steps[-1] - clock.steps[0],
                "answers": settings["batch_size"] * (len(clock.steps) - 1),
                "total_s": time.time() - BEGIN,
                # Of the last update: none, where every answer has all its tokens.
                "ends": trainer.state.log_history[-1]["val/num_eos_tokens"],
            }
        )
    )


def ppo(settings: dict):  # type: ignore[no-untyped-def,type-arg]
    """The example script's trainer, in float32 and without gradient checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    prompts = tokenizer.apply_chat_template(
        rows, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]

    def scorer(folder: str):  # type: ignore[no-untyped-def]
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        )

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        for _ in range(2)
    )
    return PPOTrainer(
        args=PPOConfig(**arguments(settings)),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer(settings["reward"]),
        value_model=scorer(settings["model"]),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )


def arguments(settings: dict) -> dict[str, object]:  # type: ignore[type-arg]
    """What the benchmark settles, and what would cost TRL time that posttrain does not spend."""
    return {
        "output_dir": settings["output"],
        "seed": 0,
        "total_episodes": settings["batch_size"] * settings["updates"],
        "per_device_train_batch_size": settings["micro_batch_size"],
        "local_rollout_forward_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": settings["batch_size"] // settings["micro_batch_size"],
        "num_mini_batches": 1,
        "num_ppo_epochs": settings["passes"],
        "response_length": settings["answer_tokens"],
        "stop_token": None,
        "temperature": settings["temperature"],
        "learning_rate": settings["learning_rate"],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


if __name__ == "__main__":
    main()
