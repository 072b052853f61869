"""Starting programs, following them, and leaving no process behind.

    base.py        what is started, and what anything that starts it must do
    local.py       starts it on this machine
    torchrun.py    the command and the environment, under torchrun when it has several processes
    join.py        takes part in a program that another machine started
    reaper.py      the process in between, which outlives a killed parent and cleans up
    outcome.py     what the end of a program means: a result, a failure or an interruption
    leftovers.py   finds a stage's processes when the reaper itself was killed

Names are loaded on first use: the reaper imports this package and has to start in no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.launch.base import Launcher, Program
    from posttrain.launch.leftovers import kill_leftovers
    from posttrain.launch.local import LocalLauncher, run_to_end

__all__ = ["Launcher", "LocalLauncher", "Program", "kill_leftovers", "run_to_end"]

_HOME = {
    "Launcher": "base",
    "LocalLauncher": "local",
    "Program": "base",
    "kill_leftovers": "leftovers",
    "run_to_end": "local",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
