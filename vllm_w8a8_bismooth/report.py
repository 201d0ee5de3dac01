"""What a conversion writes for people: report.json, and the model card."""

from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.source import Source
from vllm_w8a8_bismooth.writer import write_json

REPORT, CARD, ORIGINAL_CARD = "report.json", "README.md", "ORIGINAL_README.md"


def place_of(relative: Path) -> Path:
    """Where a side file of the source goes: its own place, except for the card, whose place ours takes."""
    return Path(ORIGINAL_CARD) if relative == Path(CARD) else relative


def write(folder: Path, source: Source, recipe: Recipe, done: Any) -> None:
    """Write report.json and the card of a finished conversion into ``folder``."""
    write_json(
        folder / REPORT,
        {
            "source_bytes": done.source_bytes,
            "written_bytes": done.written_bytes,
            "vulnerable": done.vulnerable(),
            "linears": done.linears,
            "sites": {str(index): sites for index, sites in done.sites.items()},
            "sha256": done.files,
        },
    )
