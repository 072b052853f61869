"""`posttrain generate` and `posttrain adapters` as a user calls them, on tiny models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner, Result

from posttrain.commands import generate as commands
from posttrain.errors import DataError, ModelError, PosttrainError, StoreError, UsageError
from posttrain.hardware import resolve_dtype
from posttrain.recipe.adapters import (
    AdapterConfig,
    BottleneckConfig,
    LoraConfig,
    PromptTuningConfig,
)
from posttrain.recipe.base import ArtifactKind
from posttrain.store import Artifact, InputRecord, Manifest, Store
from posttrain.store.fingerprint import stage_fingerprint
from posttrain.store.manifest import now
from posttrain.store.store import content_digest
from posttrain.train.adapters import add_adapter
from posttrain.train.outputs import save_adapter
from tests.conftest import make_tiny_model

BOTTLENECK = BottleneckConfig(type="bottleneck", reduction=8)
PROMPT = PromptTuningConfig(type="prompt", virtual_tokens=3)


class Home:
    """A store with a model, another model, and adapters of the first."""

    def __init__(self, root: Path, tiny_model: Path) -> None:
        self.store = Store(root / "store")
        self.model = self.put("convert", "model", lively(tiny_model, root / "base"), recipe="tiny")
        other = make_tiny_model(root / "other", seed=7)
        self.other = self.put("merge", "model", other, recipe="other")

    def put(
        self,
        stage: str,
        kind: ArtifactKind,
        folder: Path,
        base: Artifact | None = None,
        adapter: AdapterConfig | None = None,
        recipe: str = "tiny",
        name: str | None = None,
    ) -> Artifact:
        """Publish a folder as if a stage had left it."""
        weights = InputRecord(kind="source", digest=str(folder), source="/models/tiny.Q4.gguf")
        inputs = {"weights": weights}
        if base is not None:
            digest, fingerprint = base.digest, base.fingerprint
            inputs = {"model": InputRecord(kind="model", digest=digest, fingerprint=fingerprint)}
        config = {"adapter": adapter.model_dump(mode="json")} if adapter else {"name": name}
        digests = {key: record.digest for key, record in inputs.items()}
        work = self.store.work_folder(stage_fingerprint(stage, 1, config, digests))
        shutil.copytree(folder, work / "output")
        files = self.store.record_files(work / "output")
        metrics = {"held_out_loss_before": 4.0, "held_out_loss": 3.25, "trainable_parameters": 512}
        manifest = Manifest(
            kind=kind,
            stage=stage,
            name=name or stage,
            recipe=recipe,
            fingerprint=work.name,
            content_digest=content_digest(files),
            code_version=1,
            config=config,
            inputs=inputs,
            files=files,
            metrics=metrics if adapter else {},
            created=now(),
            seconds=1.0,
            packages={},
            hardware={},
        )
        return self.store.publish(work, manifest)

    def train(self, name: str, adapter: AdapterConfig, folder: Path, seed: int) -> Artifact:
        """An adapter that changes every answer."""
        save_changed_adapter(self.model.path, self.model.digest, adapter, folder, seed)
        return self.put("sft", "adapter", folder, self.model, adapter, name=name)


def lively(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with larger weights: as it is, it repeats its last token."""
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def save_changed_adapter(
    base: Path, digest: str, adapter: AdapterConfig, folder: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, total_steps=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    save_adapter(model, AutoTokenizer.from_pretrained(base), folder, base_digest=digest)


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    home = Home(root, tiny_model)
    home.train("sft", LoraConfig(rank=4), root / "lora", seed=1)
    home.train("sft-b", BOTTLENECK, root / "bottleneck", seed=2)
    home.train("sft-p", PROMPT, root / "prompt", seed=3)
    return home


@pytest.fixture(autouse=True)
def _at_home(made: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POSTTRAIN_HOME", str(made.store.root.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*arguments: str, stdin: str = "") -> Result:
    app = typer.Typer()
    app.command("generate")(commands.generate)
    app.command("adapters")(commands.adapters)
    result = CliRunner().invoke(app, arguments, input=stdin)
    if isinstance(result.exception, PosttrainError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def answers(*arguments: str, stdin: str = "") -> list[tuple[str, str]]:
    """Of each answer: who gave it, and what it is."""
    short = ("--max-new-tokens", "8", "--json")
    found = json.loads(call("generate", *arguments, *short, stdin=stdin).stdout)
    return [(answer["adapter"], answer["text"]) for answer in found["answers"]]


def as_served(folder: Path) -> PreTrainedModel:
    dtype = getattr(torch, resolve_dtype("auto"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_the_base_answers_as_transformers_does(made: Home) -> None:
    folder = made.model.path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = as_served(folder)
    text = "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert expected
    for name in ("convert", "tiny/convert", made.model.fingerprint[:8], str(folder)):
        assert answers(name, "--prompt", "What is red?") == [("base", expected)]


def test_adapters_of_several_kinds_answer_on_one_base_as_each_does_alone(made: Home) -> None:
    ask = ("convert", "--prompt", "What is red?")
    names = ("sft", "base", "sft-b", "sft-p", "base")
    together = answers(*ask, *(part for name in names for part in ("--adapter", name)))
    assert [name for name, _ in together] == ["sft", "base", "sft-b", "sft-p"]
    assert len({text for _, text in together}) == 4
    for name, text in together:
        assert answers(*ask, "--adapter", name) == [(name, text)]
    # Taken off again, they leave nothing behind.
    last = answers(*ask, "--adapter", "sft-p", "--adapter", "sft-b", "--adapter", "base")
    assert last[-1] == together[1]


def test_an_adapter_may_be_a_folder_or_digits(made: Home, tmp_path: Path) -> None:
    stored = made.store.root / "adapter"
    digits = next(path.name for path in stored.iterdir() if '"LORA"' in _config(path))
    shutil.copytree(stored / digits, tmp_path / "copy")
    (expected,) = answers("convert", "--adapter", "sft", "--prompt", "Hi")
    for name in (digits[:10], str(stored / digits), str(tmp_path / "copy")):
        assert answers("convert", "--adapter", name, "--prompt", "Hi") == [(name, expected[1])]


def _config(folder: Path) -> str:
    return (folder / "adapter_config.json").read_text()


def test_an_adapter_of_another_base_is_refused_with_the_reason(made: Home, tmp_path: Path) -> None:
    other = made.other.fingerprint[:12]
    for name in ("sft", str(_copy_of(made, tmp_path))):
        with pytest.raises(
            UsageError, match=r"trained on tiny\.Q4\.gguf, and .* is another model"
        ) as caught:
            call("generate", other, "--adapter", name, "--prompt", "Hi")
        assert f"posttrain generate {made.model.fingerprint[:12]}" in str(caught.value)


def _copy_of(made: Home, folder: Path) -> Path:
    adapter = next(path for path in (made.store.root / "adapter").iterdir())
    return Path(shutil.copytree(adapter, folder / "copy"))


def test_an_adapter_that_does_not_name_its_base_is_used_with_a_warning(
    made: Home, tmp_path: Path
) -> None:
    copy = _copy_of(made, tmp_path)
    config = json.loads(_config(copy))
    config["base_model_name_or_path"] = "someone/tiny"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    result = call(
        "generate", "convert", "--adapter", str(copy), "--prompt", "Hi", "--max-new-tokens", "2"
    )
    assert "names its base `someone/tiny`; nobody can tell whether that is convert" in result.stderr


def test_an_adapter_whose_base_is_a_folder_is_compared_with_it(
    made: Home, tiny_model: Path, tmp_path: Path
) -> None:
    save_changed_adapter(tiny_model, str(tiny_model), LoraConfig(rank=2), tmp_path / "mine", 5)
    mine = str(tmp_path / "mine")
    assert answers(str(tiny_model), "--adapter", mine, "--prompt", "Hi")
    with pytest.raises(UsageError, match="is another model"):
        call("generate", str(made.store.root.parent / "other"), "--adapter", mine, "--prompt", "Hi")


def test_names_that_mean_nothing_are_refused_with_what_to_write(made: Home, tmp_path: Path) -> None:
    ask = ("--prompt", "Hi")
    with pytest.raises(UsageError, match=r"neither a folder nor a Hub id(.|\n)*no such artifact"):
        call("generate", "nothing", *ask)
    with pytest.raises(UsageError, match="no such artifact"):
        call("generate", "convert", "--adapter", "nothing", *ask)
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        call("generate", "convert", "--adapter", str(tmp_path), *ask)
    with pytest.raises(UsageError, match="complete weights, no adapter"):
        call("generate", "convert", "--adapter", "merge", *ask)
    with pytest.raises(
        UsageError, match=rf"posttrain generate {made.model.fingerprint[:12]} --ada"
    ):
        call("generate", "sft", *ask)
    with pytest.raises(UsageError, match="write one of --prompt and --file"):
        call("generate", "convert", *ask, "--file", "x.txt")
    with pytest.raises(UsageError, match="the prompt is empty"):
        call("generate", "convert", stdin="\n")


def test_an_adapter_that_changes_the_base_is_asked_alone(made: Home, tmp_path: Path) -> None:
    copy = _copy_of(made, tmp_path)
    config = {**json.loads(_config(copy)), "init_lora_weights": "pissa"}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="changes the base's weights to load it"):
        call("generate", "convert", "--adapter", str(copy), "--adapter", "base", "--prompt", "Hi")


def test_a_damaged_adapter_is_not_used(made: Home, tmp_path: Path) -> None:
    damaged = made.train("sft-d", LoraConfig(rank=3), tmp_path / "damaged", seed=4)
    with (damaged.path / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match="tiny/sft-d was damaged"):
        call("generate", "convert", "--adapter", "sft-d", "--prompt", "Hi")


def test_prompts_come_from_lines_records_or_standard_input(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is red?\n\nWhat is blue?\n")
    turns = [
        {"role": "user", "content": "What is red?"},
        {"role": "assistant", "content": "The door."},
    ]
    records = [{"messages": turns}, {"prompt": "What is blue?"}, {"prompt": turns[:1]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = answers("convert", "--file", str(tmp_path / "p.txt"))
    assert len(lines) == 2
    assert answers("convert", "--file", str(tmp_path / "p.jsonl")) == [*lines, lines[0]]
    assert answers("convert", stdin="What is red?\n") == lines[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"text": "x"}\n', r"p\.jsonl:1: .*needs a `prompt`, or `messages`"),
        ("p.jsonl", '{"prompt": "x"}\n{', r"p\.jsonl:2: "),
        ("p.txt", "\n \n", "there is no prompt in it"),
        ("p.xls", "x", r"cannot read `\.xls`"),
    ],
)
def test_a_file_without_prompts_is_refused_with_the_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        call("generate", "convert", "--file", str(tmp_path / name))


def test_drawn_answers_depend_on_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Hi\nHi\n")
    draw = ("convert", "--temperature", "1", "--file", str(tmp_path / "p.txt"))
    first, second = answers(*draw, "--seed", "3")
    assert first == second
    assert answers(*draw, "--seed", "4")[0] != first


def test_a_model_without_a_chat_template_goes_on_with_the_text(made: Home, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(made.model.path, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    ((_, text),) = answers(str(plain), "--prompt", "import os")
    model = as_served(plain)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert text
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": turns}) + "\n")
    with pytest.raises(ModelError, match="prompt 1: has several turns"):
        call("generate", str(plain), "--file", str(tmp_path / "p.jsonl"))


def test_a_prompt_longer_than_the_model_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Hi\n" + "long words " * 400)
    with pytest.raises(
        DataError, match=r"prompt 2: has .* tokens, and the model reads 512 at most"
    ):
        call("generate", "convert", "--file", str(tmp_path / "p.txt"), "--max-new-tokens", "1")


def test_one_answer_is_printed_bare_and_several_in_a_table() -> None:
    ask = ("convert", "--prompt", "What is red?", "--max-new-tokens", "8")
    ((_, text),) = answers("convert", "--prompt", "What is red?")
    assert call("generate", *ask).stdout == f"{text}\n"
    table = call("generate", *ask, "--adapter", "sft", "--adapter", "base").stdout
    assert table.splitlines()[0].split() == ["prompt", "adapter", "answer"]
    assert table.count("What is red?") == 1


def test_the_list_says_what_each_adapter_is_and_where_it_goes(made: Home) -> None:
    facts = {
        fact["name"]: fact for fact in json.loads(call("adapters", "--json").stdout)["adapters"]
    }
    assert {name: (f["type"], f["rank"]) for name, f in facts.items()} == {
        "sft": ("lora", 4),
        "sft-b": ("bottleneck", 8),
        "sft-p": ("prompt", 3),
    }
    lora = facts["sft"]
    assert (lora["recipe"], lora["base"]) == ("tiny", "tiny.Q4.gguf")
    assert (lora["held_out_loss"], lora["trained_parameters"]) == (3.25, 512)
    table = call("adapters", "convert").stdout
    assert "tiny/sft-b" in table
    assert "4.00 -> 3.25" in table
    assert json.loads(call("adapters", "other/merge", "--json").stdout) == {"adapters": []}
    assert call("adapters", "other/merge").stdout == (
        "There is no adapter on other/merge in the store.\n"
    )


def test_listing_converts_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="was never converted here"):
        call("adapters", str(tmp_path / "m.gguf"))


def test_the_command_line_starts_without_the_libraries() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from posttrain.cli import app\n"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
