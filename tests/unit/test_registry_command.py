from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from posttrain.commands.registry import app
from posttrain.errors import PosttrainError, UsageError
from tests.unit.registry_store import Judging

NAME = "python-assistant"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a champion, a challenger and a model that failed."""
    root = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("POSTTRAIN_HOME", str(root))
        made = Judging(root / "store")
        first, second = made.candidate(1), made.candidate(2)
        made.candidate(3, "fail")
        registry("add", first.fingerprint, "--name", NAME)
        registry("promote", NAME)
        registry("add", second.fingerprint, "--name", NAME)
    return root


@pytest.fixture
def home(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for one test."""
    root = tmp_path / "home"
    shutil.copytree(filled, root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("POSTTRAIN_HOME", str(root))
    return root


def registry(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*arguments: str) -> str:
    result = registry(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fingerprint_of(home: Path, weights: str) -> str:
    found = home.glob("store/model/*/model.safetensors")
    return next(file.parent.name for file in found if file.read_text() == weights)


def test_nothing_registered_is_said_and_makes_no_database(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "none"))
    assert "Nothing is registered yet." in said("ls")
    with pytest.raises(UsageError, match="nothing is registered yet"):
        registry("show", NAME)
    assert not (tmp_path / "none").exists()


def test_ls_and_show(home: Path) -> None:
    lines = said("ls").splitlines()
    assert lines[1].split() == [NAME, "v1", "v2", "2"]
    assert json.loads(said("ls", "--json"))["models"][0]["champion"] == 1
    output = said("show", NAME)
    assert "champion" in output
    assert "hellaswag 0.44 (+0.030 [+0.015, +0.045])" in " ".join(output.split())
    assert "champion v1 (there was none), promote" in output
    found = json.loads(said("show", NAME, "--json"))
    assert [version["aliases"] for version in found["versions"]] == [["champion"], ["challenger"]]
    assert [change["action"] for change in found["history"]] == ["register", "promote", "register"]


def test_promote_and_rollback_say_what_changed(home: Path) -> None:
    assert said("promote", NAME) == f"champion of {NAME}: v2 (was v1)\n"
    assert said("rollback", NAME) == f"champion of {NAME}: v1 (was v2)\n"
    moved = json.loads(said("promote", NAME, "v2", "--json"))
    assert (moved["before"], moved["after"]) == (1, 2)
    with pytest.raises(UsageError, match="has no challenger"):
        registry("promote", NAME)
    with pytest.raises(UsageError, match="latest: write the number"):
        registry("promote", NAME, "latest")


def test_add_wants_a_pass_or_a_reason(home: Path) -> None:
    failed = fingerprint_of(home, "weights 3")
    with pytest.raises(PosttrainError, match="--override"):
        registry("add", failed, "--name", NAME)
    output = said("add", failed, "--name", NAME, "--override", "one subject [of 57]")
    assert output == f"challenger of {NAME}: v3 (was v2); gate: fail\n"
    shown = " ".join(said("show", NAME).split())
    assert "challenger v3 (was v2), register; override: one subject [of 57]" in shown
    again = said("add", fingerprint_of(home, "weights 1"), "--name", NAME)
    assert again == f"champion of {NAME}: v1 (unchanged); gate: pass\n"


def test_add_takes_complete_weights_only(home: Path) -> None:
    adapter = next(home.glob("store/adapter/*")).name
    with pytest.raises(UsageError, match="an adapter; merge it first"):
        registry("add", adapter, "--name", NAME)


def test_card_prints_or_writes_the_card(home: Path, tmp_path: Path) -> None:
    model = fingerprint_of(home, "weights 1")
    text = said("card", model)
    assert text.startswith("---\n")
    assert "## Limits" in text
    out = tmp_path / "README.md"
    assert said("card", model, "--out", str(out)) == f"written to {out}\n"
    assert out.read_text() == text
