"""A disk that fails."""

import os

CALLS = ("pwrite", "fdatasync", "fsync", "replace")


class Failing:
    """Lets the disk fail at the n-th of all the calls that reach it: once, or from then on."""

    def __init__(self, monkeypatch, last: int, once: bool = False):
        self.count, self.last, self.once = 0, last, once
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call):
        def wrapped(*arguments):
            self.count += 1
            if self.count == self.last or (self.count > self.last and not self.once):
                raise OSError(28, "No space left on device")
            return call(*arguments)

        return wrapped
