"""Answers written by vLLM, on the GPU that trains.

Importing this module imports torch and transformers: do it inside functions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.evaluate.samples import end_tokens
from posttrain.recipe.online import Rollout
from posttrain.train.rollout import Answer, read_answers, up_to_end


class VllmRollouts:
    """Writes with vLLM on the GPU that trains; the present weights are handed over every time.

    Written from vLLM's documentation (0.22 and later) and tested nowhere yet.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollout: Rollout
    ) -> None:
        """Start the engine beside the model.

        Raises:
            ModelError: vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ModelError(
                "rollout.backend: `vllm` is not installed; install it into this environment, or "
                "write `backend: transformers`"
            )
        import os

        # In this process, where the engine's model can be reached.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # type: ignore[import-not-found]

        self._model = model
        self._tokenizer = tokenizer
        self._rollout = rollout
        self._ends = end_tokens(model, tokenizer)
        self._make_params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=model.name_or_path,
            max_model_len=rollout.max_prompt_tokens + rollout.max_new_tokens,
            gpu_memory_utilization=0.3,  # the rest is for training
        )

    def write(self, prompts: Sequence[Sequence[int]], seed: int, first: int = 0) -> list[Answer]:
        """See `Rollouts`. vLLM promises the same draws for the same batches only."""
        self._hand_over_weights()
        params = [
            self._make_params(
                temperature=self._rollout.temperature,
                top_k=0,
                top_p=1.0,
                max_tokens=self._rollout.max_new_tokens,
                stop_token_ids=self._ends,
                seed=int(np.random.default_rng([seed, first + row]).integers(2**31)),
            )
            for row in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        written = self._engine.generate(asked, params, use_tqdm=False)
        ids = [up_to_end(list(one.outputs[0].token_ids), self._ends) for one in written]
        return read_answers(ids, self._ends, self._tokenizer)

    def _hand_over_weights(self) -> None:
        """Give the engine the weights as they are now, an adapter folded in for the moment."""
        model, adapted = self._model, hasattr(self._model, "merge_adapter")
        if adapted:
            model.merge_adapter()
        weights = [
            (name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter.data)
            for name, parameter in model.named_parameters()
            if not adapted or model.prefix not in name
        ]
        self._engine.apply_model(lambda engine_model: engine_model.load_weights(weights))
        self._engine.reset_prefix_cache()
        if adapted:
            model.unmerge_adapter()
