"""Several models as one: weights by mergekit, adapters by peft, and how two models differ.

Weights are merged in float32 on the CPU, with a seed of their own: the same models always become
the same bytes. Only the result is rounded to the precision of what was merged.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.recipe.merge import MergeConfig, MergeSource

if TYPE_CHECKING:
    import torch
    from mergekit.common import ModelReference
    from mergekit.config import InputModelDefinition, MergeConfiguration
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart, on the same positions of the same prompts."""

    largest: float
    """Of the absolute differences; infinite where a logit is not a number."""
    mean: float
    """Of the absolute differences."""
    divergence: float
    """Kullback-Leibler divergence of the second model's next-token distribution from the first's,
    in nats a token."""


def compare_logits(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Differences between two models' logits.

    Args:
        reference: A tensor of shape [positions, vocabulary] for each prompt, in float32.
        other: The same prompts' logits by the other model.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    before, after = torch.cat(list(reference)), torch.cat(list(other))
    apart = (before - after).abs()
    divergence = F.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True
    )
    largest = float(apart.max())
    finite = bool(torch.isfinite(apart).all())
    return Difference(largest if finite else float("inf"), float(apart.mean()), float(divergence))


def check_alike(
    folders: Mapping[str, Path], tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> None:
    """Refuse models whose weights do not stand for the same things.

    Args:
        folders: Model folders by the names in the recipe.
        tokenizers: Their tokenizers, by the same names.

    Raises:
        ModelError: architectures, sizes or vocabularies differ.
    """
    first, *others = folders
    layout = _layout(folders[first])
    words = tokenizers[first].get_vocab()
    for name in others:
        if difference := _difference(layout, _layout(folders[name])):
            raise ModelError(f"`{first}` and `{name}` cannot be merged: {difference}")
        if tokenizers[name].get_vocab() != words:
            raise ModelError(
                f"`{first}` and `{name}` cannot be merged: their tokenizers give the same token "
                "different numbers; merge models that were trained from one base"
            )


def merge_weights(
    config: MergeConfig,
    folders: Sequence[Path],
    base: Path | None,
    scratch: Path,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """One model of several, by mergekit.

    Args:
        config: Method, weights, densities and seed.
        folders: Model folders, one for each of `config.models`, in their order.
        base: Model folder that TIES and DARE measure changes from.
        scratch: Existing folder for the merged weights; may be removed afterwards.
        dtype: Precision of the result.

    Returns:
        The merged model in evaluation mode, with the first one's generation config.

    Raises:
        ModelError: mergekit cannot merge them, or a weight is missing from what it made.
    """
    named = [name_folder(scratch, str(number), folder) for number, folder in enumerate(folders)]
    named_base = name_folder(scratch, "base", base) if base is not None else None
    configuration = _mergekit_config(config, named, named_base, dtype)
    return run_mergekit(configuration, folders[0], scratch, dtype, config.seed)


def run_mergekit(
    configuration: MergeConfiguration,
    generates_like: Path,
    scratch: Path,
    dtype: torch.dtype,
    seed: int = 0,
) -> PreTrainedModel:
    """Merge tensor by tensor, from files to files, and load the result.

    Args:
        configuration: What mergekit is asked for; names folders by `name_folder`.
        generates_like: Model folder whose generation config the result gets.
        scratch: Existing folder for the merged weights; may be removed afterwards.
        dtype: Precision of the result.
        seed: Of what is dropped at random.

    Raises:
        ModelError: mergekit cannot merge them, or a weight is missing from what it made.
    """
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM

    merged = scratch / "merged"
    options = MergeOptions(
        copy_tokenizer=False,
        device="cpu",
        quiet=True,
        random_seed=seed,
        write_model_card=False,
    )
    try:
        run_merge(configuration, str(merged), options)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"mergekit cannot merge these models: {error}") from error
    _copy_generation_config(generates_like, merged)
    model, loading = AutoModelForCausalLM.from_pretrained(
        merged, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"mergekit left out weights of this architecture: {', '.join(missing)}")
    return model.eval()


def combine_adapters(
    config: MergeConfig, base: PreTrainedModel, folders: Sequence[Path]
) -> PeftModel:
    """One LoRA adapter of several on one base, by peft's `add_weighted_adapter`.

    Args:
        config: Method, weights, density, rank and seed.
        base: The model that all of them were trained on, in float32.
        folders: Adapter folders, one for each of `config.models`, in their order.

    Returns:
        The base with every adapter, as `adapter_name` calls it, and with their combination, which
        is called `default` and is active.

    Raises:
        ModelError: peft cannot combine these adapters in this way.
    """
    import torch
    from peft import PeftModel

    names = [adapter_name(number) for number in range(len(folders))]
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    # The combination takes its settings from the first adapter. The scale of each is part of its
    # matrices already: with rsLoRA's it would be scaled twice.
    model.peft_config[names[0]] = replace(model.peft_config[names[0]], use_rslora=False)
    torch.manual_seed(config.seed)
    try:
        model.add_weighted_adapter(
            names,
            _adapter_weights(config),
            "default",
            combination_type=config.method,
            density=config.models[0].kept if config.sparsifies else None,
            svd_rank=config.rank,
            svd_full_matrices=False,  # the vectors beyond the smaller side are never used
        )
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"peft cannot combine these adapters: {error}") from error
    model.set_adapter("default")
    return model.eval()


