"""Refuses a checkpoint that is damaged or crafted before vLLM reads its weights. Nothing in it is trusted or executed.

A tensor that is missing, misshapen or not finite is found while vLLM loads it (see scheme.py), for the Hub's
checkpoints and others' too. Here is what can only be seen on the files as a whole.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_w8a8_bismooth.checkpoint.files import REPORT, WEIGHT_SUFFIXES, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError, Problem

logger = init_logger("vllm.w8a8_bismooth")

SKIP = "BISMOOTH_SKIP_HASHES"
"""Environment variable; if it is 1, shards are not hashed before they are loaded."""
HASHED = "BISMOOTH_HASHED"
"""Environment variable, set here: the state of the shards that were found right, for the processes that vLLM starts.

Each of its API servers, of which there are as many as data-parallel engines, makes the config anew.
"""

_QUANTIFIERS, _PATTERN_LENGTH = 4, 4096
_SUFFIX = ".weight_scale"


def check_patterns(config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` with an expression that could take for ever to match.

    Python's ``re`` backtracks: a repeated group costs exponential time, and n repeats in a row cost the n-th power of
    a name's length. Real targets need neither.

    Raises:
        ValueError: names the expression.
    """
    for pattern in _patterns(config):
        if fault := _fault(pattern.removeprefix("re:")):
            raise ValueError(
                f"config.json: the expression {pattern[:100]!r} in quantization_config {fault}; name the layers plainly"
            )


def _fault(expression: str) -> str | None:
    if len(expression) > _PATTERN_LENGTH:
        return f"has {len(expression)} characters, more than {_PATTERN_LENGTH}"
    atoms = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "a", expression)
    bare = re.sub(r"\(\?[:=!]", "(", atoms)
    if re.search(r"\)[*+{]", bare):
        return "repeats a group, which can take exponential time to match"
    if (repeats := len(re.findall(r"[*+{?]", bare))) > _QUANTIFIERS:
        return f"holds {repeats} repeats, more than {_QUANTIFIERS}"
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    return None


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """The expressions among ignored modules and targets, whatever else the config is."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    lists = [config.get("ignore"), *(group.get("targets") for group in groups if isinstance(group, Mapping))]
    for names in lists:
        if isinstance(names, list):
            yield from (name for name in names if isinstance(name, str) and name.startswith("re:"))


def check_files(folder: Path) -> None:
    """Check a folder that ``bismooth convert`` wrote: headers, index, scale of every INT8 weight, and hashes.

    Hashing reads every shard once, one thread a shard; vLLM then finds them in the page cache. Processes that this one
    starts do not hash them again, unless a file has changed.

    Args:
        folder: the model as vLLM was given it. One that is not on this machine is passed over, and so is one without
            weights (``--load-format dummy``).

    Raises:
        ValueError: names the tensor or the file, and the remedy.
    """
    weights = [path for path in sorted(folder.glob("*")) if path.suffix in WEIGHT_SUFFIXES]
    if not weights:
        return
    try:
        checkpoint = Checkpoint(folder, dtypes=(*FLOAT_DTYPES, "I8"))
        problems = [*_unpaired(checkpoint), *_changed(folder)]
    except BismoothError as error:
        problems = [*error.problems]
    if problems:
        raise ValueError(f"{folder} is damaged: {BismoothError(*problems)}")


def _unpaired(checkpoint: Checkpoint) -> Iterator[Problem]:
    """INT8 weights whose scales are absent or of another shape, scales without weights, and experts that are packed."""
    headers = checkpoint.headers
    for name, header in headers.items():
        if name.endswith(_SUFFIX) and headers.get(name.removesuffix("_scale"), header).dtype != "I8":
            yield Problem(name, "is the scale of no INT8 weight", "convert the source again")
        if header.dtype != "I8":
            continue
        if name in checkpoint.encodings and ".experts." in name:
            yield Problem(
                name, "has rows of four bits, and experts are served in INT8 alone", "convert the source again"
            )
        scale = headers.get(f"{name}_scale")
        if scale is None:
            yield Problem(f"{name}_scale", "is missing", "copy the checkpoint again, or convert the source again")
        elif len(header.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] not in header.shape:
            what = f"has shape {list(scale.shape)}, {name} has {list(header.shape)}"
            yield Problem(f"{name}_scale", what, "convert the source again")


def _changed(folder: Path) -> Iterator[Problem]:
    """Shards that are not what the conversion wrote."""
    if not (folder / REPORT).exists() or os.environ.get(SKIP) == "1":
        return
    noted = read_json(folder / REPORT).get("sha256")
    noted = noted if isinstance(noted, dict) else {}
    shards, started = sorted(folder.glob("*.safetensors")), time.monotonic()
    state: str | None = _state([folder / REPORT, *shards])
    if os.environ.get(HASHED) == state:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, found in zip(shards, pool.map(sha256, shards), strict=True):
            if noted.get(path.name, found) != found:
                state = None
                what = f"has SHA-256 {found}, {REPORT} noted {noted[path.name]} when it was written"
                yield Problem(path.name, what, "copy the file again, or convert the source again")
    logger.info("w8a8_bismooth: hashed %d shards in %.1f s", len(shards), time.monotonic() - started)
    if state is not None:
        os.environ[HASHED] = state


def _state(files: list[Path]) -> str:
    """What changes when a file does."""
    seen = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns) for path in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
