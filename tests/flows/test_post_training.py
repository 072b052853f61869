"""The whole skeleton on a tiny model: what runs, what is reused, what is recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.home import Home
from posttrain.opening import open_pipeline
from posttrain.plan import make_plan
from posttrain.store import Store
from tests.flows.conftest import Tiny, chat

ALL = [
    *("preflight", "contamination", "prepare", "evaluate-base"),
    *("sft", "merge", "evaluate", "gate"),
]
OF_ROWS = [name for name in ALL if name != "contamination"]
"""Steps that depend on the rows of the dataset."""


@pytest.fixture(scope="module")
def ran(tiny: Tiny, prefect_server: None, monkeypatch_module: pytest.MonkeyPatch) -> Tiny:
    """The tiny recipe, run once."""
    monkeypatch_module.setenv("POSTTRAIN_HOME", str(tiny.home))
    monkeypatch_module.delenv("MLFLOW_TRACKING_URI", raising=False)
    from flows.post_training import post_training

    state = post_training(str(tiny.recipe), return_state=True)
    assert state.is_completed(), state.message
    return tiny


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def actions(tiny: Tiny, *overrides: str) -> dict[str, str]:
    """What a run would do now, by step."""
    store = Store(tiny.home / "store")
    plan = make_plan(open_pipeline(tiny.recipe, overrides, store), store)
    return {planned.step.name: planned.action for planned in plan.steps}


def would_run(tiny: Tiny, *overrides: str) -> list[str]:
    return [name for name, action in actions(tiny, *overrides).items() if action == "run"]


def test_every_stage_leaves_an_artifact(ran: Tiny) -> None:
    assert actions(ran) == dict.fromkeys(ALL, "reuse")
    for artifact in Store(ran.home / "store").artifacts():
        assert artifact.manifest.headline
        assert (artifact.path / ".stage" / "log.txt").exists()


def test_the_merged_model_loads_and_answers(ran: Tiny) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [merged] = [a for a in Store(ran.home / "store").artifacts() if a.manifest.stage == "merge"]
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    model = AutoModelForCausalLM.from_pretrained(merged.path)
    question = [{"role": "user", "content": "What colour is the door?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_training_lowered_the_held_out_loss(ran: Tiny) -> None:
    [sft] = [a for a in Store(ran.home / "store").artifacts() if a.manifest.stage == "sft"]
    metrics = sft.manifest.metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"] - 0.2


def test_changing_the_gate_runs_the_gate_alone(ran: Tiny) -> None:
    assert would_run(ran, "gate.max_drop=0.5") == ["gate"]


def test_changing_how_things_are_logged_runs_nothing(ran: Tiny) -> None:
    changed = ["tracking.experiment=other", "tracking.log_level=DEBUG",
               "sft.launch.log_every_steps=5", "evaluate.batch_size=3"]  # fmt: skip
    assert would_run(ran, *changed) == []


def test_changing_the_training_keeps_the_data_and_the_base_numbers(ran: Tiny) -> None:
    assert would_run(ran, "sft.optimization.learning_rate=0.01") == [
        *("sft", "merge", "evaluate", "gate")
    ]


def test_changing_one_row_runs_from_prepare_on(ran: Tiny, tmp_path: Path) -> None:
    lines = ran.rows.read_text().splitlines()
    other = tmp_path / ran.rows.name
    other.write_text("\n".join([json.dumps(chat("door", "pink")), *lines[1:]]) + "\n")
    assert would_run(ran, f"datasets.chats.source={other}") == OF_ROWS


def test_reading_the_same_file_otherwise_runs_from_prepare_on(ran: Tiny) -> None:
    assert would_run(ran, "datasets.chats.limit=20") == OF_ROWS


def test_the_plan_says_what_changed(ran: Tiny) -> None:
    store = Store(ran.home / "store")
    plan = make_plan(open_pipeline(ran.recipe, ["gate.max_drop=0.5"], store), store)
    assert plan.steps[-1].reason == "max_drop: 0.9 -> 0.5"


def test_from_a_stage_on_everything_runs_again(ran: Tiny) -> None:
    store = Store(ran.home / "store")
    plan = make_plan(open_pipeline(ran.recipe, [], store), store, from_step="merge")
    runs = [planned.step.name for planned in plan.steps if planned.action == "run"]
    assert runs == ["merge", "evaluate", "gate"]


def test_equal_rows_written_differently_stop_after_prepare(
    ran: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early cutoff: prepare runs, its bytes are the same, and so nothing after it runs."""
    from prefect.client.orchestration import get_client

    from flows.post_training import post_training

    other = tmp_path / ran.rows.name
    rows = [json.loads(line) for line in ran.rows.read_text().splitlines()]
    other.write_text("".join(json.dumps(row, indent=None, separators=(",", ":")) + "\n"
                             for row in rows))  # fmt: skip
    overrides = [f"datasets.chats.source={other}"]
    assert "prepare" in would_run(ran, *overrides)
    state = post_training(str(ran.recipe), overrides, return_state=True)
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs()
    of_this_run = [run for run in runs if run.flow_run_id == state.state_details.flow_run_id]
    by_state = {run.name: run.state_name for run in of_this_run}
    assert by_state == {
        **dict.fromkeys(ALL, "Cached"),
        "preflight": "Completed",
        "prepare": "Completed",
    }


