"""Runs a program under limits. Only :mod:`benchmarks.real.sandbox` starts it, as a script:

    python -I -S -B jail.py CHANNEL SECONDS BYTES sealed|open < PROGRAM

CHANNEL is the number of a socket that holds a token. It is sent back once the program has run to its end: whatever
ends the process before, an exception, ``sys.exit(0)`` or a signal, leaves it where it is. ``sealed`` says that this
is a mount namespace of its own, in which every file system is made read-only.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

TOKEN = 32  # bytes
LATE = 124  # exit status, that of `timeout`
_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1  # the call has one number on all processors
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")  # imports look through folders


def limit(seconds: int, memory: int) -> None:
    """Seconds of a core, bytes of address space; no process more, no byte into a file, no core dump, 32 open files."""
    # Linux does not count the processes of root, so that only the hook below refuses those.
    limits = {"AS": memory, "FSIZE": 0, "NPROC": 0, "NOFILE": 32, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    # At the first a signal comes, which lets it say why it ends, and at the second the end.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    signal.signal(signal.SIGXCPU, lambda *_: os._exit(LATE))


def seal() -> None:
    """Make every file system read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("QQQQ", _READ_ONLY, 0, 0, 0)
    if libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, len(attributes)):
        raise OSError(ctypes.get_errno(), "file systems cannot be made read-only")


def refuse(event: str, arguments: tuple) -> None:
    """An audit hook: what a function on numbers and strings never does. It cannot be taken off again."""
    writing = event == "open" and (arguments[2] or 0) & _WRITING
    if writing or (event.startswith(_REFUSED) and event not in _ALLOWED):
        raise PermissionError(f"{event} is not allowed here")


def main() -> None:
    channel, seconds, memory = map(int, sys.argv[1:4])
    program = sys.stdin.buffer.read().decode()  # whatever the locale
    if sys.argv[4] == "sealed":
        seal()
    limit(seconds, memory)
    sys.argv[1:] = []
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(channel, os.read(channel, TOKEN))
    os._exit(0)  # threads that the program left do not hold it up


if __name__ == "__main__":
    main()
