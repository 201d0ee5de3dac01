"""The files beside the weights that a model needs where it is served: those known to be useful, and what they name.

A checkpoint's folder often holds more: other formats, optimizer states, logs, data. What is not known is left out.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, Place, read_value
from vllm_w8a8_bismooth.errors import BismoothError, Problem

MODULES, ROUTER = "modules.json", "router_config.json"
"""How sentence-transformers says of which modules a model consists, and which of them an input takes."""
_USEFUL = (
    # what transformers, sentence-transformers and vLLM read
    "*_config.json", "config_*.json", MODULES, "params.json",
    "tokenizer*.json", "tokenizer.model*", "*vocab*.json", "*vocab*.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.bpe", "bpe.codes",
    "chat_template*", "*.jinja", "additional_chat_templates/*.jinja", "custom_generate/*",
    # what people read
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*",
)  # fmt: skip
_HARMFUL = ("adapter_*", "*quant*_config.json", "quantize_config.json", "*.index.json")
"""What readers would take for a statement about the weights that are written."""
_CODE = "*.py"
_WEIGHED = (
    "Dense",
    "LayerNorm",
    "WeightedLayerPooling",
    "CNN",
    "LSTM",
    "WordEmbeddings",
    "WeightedMean",
    "StaticEmbedding",
)
"""Modules of sentence-transformers that have weights of their own."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where vLLM and sentence-transformers look for them, in a module's folder."""
_SMALL = 2**20  # bytes of a JSON file that is searched for names of others


def companions(place: Place) -> list[str]:
    """The files to be copied byte for byte, in order: neither weights of the model, nor its config or index.

    These are files with well-known names; code, where a config says that there is some (``auto_map``); the folders that
    ``modules.json`` and ``router_config.json`` name, whatever is in them; and files whose name stands anywhere in the
    small JSON files among these that are configs.

    Raises:
        BismoothError: one of them is a link that leads nowhere, or ``modules.json`` cannot be read.
    """
    files = place.files()
    found = {file for file in files if _useful(file)}
    stated = {file: read_value(place.local(file)) for file in (CONFIG, *sorted(found)) if _states(file, files)}
    folders = [f"{folder}/" for folder in {*_modules(place, files).values(), *_routes(stated.get(ROUTER))} if folder]
    found |= {file for file in files if file.startswith(tuple(folders))}
    more = [file for file in found if file not in stated and _states(file, files)]
    stated |= {file: read_value(place.local(file)) for file in sorted(more)}
    if any(_has_code(value) for value in stated.values()):
        found |= {file for file in files if fnmatchcase(PurePosixPath(file).name, _CODE)}
    for file, value in stated.items():
        found |= {name for name in _named(value, os.path.dirname(file)) if name in files and _may_be_named(name)}
    for file in sorted(found):
        if not files[file] and not place.local(file).exists():
            remedy = "download the file again or remove the link"
            raise BismoothError.of(f"{place}/{file}", "a link that leads nowhere", remedy)
    return sorted(found)


def left_out(place: Place, weights: Iterable[str]) -> dict[str, int]:
    """The files that are not copied, with their bytes: not the model's weights, config and index, nor companions."""
    used = {CONFIG, INDEX, *weights, *companions(place)}
    return {file: size for file, size in place.files().items() if file not in used}


def module_problems(place: Place) -> Iterator[Problem]:
    """Modules that ``modules.json`` names without the weights that they have, so that readers would leave them out."""
    files = place.files()
    for kind, folder in _modules(place, files).items():
        name = kind.rpartition("|")[0].rpartition(".")[2]
        if folder and name in _WEIGHED and not any(f"{folder}/{weights}" in files for weights in _WEIGHTS):
            yield Problem(
                f"{place}/{folder}",
                f"has no {' or '.join(_WEIGHTS)}, but {MODULES} says that it is a {name}",
                f"download the folder again, or remove its entry from {MODULES} if the model has no such module",
            )


def _useful(file: str) -> bool:
    name = file.lower()
    known = any(fnmatchcase(name, pattern.lower()) and pattern.count("/") == name.count("/") for pattern in _USEFUL)
    return known and file != CONFIG and not _harmful(name)


def _harmful(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _HARMFUL)


def _states(file: str, files: Mapping[str, int]) -> bool:
    """Whether a file may name others: a small JSON file, and no vocabulary, which is full of words."""
    name = PurePosixPath(file).name
    is_config = name == MODULES or fnmatchcase(name, "*config*.json")
    return is_config and file in files and 0 < files[file] <= _SMALL


def _modules(place: Place, files: Mapping[str, int]) -> dict[str, str]:
    """Type and number of each module -> its folder, ``""`` for the model's own.

    Raises:
        BismoothError: ``modules.json`` is not what it must be, or names a place outside the folder.
    """
    if MODULES not in files:
        return {}
    where, value = f"{place}/{MODULES}", read_value(place.local(MODULES))
    entries = value.get("modules", []) if isinstance(value, dict) else value
    found = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        kind, path = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            what = f"entry {number} has no type and path"
            raise BismoothError.of(where, what, "download the file again")
        if path and (os.path.normpath(path) != path.removesuffix("/") or path.startswith(("/", ".."))):
            raise BismoothError.of(where, f"entry {number} has the path {path!r}, which is no folder here", "mend it")
        found[f"{kind}|{number}"] = path.removesuffix("/")
    return found


def _routes(value: Any) -> Iterator[str]:
    """The folders that a ``router_config.json`` names: every word of it, of which only those count that exist."""
    yield from (word for word in _words(value) if word and os.path.normpath(word) == word and word[0] not in "./")


def _words(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item


def _named(value: Any, folder: str) -> Iterator[str]:
    """What could be paths among the strings of a JSON value, relative to the file's folder and to the whole."""
    for word in _words(value):
        if 0 < len(word) < 1024 and "\0" not in word:
            yield os.path.normpath(word)
            yield os.path.normpath(os.path.join(folder, word))


def _may_be_named(file: str) -> bool:
    """Not weights beside the model's: vLLM reads every safetensors file at the top, whoever named it."""
    top = "/" not in file
    return file != CONFIG and not _harmful(file) and not (top and _is_weights(file))


def _is_weights(file: str) -> bool:
    return file.endswith((".safetensors", ".gguf")) or fnmatchcase(file, "pytorch_model*.bin")


def _has_code(value: Any) -> bool:
    """Whether a config names classes of the checkpoint's own code."""
    if isinstance(value, list):  # modules.json
        kinds = [entry.get("type") for entry in value if isinstance(entry, dict)]
        return any(
            isinstance(kind, str) and not kind.startswith(("sentence_transformers.", "pylate.")) for kind in kinds
        )
    return isinstance(value, dict) and bool(value.get("auto_map") or value.get("custom_pipelines"))
