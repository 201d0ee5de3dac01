"""A conversion in one call, which is what most tests want."""

from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.conversion import pipeline
from vllm_w8a8_bismooth.measure.text import CalibrationText
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.report.outcome import Outcome

_NONE = Labels()


def convert(
    folder: Path | Folder,
    destination: Path,
    recipe: Recipe,
    text: CalibrationText | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    blocks: slice | None = None,
    labels: Labels = _NONE,
) -> Outcome:
    """:func:`preparation.prepare`, then :func:`pipeline.convert`."""
    return pipeline.convert(pipeline.prepare(folder, destination, recipe, text, device, blocks, labels), progress)
