"""Starts programs in forks of one process that has imported torch, timm and this package already.

A test that starts a search or a worker as a process of its own pays 5 s of imports for each. With

    [*tests.warm_start.python(), "-m", "attnsurgery", ...]

in place of `[sys.executable, "-m", "attnsurgery", ...]` it pays them once in a test run: a server does the imports and
forks itself for each program. What the test starts is a small client, which stands for that fork: it has its standard
streams, environment and directory, passes signals on to it, ends as it ends, and takes it along when it is killed.

Where the imports themselves, or what /proc says of a process, are what is tested, the interpreter has to be a new one.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SOCKET = "ATTNSURGERY_TEST_SERVER"
"""Environment variable with the path of the server's socket, the same in all processes of a test run."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM)
_START_S = 120.0
_OWN_PATH = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""Folders on the server's path that are not on that of a program."""
_PRELOADED = (
    "alembic.command",
    "attnsurgery.blocks.timm_attn",
    "attnsurgery.cli._app",
    "attnsurgery.cli.search",
    "attnsurgery.samplers.additive",
    "attnsurgery.search.coordinator.search",
    "attnsurgery.search.report.page",
    "attnsurgery.search.workers.worker",
    "sklearn.datasets",
    "submitit.core._submit",
    "torch._dynamo",
)


def python() -> list[str]:
    """The command in place of `[sys.executable]`; what follows is `-m MODULE ...` or `-c PROGRAM ...`."""
    start_server()
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), os.environ[SOCKET]]


def worker() -> tuple[str, ...]:
    """The command that starts a worker of a search, in place of the package's own."""
    return (*python(), "-m", "attnsurgery.search.workers.worker")


def start_server() -> None:
    """Start the server of this test run, if no process of the run has; it ends with the process that started it."""
    if SOCKET in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="warm-start-")
    os.environ[SOCKET] = os.path.join(folder, "socket")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", os.environ[SOCKET]],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )

    def stop() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)


def _client(path: str, *arguments: str) -> None:
    line = _connected(path)
    request = json.dumps({"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}).encode()
    streams = array.array("i", [0, 1, 2])
    line.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    line.sendall(request)
    answers = line.makefile("r")
    pid = int(answers.readline())
    for number in _FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    for stream in (0, 1):  # whoever reads or writes them talks to the fork alone
        os.close(stream)
    answer = answers.readline()
    code = int(answer) if answer else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _connected(path: str) -> socket.socket:
    """A connection to the server, once it has done its imports."""
    deadline = time.monotonic() + _START_S
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(path)
            return line
        except OSError:
            line.close()
            if time.monotonic() > deadline:
                raise SystemExit(f"no server of tests/warm_start.py answers at {path}.") from None
            time.sleep(0.05)


def _serve(path: str) -> None:
    import gc
    import importlib
    import selectors

    for name in _PRELOADED:
        with contextlib.suppress(ImportError):  # a package that only some tests need, and skip without
            importlib.import_module(name)
    gc.freeze()  # so that a collection in a fork copies no pages
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen(64)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the test run, and that this server
    watched = selectors.DefaultSelector()
    for source, kind in ((door, "door"), (wake, "wake"), (sys.stdin, "end")):
        watched.register(source, selectors.EVENT_READ, kind)
    lines: dict[int, socket.socket] = {}  # by the process at its other end
    while True:
        for key, _ in watched.select():
            if key.data == "end":
                for pid in lines:
                    _kill(pid)
                os._exit(0)
            elif key.data == "wake":
                os.read(wake, 4096)
            elif key.data == "door":
                line, _ = door.accept()
                request, streams = _received(line)
                if (pid := os.fork()) == 0:
                    for other in (door, line, *lines.values()):
                        other.close()
                    watched.close()
                    _become(request, streams, path)
                for stream in streams:
                    os.close(stream)
                line.sendall(f"{pid}\n".encode())
                watched.register(line, selectors.EVENT_READ, pid)
                lines[pid] = line
            elif key.data in lines:  # the client is gone
                _kill(key.data)
                watched.unregister(lines[key.data])
        _reap(lines, watched)


def _received(line: socket.socket) -> tuple[dict[str, object], list[int]]:
    """A request, and the standard streams that came with it."""
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    remaining, parts = int.from_bytes(size, "big"), []
    while remaining:
        parts.append(line.recv(remaining))
        remaining -= len(parts[-1])
    return json.loads(b"".join(parts)), streams


def _reap(lines: dict[int, socket.socket], watched: object) -> None:
    """Tell clients how their processes have ended."""
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        line = lines.pop(pid)
        with contextlib.suppress(KeyError):  # the client was gone first
            watched.unregister(line)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        line.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, object], streams: list[int], path: str) -> None:
    """Turn this fork into the program of a request, and end with its exit code."""
    import random
    import runpy
    import threading
    import traceback
    import warnings

    from attnsurgery.search.workers import spawn

    code = 1
    try:
        os.setsid()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(str(request["directory"]))
        environment: dict[str, str] = request["environment"]  # type: ignore[assignment]
        os.environ.clear()
        os.environ.update({**environment, SOCKET: path})
        # as a new interpreter would have them
        for name, stream, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            buffering = 1 if name == "stderr" or os.isatty(stream) else -1
            setattr(sys, name, os.fdopen(stream, mode, buffering=buffering, closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))
        python_path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = ["", *python_path, *(entry for entry in sys.path if entry not in _OWN_PATH)]
        random.seed()
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning, "runpy")
        spawn.COMMAND = worker()
        kind, program, *arguments = request["arguments"]  # type: ignore[misc]
        sys.argv = ["-c" if kind == "-c" else program, *arguments]
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2])
    else:
        _client(*sys.argv[1:])
