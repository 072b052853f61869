"""Between a model and the one it was trained from: less learned, and less forgotten.

WiSE-FT (Wortsman et al., 2022, arXiv:2109.01903): the weights base + w * (tuned - base), with w
from 0 to 1. Of a LoRA adapter, whose change to a weight is scale * BA, that is the adapter with its
scale times w.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.train.merging import name_folder, reference, run_mergekit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def interpolate_weights(
    base: Path, tuned: Path, weight: float, scratch: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """The model at (1 - weight) * base + weight * tuned, by mergekit's linear merge.

    Tensors are read, mixed in float32 and written one by one, whatever shards they are in: neither
    model is in memory as a whole. At 0 and 1 the weights are those of the ends, to the bit.

    Args:
        base: Model folder.
        tuned: Model folder with the same tensors.
        weight: Share of the tuned model, from 0 to 1.
        scratch: Existing folder for the result's weights; may be removed afterwards.
        dtype: Precision of the result.

    Returns:
        The model in evaluation mode, with the tuned one's generation config.

    Raises:
        ModelError: the two cannot be mixed.
    """
    from mergekit.config import InputModelDefinition, MergeConfiguration

    ends = [("tuned", tuned, weight), ("base", base, 1.0 - weight)]
    configuration = MergeConfiguration(
        merge_method="linear",
        models=[
            InputModelDefinition(
                model=reference(name_folder(scratch, name, folder)), parameters={"weight": share}
            )
            for name, folder, share in ends
        ],
        parameters={"normalize": False},
        dtype="float32",
        out_dtype=str(dtype).removeprefix("torch."),
    )
    return run_mergekit(configuration, tuned, scratch, dtype)
