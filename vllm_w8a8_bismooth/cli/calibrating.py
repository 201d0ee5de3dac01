"""The option ``--calibration``, which several verbs have, and what they say of the text that was read."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.given import calibration_files as given_files
from vllm_w8a8_bismooth.measure.bundled import NONE

if TYPE_CHECKING:  # torch comes with them
    from rich.console import Console

    from vllm_w8a8_bismooth.measure.text import CalibrationText
    from vllm_w8a8_bismooth.measure.used import Used


def _option(default: str) -> Any:
    return typer.Option(
        "--calibration",
        metavar="FILE|-|bundled|none",
        help="Text, or rows of texts or chats (.txt, .jsonl, .json, .parquet, also .gz; - is what is piped in). "
        "Several files add up. bundled is text that comes with bismooth, none does without.",
        show_default=default,
    )


ConvertOption = Annotated[list[str] | None, _option("bundled, with bismooth and auto")]
AnalyzeOption = Annotated[list[str] | None, _option(NONE)]


def files(given: list[str] | None) -> list[str]:
    """What ``--calibration`` names besides ``none``; empty is none, and if the option was not given.

    Raises:
        BismoothError: one is empty, ``none`` beside files, or standard input twice.
    """
    return [str(file) for file in given_files("--calibration", given or [])]


def for_convert(given: list[str] | None) -> list[str] | str | None:
    """As :func:`api.convert` takes it; ``None`` if the option was not given."""
    return files(given) or (NONE if given else None)


def for_analyze(given: list[str] | None, tokens: int | None) -> "CalibrationText | None":
    """What is in the files; ``None`` if there are none.

    Raises:
        BismoothError: see :func:`files`; ``--calibration-tokens`` without any file, or one that is not readable.
    """
    from vllm_w8a8_bismooth.measure.text import read_text

    found = files(given)
    if tokens is not None and not found:
        what = "--calibration-tokens has no effect without --calibration FILE"
        raise BismoothError.of("analyze", what, "leave it out")
    return read_text(*found) if found else None


def remarks(console: "Console", used: "Used | None") -> None:
    """A line for everything of the calibration text that was not used as it is."""
    from rich.markup import escape

    for remark in used.remarks() if used is not None else []:
        console.print(f"[yellow]Note:[/yellow] {escape(remark)}.", highlight=False)
