"""The smoothing sites of a config's model, and all names and shapes, without its weights; kept between calls."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.discovery.bounds import check_bounds
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.progress import Progress, silent

_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "quantization_config")
"""Entries of a config that change nothing of what is found."""


def discover(
    config: Mapping[str, Any],
    code: Path | None = None,
    progress: Progress = silent,
    given: Discovery | None = None,
) -> Discovery:
    """What is known of the models with a config: kinds of blocks, sites, what becomes INT8, names in the checkpoint.

    A small model of the same class is built from the config, with random weights, and every magnitude that can move
    between two of its tensors is found by trying, and proven by equality in fp64. The same config gives the same record
    every time. It is kept in the user's cache (``$XDG_CACHE_HOME/bismooth/discovery``), for the same versions of
    transformers and of this room.

    Args:
        config: of ``config.json``.
        code: folder of the code that the config names (``auto_map``), if it may run; it then is a part of what
            the record is kept by.
        progress: called after each block, with the stage ``discover``.
        given: a record whose sites are taken instead of searching for any, if the same proof finds that they hold.

    Raises:
        BismoothError: the config is of no model, or the given record is not one of it, or has sites that do not hold.
        UnknownModel: transformers does not know the type, or it is code that may not run.
        Unproven: no small model of it can be built and run.
    """
    check_bounds(config)
    kept = _folder() / f"{_key(config, code, given)}.json"
    try:
        return Discovery.from_json(json.loads(kept.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, or not of this form: it is found again
    from vllm_w8a8_bismooth.discovery.find import find  # which imports torch
    from vllm_w8a8_bismooth.discovery.origin import explained, refused

    try:
        found = find(config, code, progress, given)
    except BismoothError:
        raise
    except Exception as error:  # any class of transformers runs here, of whatever form
        raise refused(f"its sites could not be found out ({explained(error)})") from error
    _keep(kept, json.dumps(found.to_json()))
    return found


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bismooth" / "discovery"


def _key(config: Mapping[str, Any], code: Path | None, given: Discovery | None) -> str:
    """A hash of the config, the model's own code, the versions of transformers and torch, this room's sources, and the
    record that is to be proven."""
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    digest.update(f"{version('transformers')} {version('torch')}".encode())  # without their imports, which take seconds
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *(sorted(code.glob("*.py")) if code else ())):
        digest.update(source.read_bytes())
    if given is not None:
        digest.update(json.dumps(given.to_json()).encode())
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Write a file at once or not at all; a cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
