"""Runs one untrusted program, cut off from everything else. Linux only; `sandbox.py` starts it.

Runs as a script of the bare interpreter: no packages, no environment, a job as JSON on stdin, the
outcome as JSON on stdout. Imports the standard library alone.

    this process      leaves all namespaces of the system: network, processes, mounts, IPC, users
      └── init        first process of the new ones: builds a root of its own, watches the clock;
            │         when it ends, the kernel kills whatever the program has left running
            └── program   no privileges, hard limits; sees Python, an empty folder, and nothing else

The manual pages: namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2),
capabilities(7), getrlimit(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import resource
import select
import sys
import time
import types
from pathlib import Path
from typing import Any, NoReturn

_NEW_MOUNTS, _NEW_CGROUP, _NEW_NAME, _NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEW_USERS, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_NEW_SYSTEM = _NEW_MOUNTS | _NEW_CGROUP | _NEW_NAME | _NEW_IPC | _NEW_PROCESSES | _NEW_NETWORK

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPABILITY_VERSION = 0x20080522

_FIRST_ID, _IDS = 40_000, 20_000
"""Users without privileges or a name, one of which the program becomes where this is root."""

_WORK = "/work"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the job on stdin and say how it ended; `{"error": ...}` where it cannot be confined."""
    job = json.load(sys.stdin)
    try:
        as_root = _leave_system()
    except OSError as error:
        _answer({"error": f"this process may not leave the system's namespaces ({error})"})
    init = os.fork()
    if init == 0:
        _run_init(job, as_root)
    os.waitpid(init, 0)


def _leave_system() -> bool:
    """Enter new namespaces, and say whether as root; else with a user namespace of one's own."""
    if os.geteuid() == 0 and _has_other_users():
        try:
            _call("unshare", _NEW_SYSTEM)
        except PermissionError:  # root in name only, as in most containers
            pass
        else:
            return True
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NEW_SYSTEM | _NEW_USERS)
    own = Path("/proc/self")
    (own / "setgroups").write_text("deny")
    (own / "uid_map").write_text(f"0 {user} 1")
    (own / "gid_map").write_text(f"0 {group} 1")
    return False


