"""report.json: what a conversion did, written beside its shards and read back when somebody asks for it again."""

from dataclasses import asdict
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import RECIPE, REPORT, read_json, write_json
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.granularity import Evidence
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.outcome import Outcome


def write(folder: Path, outcome: Outcome) -> None:
    """Write report.json into a folder."""
    report = {
        "source_bytes": outcome.source_bytes,
        "written_bytes": outcome.written_bytes,
        "source_quantized": outcome.quantized,
        "calibration": outcome.calibration(),
        "vulnerable": outcome.vulnerable(),
        "linears": outcome.linears,
        "ignored": outcome.ignored,
        "floats": outcome.floats,
        "sites": {str(index): sites for index, sites in outcome.sites.items()},
        "estimated_kl": outcome.estimated_kl,
        "granularity": [asdict(entry) for entry in outcome.granularity],
        "beside": outcome.beside,
        "sha256": outcome.files,
    }
    write_json(folder / REPORT, report)


def read(folder: Path, outcome: Outcome) -> None:
    """Put into an outcome what report.json and recipe.json in a folder say; what earlier versions lack stays empty.

    Raises:
        BismoothError: one of them cannot be read, or is not as it was written.
    """
    report, chosen = read_json(folder / REPORT), read_json(folder / RECIPE)
    try:
        outcome.source_bytes, outcome.written_bytes = report["source_bytes"], report["written_bytes"]
        outcome.linears, outcome.ignored, outcome.files = report["linears"], report["ignored"], report["sha256"]
        outcome.sites = {int(index): sites for index, sites in report["sites"].items()}
        outcome.estimated_kl = report.get("estimated_kl")
        outcome.granularity = [
            Evidence(**{**entry, "linears": tuple(entry["linears"])}) for entry in report["granularity"]
        ]
        outcome.beside = report.get("beside") or []
        if used := dict(report.get("calibration") or {}):
            del used["compute_dtype"]  # which the recipe has
            outcome.used = Used.of(used)
        outcome.recipe = Recipe(**chosen["recipe"])
        outcome.vulnerable()  # needs an error of each linear
    except (AttributeError, KeyError, TypeError, ValueError):
        what, remedy = "not as it was written", "remove the folder or choose another folder"
        raise BismoothError.of(folder / REPORT, what, remedy) from None
