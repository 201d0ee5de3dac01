"""Calibration text, and the tokens that the checkpoint's own tokenizer makes of it."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError

WINDOW = 512
_PIECE = 2**12  # characters tokenized at once
_DENSE = 16  # characters of a token, at most, on average


@dataclass(frozen=True)
class CalibrationText:
    """The documents of a calibration file and the SHA-256 of its bytes."""

    path: Path
    documents: tuple[str, ...]
    sha256: str


def read_text(path: str | Path) -> CalibrationText:
    """A ``.txt`` file (one document) or a ``.jsonl`` file (one ``{"text": ...}`` object a line).

    Raises:
        BismoothError: missing, empty, not UTF-8, another suffix, or a line that is not such an object.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise BismoothError.of(path, "no .txt or .jsonl file", "give calibration text as one, or 'none'")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        what = f"calibration file cannot be read ({error.strerror})"
        raise BismoothError.of(path, what, "check the path") from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start})"
        raise BismoothError.of(path, what, "convert the calibration file to UTF-8") from None
    documents = [text] if path.suffix == ".txt" else [_document(path, n, line) for n, line in _lines(text)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise BismoothError.of(path, "the calibration file is empty", "give it text, or use --calibration none")
    return CalibrationText(path, tuple(documents), hashlib.sha256(data).hexdigest())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _document(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise BismoothError.of(path, f'line {number} is not a JSON object with a string "text"', "mend it")
    return value["text"]


def tokenize(text: CalibrationText, checkpoint: Checkpoint, budget: int) -> torch.Tensor:
    """Windows of equal length from the checkpoint's own tokenizer, each led by BOS where the tokenizer adds one.

    They are spread evenly over the text: a few documents in a row show less of the model than as many tokens of all.

    Args:
        text: the documents.
        checkpoint: its folder holds the tokenizer, its config the vocabulary size and the longest position.
        budget: largest number of tokens.

    Returns:
        int64 ``[windows, length]`` with ``length <= 512`` and at most ``budget`` tokens in all.

    Raises:
        BismoothError: no tokenizer in the folder, its ids exceed the model's vocabulary, or transformers refuses the
            config.
    """
    from transformers import AutoTokenizer

    ids: list[int] = []
    # The config decides on the tokenizer's class where no file of the tokenizer does.
    config = transformers_config(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, config=config, local_files_only=True, trust_remote_code=False
        )
        lead = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
        # In pieces, because the text may be far longer than the budget; a seam costs at most one odd token.
        pieces = [(d, i) for d in text.documents for i in range(0, len(d), _PIECE)]
        share = min(1, budget * _DENSE / sum(map(len, text.documents)))
        for document, i in _spread(pieces, math.ceil(share * len(pieces))):
            ids += tokenizer(document[i : i + _PIECE], add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        what = f"no usable tokenizer ({type(error).__name__}: {error})"
        raise BismoothError.of(checkpoint.folder, what, "add tokenizer.json, or use --calibration none") from None
    if not ids:
        what = "the checkpoint's tokenizer makes no tokens of it"
        raise BismoothError.of(text.path, what, "use --calibration none")
    vocabulary = checkpoint.headers[checkpoint.names.embedding].shape[0]
    if max(ids) >= vocabulary:
        raise BismoothError.of(
            checkpoint.folder,
            f"the tokenizer gives id {max(ids)}, {checkpoint.names.embedding} has {vocabulary} rows",
            "put the tokenizer there that belongs to the model",
        )
    longest = checkpoint.config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else WINDOW
    length = max(1, min(WINDOW, longest, budget, len(ids) + len(lead)) - len(lead))
    count = max(1, min(budget // (length + len(lead)), len(ids) // length))
    windows = torch.tensor(_spread([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)], count))
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(count, -1), windows], dim=1)


def _spread(items: list, count: int) -> list:
    """``count`` of the items (all, if there are fewer) at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def transformers_config(checkpoint: Checkpoint):
    """The config as transformers understands it.

    Raises:
        BismoothError: transformers refuses it.
    """
    from transformers import AutoConfig

    # Without a classifier's labels, for each of which transformers would make up a name.
    settings = {key: value for key, value in checkpoint.config.items() if key != "num_labels"}
    try:
        return AutoConfig.for_model(**settings)
    except Exception as error:  # its validation raises many types
        raise refused(checkpoint, error) from None


def refused(checkpoint: Checkpoint, error: Exception) -> BismoothError:
    """The problem that transformers refuses a checkpoint's config."""
    return BismoothError.of(
        checkpoint.folder,
        f"transformers refuses config.json ({type(error).__name__}: {error})",
        "mend it, or use --calibration none",
    )
