"""Write `continuation.jsonl`: which of four continuations is the real one, on the Python bed's held-out text.

    python -m benchmarks.tasks.continuation

Every wrong continuation follows the same token elsewhere in the held-out text, so that the first word betrays nothing.
What looks random is ordered by CRC-32, so the committed file can be made again anywhere.
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.testbed import PYTHON

FILE = Path(__file__).with_suffix(".jsonl")
QUESTIONS, CONTEXT, CONTINUATION, CHOICES = 200, 64, 8, 4
_END = 1  # between documents


def questions() -> list[dict]:
    """``{"context", "choices", "answer"}``, from all over the held-out tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PYTHON.model, local_files_only=True)
    stream = np.load(PYTHON.folder / "heldout.npy").astype(int)

    def text(start: int, count: int) -> str:
        return tokenizer.decode(stream[start : start + count].tolist(), clean_up_tokenization_spaces=False)

    def shuffled(things: Iterable) -> list:
        return sorted(things, key=lambda thing: zlib.crc32(repr(thing).encode()))

    whole = np.lib.stride_tricks.sliding_window_view(stream != _END, CONTEXT + CONTINUATION).all(axis=1)
    places = np.flatnonzero(whole) + CONTEXT  # of continuations that have a context in the same document
    result = []
    for place in shuffled(places.tolist()):
        context, real = text(place - CONTEXT, CONTEXT), text(place, CONTINUATION)
        others = {text(p, CONTINUATION) for p in places[stream[places - 1] == stream[place - 1]]}
        wrong = shuffled(choice for choice in others - {real} if not choice.isspace())[: CHOICES - 1]
        # The harness moves blanks from the end of a context to the choices.
        if context[-1:].isspace() or real.isspace() or len(wrong) < CHOICES - 1:
            continue
        choices = sorted([real, *wrong], key=lambda choice: zlib.crc32(f"{place} {choice}".encode()))
        result.append({"context": context, "choices": choices, "answer": choices.index(real)})
        if len(result) == QUESTIONS:
            return result
    raise AssertionError(f"the held-out text has only {len(result)} questions")


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(question) + "\n" for question in questions()))
