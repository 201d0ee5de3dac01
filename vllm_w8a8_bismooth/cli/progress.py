"""How far a command has come, shown while it runs."""

import resource
import time
from typing import TYPE_CHECKING

from vllm_w8a8_bismooth.checkpoint.files import readable_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Progress:
    """What is done, how long the rest takes, bytes made, peak memory: a bar a stage on a terminal, else a line now and
    then."""

    PAUSE = 10.0
    """Seconds between lines of one stage."""
    UNITS = {
        "read": "shards",
        "merge": "shards",
        "engine": "engines",
        "vllm": "readings",
        "source": "windows",
        "checkpoint": "windows",
    }
    """What a stage counts, if not blocks."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.last = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.tasks:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int, written: int = 0) -> None:
        unit = self.UNITS.get(stage, "blocks")
        note = f"{readable_size(written)} written, " if written else ""
        note += f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"
        if self.console.is_terminal:
            self.bars.start()  # not before there is something to show; again has no effect
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=total, unit=unit, note=note)
            self.bars.update(self.tasks[stage], completed=done, note=note)
            return
        now = time.monotonic()
        started, first = self.begun.setdefault(stage, (now, done))
        if started != now and done < total and now - self.last < self.PAUSE:
            return
        self.last = now
        left = f", {duration((now - started) / (done - first) * (total - done))} left" if first < done < total else ""
        self.console.print(f"{stage}: {done} of {total} {unit}{left}, {note}", highlight=False)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
