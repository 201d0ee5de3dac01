"""The option ``--calibration``, which several verbs have, and what they say of the text that was read."""

from typing import TYPE_CHECKING, Annotated

import typer

from vllm_w8a8_bismooth.errors import BismoothError, refuse_empty

if TYPE_CHECKING:  # torch comes with them
    from rich.console import Console

    from vllm_w8a8_bismooth.measure.text import CalibrationText, Used

CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE|-|none",
        help="Text, or rows of texts or chats (.txt, .jsonl, .json, .parquet, also .gz; - is what is piped in). "
        "Several files add up. none, the default, does without.",
    ),
]


def files(given: list[str] | None, tokens: int | None, verb: str) -> list[str]:
    """The files of ``--calibration``; empty is none.

    Raises:
        BismoothError: ``none`` beside files, standard input twice, or ``--calibration-tokens`` without any file.
    """
    given = given or ["none"]
    for file in given:
        refuse_empty("--calibration", file)
    if given.count("-") > 1:
        raise BismoothError.of("--calibration -", "given twice, and can be read once", "leave out one of the two")
    if "none" in given and set(given) != {"none"}:
        raise BismoothError.of("--calibration none", "stands beside files", "leave out one of the two")
    found = [path for path in given if path != "none"]
    if tokens is not None and not found:
        what = "--calibration-tokens has no effect without --calibration FILE"
        raise BismoothError.of(verb, what, "leave it out")
    return found


def read(paths: list[str]) -> "CalibrationText | None":
    """What is in the files; ``None`` if there are none."""
    from vllm_w8a8_bismooth.measure.text import read_text

    return read_text(*paths) if paths else None


def remarks(console: "Console", used: "Used | None") -> None:
    """A line for everything of the calibration text that was not used as it is."""
    from rich.markup import escape

    for remark in used.remarks() if used is not None else []:
        console.print(f"[yellow]Note:[/yellow] {escape(remark)}.", highlight=False)
