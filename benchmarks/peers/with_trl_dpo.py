"""What a plain TRL script for DPO does: the peer of `dpo`.

As TRL's documentation has it: LoRA by peft, the reference being the model with the adapter off. Run
as a program with a JSON object of settings; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from with_trl import arguments, make_clock

BEGIN = time.time()


def main() -> None:
    """Train, save, and say how long it took."""
    settings = json.loads(sys.argv[1])
    trainer = dpo(settings)
    clock = make_clock()  # type: ignore[no-untyped-call]
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(settings["output"])
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    print(
        json.dumps(
            {
                # Without the first step, in which kernels are chosen and memory is taken.
                "train_s": clock.steps[-1] - clock.steps[0],
                "tokens": int(counted[-1] - counted[0]),
                "total_s": time.time() - BEGIN,
                "steps": len(clock.steps),
            }
        )
    )


def dpo(settings: dict):  # type: ignore[no-untyped-def,type-arg]
    """TRL's own example: conversational pairs, LoRA by peft."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    dtype = getattr(torch, settings["dtype"])
    given = {**arguments(settings), "num_train_epochs": settings["epochs"], "seed": 0}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype),
        args=DPOConfig(**given, beta=0.1, max_length=settings["max_length"]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


if __name__ == "__main__":
    main()
