"""Calibration text, and the tokens that the checkpoint's own tokenizer makes of it."""

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import bundled, own
from vllm_w8a8_bismooth.measure.corpus import PLAIN, Corpus
from vllm_w8a8_bismooth.measure.documents import ACCEPTED, Chat, Unusable, document
from vllm_w8a8_bismooth.measure.json_rows import LONGEST
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.model.configs import decoded, positions_of

WINDOW = 512
_PIECE = 2**12  # characters tokenized at once
_DENSE = 16  # characters of a token, at most, on average
_MOST = 64  # times the budget are kept, where a template adds far more than is said
_DAY = datetime(2024, 7, 26)  # for templates that show the date: tokens must not depend on the day of the conversion


@dataclass(frozen=True)
class Read:
    """What one file of calibration text holds.

    Attributes:
        corpus: the file.
        rows, skipped: rows with text or a chat, and others. A file of plain text is one row.
        reason: the first that was skipped, and why; ``None`` if none was.
        pieces, characters: of all text, pieces as :func:`_pieces` cuts them.
    """

    corpus: Corpus
    rows: int
    skipped: int
    reason: str | None
    pieces: int
    characters: int


@dataclass(frozen=True)
class CalibrationText:
    """Files of calibration text, of which nothing is in memory, and the SHA-256 of their bytes.

    Attributes:
        files: in the order given.
        sha256: of a single file's bytes; of several, that of their SHA-256, in hexadecimal, one after the other.
    """

    files: tuple[Read, ...]

    @property
    def sha256(self) -> str:
        digests = [read.corpus.sha256 for read in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The files' names, for people."""
        return ", ".join(read.corpus.name for read in self.files)


@dataclass(frozen=True)
class Sample:
    """Tokens for calibration.

    Attributes:
        tokens: int64 ``[windows, length]``.
        used: what they were made of.
    """

    tokens: torch.Tensor
    used: Used


def read_text(*sources: str | Path | Iterable[str]) -> CalibrationText:
    """Look through files of text: plain text, JSON lines, JSON or Parquet, also gzipped; see docs/converter.md.

    Rows that hold no text are skipped and counted.

    Args:
        sources: paths (``-`` is what is piped in, and the word ``bundled`` as a string the text that comes with this
            package), or documents in memory, as an iterable of strings that is no string.

    Raises:
        BismoothError: a file cannot be read, is of no known kind, or holds no text.
    """
    files = []
    for source in sources:
        if isinstance(source, str) and source == bundled.WORD:
            files.append(_read(Corpus(bundled.path(), name=bundled.NAME)))
            continue
        path = Path(source) if isinstance(source, str | Path) else Path("text in memory")
        files.append(_read(Corpus(path, None if isinstance(source, str | Path) else source)))
    return CalibrationText(tuple(files))


def _read(corpus: Corpus) -> Read:
    rows = skipped = pieces = characters = 0
    reason = None
    if corpus.kind == PLAIN:
        for piece in corpus.text(_PIECE):
            rows |= bool(piece.strip())
            pieces, characters = pieces + 1, characters + len(piece)
    else:
        for place, found in _documents(corpus):
            if isinstance(found, Unusable):
                skipped += 1
                reason = reason or f"{corpus.name} {place}: {found.reason}"
            else:
                size = len(_plain(found))
                rows, pieces, characters = rows + 1, pieces + _cuts(size), characters + size
    if not rows:
        what = f"holds no usable row ({reason})" if reason else "the calibration file is empty"
        remedy = f"rows must have {ACCEPTED}" if reason else "give it text, or use --calibration none"
        raise BismoothError.of(corpus.path, what, remedy)
    return Read(corpus, rows, skipped, reason, pieces, characters)


def _documents(corpus: Corpus) -> Iterator[tuple[str, str | Chat | Unusable]]:
    """Where every row is, and what it says. None is longer than JSON's may be, whatever the file."""
    for place, row in corpus.rows():
        found = row if isinstance(row, Unusable) else document(row)
        if not isinstance(found, Unusable) and len(_plain(found)) > LONGEST:
            found = Unusable(f"longer than {LONGEST} characters")
        yield place, found


def _cuts(characters: int) -> int:
    """How many pieces a document is cut into."""
    return -(-characters // _PIECE)


def _plain(found: str | Chat) -> str:
    return found.plain() if isinstance(found, Chat) else found


def _pieces(text: CalibrationText) -> Iterator[tuple[int, str | Chat, int, int]]:
    """Every piece of the text in its order: number of its document, the document, number of the piece inside it, size.

    Of plain text the document is the piece itself.
    """
    number = 0
    for read in text.files:
        if read.corpus.kind == PLAIN:
            yield from ((number, piece, 0, len(piece)) for piece in read.corpus.text(_PIECE))
            number += 1
            continue
        for _, found in _documents(read.corpus):
            if not isinstance(found, Unusable):
                size = len(_plain(found))
                yield from ((number, found, i, min(_PIECE, size - i * _PIECE)) for i in range(_cuts(size)))
                number += 1


def tokenize(text: CalibrationText, checkpoint: Checkpoint, budget: int) -> torch.Tensor:
    """The tokens of :func:`sample`, for those who need nothing else."""
    return sample(text, checkpoint, budget).tokens


def sample(text: CalibrationText, checkpoint: Checkpoint, budget: int, window: int = WINDOW) -> Sample:
    """Windows of equal length from the checkpoint's own tokenizer, each led by BOS where the tokenizer adds one.

    They are spread evenly over the text: a few documents in a row show less of the model than as many tokens of all.
    Chats go through the checkpoint's chat template. Windows with ids that the embedding lacks are left out.

    Args:
        text: the documents.
        checkpoint: its folder holds the tokenizer, its config the vocabulary size and the longest position.
        budget: largest number of tokens.
        window: largest length.

    Returns:
        int64 ``[windows, length]`` with ``length <= window`` and at most ``budget`` tokens in all, and what was used.

    Raises:
        BismoothError: no tokenizer in the folder, most windows hold ids beyond the model's vocabulary, transformers
            refuses the config, or the text has changed since it was read.
    """
    from transformers import AutoTokenizer

    # The config decides on the tokenizer's class where no file of the tokenizer does.
    config = transformers_config(checkpoint)
    with _tokenizer_errors(checkpoint):
        trusted = checkpoint.code is not None
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, config=config, local_files_only=True, trust_remote_code=trusted
        )
        lead = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    rendering = _Rendering(tokenizer, begun=bool(lead))
    pieces, size, step = [], 0, 1
    for place, (number, piece) in enumerate(_chosen(text, budget, rendering)):
        if place % step == 0:
            with _tokenizer_errors(checkpoint):
                found = array("q", tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
            pieces.append((number, found))
            size += len(found)
            if size > _MOST * budget:
                pieces, step = pieces[::2], 2 * step
                size = sum(len(found) for _, found in pieces)
    # Of each token, its id and the number of its document.
    ids, owners = array("q"), array("q")
    for number, found in pieces:
        ids.extend(found)
        owners.extend([number] * len(found))
    if not ids:
        what = "the checkpoint's tokenizer makes no tokens of it"
        raise BismoothError.of(text.name, what, "use --calibration none")
    whole = min(window, positions_of(checkpoint.config) or window, budget, len(ids) + len(lead))
    lead = lead[: whole - 1]  # a window of one token has no room for it
    length = whole - len(lead)
    starts = range(0, len(ids) - length + 1, length)
    kept = _within_vocabulary([ids[i : i + length] for i in starts], lead, checkpoint)
    chosen = [starts[i] for i in _spread(kept, budget // whole)]
    windows = torch.tensor([ids[i : i + length] for i in chosen])
    tokens = torch.cat([torch.tensor(lead, dtype=torch.int64).expand(len(chosen), -1), windows], dim=1)
    documents = {number for i in chosen for number in owners[i : i + length]}
    refused = rendering.refused
    used = Used(
        files=tuple(read.corpus.name for read in text.files),
        rows=sum(read.rows for read in text.files),
        skipped=sum(read.skipped for read in text.files),
        reason=next((read.reason for read in text.files if read.reason), None),
        documents=len(documents),
        windows=len(chosen),
        tokens=tokens.numel(),
        left_out=len(starts) - len(kept),
        plain_chats=len(documents & refused.keys()),
        template=next((reason for number, reason in refused.items() if number in documents), None),
    )
    return Sample(tokens, used)


def _chosen(text: CalibrationText, budget: int, rendering: "_Rendering") -> Iterator[tuple[int, str]]:
    """Pieces spread evenly over the text, with the numbers of their documents: as many as give the budget for sure.

    In pieces, because the text may be far longer than the budget; a seam costs at most one odd token. Pieces are taken
    as characters fall due, not by their number: else rows that alternate in length could give only the short ones.
    """
    pieces, characters = (sum(getattr(read, key) for read in text.files) for key in ("pieces", "characters"))
    count = math.ceil(min(1, budget * _DENSE / characters) * pieces)
    due = 0  # characters times pieces; never above 0 between two pieces
    for number, found, i, size in _pieces(text):
        due += size * count
        if due > 0:
            due -= size * pieces
            yield number, rendering.piece(number, found, i)


class _Rendering:
    """Makes text of chats by the checkpoint's chat template.

    Args:
        tokenizer: of the checkpoint.
        begun: whether every window begins with BOS anyway, which a chat then leaves out.

    Attributes:
        refused: numbers of the chats of which it made none, and why.
    """

    def __init__(self, tokenizer: Any, begun: bool):
        self._tokenizer = tokenizer
        self._begin = tokenizer.bos_token if begun else None
        self.refused: dict[int, str] = {}
        self._last: tuple[int, str] = (-1, "")  # a chat may be long, and many of its pieces chosen

    def piece(self, number: int, found: str | Chat, index: int) -> str:
        """The text of one piece of a document; no half of a surrogate pair is left in it."""
        if isinstance(found, Chat):
            if self._last[0] != number:
                self._last = number, self._rendered(number, found)
            size = -(-len(self._last[1]) // _cuts(len(found.plain())))
            text = self._last[1][index * size : (index + 1) * size]
        else:
            text = found[index * _PIECE : (index + 1) * _PIECE]
        return text.encode("utf-8", "replace").decode()

    def _rendered(self, number: int, chat: Chat) -> str:
        try:
            if not getattr(self._tokenizer, "chat_template", None):
                raise ValueError("the checkpoint has none")
            text = self._tokenizer.apply_chat_template(chat.messages(), tokenize=False, strftime_now=_DAY.strftime)
            if not any(content.strip() in text for _, content in chat.turns if content.strip()):
                raise ValueError("it leaves out what is said")
            return text.removeprefix(self._begin or "")
        except Exception as error:  # a template raises what it likes
            self.refused[number] = str(error)[:200]
            return chat.plain()


def _within_vocabulary(windows: list[array], lead: list[int], checkpoint: Checkpoint) -> list[int]:
    """Numbers of the windows whose ids all have a row of the embedding; raises where those are fewer than half."""
    embedding = checkpoint.names.embedding
    vocabulary = checkpoint.headers[embedding].shape[0]
    kept = [i for i, window in enumerate(windows) if max([*lead, *window]) < vocabulary]
    if 2 * len(kept) < len(windows):
        raise BismoothError.of(
            checkpoint.folder,
            f"the tokenizer gives id {max(map(max, [lead or [0], *windows]))}, {embedding} has {vocabulary} rows, "
            f"and {len(windows) - len(kept)} of {len(windows)} windows of text hold such ids",
            "put the tokenizer there that belongs to the model, or use --calibration none",
        )
    return kept


def _spread(items: list, count: int) -> list:
    """``count`` of the items (all, if there are fewer) at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@contextmanager
def _tokenizer_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        what = f"no usable tokenizer for the calibration text ({type(error).__name__}: {error})"
        raise BismoothError.of(checkpoint.folder, what, "add tokenizer.json, or use --calibration none") from None


def transformers_config(checkpoint: Checkpoint):
    """The config as transformers understands it.

    Raises:
        BismoothError: transformers refuses it.
    """
    if checkpoint.code is not None:
        return own.origin_of(checkpoint).config
    from transformers import AutoConfig

    # Without a classifier's labels, for each of which transformers would make up a name.
    # A copy to the bottom: transformers changes what is inside, and the config is written as it was read.
    settings = decoded({key: value for key, value in checkpoint.config.items() if key != "num_labels"})
    try:
        return AutoConfig.for_model(**settings)
    except Exception as error:  # its validation raises many types
        raise refused(checkpoint, error) from None


def refused(checkpoint: Checkpoint, error: Exception) -> BismoothError:
    """The problem that transformers refuses a checkpoint's config."""
    return BismoothError.of(
        checkpoint.folder,
        f"transformers refuses config.json ({type(error).__name__}: {error})",
        "mend it",
    )
