"""The text of a score, cut into windows of the source's tokens as calibration cuts its text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, read_json
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.measure.text import CalibrationText, Used, read_text, sample, transformers_config
from vllm_w8a8_bismooth.scoring.vocabulary import size

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

FEWEST = 16
"""Tokens of a window, at least."""
_WORDS = {
    ", or use --calibration none": "",
    "use --calibration none": "give more of it",
    "--calibration ": "--text ",
    "calibration file": "file",
    "calibration text": "text",
}
"""What messages on calibration text say -> what they say here."""


@dataclass(frozen=True)
class Windows:
    """What is scored.

    Attributes:
        tokens: int64 ``[windows, length]``.
        files: names of the text's files, without folders.
        sha256: of the text, as :class:`CalibrationText` has it.
        notes: what was not used of the text as it is, in sentences without a full stop.
    """

    tokens: np.ndarray
    files: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...]


def read(files: Sequence[Path]) -> CalibrationText:
    """:func:`measure.text.read_text`, in the words of this verb.

    Raises:
        BismoothError: as there.
    """
    with _in_our_words():
        return read_text(*files)


def cut(text: CalibrationText, source: Path, budget: int, window: int) -> Windows:
    """Windows of equal length of the tokens that the source's tokenizer makes of the text.

    They are spread evenly over the text, and begin with BOS where the tokenizer adds one. A text that is too short for
    the budget gives what it has, and a note says so.

    Args:
        text: what :func:`read` gave.
        source: a checkpoint's folder, of any model.
        budget: tokens in all, at most.
        window: tokens of a window, at most.

    Raises:
        BismoothError: no usable tokenizer, transformers refuses the config, or too little text for one window.
    """
    checkpoint = _as_checkpoint(source, read_json(source / CONFIG))
    # As transformers understands it: the key in config.json depends on the model.
    longest = getattr(transformers_config(checkpoint).get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        window = min(window, longest - 1)  # vLLM adds a token, to have something to generate
    with _in_our_words():
        taken = sample(text, checkpoint, budget, window)
    windows, length = taken.tokens.shape
    if length < FEWEST or not windows:
        what = f"gives {length * windows} tokens, and a window has {FEWEST} at least"
        raise BismoothError.of(text.name, what, "give a longer text")
    return Windows(taken.tokens.numpy(), taken.used.files, text.sha256, tuple(_notes(taken.used, budget)))


def text_of(source: Path, token: int) -> str | None:
    """What the source's tokenizer makes of one token; ``None`` if it is not there."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False).decode([token])
    except Exception:  # transformers raises anything here, and this is only for people
        return None


def _as_checkpoint(source: Path, config: dict[str, Any]) -> "Checkpoint":
    """As much of a checkpoint as tokenizing looks at: this is for models too that cannot be converted, or have been."""
    rows = size(config)
    if rows is None:
        raise BismoothError.of(source / CONFIG, "has no vocab_size", "give the folder of a model that generates text")
    name = f"{CONFIG}'s vocabulary"
    return cast(
        "Checkpoint",
        SimpleNamespace(
            folder=source,
            code=None,
            config=config,
            names=SimpleNamespace(embedding=name),
            headers={name: SimpleNamespace(shape=(rows,))},
        ),
    )


def _notes(used: Used, budget: int) -> Iterator[str]:
    for remark in used.remarks():
        yield _reworded(remark)
    missing = budget - used.tokens
    if missing >= used.tokens // used.windows:
        yield f"The text gives {used.tokens:,} of the {budget:,} tokens asked for"


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except BismoothError as error:
        problems = (replace(p, what=_reworded(p.what), remedy=_reworded(p.remedy)) for p in error.problems)
        raise BismoothError(*cast("Iterator[Problem]", problems)) from None


def _reworded(message: str) -> str:
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message
