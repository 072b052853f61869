"""The store: what is published is found, what is damaged is not, what is needed stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import StoreError
from posttrain.store import Artifact, InputRecord, Manifest, Store
from posttrain.store.fingerprint import canonical_json, stage_fingerprint
from posttrain.store.gc import collect, find_garbage
from posttrain.store.manifest import now
from posttrain.store.store import content_digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(
    store: Store,
    text: str = "hello",
    *,
    made_from: Artifact | None = None,
    days_ago: float = 0.0,
    replace: bool = False,
) -> Artifact:
    inputs = {}
    if made_from is not None:
        inputs["data"] = InputRecord(
            kind=made_from.kind, digest=made_from.digest, fingerprint=made_from.fingerprint
        )
    digests = {name: record.digest for name, record in inputs.items()}
    fingerprint = stage_fingerprint("prepare", 1, {"text": text}, digests)
    work = store.work_folder(fingerprint)
    (work / "output" / "deep").mkdir(parents=True)
    (work / "output" / "deep" / "file.txt").write_text(text)
    (work / "events.jsonl").write_text("{}\n")
    files = store.record_files(work / "output")
    manifest = Manifest(
        kind="dataset",
        stage="prepare",
        name="prepare",
        recipe="test",
        fingerprint=fingerprint,
        content_digest=content_digest(files),
        code_version=1,
        config={"text": text},
        inputs=inputs,
        files=files,
        created=now() - timedelta(days=days_ago),
        seconds=0.0,
        packages={},
        hardware={},
    )
    return store.publish(work, manifest, replace=replace)


def test_what_is_published_is_found_again(store: Store) -> None:
    made = publish(store)
    found = Store(store.root).find("dataset", made.fingerprint)
    assert found == made
    assert (made.path / "deep" / "file.txt").read_text() == "hello"
    assert (made.path / ".stage" / "events.jsonl").exists()
    assert not (store.root / "work" / made.fingerprint).exists()


def test_the_content_digest_ignores_how_it_was_made(store: Store) -> None:
    made = publish(store)
    assert [record.path for record in made.manifest.files] == ["deep/file.txt"]


def test_an_empty_output_is_no_artifact(store: Store) -> None:
    (store.work_folder("f" * 64) / "output").mkdir()
    with pytest.raises(StoreError, match="wrote nothing"):
        store.record_files(store.work_folder("f" * 64) / "output")


def _flip_a_bit(folder: Path) -> None:
    file = folder / "deep" / "file.txt"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def _edit_manifest(folder: Path, key: str, value: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


DAMAGE = {
    "a flipped bit": _flip_a_bit,
    "a truncated file": lambda folder: os.truncate(folder / "deep" / "file.txt", 2),
    "a missing file": lambda folder: (folder / "deep" / "file.txt").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "another config": lambda folder: _edit_manifest(folder, "config", {"text": "other"}),
    "another digest": lambda folder: _edit_manifest(folder, "content_digest", "0" * 64),
    "other files": lambda folder: _edit_manifest(folder, "files", []),
    "another fingerprint": lambda folder: _edit_manifest(folder, "fingerprint", "0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_reported_set_aside_and_rebuilt(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = publish(store)
    DAMAGE[damage](made.path)
    assert store.find("dataset", made.fingerprint) is None
    assert str(made.path) in caplog.text
    assert not made.path.exists()
    assert len(list((store.root / "aside").iterdir())) == 1
    assert publish(store).digest == made.digest


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_damaged(store: Store, damage: str) -> None:
    good, bad = publish(store, "good"), publish(store, "bad")
    DAMAGE[damage](bad.path)
    assert {path for path, found in store.verify() if found} == {bad.path}
    assert good.path in {path for path, found in store.verify() if not found}


def test_verify_sees_a_flip_that_left_no_trace_in_the_file_system(store: Store) -> None:
    made = publish(store)
    file = made.path / "deep" / "file.txt"
    before = file.stat()
    _flip_a_bit(made.path)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [found for _, found in store.verify() if found]


def _hold(path: Path, held: object, release: object) -> None:
    with Store(path).lock("f" * 64):
        held.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_a_second_worker_waits_and_a_killed_one_leaves_no_lock(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    worker = context.Process(target=_hold, args=(store.root, held, release))
    worker.start()
    assert held.wait(60)
    assert store.is_locked("f" * 64)

    waited: list[bool] = []

    def kill_the_holder() -> None:
        waited.append(True)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    with store.lock("f" * 64, kill_the_holder):
        assert waited == [True]
    worker.join()
    assert not store.is_locked("f" * 64)


def test_rebuilding_replaces_and_keeps_the_old_one_aside(store: Store) -> None:
    made = publish(store)
    again = publish(store, replace=True)
    assert again.path == made.path
    assert len(list((store.root / "aside").iterdir())) == 1


def test_garbage_is_what_nothing_needs(store: Store) -> None:
    data = publish(store, "data", days_ago=30)
    used = publish(store, "used", made_from=data, days_ago=30)
    young = publish(store, "young")
    forgotten = publish(store, "forgotten", days_ago=30)
    needed = publish(store, "registered", days_ago=30)
    record = {"recipe": "r", "started": "2026-01-01", "artifacts": {"sft": used.fingerprint}}
    store.record_run("one", record)
    garbage = find_garbage(store, needed=[needed.fingerprint])
    assert [item.path for item in garbage] == [forgotten.path]
    assert collect(store, garbage) > 0
    left = {artifact.fingerprint for artifact in store.artifacts()}
    assert left == {item.fingerprint for item in (data, used, young, needed)}
    assert not list((store.root / "aside").iterdir())


def test_only_the_last_runs_of_a_recipe_protect_what_they_used(store: Store) -> None:
    old, new = (publish(store, text, days_ago=30) for text in ("old", "new"))
    for started, artifact in (("2026-01-01", old), ("2026-02-01", new)):
        artifacts = {"sft": artifact.fingerprint}
        store.record_run(started, {"recipe": "r", "started": started, "artifacts": artifacts})
    assert [item.path for item in find_garbage(store, keep_runs=1)] == [old.path]
    assert find_garbage(store, keep_runs=2) == []


def test_work_in_progress_is_no_garbage(store: Store) -> None:
    abandoned, busy = "a" * 64, "b" * 64
    for fingerprint in (abandoned, busy):
        os.utime(store.work_folder(fingerprint), (0, 0))
    with store.lock(busy):
        paths = [item.path.name for item in find_garbage(store)]
    assert paths == [abandoned]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), json_values))
def test_canonical_json_depends_on_the_value_alone(value: dict[str, object]) -> None:
    shuffled = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(shuffled)
    assert json.loads(canonical_json(value)) == value
