"""Reading recipes: what is written, what is changed by --set, and how mistakes read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from posttrain.errors import RecipeError, UsageError
from posttrain.recipe import Recipe, SftConfig, result_config
from posttrain.recipe.load import load_recipe, validate_recipe

GOOD = """\
name: assistant
model: some/model
datasets:
  chats:
    source: tickets.jsonl
stages:
  - prepare: {dataset: chats}
  - sft:
      dataset: chats
      adapter: {rank: 8}
      optimization: {learning_rate: 2e-4}
  - merge
  - evaluate: {tasks: [mmlu], limit: 10}
  - gate: {max_drop: 0.01}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


def _sft(recipe: Recipe) -> SftConfig:
    return next(stage for stage in recipe.stages if isinstance(stage, SftConfig))


def test_a_recipe_is_read_as_written(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert [stage.stage for stage in recipe.stages] == [
        *("prepare", "sft", "merge", "evaluate", "gate")
    ]
    sft = _sft(recipe)
    assert sft.adapter is not None
    assert (sft.adapter.rank, sft.learning_rate) == (8, 2e-4)


def test_a_recipe_written_back_is_the_same_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    for exclude_defaults in (True, False):
        written = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=exclude_defaults))
        recipe_file.write_text(written)
        assert load_recipe(recipe_file) == recipe


@pytest.mark.parametrize(
    ("override", "rank"),
    [
        ("sft.adapter.rank=4", 4),
        ("stages.sft.adapter.rank=5", 5),
        ("stages[1].sft.adapter.rank=6", 6),
    ],
)
def test_set_reaches_a_stage_by_kind_or_position(
    recipe_file: Path, override: str, rank: int
) -> None:
    adapter = _sft(load_recipe(recipe_file, [override])).adapter
    assert adapter is not None
    assert adapter.rank == rank


def test_set_creates_what_is_not_there_yet(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["datasets.more.source=a.jsonl", "merge.check_prompts=2"])
    assert recipe.datasets["more"].source == "a.jsonl"


def test_set_takes_yaml_values(recipe_file: Path) -> None:
    assert _sft(load_recipe(recipe_file, ["sft.adapter=null"])).adapter is None
    assert _sft(load_recipe(recipe_file, ["sft.epochs=3"])).epochs == 3.0


@pytest.mark.parametrize("override", ["nonsense", "=1", "stft.epochs=2", "name.x.y=1"])
def test_a_set_that_leads_nowhere_is_refused(recipe_file: Path, override: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, [override])
    assert override in str(caught.value)


MISTAKES = """\
name: my assistant
datasets:
  chats: {sorce: tickets.jsonl}
stages:
  - prepare: {dataset: chats, split: {validation: 1.5}, order: [length]}
  - sft:
      dataset: chats
      adapter: {type: lora, rank: 0}
      dtype: float8
  - traing: {}
  - gate: {max_drop: often}
"""

MISTAKES_REPORT = """\
{file}: 8 problems
  name (line 1): is 'my assistant': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'
    `name`: Name of the pipeline, in Prefect, MLflow and the store.
  model: is missing
    `model`: Base model: Hub id (`OWNER/NAME` or `OWNER/NAME@REVISION`), folder, \
`gguf:FILE`, `package:NAME` for a GGUF file inside an installed Python package, or `artifact:NAME` \
for a model that another recipe left in the store.
  datasets.chats.source (line 3): is missing
    `source`: File, folder, glob, `hub:OWNER/NAME`, or `builtin:python-docs/chats`. Several are \
joined.
  datasets.chats.sorce (line 3): there is no such key; did you mean `source`?
    keys here: source, format, columns, split, subset, revision, limit, on_bad_row, license
  stages[0].prepare.split.validation (line 5): is 1.5: input should be less than 1
    `validation`: Share of rows that the loss is measured on during training.
  stages[1].sft.adapter.rank (line 8): is 0: input should be greater than or equal to 1
    `rank`: Rank of the update. 8-16 suits format and style, 32-64 harder adaptation.
  stages[1].sft.dtype (line 9): is 'float8'
    write one of: 'auto', 'float32', 'bfloat16' or 'float16'
  stages[2] (line 10): there is no stage `traing`; the stages are prepare, mix, \
pretrain, sft, reward, ppo, grpo, rloo, dpo, orpo, kto, merge, evaluate, judge, gate, register
"""


def test_all_mistakes_stand_in_one_report(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MISTAKES.replace("often", "0.02"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == MISTAKES_REPORT.format(file=file).rstrip("\n")


def test_a_key_written_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + "name: another\n")
    with pytest.raises(RecipeError, match=r"line 15, column 1: .*`name` is written twice"):
        load_recipe(file)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\nstages: [\n")
    with pytest.raises(RecipeError, match="line 3"):
        load_recipe(file)


def test_a_missing_file_suggests_its_neighbour(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean `recipe\.yaml`"):
        load_recipe(recipe_file.with_name("recipes.yaml"))


@pytest.mark.parametrize("stages", [[], [{}], [{"sft": {}, "merge": {}}], [3], [{"sft": 3}]])
def test_stages_of_the_wrong_shape_are_refused(stages: list[object]) -> None:
    with pytest.raises(RecipeError, match="stages"):
        validate_recipe({"name": "x", "model": "m", "stages": stages})


def test_what_changes_no_result_stays_out_of_the_fingerprint(recipe_file: Path) -> None:
    plain = result_config(_sft(load_recipe(recipe_file)))
    moved = ["sft.launch.num_processes=2", "sft.launch.log_every_steps=9", "sft.name=other"]
    assert result_config(_sft(load_recipe(recipe_file, moved))) == plain
    assert result_config(_sft(load_recipe(recipe_file, ["sft.seed=1"]))) != plain


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_recipe_in_configs_is_valid(file: Path) -> None:
    assert load_recipe(file).stages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("order: [near_dedup]", "`order` leaves out length, exact_dedup, decontaminate; add it"),
        ("split: {validation: 0.6, test: 0.4}", "leave nothing to train on"),
        ("split: {test: 0.1, test_dataset: b}", "write either `test` (a share) or `test_dataset`"),
        ("balance: {cap: 5, temperature: 2}", "write either `cap` or `temperature`"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, settings: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: x\nmodel: m\ndatasets: {a: {source: a.jsonl}}\n"
        f"stages:\n  - prepare: {{dataset: a, {settings}}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert "stages[0].prepare" in str(caught.value)


def test_decontaminate_takes_a_list_of_benchmarks(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: x\nmodel: m\ndatasets: {a: {source: a.jsonl}}\n"
        "stages:\n  - prepare: {dataset: a, decontaminate: [mmlu, hellaswag]}\n"
    )
    prepare = load_recipe(file).stages[0]
    assert prepare.decontaminate.benchmarks == ("mmlu", "hellaswag")  # type: ignore[union-attr]
