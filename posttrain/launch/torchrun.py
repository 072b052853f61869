"""The command and the environment of a program, under torchrun when it has several processes."""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from posttrain.launch.base import Program

_JOIN_TIMEOUT_S = 3600
"""How long machines wait for each other; torchrun's own ten minutes are short for a person."""


def command_of(program: Program) -> list[str]:
    """What is started on this machine: the program itself, or torchrun with the program."""
    target = ["-m", program.module, str(program.stage_dir.resolve())]
    if not program.has_ranks:
        return [sys.executable, *target]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *_meeting(program)]
    return [*torchrun, "--nproc-per-node", str(program.num_processes), *target]


def environment_of(program: Program) -> dict[str, str]:
    """This process's environment, and what the program needs in it."""
    env = dict(os.environ)
    env["PYTHONUNBUFFERED"] = "1"
    # Keeps the working directory off sys.path: a user's own `datasets.py` there must not hide
    # the library.
    env["PYTHONSAFEPATH"] = "1"
    if program.has_ranks:
        # torchrun's own choice is one thread a rank, whatever the machine.
        threads = max(1, len(os.sched_getaffinity(0)) // program.num_processes)
        env.setdefault("OMP_NUM_THREADS", str(threads))
        # torchrun's own patience must not end before ours.
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(program.grace_s)))
    env.update(program.env)
    return env


def how_to_join(program: Program) -> str:
    """What a person does on the other machines."""
    others = "another machine" if program.nodes == 2 else f"{program.nodes - 1} other machines"
    stage_dir = shlex.quote(str(program.stage_dir.resolve()))
    # From the same working directory: paths in a recipe are relative to it.
    command = f"cd {shlex.quote(str(Path.cwd()))} && posttrain join {stage_dir}"
    return f"waiting at {program.rendezvous} for {others}; run there: {command}"


def _meeting(program: Program) -> list[str]:
    """How ranks find each other."""
    if program.nodes == 1:
        # Without an address ranks look each other up by host name, which a container may not know.
        return ["--standalone", "--local-addr", "127.0.0.1"]
    assert program.rendezvous is not None, "the recipe's Launch has looked"
    options = ["--nnodes", str(program.nodes), "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", program.rendezvous]
    # The stage's fingerprint: machines that work on another stage are turned away.
    options += ["--rdzv-id", program.stage_dir.resolve().name]
    options += ["--rdzv-conf", f"join_timeout={_JOIN_TIMEOUT_S}"]
    return [*options, "--local-addr", _address_towards(program.rendezvous)]


def _address_towards(rendezvous: str) -> str:
    """The address by which the other machines reach this one.

    torchrun would give them its host name, which they need not know.
    """
    host, _, port = rendezvous.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing: it only chooses the way
        address = str(probe.getsockname()[0])
        # On the machine of the rendezvous itself its name may mean the loopback.
        return host if ip_address(address).is_loopback else address
    return host
