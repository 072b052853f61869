"""A language model's body under a head that gives a sequence one number: what a reward model is.

The number is read at a sequence's last token that is no padding. Transformers finds it by comparing
with the padding token, so that token must end no answer: see `choose_padding`.

Importing this module imports torch: do it inside functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from posttrain.data.rows import Message
from posttrain.errors import ModelError
from posttrain.hardware import ResolvedDType
from posttrain.recipe.adapters import Quantization
from posttrain.stages.program import StageInput
from posttrain.train.quantization import HOW_TO_INSTALL, in_4_bits, keep_differentiable
from posttrain.train.tokenize import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD = "score"
"""Name of the head in every decoder of transformers with one label."""


class ScoreHead(nn.Linear):  # type: ignore[misc]  # torch is untyped here
    """One number a position, computed in float32 whatever the body computes in.

    In bfloat16 scores around 1 would be multiples of 1/128, and many pairs ties.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Scores of shape [..., 1] from hidden states of shape [..., width], in float32."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float())


def load_body(
    base: StageInput, dtype: ResolvedDType, quantization: Quantization | None = None
) -> PreTrainedModel:
    """The weights of a language model, or of a reward model, as one that scores sequences.

    Of a language model the head is new and random: see `start_head`.

    Args:
        base: A model folder.
        dtype: Precision of the weights; with `quantization` of what is computed.
        quantization: Hold the linear layers, less the head, in 4 bits, frozen.

    Raises:
        ModelError: the folder cannot be loaded, or transformers has no such form of the model.
    """
    from transformers import AutoModelForSequenceClassification

    torch_dtype = getattr(torch, dtype)
    packed = None if quantization is None else in_4_bits(quantization, torch_dtype)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base.path,
            num_labels=1,
            dtype=torch_dtype,
            use_safetensors=True,
            quantization_config=packed,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if "bitsandbytes" in str(error):
            raise ModelError(f"quantization: {error}; {HOW_TO_INSTALL}") from error
        message = f"{base.path}: cannot be loaded as a model that scores: {error}"
        raise ModelError(message) from error
    found = getattr(model, HEAD, None)
    if not isinstance(found, nn.Linear) or found.bias is not None:
        kind = type(model).__name__
        raise ModelError(f"{base.path}: {kind} has no linear head `{HEAD}` without a bias")
    head = ScoreHead(found.in_features, 1, bias=False, dtype=found.weight.dtype)
    head.weight.data = found.weight.data
    setattr(model, HEAD, head)
    if quantization is not None:
        keep_differentiable(model)
        model.requires_grad_(False)
    return model


def start_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the head's weights from N(0, 1 / (width + 1)).

    So scores begin with a standard deviation of about one where hidden states have one
    (Huang et al., 2024, arXiv:2403.17031, as Stiennon et al., 2020, arXiv:2009.01325, have it).
    """
    head: ScoreHead = getattr(model, HEAD)
    width = head.in_features
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, width, generator=draw) * (width + 1) ** -0.5
    # A parameter of its own: under ZeRO-3 the old one is divided already.
    head.weight = nn.Parameter(weight.to(model.device, torch.float32))


def choose_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token that ends no answer, and padding on the right.

    Many chat models pad with the token that ends a turn. Whether an answer ended could then not be
    seen at the position that is scored. Where the vocabulary has no other special token, padding
    stays, and each answer is scored at the token before.
    """
    tokenizer.padding_side = "right"
    chat = (Message("user", "?"), Message("assistant", "!"))
    rendered = tokenizer(render_chat(tokenizer, chat), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    ends = {tokenizer.eos_token_id, *[token for token in rendered if token in special][-1:]}
    others = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(special)]
    free = [token for token in others if token is not None and token not in ends]
    if free:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
