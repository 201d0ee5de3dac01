"""The process that runs the cases: what it reads and writes.

It reads one line, ``{"device": 0, "ended": {name: fault}}``: the number of the GPU, ``null`` for the CPU, and what
processes before it have tried, with what was wrong or ``""``. It writes a line of ``{"tiles": [...], "names": [...]}``,
all there is to try, and then after each other case ``{"ended": name, "fault": ...}``. Where it cannot go on, it ends
with ``"last": true`` on such a line, if the kernel may be to blame, or else with ``{"problem": ...}``.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from vllm_w8a8_bismooth.ops.selftest import cases


def main(machine: Callable[[int | None], cases.Machine]) -> None:
    """Run what has not been tried.

    Args:
        machine: makes the device of that number.
    """
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no line

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ended = request["ended"]
    try:
        device = machine(request["device"])
        names = cases.names(device)
        say(tiles=list(map(astuple, device.tiles)), names=names)
    except Exception as error:
        say(problem=_first_line(error))
        return
    for name in names:
        if name in ended:
            continue
        try:
            device.restrict({each: fault for each, fault in ended.items() if fault})
            ended[name] = cases.run(name, device)
        except Exception as error:
            if "out of memory" in str(error):
                say(problem=_first_line(error))
            else:
                say(ended=name, fault=_first_line(error), last=True)
            return
        say(ended=name, fault=ended[name])


def _end_with_parent() -> None:
    """Nobody else would end a kernel that does not end itself."""
    os.read(0, 1)  # not sys.stdin, whose lock the interpreter wants in the end
    os._exit(1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