def test_a_gate_that_is_not_convinced_rejects_the_run(ran: Tiny) -> None:
    from flows.post_training import post_training

    state = post_training(str(ran.recipe), ["gate.max_drop=0.001"], return_state=True)
    assert (state.name, state.is_failed()) == ("Rejected", True)


def test_the_report_of_the_data_is_an_artifact_in_prefect_and_in_mlflow(ran: Tiny) -> None:
    import mlflow
    from prefect.client.orchestration import get_client

    artifacts = Store(ran.home / "store").artifacts()
    prepared = next(a for a in artifacts if a.manifest.stage == "prepare")
    with get_client(sync_client=True) as client:
        shown = [str(a.data) for a in client.read_artifacts() if a.key == "report-prepare"]
    page = str(prepared.path / "report.html")
    assert any("for training and" in text and page in text for text in shown)
    found = mlflow.MlflowClient(Home(ran.home).tracking_uri).list_artifacts(
        str(prepared.manifest.mlflow_run_id)
    )
    assert "report.html" in {file.path for file in found}


def test_mlflow_holds_the_run_its_stages_data_and_models(ran: Tiny) -> None:
    import mlflow

    client = mlflow.MlflowClient(Home(ran.home).tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = runs[0]
    children = {
        run.info.run_name: client.get_run(run.info.run_id)
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert list(children) == ALL
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    sft = children["sft"]
    assert sft.data.params["adapter.rank"] == "16"
    assert len(client.get_metric_history(sft.info.run_id, "loss")) == 24
    [dataset] = sft.inputs.dataset_inputs
    [model] = sft.outputs.model_outputs
    assert [entry.model_id for entry in children["merge"].inputs.model_inputs] == [model.model_id]
    logged = client.get_logged_model(model.model_id)
    assert Path(logged.tags["posttrain.path"]).is_dir()
    assert "sft.held_out_loss" in parent.data.metrics
    assert dataset.dataset.digest == sft.data.tags["posttrain.input.dataset"][:36]


def test_a_reused_stage_links_the_run_that_made_it(ran: Tiny) -> None:
    import mlflow

    client = mlflow.MlflowClient(Home(ran.home).tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.`posttrain.reused.sft` LIKE '%'")
    assert runs
    made_by = client.get_run(runs[0].data.tags["posttrain.reused.sft"])
    assert made_by.info.run_name == "sft"


def posttrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_line_says_what_was_reused(ran: Tiny) -> None:
    done = posttrain("run", str(ran.recipe))
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stdout
    assert "Gate: pass" in done.stdout


def test_exit_code_3_when_the_gate_said_no(ran: Tiny) -> None:
    done = posttrain("run", str(ran.recipe), "--set", "gate.max_drop=0.001", "--json")
    assert done.returncode == 3, done.stderr
    summary = json.loads(done.stdout)
    assert summary["verdict"] == "not enough evidence"
    assert [row["status"] for row in summary["stages"]] == ["reused"] * len(ALL)


def test_exit_code_2_for_a_recipe_with_mistakes(ran: Tiny) -> None:
    done = posttrain("run", str(ran.recipe), "--set", "sft.epochs=-1")
    assert done.returncode == 2
    assert "stages[1].sft.epochs" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_and_store_commands(ran: Tiny) -> None:
    assert "reuse" in posttrain("plan", str(ran.recipe)).stdout
    listing = json.loads(posttrain("store", "ls", "--json").stdout)
    assert {item["stage"] for item in listing["artifacts"]} >= {"sft", "merge", "gate"}
    assert "0 damaged" in posttrain("store", "verify").stdout
    assert "freed 0.0 MB" in posttrain("store", "gc").stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("posttrain.stages.sft", "prefect"),
        ("posttrain.stages.gate", "torch"),
        ("flows.post_training", "torch"),
        ("flows.post_training", "transformers"),
        ("posttrain.cli", "prefect"),
    ],
)
def test_nothing_is_imported_that_does_not_belong(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
