"""Runs programs that a model wrote, each in a process of its own with limits, and says which ran to their end.

What holds it, from the outside in: namespaces without a network, with read-only file systems and with its own process
numbers, so that no process outlives it (util-linux' ``unshare``; where a user may not have them, :func:`isolation`
says so); limits of the kernel (:func:`benchmarks.real.jail.limit`); a process group that is killed; an interpreter
without environment, packages and user's paths (``-I -S``) in an empty folder; a hook that refuses processes, sockets
and writing. What it prints goes nowhere.

It is made against accidents: programs that loop, fill memory, exit early or write where they stand. It is no prison. A
program can read the files that its user can read, and one that knows this module could find the socket that has the
token and pass without having been checked, as it could pass with an object that equals everything.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from benchmarks.real import jail

PASSED, FAILED, LATE = "passed", "failed", "out of time"
SECONDS = 5  # of a core
PATIENCE = 30  # seconds by the clock, on a machine that may be busy
MEMORY = 2**30  # bytes of address space
_JAIL = Path(__file__).with_name("jail.py")
_NAMESPACES = ["--user", "--map-root-user", "--net", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL", "--"]


@cache
def isolation() -> str:
    """``namespaces``, or ``limits only`` where this user cannot have any."""
    unshare = shutil.which("unshare")
    has = unshare and subprocess.run([unshare, *_NAMESPACES, "true"], capture_output=True).returncode == 0
    return "namespaces" if has else "limits only"


def run(program: str, seconds: int = SECONDS, patience: float = PATIENCE, memory: int = MEMORY) -> str:
    """Run a Python program.

    Args:
        program: source text; it passes by running to its end.
        seconds: of a core.
        patience: seconds by the clock.
        memory: bytes of address space, with the interpreter's own.

    Returns:
        :data:`PASSED`, :data:`LATE` for one that was stopped by either clock, or else :data:`FAILED`.
    """
    token = secrets.token_bytes(jail.TOKEN)
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryDirectory() as folder:
        ours.sendall(token)
        sealed = isolation() == "namespaces"
        command = [shutil.which("unshare"), *_NAMESPACES] if sealed else []
        command += [os.path.realpath(sys.executable), "-I", "-S", "-B", str(_JAIL), str(theirs.fileno())]
        process = subprocess.Popen(
            [*command, str(seconds), str(memory), "sealed" if sealed else "open"],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=patience)
        except subprocess.TimeoutExpired:
            return LATE
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ours.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            if process.returncode == 0 and ours.recv(jail.TOKEN) == token:
                return PASSED
    return LATE if process.returncode == jail.LATE else FAILED


def run_all(programs: list[str]) -> list[str]:
    """What :func:`run` says of each, as many at once as there are cores.

    Raises:
        RuntimeError: a program that does nothing does not pass: what is measured here would be the machine.
    """
    if run("pass") != PASSED:
        raise RuntimeError(f"no program runs in the sandbox here ({isolation()}, {os.path.realpath(sys.executable)})")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, programs))
