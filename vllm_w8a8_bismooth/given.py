"""What the functions of :mod:`api` are given, checked, and made into what the rooms take."""

import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w8a8_bismooth.errors import BismoothError, refuse_empty
from vllm_w8a8_bismooth.progress import Progress, silent

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.checkpoint.basis import Means
    from vllm_w8a8_bismooth.checkpoint.files import Folder
    from vllm_w8a8_bismooth.discovery.record import Discovery
    from vllm_w8a8_bismooth.measure.text import CalibrationText
    from vllm_w8a8_bismooth.scoring.score import Preparation

_LARGEST_RECORD = 2**24


def text(method: str, calibration: str | Path | Sequence[str | Path] | None) -> "CalibrationText | None":
    """The text of a conversion; ``None`` is data-free. Methods that take text have the bundled one by default."""
    from vllm_w8a8_bismooth.measure.bundled import NONE, WORD
    from vllm_w8a8_bismooth.recipe import DEFAULTS

    takes_text = "calibration_tokens" in DEFAULTS[method]
    if calibration is None:
        calibration = WORD if takes_text else NONE
    named: list[Any] = [*calibration] if isinstance(calibration, list | tuple) else [calibration]
    if not named:
        raise BismoothError.of("calibration=[]", "names no file", "give it one, or leave it out")
    if not (files := calibration_files("--calibration", named)):
        return None
    if not takes_text:
        raise BismoothError.of(f"--method {method}", "--calibration has no effect", "leave it out")
    from vllm_w8a8_bismooth.measure.text import read_text

    chosen = (file if isinstance(file, str) and file == WORD else path("calibration", file) for file in files)
    return read_text(*chosen)


def calibration_files(argument: str, named: Sequence[str | Path]) -> list[str | Path]:
    """What is named besides the word ``none``, in order.

    Raises:
        BismoothError: one is empty, ``none`` stands beside files, or standard input twice.
    """
    from vllm_w8a8_bismooth.measure.bundled import NONE

    for file in named:
        refuse_empty(argument, file, "give a file, bundled or none")
    if [str(file) for file in named].count("-") > 1:
        raise BismoothError.of(f"{argument} -", "given twice, and can be read once", "leave out one of the two")
    files = [file for file in named if not (isinstance(file, str) and file == NONE)]
    if 0 < len(files) < len(named):
        raise BismoothError.of(f"{argument} none", "stands beside files", "leave out one of the two")
    return files


def fetched(source: str | Path, means: "Means | None" = None) -> "Folder":
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.basis import Means
    from vllm_w8a8_bismooth.checkpoint.files import Folder

    return hub.fetch(source, means or Means()) if isinstance(source, str) else Folder(path("source", source))


def means(sites: str | Path | None, trust_remote_code: bool, progress: Progress = silent) -> "Means":
    """By what a model may be known: a record in a file, its own code.

    Raises:
        BismoothError: the file holds no record.
    """
    from vllm_w8a8_bismooth.checkpoint.basis import Means

    if not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code must be True or False, not {trust_remote_code!r}")
    record = None if sites is None else _record(path("sites", sites))
    return Means(record, trusted=trust_remote_code, progress=progress)


def _record(file: Path) -> "Discovery":
    from vllm_w8a8_bismooth.checkpoint.files import read_json
    from vllm_w8a8_bismooth.discovery.reading import read

    remedy = "give what bismooth sites --json prints for this model, edited or not"
    if file.is_file() and file.stat().st_size > _LARGEST_RECORD:
        raise BismoothError.of(f"--sites {file}", f"larger than {_LARGEST_RECORD >> 20} MiB", remedy)
    try:
        return read(read_json(file))
    except ValueError as error:
        raise BismoothError.of(f"--sites {file}", f"holds no record of sites: {error}", remedy) from None
    except BismoothError as error:
        raise BismoothError.of(f"--sites {file}", error.problems[0].what, remedy) from None


def at_hand(source: str | Path) -> "Folder":
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.files import Folder

    if not isinstance(source, str):
        return Folder(path("source", source))
    if (folder := hub.cached(source)) is None:
        remedy = "bismooth inspect shows size, needs and problems from the headers alone"
        raise BismoothError.of(source, "not downloaded yet, and --dry-run writes nothing", remedy)
    return folder


def path(argument: str, value: object, *if_empty: str) -> Path:
    """A path; ``if_empty`` is the remedy where it is empty and a folder is not what is wanted."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{argument} must be a path, as a string or a pathlib.Path, not {value!r}")
    refuse_empty(argument, value, *if_empty)
    return Path(value)


def destination(value: object) -> str | Path:
    """As it was given: a path would have no empty name any more."""
    return value if isinstance(value, str) else path("destination", value)


def progress(progress: Progress | None) -> Progress:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of stage, done, total and written, not {progress!r}")
    return progress or silent


def prepare_score(
    folder: str | Path,
    against: str | Path | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 8192,
    window: int = 512,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    write_card: bool = False,
) -> "Preparation":
    """All that :func:`api.score` does before its first engine.

    Args:
        folder, against, text, tokens, window, dtype, tensor_parallel_size, write_card: see :func:`api.score`.

    Raises:
        BismoothError: see :func:`api.score`.
        TypeError: an argument is of another kind than it should be.
    """
    place = path("folder", folder)
    numbers_given = {"tokens": tokens, "window": window, "tensor_parallel_size": tensor_parallel_size}
    for name, value in numbers_given.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {value!r}")
    if not isinstance(write_card, bool):
        raise TypeError(f"write_card must be True or False, not {write_card!r}")
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a text, not {dtype!r}")
    files = [] if text is None else list(text) if isinstance(text, list | tuple) else [text]
    if not files:
        remedy = "give text like what the model will read, but not what it was calibrated on: --text FILE"
        raise BismoothError.of("score", "needs a text for the model to predict", remedy)
    paths = [path("text", file, "give a file") for file in files]

    from vllm_w8a8_bismooth.scoring import score as room
    from vllm_w8a8_bismooth.scoring.tokens import read

    content = read(paths)
    source = None if against is None else fetched(against)
    return room.prepare(place, source, content, int(tokens), int(window), dtype, int(tensor_parallel_size), write_card)
