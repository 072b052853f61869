"""The command that starts a program, by how many processes and machines it has."""

import json
import os
import sys
from pathlib import Path

import pytest

from posttrain.errors import UsageError
from posttrain.launch import Program
from posttrain.launch.join import program_to_join
from posttrain.launch.torchrun import command_of, environment_of, how_to_join
from posttrain.stages.program import StageJob

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def program(stage_dir: Path, **settings: object) -> Program:
    return Program(module="posttrain.stages.sft", stage_dir=stage_dir, **settings)  # type: ignore[arg-type]


def test_one_process_is_started_without_torchrun(tmp_path: Path) -> None:
    one = program(tmp_path)
    assert not one.has_ranks
    assert command_of(one) == [sys.executable, "-m", "posttrain.stages.sft", str(tmp_path)]


def test_several_processes_of_one_machine_meet_on_the_loopback(tmp_path: Path) -> None:
    command = command_of(program(tmp_path, num_processes=2))
    assert command[:3] == TORCHRUN
    assert command[3:] == [
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"),
        *("-m", "posttrain.stages.sft", str(tmp_path)),
    ]


def test_one_process_can_want_torchrun(tmp_path: Path) -> None:
    command = command_of(program(tmp_path, torchrun=True))
    assert command[:4] == [*TORCHRUN, "--standalone"]
    assert command[command.index("--nproc-per-node") + 1] == "1"


def test_several_machines_meet_at_the_rendezvous_of_this_stage(tmp_path: Path) -> None:
    stage_dir = tmp_path / "0123abcd"
    stage_dir.mkdir()
    both = program(stage_dir, num_processes=4, nodes=2, rendezvous="127.0.0.1:29500")
    command = command_of(both)
    options = dict(zip(command[3:-3:2], command[4:-3:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "127.0.0.1:29500",
        "--rdzv-id": "0123abcd",
        "--rdzv-conf": "join_timeout=3600",
        "--local-addr": "127.0.0.1",
        "--nproc-per-node": "4",
    }


def test_a_host_name_that_is_this_machine_is_the_address_for_the_others(tmp_path: Path) -> None:
    """Its own name may lead to 127.0.1.1 here, by which nobody else reaches it."""
    command = command_of(program(tmp_path, nodes=2, rendezvous="localhost:29500"))
    assert command[command.index("--local-addr") + 1] == "localhost"


def test_cores_are_shared_among_this_machines_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert environment_of(program(tmp_path, num_processes=2))["OMP_NUM_THREADS"] == "4"
    assert environment_of(program(tmp_path, torchrun=True))["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in environment_of(program(tmp_path))


def test_a_person_is_told_what_to_run_on_the_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_dir = tmp_path / "store" / "work" / "0123abcd"
    stage_dir.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = how_to_join(program(stage_dir, nodes=3, rendezvous="node0:29500"))
    assert told == (
        f"waiting at node0:29500 for 2 other machines; run there: cd {tmp_path} && "
        f"posttrain join {stage_dir}"
    )


# Joining


def write_job(stage_dir: Path, launch: dict[str, object]) -> None:
    config = {"stage": "sft", "dataset": "chats", "launch": launch}
    job = StageJob(stage="sft", name="sft-chats", config=config, inputs={})
    (stage_dir / "stage.json").write_text(job.model_dump_json())


def test_another_machine_starts_what_the_first_one_did(tmp_path: Path) -> None:
    write_job(tmp_path, {"nodes": 2, "num_processes": 4, "rendezvous": "127.0.0.1:29500"})
    joined = program_to_join(tmp_path)
    first = program(tmp_path, nodes=2, num_processes=4, rendezvous="127.0.0.1:29500", torchrun=True)
    assert command_of(joined) == command_of(first)
    assert joined.stage == "sft-chats"


def test_a_stage_of_one_machine_is_not_joined(tmp_path: Path) -> None:
    write_job(tmp_path, {"num_processes": 2})
    with pytest.raises(UsageError, match="`sft-chats` runs on one machine"):
        program_to_join(tmp_path)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"stage": "sft"})])
def test_a_folder_without_a_waiting_stage_is_not_joined(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "stage.json").write_text(content)
    with pytest.raises(UsageError, match="no stage waits here"):
        program_to_join(tmp_path)
