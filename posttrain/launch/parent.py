"""Ending with one's parent: what Linux offers against processes that outlive their purpose."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int, signal_number: int = signal.SIGTERM) -> None:
    """Get a signal when the parent dies, however it dies.

    Args:
        parent_pid: the parent; if it is gone already, this process ends at once.
        signal_number: what the kernel shall send.
    """
    prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:  # it died before the call above
        os._exit(128 + signal_number)


def prctl(option: int, value: int) -> None:
    """Change how the kernel treats this process. Does nothing but on Linux.

    See the manual page prctl 2.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":  # elsewhere descendants are found while their parents live
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
