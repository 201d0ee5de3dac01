"""How much work something is, the same on every machine."""

import sys
import threading
from collections.abc import Callable


def calls(function: Callable[[], object]) -> int:
    """How many functions, in Python and in C, a call of this one calls, in new threads too."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return count
