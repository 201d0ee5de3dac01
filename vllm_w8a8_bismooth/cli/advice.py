"""What to try next."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.recipe import Recipe
    from vllm_w8a8_bismooth.report.outcome import Outcome

FEW = 1024
"""Calibration tokens whose factors may be worse than none."""


def advice(recipe: "Recipe", report: "Outcome") -> str:
    """What to try where linears still lose their weights: never what was just done."""
    smaller = f"a --group-size under {recipe.group_size}" if (recipe.group_size or 0) > 32 else ""
    balanced = "--smoothing balanced" if recipe.smoothing == "alpha" else ""
    held_back = any(entry.held_back for entry in report.granularity)
    few = report.used is not None and report.used.tokens < FEW
    more = "more calibration text (factors from so few tokens are poor)" if few else ""
    tries = {
        "rtn": ["--method bismooth", "--method mixed"],
        "mixed": ["--method bismooth", smaller],
        "bismooth": [
            "--calibration bundled" if recipe.calibration is None else more,
            balanced,
            smaller,
            "" if recipe.calibration is None or report.part or recipe.group_size else "--method auto",
        ],
        "auto": [more, "a larger --group-budget" if held_back else "", smaller, balanced],
    }[recipe.method]
    return f"Try {' or '.join([*filter(None, tries), '--ignore, which leaves linears in float'])}."
