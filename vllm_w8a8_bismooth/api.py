"""Conversion, inspection, verification and scores as functions, for Python and for the command.

``import vllm_w8a8_bismooth as b; b.convert("SRC", "DST")``. Messages name options as the command does:
``--group-size`` is ``group_size``. Only ``score`` needs vLLM.
"""

import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w8a8_bismooth import given
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.progress import Progress

if TYPE_CHECKING:  # torch comes with most of them, and inspect does without
    from vllm_w8a8_bismooth.conversion.inspect import Survey
    from vllm_w8a8_bismooth.conversion.preparation import Preparation
    from vllm_w8a8_bismooth.conversion.preview import Preview
    from vllm_w8a8_bismooth.conversion.sites import Sites
    from vllm_w8a8_bismooth.report.outcome import Outcome
    from vllm_w8a8_bismooth.scoring.result import Score
    from vllm_w8a8_bismooth.verification import Verification


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    method: str = "bismooth",
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_tokens: int | None = None,
    compute_dtype: str | None = None,
    smoothing: str | None = None,
    alpha: float | None = None,
    rounding: str | None = None,
    bits: float | None = None,
    group_size: int | None = None,
    group_layers: str | Sequence[str] | None = None,
    group_budget: float | str | None = None,
    target_kl: float | None = None,
    ignore: str | Sequence[str] | None = None,
    head: str | None = None,
    blocks: str | slice | range | None = None,
    device: str = "cpu",
    sites: str | Path | None = None,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    progress: Progress | None = None,
) -> "Outcome":
    """Convert a checkpoint to INT8, as ``bismooth convert`` does.

    The destination ends up whole or absent; the source is only read. A call that was interrupted goes on where it
    stopped when it is made again; one whose result is there already does nothing.

    Args:
        source: a folder, or as a string also ``org/name[@revision]`` on the Hugging Face Hub.
        destination: the folder to write. It must be absent, empty, or hold the same result.
        method: ``rtn``, ``bismooth``, ``mixed`` or ``auto``.
        calibration: one or more files of text. ``"bundled"`` is text that comes with this package, the default of
            ``bismooth`` and ``auto``; ``"none"`` is data-free, which ``auto`` cannot do.
        calibration_tokens: how many tokens are taken from it; ``None`` is 16384.
        compute_dtype: in which they run through the model: ``float32``, ``bfloat16``, or ``auto``, the default: of a
            model in bf16 what is faster here, else fp32. An unfinished conversion keeps its own.
        smoothing: the rule for the factors, ``balanced`` (the default) or ``alpha``.
        alpha: with ``smoothing="alpha"``, the share of the activations' range that moves into the weights, 0 to 1.
        rounding: of the weights, ``nearest``, or ``gptq``, which makes up for errors and is the default with
            calibration.
        bits: of a weight of the linears, on average, scales and all, 4.2 to 8: rows have four bits, or eight where that
            is worth most to the predictions. Only the plugin serves the result. ``None`` is INT8.
        group_size: columns per scale in per-group linears, a multiple of 32; with ``bits`` columns per step of 4-bit
            rows. If it is ``None``, ``mixed`` takes 128, and ``auto`` and ``bits`` the largest of 128, 64 and 32 that
            fits all linears.
        group_layers: patterns of the linears to make per-group, see :mod:`patterns`. Those that vLLM fuses with them
            come with them, and with an expert all others of its block.
        group_budget: with ``auto``, the share of the linears' multiplications that may have per-group scales, ``0.15``
            or ``"15%"``.
        target_kl: with ``auto``, the estimated KL divergence to the source at which no more groups are given, in nats a
            token.
        ignore: patterns of the linears to leave in the source's dtype.
        head: ``"int8"`` makes the language model's head INT8, too, per-channel, and of a tied one a tensor of its own;
            ``"float"`` (the default) leaves it as it is.
        blocks: only these decoder blocks, ``"0:42"`` or ``range(42)``: makes a part, see :func:`merge`.
        device: where blocks are worked on: ``cpu``, ``cuda``, ``cuda:1``.
        sites: a file with the record of the model's sites, as :func:`sites` gives it, perhaps edited. It is proven, and
            takes the place of what would be known or found out.
        trust_remote_code: whether code in the checkpoint's own folder may run, for types that transformers lacks.
        base_model: for the model card, the original's id on the Hub, ``org/name``; ``None`` is the source's, if known.
        license: for the model card, the original's licence by its id on the Hub or in SPDX; ``None`` is the source's.
        progress: called as ``progress(stage, done, total, written)``: a stage's name (``calibrate``, ``analyze``,
            ``carry``, ``convert``, ``discover``), blocks done and in all, and bytes written so far.

    Returns:
        What was done; ``outcome.vulnerable()`` lists the linears that INT8 still breaks.

    Raises:
        BismoothError: anything wrong with the input. The text says what, where and what to do; ``problems`` has it as
            data.
        errors.Interrupted: a kind of it: the machine stood in the way (a full disk); the same call goes on from there.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.conversion import pipeline

    ready = prepare(
        source,
        destination,
        method=method,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        compute_dtype=compute_dtype,
        smoothing=smoothing,
        alpha=alpha,
        rounding=rounding,
        bits=bits,
        group_size=group_size,
        group_layers=group_layers,
        group_budget=group_budget,
        target_kl=target_kl,
        ignore=ignore,
        head=head,
        blocks=blocks,
        device=device,
        sites=sites,
        trust_remote_code=trust_remote_code,
        base_model=base_model,
        license=license,
        progress=progress,
    )
    return pipeline.convert(ready, given.progress(progress))


def preview(source: str | Path, destination: str | Path, **options: Any) -> "Preview":
    """What :func:`convert` would do with the same arguments, after the same checks. Nothing is written or downloaded.

    Args:
        source: a folder, or a repository on the Hub that is in the cache already.
        destination: the folder to be.
        options: those of :func:`convert` but ``progress``.

    Raises:
        BismoothError: whatever :func:`convert` would refuse before it reads the weights.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.conversion import preview as room

    return room.preview(prepare(source, destination, download=False, **options))


