"""The registry against a real MLflow database, each test with a fresh copy of an empty one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from posttrain.errors import DataError, PosttrainError, StoreError, UsageError
from posttrain.home import Home
from posttrain.lineage import Graph
from posttrain.recipe import RegisterConfig
from posttrain.registry import (
    Change,
    Registry,
    find_champion,
    judged_by,
    registered_fingerprints,
)
from posttrain.registry.connection import shown
from posttrain.registry.history import champions
from posttrain.stages.program import StageContext, read_result
from posttrain.stages.register import main
from posttrain.store.gc import find_garbage
from posttrain.tracking import mlflow_name
from tests.unit.registry_store import Judging, stage_dir

NAME = "python-assistant"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return Home(tmp_path)


@pytest.fixture
def made(home: Home) -> Judging:
    return Judging(home.store.root)


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry(home)


def client_of(home: Home):
    from mlflow import MlflowClient

    return MlflowClient(home.tracking_uri)


def three_champions(made: Judging, registry: Registry) -> None:
    for number in (1, 2, 3):
        entry = made.entry(made.candidate(number))
        registry.register(NAME, entry, alias="champion")


# What a version carries


def test_a_version_carries_verdict_numbers_fingerprint_and_lineage(home, made, registry):
    model = made.candidate()
    done = registry.register(NAME, made.entry(model))
    assert (done.version, done.alias, done.before, done.verdict) == (1, "challenger", None, "pass")
    assert done.metrics == {"hellaswag": 0.44}
    found = client_of(home).get_model_version_by_alias(NAME, "challenger")
    assert found.tags["posttrain.fingerprint"] == model.fingerprint
    assert found.tags["posttrain.digest"] == model.digest
    assert found.tags["posttrain.path"] == str(model.path)
    assert found.tags["posttrain.recipe"] == "tiny"
    assert found.tags["posttrain.verdict"] == "pass"
    assert found.tags["posttrain.metric.hellaswag"] == "0.44"
    assert found.tags["posttrain.difference.hellaswag"] == "+0.030 [+0.015, +0.045]"
    assert found.tags["posttrain.lineage"].startswith("tiny/sft")
    assert "- hellaswag: +0.030 on 400 items" in found.description
    assert "tiny/sft" in found.description


def test_the_version_points_to_the_model_that_the_run_logged(home, made, registry):
    import mlflow

    client = client_of(home)
    experiment = client.create_experiment("tiny", (home.mlflow_artifacts / "tiny").as_uri())
    run, other = client.create_run(experiment), client.create_run(experiment)
    model = made.candidate(mlflow=run.info.run_id)
    mlflow.set_tracking_uri(home.tracking_uri)
    logged, _ = (
        mlflow.create_external_model(
            name="tiny-merge",
            source_run_id=one.info.run_id,
            experiment_id=experiment,
            tags={"posttrain.fingerprint": model.fingerprint},
        )
        for one in (run, other)
    )
    os.environ.pop("MLFLOW_TRACKING_URI")
    registry.register(NAME, made.entry(model))
    found = client.get_model_version(NAME, "1")
    assert (found.source, found.run_id) == (f"models:/{logged.model_id}", run.info.run_id)
    assert NAME in client.get_logged_model(logged.model_id).tags["mlflow.modelVersions"]


def test_a_model_of_an_unknown_run_gets_a_logged_model_of_its_own(home, made, registry):
    model = made.candidate(mlflow="0" * 32)
    registry.register(NAME, made.entry(model))
    source = client_of(home).get_model_version(NAME, "1").source
    logged = client_of(home).get_logged_model(source.removeprefix("models:/"))
    assert logged.tags["posttrain.fingerprint"] == model.fingerprint


def test_registering_leaves_the_environment_as_it_was(made, registry):
    registry.register(NAME, made.entry(made.candidate()))
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"} & set(os.environ)


def test_the_same_model_is_one_version_with_the_latest_verdict(home, made, registry):
    model = made.candidate()
    registry.register(NAME, made.entry(model))
    made.judge(model, "pass", 0.46)
    done = registry.register(NAME, made.entry(model), alias="champion")
    assert (done.version, done.alias) == (1, "champion")
    (version,) = registry.versions(NAME)
    assert version.metrics == {"hellaswag": "0.46"}
    assert version.aliases == ("champion",)
    again = registry.register(NAME, made.entry(model))
    assert (again.version, again.alias) == (1, "champion")
    assert [change.alias for change in registry.history(NAME)] == ["challenger", "champion"]


# The gate decides, or a person who says why


@pytest.mark.parametrize("outcome", ["fail", "not enough evidence", None])
def test_a_model_that_did_not_pass_is_not_registered(home, made, registry, outcome):
    model = made.candidate(1, outcome)
    with pytest.raises(PosttrainError, match=f"posttrain registry add .* --name {NAME} --override"):
        registry.register(NAME, made.entry(model))
    assert registry.models() == []


def test_an_override_is_recorded_with_who_and_when(home, made, registry, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    done = registry.register(NAME, made.entry(made.candidate(1, "fail")), override="one subject")
    assert (done.verdict, done.override) == ("fail", "one subject")
    tags = client_of(home).get_model_version(NAME, "1").tags
    assert (tags["posttrain.override"], tags["posttrain.override_by"]) == ("one subject", "ada")
    at = datetime.fromisoformat(tags["posttrain.override_at"])
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    (change,) = registry.history(NAME)
    assert (change.who, change.override, change.after) == ("ada", "one subject", 1)


def test_an_overridden_challenger_needs_another_reason_to_be_champion(made, registry):
    registry.register(NAME, made.entry(made.candidate(1, "fail")), override="to try it")
    with pytest.raises(PosttrainError, match=f"promote {NAME} 1 --override") as caught:
        registry.promote(NAME, "challenger")
    assert "the gate says `fail`" in str(caught.value)
    assert registry.model(NAME).champion is None
    moved = registry.promote(NAME, 1, override="customers want it")
    assert moved.sentence == f"champion of {NAME}: v1 (there was none)"
    assert registry.history(NAME)[-1].override == "customers want it"
    assert registry.versions(NAME)[0].override == "customers want it"


def test_an_override_without_a_reason_is_refused(made, registry):
    with pytest.raises(UsageError, match="say why"):
        registry.register(NAME, made.entry(made.candidate(1, "fail")), override="  ")


def test_an_adapter_is_not_registered(made, registry):
    model = made.candidate()
    adapter = next(a for a in made.store.artifacts() if a.kind == "adapter")
    assert model.kind == "model"
    with pytest.raises(UsageError, match="merge"):
        registry.register(NAME, made.entry(adapter), override="anyway")


def test_a_name_that_would_break_a_filter_is_refused(made, registry):
    with pytest.raises(UsageError, match="letters, digits"):
        registry.register("it's", made.entry(made.candidate()))


def test_the_verdict_of_the_latest_run_counts(made):
    model = made.candidate(1, None)
    gates = {"fail": made.judge(model, "fail", 0.40), "pass": made.judge(model, "pass", 0.41)}
    for number, (outcome, gate) in enumerate([*gates.items(), *gates.items()]):
        record = {"recipe": "tiny", "started": f"2026-01-0{number + 1}"}
        artifacts = {"merge": model.fingerprint, "gate": gate.fingerprint}
        made.store.record_run(str(number), {**record, "artifacts": artifacts})
        judged = judged_by(Graph.read(made.store), model)
        assert judged is not None
        assert judged.verdict.verdict == outcome


# Promotion and rollback


def test_promoting_the_challenger_takes_its_alias_along(made, registry):
    three_champions(made, registry)
    registry.register(NAME, made.entry(made.candidate(4)))
    moved = registry.promote(NAME, "challenger")
    assert moved.sentence == f"champion of {NAME}: v4 (was v3)"
    found = registry.model(NAME)
    assert (found.champion, found.challenger, found.previous_champion) == (4, None, 3)
    assert registry.promote(NAME, 4).sentence == f"champion of {NAME}: v4 (unchanged)"
    assert len(registry.history(NAME)) == 5


def test_rollback_leads_back_champion_by_champion_and_keeps_the_history(made, registry):
    three_champions(made, registry)
    assert registry.rollback(NAME).sentence == f"champion of {NAME}: v2 (was v3)"
    assert registry.rollback(NAME).sentence == f"champion of {NAME}: v1 (was v2)"
    with pytest.raises(UsageError, match="v1 is the first champion"):
        registry.rollback(NAME)
    assert registry.promote(NAME, 3).sentence == f"champion of {NAME}: v3 (was v1)"
    assert registry.rollback(NAME).after == 1
    said = [(change.action, change.before, change.after) for change in registry.history(NAME)]
    assert said == [
        ("register", None, 1),
        ("register", 1, 2),
        ("register", 2, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 1),
        ("promote", 1, 3),
        ("rollback", 3, 1),
    ]


def test_rollback_passes_over_a_deleted_version(home, made, registry):
    three_champions(made, registry)
    client_of(home).delete_model_version(NAME, "2")
    assert registry.model(NAME).previous_champion == 1
    assert registry.rollback(NAME).after == 1


def test_rollback_to_weights_that_are_gone_is_refused(home, made, registry):
    three_champions(made, registry)
    fingerprint = registry.versions(NAME)[1].fingerprint
    shutil.rmtree(home.store.path_of("model", fingerprint))
    with pytest.raises(StoreError, match="is no longer in the store"):
        registry.rollback(NAME)
    assert registry.model(NAME).champion == 3


def test_a_champion_chosen_in_mlflow_itself_is_one_to_roll_back_to(home, made, registry):
    three_champions(made, registry)
    client_of(home).set_registered_model_alias(NAME, "champion", "1")
    registry.promote(NAME, 2)
    assert registry.rollback(NAME).after == 1


def change(action: str, before: int | None, after: int) -> Change:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Change(at=at, who="ada", action=action, alias="champion", before=before, after=after)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("present", "line"),
    [
        (3, [1, 2, 3]),  # as recorded
        (2, [1, 2]),  # killed after the record of 2 -> 3, before it was done
        (5, [1, 2, 3, 5]),  # changed elsewhere since
    ],
)
def test_the_line_of_champions_is_what_the_aliases_say(present, line):
    recorded = [change("register", None, 1), change("promote", 1, 2), change("promote", 2, 3)]
    assert champions(recorded, present) == line
    assert champions([change("register", None, 1)], None) == []
    again = [*recorded, change("promote", 2, 3)]
    assert champions(again, 3) == [1, 2, 3]


def test_a_gate_that_compared_with_another_champion_is_noted(made, registry):
    registry.register(NAME, made.entry(made.candidate(1)), alias="champion")
    label = f"champion {NAME} v1"
    registry.register(NAME, made.entry(made.candidate(2, champion=label)), alias="champion")
    assert registry.promote(NAME, 1).note == ""
    late = registry.register(NAME, made.entry(made.candidate(3, champion=f"champion {NAME} v2")))
    assert late.note == ""
    moved = registry.promote(NAME, "challenger")
    assert f"compared v3 with champion {NAME} v2, not with v1" in moved.note


def test_unknown_names_and_versions_are_named(made, registry):
    with pytest.raises(UsageError, match="there are: none"):
        registry.promote(NAME, 1)
    registry.register(NAME, made.entry(made.candidate()))
    with pytest.raises(UsageError, match="has no version 7; it has v1"):
        registry.promote(NAME, 7)
    with pytest.raises(UsageError, match=f"there are: {NAME}"):
        registry.history("other")
    with pytest.raises(UsageError, match="no champion to roll back from"):
        registry.rollback(NAME)


def test_a_clock_that_is_behind_does_not_change_the_order(home, made, registry):
    registry.register(NAME, made.entry(made.candidate(1)), alias="champion")
    later = Change(
        at=datetime(2100, 1, 1, tzinfo=UTC),
        **{"who": "ada", "action": "promote", "alias": "challenger", "before": None, "after": 1},
    )
    client_of(home).set_registered_model_tag(NAME, *later.tag)
    registry.register(NAME, made.entry(made.candidate(2)), alias="champion")
    assert [change.after for change in registry.history(NAME)] == [1, 1, 2]


def test_models_that_others_registered_are_listed_whatever_their_name(home, registry):
    client_of(home).create_registered_model("somebody's model")
    (found,) = registry.models()
    assert (found.name, found.versions, found.champion) == ("somebody's model", 0, None)


# What others ask


def test_asking_for_a_champion_costs_nothing_where_nothing_was_tracked(tmp_path):
    program = (
        "import sys; from pathlib import Path; from posttrain.home import Home;"
        "from posttrain.registry import find_champion, registered_fingerprints as kept;"
        f"home = Home(Path({str(tmp_path / 'none')!r}));"
        "assert find_champion('x', home) is None and kept(home) == set();"
        "assert 'mlflow' not in sys.modules"
    )
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    assert not (tmp_path / "none").exists()


def test_the_champion_is_found_with_its_weights(home, made, registry):
    assert find_champion(NAME, home) is None
    model = made.candidate()
    registry.register(NAME, made.entry(model))
    assert find_champion(NAME, home) is None
    registry.promote(NAME, 1)
    champion = find_champion(NAME, home)
    assert champion is not None
    assert (champion.artifact.path, champion.label) == (model.path, f"champion {NAME} v1")


def test_a_champion_without_weights_is_an_error_that_says_what_to_do(home, made, registry):
    model = made.candidate()
    registry.register(NAME, made.entry(model), alias="champion")
    shutil.rmtree(model.path)
    with pytest.raises(StoreError, match="run its recipe `tiny` again") as caught:
        find_champion(NAME, home)
    assert "against_champion: ignore" in str(caught.value)


def test_a_champion_that_somebody_else_registered_is_an_error(home):
    client = client_of(home)
    client.create_registered_model(NAME)
    client.create_model_version(NAME, source=str(home.root))
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(UsageError, match="was not registered by posttrain"):
        find_champion(NAME, home)
    assert registered_fingerprints(home) == set()


def test_garbage_collection_keeps_what_an_alias_or_a_rollback_leads_to(home, made, registry):
    models = [made.candidate(number) for number in (1, 2, 3, 4)]
    for model in models[:3]:
        registry.register(NAME, made.entry(model), alias="champion")
    registry.register(NAME, made.entry(models[3]))
    needed = registered_fingerprints(home)
    assert {model.fingerprint for model in models[1:]} <= needed
    assert models[0].fingerprint not in needed
    for artifact in home.store.artifacts():
        old = artifact.manifest.model_copy(update={"created": datetime(2020, 1, 1, tzinfo=UTC)})
        (artifact.path / "manifest.json").write_text(old.model_dump_json())
    gone = {item.path for item in find_garbage(home.store, needed=needed)}
    assert models[0].path in gone
    assert not gone & {model.path for model in models[1:]}
    champion_gate = judged_by(Graph.read(home.store), models[2]).gate
    assert champion_gate.path not in gone


def test_a_server_that_does_not_answer_is_an_error_and_hides_its_password(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for ask in (lambda: find_champion(NAME, home), lambda: registered_fingerprints(home)):
        with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9 cannot be reached") as caught:
            ask()
        assert "secret" not in str(caught.value)
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://ada:secret@127.0.0.1:9"
    assert shown("postgresql://u:p@db/x") == "postgresql://db/x"


# The stage


def run_main(folder: Path):
    return main(StageContext(folder, RegisterConfig))


def test_the_stage_registers_and_writes_the_card(home, made, registry):
    model = made.candidate()
    gate = next(a for a in made.store.artifacts() if a.kind == "verdict")
    folder = stage_dir(home.root, {"name": NAME}, {"model": model, "verdict": gate})
    result = run_main(folder)
    assert result.headline == f"{NAME} v1, challenger"
    assert result.metrics == {"version": 1.0}
    written = json.loads((folder / "output" / "registration.json").read_bytes())
    assert written["fingerprint"] == model.fingerprint
    assert written["verdict_fingerprint"] == gate.fingerprint
    assert (folder / "output" / "README.md").read_text().startswith("---\n")
    assert registry.model(NAME).challenger == 1


def test_the_stage_refuses_what_the_gate_did_not_pass(home, made, registry):
    model = made.candidate(1, "fail")
    gate = next(a for a in made.store.artifacts() if a.kind == "verdict")
    folder = stage_dir(home.root, {"name": NAME}, {"model": model, "verdict": gate})
    with pytest.raises(PosttrainError, match="the gate says `fail`"):
        run_main(folder)
    assert registry.models() == []


def test_the_stage_refuses_a_model_that_the_gate_did_not_judge(home, made):
    made.candidate(1)
    gate = next(a for a in made.store.artifacts() if a.kind == "verdict")
    other = made.candidate(2)
    folder = stage_dir(home.root, {"name": NAME}, {"model": other, "verdict": gate})
    with pytest.raises(DataError, match="has not judged tiny/merge"):
        run_main(folder)


def test_the_stage_takes_the_candidate_that_the_gate_chose(home, made, registry):
    models = {name: made.candidate(number, None) for number, name in enumerate("ab")}
    gate = made.choose(models, choice="b")
    inputs = {f"model:{name}": model for name, model in models.items()} | {"verdict": gate}
    run_main(stage_dir(home.root, {"name": NAME}, inputs))
    assert registry.versions(NAME)[0].fingerprint == models["b"].fingerprint
    lost = {"model": models["a"], "verdict": gate}
    with pytest.raises(PosttrainError, match="the gate says `fail`"):
        run_main(stage_dir(home.root, {"name": NAME}, lost, "1" * 64))


DYING = """
import os, signal, sys
import mlflow.tracking.client as at
from posttrain.recipe import RegisterConfig
from posttrain.stages import program, register

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv.pop(1)
setattr(program.StageContext if where == "finish" else at.MlflowClient, where, die)
program.run_program(RegisterConfig, register.main)
"""


@pytest.mark.parametrize(
    "where",
    ["_create_model_version", "update_model_version", "set_registered_model_alias", "finish"],
)
def test_a_killed_stage_that_is_repeated_makes_no_second_version(home, made, registry, where):
    registry.register(NAME, made.entry(made.candidate(1)), alias="champion")
    model = made.candidate(2)
    gate = judged_by(Graph.read(made.store), model).gate
    config = {"name": NAME, "alias": "champion"}
    folder = stage_dir(home.root, config, {"model": model, "verdict": gate})
    killed = subprocess.run([sys.executable, "-c", DYING, where, str(folder)], check=False)
    assert killed.returncode == -9
    assert read_result(folder) is None
    run_main(folder)
    assert [version.number for version in registry.versions(NAME)] == [1, 2]
    found = registry.model(NAME)
    assert (found.champion, found.previous_champion) == (2, 1)
    assert client_of(home).get_model_version(NAME, "2").description
    experiments = [one.experiment_id for one in client_of(home).search_experiments()]
    assert len(client_of(home).search_logged_models(experiments)) == 2


def test_two_promotions_at_once_are_both_recorded(home, made, registry):
    for number in (1, 2, 3):
        registry.register(NAME, made.entry(made.candidate(number)))
    registry.promote(NAME, 1)
    program = (
        "import sys; from posttrain.home import Home; from posttrain.registry import Registry;"
        "import mlflow; print('ready', flush=True); sys.stdin.readline();"
        "Registry(Home.find()).promote(sys.argv[1], int(sys.argv[2]))"
    )
    people = [
        subprocess.Popen(
            [sys.executable, "-c", program, NAME, version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for version in ("2", "3")
    ]
    for person in people:
        assert person.stdout.readline() == b"ready\n"
    for person in people:
        person.stdin.write(b"\n")
        person.stdin.close()
    assert [person.wait(60) for person in people] == [0, 0]
    for person in people:
        person.stdout.close()
    first, second = registry.history(NAME)[-2:]
    assert {first.after, second.after} == {2, 3}
    assert (first.before, second.before) == (1, first.after)
    assert registry.model(NAME).champion == second.after
    assert registry.rollback(NAME).after == first.after


def test_names_of_metrics_are_those_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for name in ("code:pass@1", "quiz (easy)", "tests:rouge_l", "50% done"):
        _validate_metric_name(mlflow_name(name))
    assert mlflow_name("code:pass@1") == "code:pass_at_1"
    assert mlflow_name("tests:rouge_l") == "tests:rouge_l"