def _has_other_users() -> bool:
    """Whether the users that a program may become exist here; some containers have root alone."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= _FIRST_ID and first + count >= _FIRST_ID + _IDS:
            return True
    return False


def _run_init(job: dict[str, Any], as_root: bool) -> NoReturn:
    """Build the root, start the program, wait for its end or for the clock."""
    _prctl(_PR_SET_PDEATHSIG, 9)
    _prctl(_PR_SET_DUMPABLE, 0)  # the program cannot look into this process
    try:
        _build_root(Path(job["scratch"]), int(job["disk_mb"]))
    except OSError as error:
        _answer({"error": f"no file system of its own can be made for the program ({error})"})
    read, write = os.pipe()
    program = os.fork()
    if program == 0:
        _run_program(job, as_root, write)
    os.close(write)
    _answer(_watch(program, read, job))


def _watch(program: int, said: int, job: dict[str, Any]) -> dict[str, str]:
    """Wait for the program; what it said counts only with the token, which it is not told."""
    ended = os.pidfd_open(program)
    deadline = time.monotonic() + float(job["wall_s"])
    if not select.select([ended], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return {"outcome": "timeout", "message": "did not end in time"}
    _, status = os.waitpid(program, 0)
    os.set_blocking(said, False)
    try:
        words = os.read(said, 4096).decode(errors="replace")
    except BlockingIOError:  # a process that the program left holds the pipe open
        words = ""
    outcome, _, message = words.removeprefix(job["token"]).partition(":")
    if words.startswith(job["token"]) and outcome == "error":
        return {"error": message}
    if words.startswith(job["token"]) and outcome in ("passed", "failed"):
        return {"outcome": outcome, "message": message}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (9, 24):  # KILL, XCPU
        return {"outcome": "timeout", "message": "used up its computing time"}
    if os.WIFSIGNALED(status):
        return {"outcome": "failed", "message": f"killed by signal {os.WTERMSIG(status)}"}
    return {"outcome": "failed", "message": "ended before its tests did"}


# The program's world


def _build_root(scratch: Path, disk_mb: int) -> None:
    """Make a root that holds Python, its libraries, four devices and an empty folder to work in.

    Everything but that folder is read-only, and what was the root before is not there any more.
    """
    _mount(None, Path("/"), None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", scratch, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    root, old = scratch / "root", scratch / "old"
    for path in _outermost([sys.base_prefix, sys.base_exec_prefix, *_LIBRARIES]):
        _show(path, root, _READ_ONLY | _NO_SUID | _NO_DEVICES)
    for device in _DEVICES:
        _show(Path(device), root, _READ_ONLY | _NO_SUID)
    work = root / _WORK.lstrip("/")
    work.mkdir()
    options = f"size={disk_mb}m,nr_inodes=10000,mode=777"
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    old.mkdir()
    _call("pivot_root", bytes(scratch), bytes(old))
    os.chdir("/")
    _call("umount2", b"/old", _MNT_DETACH)
    Path("/old").rmdir()
    _set_attributes(Path("/"), _READ_ONLY, recursive=False)
    # A process whose root is not that of its mounts may make no user namespace, and so never again
    # has a privilege of any kind.
    os.chroot("/root")
    os.chdir(_WORK)


def _outermost(names: list[str]) -> list[Path]:
    """Those that exist, without those that lie in another one."""
    paths = sorted({Path(name) for name in names if Path(name).exists()})
    return [path for path in paths if not any(other in path.parents for other in paths)]


def _show(path: Path, root: Path, attributes: int) -> None:
    """Make a file or folder visible below the new root, at the same place."""
    target = root / str(path).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(str(path), target, None, _MS_BIND | _MS_REC)
    _set_attributes(target, attributes, recursive=True)


def _run_program(job: dict[str, Any], as_root: bool, say: int) -> NoReturn:
    """Give up every privilege, then run answer and tests in one module and say how it went."""
    try:
        _isolate(say)
        _limit(job)
        _drop_privileges(_FIRST_ID + int(job["number"]) % _IDS if as_root else None)
    except BaseException as error:
        os.write(say, f"{job['token']}error:the program cannot be confined ({error})".encode())
        os._exit(1)
    # In one small write each: they fit into the pipe, and memory may have run out.
    passed, failed = f"{job['token']}passed:".encode(), f"{job['token']}failed:".encode()
    try:
        _execute(job["parts"])
    except BaseException as error:
        os.write(say, failed + _sentence(error))
        os._exit(1)
    os.write(say, passed)
    os._exit(0)


def _isolate(say: int) -> None:
    """A session of its own, no descriptor but `say`, no environment, output to nowhere."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(3, say)
    os.closerange(say + 1, highest if highest != resource.RLIM_INFINITY else 65536)
    os.environ.clear()
    os.environ.update({"HOME": _WORK, "TMPDIR": _WORK})
    sys.argv = ["answer.py"]


def _limit(job: dict[str, Any]) -> None:
    seconds, size = math.ceil(job["cpu_s"]), int(job["memory_mb"]) << 20
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, size, size),
        (resource.RLIMIT_FSIZE, int(job["disk_mb"]) << 20, int(job["disk_mb"]) << 20),
        (resource.RLIMIT_NPROC, int(job["processes"]), int(job["processes"])),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _drop_privileges(user: int | None) -> None:
    """Become `user`, hold no capability, and never gain one again."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # beyond the last one that this kernel has
                break
            raise
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _execute(parts: dict[str, str]) -> None:
    """Run named pieces of source, one after the other, as one module that is not `__main__`."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = sys.modules["__main__"] = module
    for name, source in parts.items():
        exec(compile(source, name, "exec"), module.__dict__)


def _sentence(error: BaseException) -> bytes:
    """Such as `tests.py, line 3: AssertionError: 4`, short enough for a pipe."""
    try:
        step, line = error.__traceback__, ""
        while step is not None:
            name = step.tb_frame.f_code.co_filename
            if not name.startswith("/"):
                line = f"{name}, line {step.tb_lineno}: "
            step = step.tb_next
        return f"{line}{type(error).__name__}: {error}"[:500].encode(errors="replace")
    except BaseException:
        return b"MemoryError" if isinstance(error, MemoryError) else b"failed"


# System calls


def _mount(
    source: str | None, target: Path, kind: str | None, flags: int, options: str | None = None
) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    _call("mount", text(source), bytes(target), text(kind), ctypes.c_ulong(flags), text(options))


def _set_attributes(target: Path, attributes: int, recursive: bool) -> None:
    """Restrict a mount; below it too where asked. Needs Linux 5.12."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _call(
        "syscall",
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        _AT_FDCWD,
        bytes(target),
        flags,
        wanted,
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _answer(outcome: dict[str, str]) -> NoReturn:
    os.write(1, json.dumps(outcome).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