def merge(
    destination: str | Path,
    parts: Sequence[str | Path],
    *,
    base_model: str | None = None,
    license: str | None = None,
    progress: Progress | None = None,
) -> "Outcome":
    """Join the parts of a checkpoint that :func:`convert` made with ``blocks``, as ``bismooth merge`` does.

    Args:
        destination: the folder to write. It must be absent, empty, or hold the same result.
        parts: the folders of all parts, in any order; they are only read.
        base_model, license: for the model card, as of :func:`convert`.
        progress: as of :func:`convert`; counts shards in the stage ``merge``.

    Raises:
        BismoothError: parts are missing, damaged, or do not fit together.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.conversion import merge as room
    from vllm_w8a8_bismooth.report.labels import Labels

    if isinstance(parts, str | os.PathLike) or not isinstance(parts, Iterable):
        raise TypeError(f"parts must be a list of folders, not {parts!r}")
    folders = [given.path("parts", part) for part in parts]
    ready = room.prepare(folders, given.destination(destination), Labels(base_model, license))
    return room.merge(ready, given.progress(progress))


def verify(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    engine: bool = True,
) -> "Verification":
    """Check a converted checkpoint, as ``bismooth verify`` does.

    Args:
        folder: the checkpoint, ours or another symmetric INT8 W8A8 one in compressed-tensors' format.
        against: the checkpoint that it was made from, a folder or ``org/name[@revision]``, to compare weights and
            function with.
        trust_remote_code: as of :func:`convert`; for a checkpoint that was converted with it.
        progress: as of :func:`convert`; counts shards in the stage ``read`` and blocks in the stage ``compare``.
        engine: whether vLLM is asked in a process of its own, if it is installed and nothing else is wrong; that takes
            10 to 20 seconds.

    Returns:
        What was found: ``ok``, ``findings`` (what is wrong, where, and what to do), ``notes``.

    Raises:
        BismoothError: there is nothing to check.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth import verification

    if not isinstance(engine, bool):
        raise TypeError(f"engine must be True or False, not {engine!r}")
    watch = given.progress(progress)
    means = given.means(None, trust_remote_code, watch)
    other = None if against is None else given.fetched(against, means)
    return verification.verify(given.path("folder", folder), other, watch, engine, means.trusted)


