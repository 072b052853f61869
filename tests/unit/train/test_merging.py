"""Several models made one: what each method computes, what is measured, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from posttrain.errors import ModelError
from posttrain.recipe.merge import MergeConfig
from posttrain.stages.merge import main
from posttrain.stages.program import StageContext, StageInput, StageResult
from posttrain.train.merging import compare_logits
from posttrain.train.outputs import final_logits, max_difference, save_adapter, save_model
from tests.unit.train.programs import digests_of, make_dataset, make_stage_dir

Weights = Mapping[str, torch.Tensor]
Merge = Callable[..., tuple[Path, StageResult]]

BOTH = [{"model": "a"}, {"model": "b"}]
PROMPTS = [[1, 50, 60, 70], [1, 80]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tune(base: Path, folder: Path, seed: int, scale: float = 0.01) -> Path:
    """The base with a little noise on every weight, as training would leave it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    model.generation_config.max_new_tokens = 7
    save_model(model, AutoTokenizer.from_pretrained(base), folder)
    return folder


def adapt(base: Path, folder: Path, seed: int, **settings: object) -> Path:
    """A LoRA adapter that changes something: peft starts B at zero, this one does not."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    save_adapter(model, AutoTokenizer.from_pretrained(base), folder, "digest")
    return folder


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`base`, and `a` and `b` that were made from it."""
    folder = tmp_path_factory.mktemp("models")
    tuned = {name: tune(tiny_model, folder / name, seed) for seed, name in enumerate("ab", 1)}
    return {"base": tiny_model, **tuned}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a` and `b`, adapters of one base."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: adapt(tiny_model, folder / name, seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture
def merge(tmp_path: Path, tiny_model: Path) -> Merge:
    """Runs the stage on these folders; an adapter's base is the tiny model."""

    def run(
        folders: Mapping[str, Path],
        name: str = "merge",
        datasets: tuple[str, ...] = ("chats",),
        **config: object,
    ) -> tuple[Path, StageResult]:
        inputs = {
            f"prompts:{dataset}": StageInput(
                kind="dataset", path=str(make_dataset(tmp_path / f"{name}-{dataset}")), digest="d"
            )
            for dataset in datasets
        }
        for source, folder in folders.items():
            adapter = (folder / "adapter_config.json").exists()
            key = "base" if source == "base" and "base" not in str(config["models"]) else None
            inputs[key or f"model:{source}"] = StageInput(
                kind="adapter" if adapter else "model",
                path=str(folder),
                digest=source,
                base=str(tiny_model) if adapter else None,
            )
        if config.get("into") == "adapter":
            inputs["model"] = StageInput(kind="model", path=str(tiny_model), digest="base-digest")
        stage_dir = make_stage_dir(tmp_path / name, "merge", config, inputs)
        context = StageContext(stage_dir, MergeConfig)
        context.output.mkdir()
        result = main(context)
        assert not (stage_dir / "scratch").exists()
        return context.output, result

    return run


def weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def same(first: Weights, second: Weights, tolerance: float = 1e-6) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], atol=tolerance) for name in first)


def mixed(*parts: tuple[float, Path]) -> Weights:
    """The sum of these models' weights, each times its factor."""
    loaded = [(factor, weights(folder)) for factor, folder in parts]
    return {name: sum(f * w[name] for f, w in loaded) for name in loaded[0][1]}


# Weights


@pytest.mark.parametrize(
    ("shares", "parts"),
    [((None, None), (0.5, 0.5)), ((0.5, 0.5), (0.5, 0.5)), ((3, 1), (0.75, 0.25))],
)
def test_a_linear_merge_is_the_weighted_mean(
    models: dict[str, Path],
    merge: Merge,
    shares: tuple[float | None, float | None],
    parts: tuple[float, float],
) -> None:
    sources = [{"model": name, "weight": share} for name, share in zip("ab", shares, strict=True)]
    output, _ = merge({n: models[n] for n in "ab"}, method="linear", models=sources)
    assert same(weights(output), mixed((parts[0], models["a"]), (parts[1], models["b"])))


def test_weights_that_are_not_normalized_are_taken_as_written(
    models: dict[str, Path], merge: Merge
) -> None:
    sources = [{"model": "a", "weight": 1}, {"model": "b", "weight": 0.5}]
    output, _ = merge(
        {n: models[n] for n in "ab"}, method="linear", models=sources, normalize=False
    )
    assert same(weights(output), mixed((1, models["a"]), (0.5, models["b"])))


@pytest.mark.parametrize(("t", "end"), [(0, "a"), (1, "b")])
def test_slerp_ends_at_its_two_models(
    models: dict[str, Path], merge: Merge, t: float, end: str
) -> None:
    output, _ = merge({n: models[n] for n in "ab"}, method="slerp", models=BOTH, t=t)
    assert same(weights(output), weights(models[end]))


def test_ties_of_one_model_with_all_of_its_changes_is_that_model(
    models: dict[str, Path], merge: Merge
) -> None:
    source = {"model": "a", "density": 1}
    output, _ = merge({"base": models["base"], "a": models["a"]}, method="ties", models=[source])
    assert same(weights(output), weights(models["a"]))


def test_ties_keeps_the_largest_changes(models: dict[str, Path], merge: Merge) -> None:
    source = {"model": "a", "density": 0.25}
    output, _ = merge({"base": models["base"], "a": models["a"]}, method="ties", models=[source])
    name = "model.layers.0.mlp.up_proj.weight"
    change = (weights(output)[name] - weights(models["base"])[name]).abs()
    before = (weights(models["a"])[name] - weights(models["base"])[name]).abs()
    assert int((change > 1e-7).sum()) == before.numel() // 4
    assert float(before[change > 1e-7].min()) >= float(before[change <= 1e-7].max())


def test_ties_drops_the_changes_whose_sign_loses(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    base = weights(models["base"])
    opposed = tmp_path / "opposed"
    shutil.copytree(models["a"], opposed)
    from safetensors.torch import save_file

    half_back = mixed((1.5, models["base"]), (-0.5, models["a"]))
    save_file(dict(half_back), opposed / "model.safetensors", {"format": "pt"})
    sources = [{"model": "a", "density": 1}, {"model": "b", "density": 1}]
    output, _ = merge(
        {"base": models["base"], "a": models["a"], "b": opposed}, method="ties", models=sources
    )
    assert same(weights(output), weights(models["a"]))
    assert not same(weights(output), base)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_by_its_seed_alone(models: dict[str, Path], merge: Merge, method: str) -> None:
    def bytes_of(name: str, seed: int) -> str:
        torch.manual_seed(len(name))
        output, _ = merge(models, name=name, method=method, models=BOTH, seed=seed)
        return digests_of(output)["model.safetensors"]

    first = bytes_of("first", 3)
    assert bytes_of("second", 3) == first
    assert bytes_of("other-seed", 4) != first


def test_dare_that_drops_nothing_adds_the_mean_of_the_changes(
    models: dict[str, Path], merge: Merge
) -> None:
    sources = [{"model": "a", "density": 1}, {"model": "b", "density": 1}]
    output, _ = merge(models, method="dare_linear", models=sources)
    assert same(weights(output), mixed((0.5, models["a"]), (0.5, models["b"])))


def test_adapters_are_folded_in_first(
    models: dict[str, Path], adapters: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(models["base"])
    PeftModel.from_pretrained(base, adapters["a"]).merge_and_unload().save_pretrained(
        tmp_path / "folded"
    )
    output, _ = merge({"a": adapters["a"], "b": models["b"]}, method="linear", models=BOTH)
    assert same(weights(output), mixed((0.5, tmp_path / "folded"), (0.5, models["b"])))


def test_one_artifact_under_two_names_counts_twice(models: dict[str, Path], merge: Merge) -> None:
    output, _ = merge({"a": models["a"], "b": models["a"]}, method="linear", models=BOTH)
    assert same(weights(output), weights(models["a"]))


# What is written


def test_a_merge_is_a_complete_folder_and_the_same_bytes_each_time(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    first, _ = merge(models, name="first", method="ties", models=BOTH)
    second, _ = merge(models, name="second", method="ties", models=BOTH)
    assert digests_of(first) == digests_of(second)
    for path in first.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert AutoTokenizer.from_pretrained(first).chat_template
    assert GenerationConfig.from_pretrained(first).max_new_tokens == 7
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.generate(torch.tensor([[1, 50]]), do_sample=False).shape[1] > 2


def test_16_bit_models_merge_into_a_16_bit_model(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    halves = {}
    for name in "ab":
        halves[name] = tmp_path / f"{name}16"
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.bfloat16)
        save_model(model, AutoTokenizer.from_pretrained(models[name]), halves[name])
    output, _ = merge(halves, method="linear", models=BOTH)
    assert {weight.dtype for weight in weights(output).values()} == {torch.bfloat16}
    mean = mixed((0.5, models["a"]), (0.5, models["b"]))
    merged = {name: weight.float() for name, weight in weights(output).items()}
    assert same(merged, mean, tolerance=1e-2)


def test_each_model_and_the_merge_are_measured_on_every_dataset(
    models: dict[str, Path], merge: Merge
) -> None:
    both = {n: models[n] for n in "ab"}
    _, result = merge(both, datasets=("chats", "more rows"), method="linear", models=BOTH)
    assert sorted(result.metrics) == sorted(
        f"perplexity/{dataset}{name}"
        for dataset in ("chats", "more_rows")
        for name in ("", "/a", "/b")
    )
    assert result.headline.startswith("linear of 2; perplexity on chats ")
    assert result.details["perplexity"]["chats"]["a"] == result.metrics["perplexity/chats/a"]
    _, end = merge(both, name="end", method="slerp", models=BOTH, t=1)
    assert end.metrics["perplexity/chats"] == pytest.approx(end.metrics["perplexity/chats/b"])
    assert end.metrics["perplexity/chats"] != pytest.approx(end.metrics["perplexity/chats/a"])


# What is refused


def test_models_of_other_sizes_are_refused(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["b"])
    model.resize_token_embeddings(640)
    save_model(model, AutoTokenizer.from_pretrained(models["b"]), tmp_path / "wide")
    with pytest.raises(
        ModelError, match=r"`a` and `b` cannot be merged: .*600 x 64.* and 640 x 64"
    ):
        merge({"a": models["a"], "b": tmp_path / "wide"}, method="linear", models=BOTH)


def test_models_of_other_architectures_are_refused(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models["b"], other)
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a LlamaForCausalLM and a Qwen2ForCausalLM"):
        merge({"a": models["a"], "b": other}, method="linear", models=BOTH)


def test_models_with_other_vocabularies_are_refused(
    models: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models["b"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary)[100:102]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="different numbers"):
        merge({"a": models["a"], "b": other}, method="linear", models=BOTH)


# Adapters


def logits_of(base: Path, adapter: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return final_logits(PeftModel.from_pretrained(model, adapter).eval(), PROMPTS)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_concatenated_adapters_add_their_changes(
    tiny_model: Path, tmp_path: Path, merge: Merge, settings: dict[str, object]
) -> None:
    adapters = {
        name: adapt(tiny_model, tmp_path / name, seed, r=2 + 2 * seed, **settings)
        for seed, name in enumerate("ab", 1)
    }
    output, _ = merge(adapters, method="cat", models=BOTH, into="adapter", normalize=False)
    folded = AutoModelForCausalLM.from_pretrained(tiny_model)
    for adapter in adapters.values():
        folded = PeftModel.from_pretrained(folded, adapter).merge_and_unload()
    combined = logits_of(tiny_model, output)
    assert max_difference(final_logits(folded.eval(), PROMPTS), combined) < 1e-4
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 10


@pytest.mark.parametrize(
    "method",
    [
        *("linear", "svd", "cat", "ties", "dare_linear", "dare_ties"),
        *("ties_svd", "dare_linear_svd", "dare_ties_svd"),
    ],
)
def test_combined_adapters_are_one_adapter_of_their_base(
    tiny_model: Path, adapters: dict[str, Path], merge: Merge, method: str
) -> None:
    output, result = merge(adapters, method=method, models=BOTH, into="adapter")
    assert {path.name for path in output.iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
    }
    assert not any(path.is_dir() for path in output.iterdir())
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base-digest"
    plain = final_logits(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), PROMPTS)
    combined = logits_of(tiny_model, output)
    assert max_difference(plain, combined) > 1e-3
    assert max_difference(logits_of(tiny_model, adapters["a"]), combined) > 1e-3
    assert {"perplexity/chats", "perplexity/chats/a", "perplexity/chats/b"} <= set(result.metrics)


def test_each_combined_adapter_is_measured_by_itself(
    adapters: dict[str, Path], merge: Merge
) -> None:
    _, combined = merge(adapters, name="one", method="cat", models=BOTH, into="adapter")
    _, folded = merge(adapters, name="two", method="linear", models=BOTH)
    for name in ("perplexity/chats/a", "perplexity/chats/b", "perplexity/chats"):
        # Concatenated with equal shares, the adapters are the mean of their changes.
        assert combined.metrics[name] == pytest.approx(folded.metrics[name], rel=1e-4)
    assert len({round(value, 3) for value in combined.metrics.values()}) == 3


def test_an_adapter_combined_with_itself_is_itself(
    tiny_model: Path, adapters: dict[str, Path], merge: Merge
) -> None:
    twice = {"a": adapters["a"], "b": adapters["a"]}
    expected = logits_of(tiny_model, adapters["a"])
    for method in ("svd", "cat", "ties_svd", "linear", "ties"):
        sources = [{"model": name, "density": 1 if "ties" in method else None} for name in "ab"]
        output, result = merge(twice, name=method, method=method, models=sources, into="adapter")
        # The square roots of the weights stand on both matrices: linear and ties do not sum up.
        exact = method in ("svd", "cat", "ties_svd", "ties")
        assert (max_difference(expected, logits_of(tiny_model, output)) < 1e-3) == exact, method
        same = result.metrics["perplexity/chats/a"], result.metrics["perplexity/chats/b"]
        assert same[0] == pytest.approx(same[1])


def test_dare_of_adapters_drops_by_its_seed_alone(adapters: dict[str, Path], merge: Merge) -> None:
    def bytes_of(name: str, seed: int) -> dict[str, str]:
        torch.manual_seed(len(name))
        output, _ = merge(
            adapters, name=name, method="dare_ties", models=BOTH, into="adapter", seed=seed
        )
        return digests_of(output)

    first = bytes_of("first", 3)
    assert bytes_of("second", 3) == first
    assert bytes_of("other-seed", 4) != first


def test_the_rank_of_a_decomposition_can_be_chosen(adapters: dict[str, Path], merge: Merge) -> None:
    output, _ = merge(adapters, method="svd", models=BOTH, into="adapter", rank=6)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 6


def test_adapters_of_different_ranks_need_a_method_for_that(
    tiny_model: Path, adapters: dict[str, Path], merge: Merge, tmp_path: Path
) -> None:
    wide = adapt(tiny_model, tmp_path / "wide", 3, r=8)
    both = {"a": adapters["a"], "b": wide}
    with pytest.raises(ModelError, match=r"cannot combine these adapters: .*same r"):
        merge(both, method="ties", models=BOTH, into="adapter")
    merge(both, name="svd", method="ties_svd", models=BOTH, into="adapter")


# How far apart


def test_the_difference_of_logits_is_told_in_three_ways() -> None:
    before, after = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    same = compare_logits([before], [before])
    assert (same.largest, same.mean, same.divergence) == (0, 0, 0)
    apart = compare_logits([before, before], [after, before])
    chance = 1 / (1 + torch.tensor(1.0).exp())
    divergence = float(chance * (2 * chance).log() + (1 - chance) * (2 - 2 * chance).log())
    assert (apart.largest, apart.mean) == (1.0, 0.25)
    assert apart.divergence == pytest.approx(divergence / 2)