def adapter_name(number: int) -> str:
    """What one of several combined adapters is called in the model that holds them all."""
    return f"source-{number}"


def _adapter_weights(config: MergeConfig) -> list[float]:
    """The weights as peft wants them.

    Where a sign prevails it divides by the number of models that have it: the weights of equal
    models then are 1, and otherwise shares of 1.
    """
    shares = [source.share for source in config.models]
    if not config.normalize:
        return shares
    agree = "ties" in str(config.method)
    return [share / sum(shares) * (len(shares) if agree else 1) for share in shares]


def _mergekit_config(
    config: MergeConfig, folders: Sequence[Path], base: Path | None, dtype: torch.dtype
) -> MergeConfiguration:
    from mergekit.config import MergeConfiguration

    settings: dict[str, Any] = {"normalize": config.normalize}
    if config.method == "slerp":
        settings, base = {"t": config.position}, folders[0]
    return MergeConfiguration(
        merge_method=str(config.method),
        base_model=reference(base) if base is not None else None,
        models=[
            _input(config, source, folder)
            for source, folder in zip(config.models, folders, strict=True)
        ],
        parameters=settings,
        dtype="float32",
        out_dtype=str(dtype).removeprefix("torch."),
    )


def _input(config: MergeConfig, source: MergeSource, folder: Path) -> InputModelDefinition:
    from mergekit.config import InputModelDefinition

    settings: dict[str, Any] = {}
    if config.method != "slerp":
        settings["weight"] = source.share
    if config.sparsifies:
        settings["density"] = source.kept
    return InputModelDefinition(model=reference(folder), parameters=settings)


def reference(folder: Path) -> ModelReference:
    """A folder as mergekit names it."""
    from mergekit.common import ModelPath, ModelReference

    return ModelReference(model=ModelPath(path=str(folder)))


def name_folder(scratch: Path, name: str, folder: Path) -> Path:
    """A folder under a name of ours.

    mergekit reads "+" and "@" in a path as its own signs, and takes two models at one path (two
    stages may leave the same bytes in the store) for one.
    """
    link = scratch / f"source-{name}"
    link.symlink_to(folder.resolve(), target_is_directory=True)
    return link


def _copy_generation_config(source: Path, target: Path) -> None:
    file = source / "generation_config.json"
    if file.exists():
        shutil.copyfile(file, target / file.name)


@dataclass(frozen=True)
class _Layout:
    architecture: str
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]


def _layout(folder: Path) -> _Layout:
    """Names and shapes of all weights, without loading any."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    architecture = (config.architectures or [type(config).__name__])[0]
    return _Layout(architecture, bool(config.tie_word_embeddings), shapes)


def _difference(first: _Layout, other: _Layout) -> str | None:
    if first.architecture != other.architecture:
        return f"they are a {first.architecture} and a {other.architecture}"
    if first.tied != other.tied:
        return "one shares its input and output embeddings and the other does not"
    for name in sorted(first.shapes.keys() | other.shapes.keys()):
        one, two = first.shapes.get(name), other.shapes.get(name)
        if one != two:
            sizes = [" x ".join(map(str, shape)) if shape else "absent" for shape in (one, two)]
            return f"{name} is {sizes[0]} in one and {sizes[1]} in the other"
    return None