def inspect(
    source: str | Path,
    *,
    calibration_tokens: int = 16384,
    group_size: int = 128,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> "Survey":
    """Say from headers alone what a conversion needs and what stands in its way, as ``bismooth inspect`` does.

    Args:
        source: a folder, or as a string also ``org/name[@revision]`` on the Hub, of which no weights are downloaded.
        calibration_tokens: of a calibrated conversion, for the estimates.
        group_size: columns per scale, for which tensor parallelism is checked.
        trust_remote_code: as of :func:`convert`.
        progress: as of :func:`convert`; counts blocks in the stage ``discover``.

    Returns:
        What the headers hold; ``kinds`` has the blocks and their sites, and ``problems`` is empty if the checkpoint can
        be converted.

    Raises:
        BismoothError: there is nothing to read.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.files import Folder
    from vllm_w8a8_bismooth.conversion.inspect import survey

    for name, value in {"calibration_tokens": calibration_tokens, "group_size": group_size}.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < 1:
            raise BismoothError.of(f"--{name.replace('_', '-')} {value}", "not positive", "give a number from 1 on")
    if group_size % 32:
        raise BismoothError.of(f"--group-size {group_size}", "not a positive multiple of 32", "give one, like 128")
    means = given.means(None, trust_remote_code, given.progress(progress))
    place = hub.find(source) if isinstance(source, str) else Folder(given.path("source", source))
    return survey(place, int(calibration_tokens), int(group_size), means)


def sites(
    source: str | Path,
    *,
    sites: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> "Sites":
    """Find out where magnitude can move in a model, from its config alone, as ``bismooth sites`` does.

    Args:
        source: a folder, a ``config.json``, or as a string also ``org/name[@revision]`` on the Hub, of which no weights
            are downloaded.
        sites: a file with a record, as of :func:`convert`, to be proven instead.
        trust_remote_code: as of :func:`convert`.
        progress: as of :func:`convert`; counts blocks in the stage ``discover``.

    Returns:
        ``kinds`` of blocks with their sites, and the whole ``record``; ``json.dumps(found.record.to_json())`` is what
        ``sites`` takes here and in :func:`convert`.

    Raises:
        BismoothError: no model can be made of the config, or the record's sites do not hold.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.checkpoint.files import CONFIG, Folder, read_json

    means = given.means(sites, trust_remote_code, given.progress(progress))
    where = given.path("source", source)
    if where.is_file():
        config, code = read_json(where), where.parent
    else:
        place = hub.find(source) if isinstance(source, str) else Folder(where)
        config = read_json(place.local(CONFIG))
        code = place.code() if means.trusted else Path()
    from vllm_w8a8_bismooth.conversion.sites import find

    return find(config, str(source), code, means)


def score(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 8192,
    window: int = 512,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    write_card: bool = False,
    progress: Progress | None = None,
) -> "Score":
    """Compare a checkpoint's predictions with its source's in real vLLM, as ``bismooth score`` does.

    Each runs in an engine in a process of its own, as it is served. What the source predicts is kept in the user's
    folder for caches, for the next call; a call that was interrupted goes on when it is made again.

    Args:
        folder: the checkpoint, of anybody; vLLM serves it.
        against: the checkpoint that it was made from, a folder or ``org/name[@revision]``; ``None`` is the one that its
            recipe.json names, if that is beside it, in the current folder or in the Hub's cache.
        text: one or more files of text that the model should predict, of the kinds that ``calibration`` may have. There
            is no default.
        tokens: how many are taken from them, at most.
        window: tokens that are predicted in one go, at most.
        dtype: ``auto`` (each checkpoint's own), ``bfloat16``, ``float32`` or ``float16``.
        tensor_parallel_size: over how many GPUs, or nodes of a CPU, vLLM spreads each.
        write_card: whether the table is put into the checkpoint's README.md, in the place of an earlier one.
        progress: as of :func:`convert`; counts windows in the stages ``source`` and ``checkpoint``, and what
            is done of both engines in ``engine``.

    Returns:
        ``divergence`` with KL divergence, top-1 agreement and perplexities; what was measured, and ``notes``.

    Raises:
        BismoothError: both cannot be compared, there is no text, or an engine fails.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.scoring import score as room

    watch = given.progress(progress)
    ready = given.prepare_score(folder, against, text, tokens, window, dtype, tensor_parallel_size, write_card)
    return room.run(ready, watch)


def prepare(
    source: str | Path,
    destination: str | Path,
    *,
    method: str = "bismooth",
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_tokens: int | None = None,
    blocks: str | slice | range | None = None,
    device: str = "cpu",
    sites: str | Path | None = None,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    progress: Progress | None = None,
    download: bool = True,
    **choices: Any,
) -> "Preparation":
    """All that :func:`convert` does before its first write.

    Args:
        source, destination, method, calibration, calibration_tokens, blocks, device, sites, trust_remote_code,
            base_model, license, progress: see :func:`convert`.
        download: whether a source on the Hub may be downloaded.
        choices: further fields of :class:`recipe.Recipe`.

    Raises:
        BismoothError: see :func:`convert`.
        TypeError: an argument is of another kind than it should be.
    """
    from vllm_w8a8_bismooth.checkpoint import hub
    from vllm_w8a8_bismooth.recipe import Recipe, option_of
    from vllm_w8a8_bismooth.report.labels import Labels

    destination = given.destination(destination)
    recipe = Recipe.of(method, calibration_tokens=calibration_tokens, **choices)
    labels, text = Labels(base_model, license), given.text(method, calibration)
    means = given.means(sites, trust_remote_code, given.progress(progress))
    for name, value in {
        "calibration_tokens": calibration_tokens,
        "compute_dtype": choices.get("compute_dtype"),
    }.items():
        if text is None and value is not None:
            what = f"{option_of(name)} has no effect with --calibration none"
            raise BismoothError.of("convert", what, "leave out one of the two")

    from vllm_w8a8_bismooth.conversion import preparation
    from vllm_w8a8_bismooth.conversion.destination import Destination

    if isinstance(source, str) and (parsed := hub.parse(source)) is not None:  # a download may take hours
        Destination.of(destination, parsed[0].rpartition("/")[2]).check()
    folder = given.fetched(source, means) if download else given.at_hand(source)
    return preparation.prepare(folder, destination, recipe, text, device, blocks, labels, means)
