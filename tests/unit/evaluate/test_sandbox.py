"""Every test runs code that tries to break out, for real."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from posttrain.evaluate.sandbox import (
    Limits,
    SandboxError,
    check_sandbox,
    run_program,
    run_programs,
)

QUICK = Limits(cpu_s=1, memory_mb=256)


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    try:
        run_program({"answer.py": ""}, QUICK)
    except SandboxError as error:
        pytest.skip(str(error))


def test_the_walls_are_tried_before_they_are_relied_on():
    check_sandbox()


def run(code: str, tests: str = "", limits: Limits = QUICK):
    return run_program({"answer.py": code, "tests.py": tests}, limits)


def test_a_right_answer_passes_and_a_wrong_one_says_which_test_failed():
    tests = "assert double(2) == 4\nassert double(3) == 6, double(3)"
    assert run("def double(x): return 2 * x", tests).kind == "passed"
    wrong = run("def double(x): return 4", tests)
    assert (wrong.kind, wrong.message) == ("failed", "tests.py, line 2: AssertionError: 4")


def test_code_that_is_no_python_fails():
    assert run("def (").message.startswith("SyntaxError")


def test_the_standard_library_works():
    code = """
import dataclasses, json, tempfile, threading, sqlite3, zoneinfo
@dataclasses.dataclass
class Point:
    x: int
thread = threading.Thread(target=lambda: None)
thread.start(), thread.join()
with tempfile.TemporaryFile() as file:
    file.write(b'x')
"""
    assert run(code, "assert Point(1) == Point(1)").kind == "passed"


def test_what_is_meant_for_the_command_line_does_not_run():
    assert run("if __name__ == '__main__':\n    raise SystemExit(1)").kind == "passed"


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_an_answer_that_leaves_before_its_tests_fails(leave):
    assert run(leave, "assert False").kind == "failed"


def test_an_endless_loop_is_ended():
    started = time.monotonic()
    assert run("while True: pass").kind == "timeout"
    assert time.monotonic() - started < 10


def test_waiting_does_not_help():
    assert run("import time; time.sleep(1000)", limits=Limits(cpu_s=0.3)).kind == "timeout"


def test_processes_are_few_and_none_is_left():
    mark = f"left_{os.getpid()}"
    code = f"""
import ctypes, os, time
started = 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            ctypes.CDLL(None).prctl(15, b'{mark[:15]}')
            time.sleep(1000)
        started += 1
except BlockingIOError:
    pass
assert 1 <= started < {QUICK.processes}, started
"""
    outcome = run(code)
    assert outcome.kind == "passed", outcome.message
    assert not [one for one in psutil.process_iter(["name"]) if one.info["name"] == mark[:15]]


def test_memory_is_limited():
    assert "MemoryError" in run("x = bytearray(1 << 30)").message
    assert run("x = bytearray(64 << 20)").kind == "passed"


def test_files_are_limited_one_by_one_and_together():
    assert "too large" in run("open('big', 'wb').write(bytes(64 << 20))").message
    many = "for n in range(64):\n    open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(many).message


def test_there_is_no_network_not_even_to_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "OSError: [Errno 101]" in run(code).message
    assert "failed" in run("import urllib.request as u; u.urlopen('http://192.0.2.1')").kind


def test_no_socket_of_this_machine_can_be_reached(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
        assert "FileNotFoundError" in run(code).message


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os\nassert set(os.environ) == {'HOME', 'TMPDIR'}, dict(os.environ)"
    assert run(code).kind == "passed"
    c = "import ctypes; g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p"
    assert run(f"{c}\nassert g(b'HF_TOKEN') is None").kind == "passed"


def test_nothing_of_this_machine_can_be_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ")):
        assert "FileNotFoundError" in run(f"open({str(path)!r})").message


def test_only_its_own_folder_can_be_written(tmp_path):
    assert "Read-only" in run("open('/file', 'w')").message
    assert run("import os; open(os.__file__, 'a')").kind == "failed"
    assert run(f"import os; os.makedirs({str(tmp_path / 'new')!r})").kind == "failed"
    assert run("open('/work/file', 'w').write('x')").kind == "passed"
    assert list(tmp_path.iterdir()) == []


def test_each_run_finds_an_empty_folder_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os\nassert os.listdir() == []\nopen('file', 'w').write('x')"
    assert [run(code).kind for _ in range(2)] == ["passed", "passed"]
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_inherited(tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = """
import os
found = []
for descriptor in range(3, 1024):
    try:
        found.append(os.readlink) if os.fstat(descriptor) else None
    except OSError:
        pass
assert len(found) <= 1, found  # the pipe on which it says that it passed
"""
        assert run(code).kind == "passed"


def test_nothing_stands_on_the_input_and_any_output_is_thrown_away():
    assert "EOFError" in run("input()").message
    assert run("for _ in range(100): print('x' * 1_000_000)").kind == "passed"


def test_privileges_cannot_be_regained():
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x20000, 0x40000000):  # users, mounts, network
    assert libc.unshare(flag) != 0, hex(flag)
assert libc.mount(b'none', b'/work', b'tmpfs', 0, None) != 0
for call in (lambda: os.chroot('/work'), lambda: os.setuid(12345)):
    try:
        call()
    except OSError:
        continue
    raise AssertionError('went through')
"""
    assert run(code).kind == "passed", run(code).message


def test_the_process_that_keeps_time_cannot_be_killed():
    code = "import os\nfor n in (9, 15, 19):\n    try: os.kill(1, n)\n    except OSError: pass"
    assert run(code, "assert True").kind == "passed"
    assert run(f"{code}\nwhile True: pass").kind == "timeout"


def test_hashes_are_the_same_every_time():
    code = "raise ValueError(hash('posttrain'))"
    assert run(code).message == run(code).message


def test_several_run_side_by_side_and_keep_their_order():
    programs = [{"answer.py": f"assert {number} % 3"} for number in range(9)]
    seen: list[tuple[int, int]] = []
    kinds = [one.kind for one in run_programs(programs, QUICK, lambda *at: seen.append(at))]
    assert kinds == ["failed", "passed", "passed"] * 3
    assert seen[-1] == (9, 9)


def test_it_works_from_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(run("x = 1").kind))
    thread.start()
    thread.join()
    assert found == ["passed"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare")
def test_where_namespaces_are_withheld_nothing_is_run(tmp_path):
    ran = tmp_path / "ran"
    program = f"""
from posttrain.evaluate.sandbox import Limits, SandboxError, run_program
try:
    run_program({{"answer.py": "open({str(ran)!r}, 'w')"}}, Limits())
except SandboxError as error:
    print(error)
"""
    # Within a user namespace of this test's own, further ones can be forbidden.
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "code is not run on this machine" in done.stdout, done.stderr
    assert "remove the metric `code`" in done.stdout
    assert not ran.exists()
