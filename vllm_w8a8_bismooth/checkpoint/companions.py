"""The files beside the weights that a model needs where it is served: those known to be useful, and what they name.

A checkpoint's folder often holds more: other formats, optimizer states, logs, data. What is not known is left out.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, SINGLE, Folder, Place, read_value, refuse_pointer
from vllm_w8a8_bismooth.checkpoint.modules import weight_problems
from vllm_w8a8_bismooth.errors import BismoothError, Problem

MODULES, ROUTER = "modules.json", "router_config.json"
"""How sentence-transformers says of which modules a model consists, and which of them an input takes."""
_LOADED = (
    "*_config.json", "config_*.json", MODULES, "params.json",
    "tokenizer*.json", "tokenizer.model*", "*vocab*.json", "*vocab*.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.bpe", "bpe.codes",
    "*parser*.py", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja", "custom_generate/*",
)  # fmt: skip
"""What transformers, sentence-transformers and vLLM read; parsers are for its --tool-parser-plugin and
--reasoning-parser-plugin."""
_FOR_PEOPLE = (
    "README.md", "SYSTEM_PROMPT*", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*",
)  # fmt: skip
_INDICES = "*.index.json"
_HARMFUL = ("adapter_*", "*quant*_config.json", "quantize_config.json", _INDICES)
"""What readers would take for a statement about the weights that are written."""
_REMAINS = (
    "onnx/*", "openvino/*", "checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*", "__pycache__/*",
    "*.onnx", "*.h5", "*.msgpack", "*.ot", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin",
    "trainer_state.json", "events.out.*",
)  # fmt: skip
"""What is no part of a module, though it lies in its folder: other engines' formats, and what trainers leave."""
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
    "SparseAutoEncoder",
)
"""Modules of sentence-transformers that have weights of their own."""
_CONFIGURED = ("Pooling", "Dense", "LayerNorm", "WeightedLayerPooling")
"""Those without whose config.json vLLM leaves the module out, or pools in another way."""
_WEIGHTS = (SINGLE, "pytorch_model.bin")
"""Where vLLM and sentence-transformers look for them, in a module's folder."""
_SMALL = 2**24  # bytes of a JSON file that is searched for names of others; tokenizers' configs take more than 1 MiB
_LOOKED_AT = 1000  # files behind a link


@dataclass(frozen=True)
class _Module:
    """A module of sentence-transformers: class, folder (``""`` is the model's own), and the file that says so."""

    kind: str
    folder: str
    said: str

    @property
    def name(self) -> str:
        return self.kind.rpartition(".")[2]

    @property
    def is_own(self) -> bool:
        """Whether its class is code of the checkpoint's own."""
        return not self.kind.startswith(("sentence_transformers.", "pylate."))

    def holds(self, file: str) -> bool:
        """Whether a file is a part of it, and not something that was left in its folder."""
        inside = file.removeprefix(f"{self.folder}/")
        return inside != file and not any(fnmatchcase(f"/{inside}", f"*/{pattern}") for pattern in _REMAINS)


def companions(place: Place) -> list[str]:
    """The files to be copied byte for byte, in order: neither weights of the model, nor its config or index.

    These are files with well-known names; code, where a config or a module's type says that there is some; the folders
    that ``modules.json`` and routers name, but for what others left there; and files whose name stands anywhere in the
    small JSON files among these that are configs.

    Raises:
        BismoothError: one of them is a link or a pointer to a file that is absent; ``modules.json`` cannot be read.
    """
    files = place.files()
    found = {file for file in files if _useful(file)}
    modules = _modules(place, files)
    found |= {file for file in files if any(module.holds(file) for module in modules)}
    stated = {file: read_value(place.local(file)) for file in (CONFIG, *sorted(found)) if _states(file, files)}
    if _carries_code(modules, stated):
        found |= {file for file in files if fnmatchcase(PurePosixPath(file).name, _CODE)}
    for file, value in stated.items():
        found |= {name for name in _named(value, os.path.dirname(file)) if name in files and _may_be_named(name)}
    for file in sorted(found):
        if not files[file] and not place.local(file).exists():
            remedy = "download the file again or remove the link"
            raise BismoothError.of(f"{place}/{file}", "a link that leads nowhere", remedy)
        if 100 < files[file] < 200:
            refuse_pointer(place.local(file))
    return sorted(found)


def link_problems(place: Place) -> Iterator[Problem]:
    """Links to folders, which are not entered, with files in them that would have to travel."""
    linked = _linked(place)
    if not linked:
        return
    files = place.files()
    modules = _modules(place, files)
    said = {problem.where for problem in _lacking(place, files, modules)}
    stated = {file: read_value(place.local(file)) for file in (CONFIG, *sorted(files)) if _states(file, files)}
    code = _carries_code(modules, stated)
    for folder, inside in linked.items():
        needed = (
            f for f in inside if _useful(f) or (code and fnmatchcase(f, _CODE)) or any(m.holds(f) for m in modules)
        )
        if folder not in said and (file := next(needed, None)):
            what = f"a link to a folder, which is not followed, and {file} is to travel"
            yield Problem(folder, what, "put the files themselves there")


def _linked(place: Place) -> dict[str, list[str]]:
    """Links to folders -> files in them, no deeper than packages are; they may lead anywhere."""
    if not isinstance(place, Folder):
        return {}
    found = {}
    for path in sorted(place.path.rglob("*")):
        folder = path.relative_to(place.path)
        if path.is_symlink() and path.is_dir() and not any(part.startswith(".") for part in folder.parts):
            inside = (file for depth in ("*", "*/*") for file in path.glob(depth))
            found[folder.as_posix()] = [f.relative_to(place.path).as_posix() for f in islice(inside, _LOOKED_AT)]
    return found


def _carries_code(modules: Iterable[_Module], stated: Mapping[str, Any]) -> bool:
    """Whether a config or a module's type says that the checkpoint has code of its own."""
    return any(module.is_own for module in modules) or any(map(_has_code, stated.values()))


def left_out(place: Place, weights: Iterable[str]) -> dict[str, int]:
    """The files that are not copied, with their bytes: not the model's weights, config and index, nor companions."""
    used = {CONFIG, INDEX, *weights, *companions(place)}
    return {file: size for file, size in place.files().items() if file not in used}


def loaded(place: Place) -> list[str]:
    """The files that readers would look into because of their names, in order: not config, indices and weights."""
    return [
        file
        for file in sorted(place.files())
        if file != CONFIG
        and not fnmatchcase(file.lower(), _INDICES)
        and (_is_known(file, _LOADED) or _is_known(file, _HARMFUL))
    ]


def notes(place: Place) -> list[str]:
    """Where the result would be served otherwise than the source, for what lies beside it and does not travel."""
    found, files = [], [file for file in place.files() if "/" not in file]
    formats = [file for file in files if fnmatchcase(file, "consolidated*.safetensors")]
    if formats and any(file == "tekken.json" or file.startswith("tokenizer.model.v") for file in files):
        found.append(
            f"because of {formats[0]}, which does not travel, vLLM takes Mistral's tokenizer for the source; give "
            "--tokenizer-mode mistral, and it takes it for the result too"
        )
    if linked := [folder for folder, inside in _linked(place).items() if inside]:
        found.append(f"links to folders are not followed, and nothing in them travels: {', '.join(linked[:4])}")
    if isinstance(place, Folder):
        path = place.path.resolve()
        around = Folder(path.parent)
        with suppress(BismoothError):  # usually there is nothing of that kind around it
            folders = [module.folder for module in _modules(around, {MODULES: 0})]
            if path.name in folders and len(folders) > 1:
                found.append(
                    f"{around}/{MODULES} names this folder as one module of {len(folders)}, and the others do not "
                    f"travel with it; to have them, move its files up into {around}, set its path in {MODULES} to "
                    '"", and convert that folder'
                )
    return found


def module_problems(place: Place) -> Iterator[Problem]:
    """Modules that ``modules.json`` names without the files that they have, or with weights that do not load.

    Readers would leave them out.
    """
    files = place.files()
    modules = _modules(place, files)
    lacking = [*_lacking(place, files, modules)]
    yield from lacking
    folders = {problem.where for problem in lacking} | {""}
    for module in (module for module in modules if module.name in _WEIGHED and module.folder not in folders):
        folders.add(module.folder)
        if files.get(f"{module.folder}/{SINGLE}"):
            is_linear = module.name == "Dense" and not module.is_own
            yield from weight_problems(place, module.folder, is_linear)


def _lacking(place: Place, files: Mapping[str, int], modules: Iterable[_Module]) -> Iterator[Problem]:
    """Modules whose files are not there."""
    for module in filter(lambda module: module.folder, modules):
        folder, lacks = module.folder, ""
        if module.name in _WEIGHED and not any(files.get(f"{folder}/{weights}") for weights in _WEIGHTS):
            lacks = " or ".join(_WEIGHTS)
        elif module.name in _CONFIGURED and not files.get(f"{folder}/{CONFIG}"):
            lacks = CONFIG
        if lacks and isinstance(place, Folder) and place.local(folder).is_symlink():
            yield Problem(folder, "a link to a folder, which is not followed", "put the files themselves there")
        elif lacks and (other := _spelled_otherwise(folder, files)):
            yield Problem(folder, f"no such folder; {other} is there", f"write it so in {module.said}")
        elif lacks:
            yield Problem(
                folder,
                f"has no {lacks}, but {module.said} says that it is a {module.name}",
                f"download the folder again, or remove its entry from {module.said} if the model has no such module",
            )


def _spelled_otherwise(folder: str, files: Mapping[str, int]) -> str | None:
    """A folder whose name differs only in upper and lower case from one that is not there."""
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    alike = (other for other in sorted(folders) if other.lower() == folder.lower())
    return None if folder in folders else next(alike, None)


def _useful(file: str) -> bool:
    known = _is_known(file, _LOADED) or _is_known(file, _FOR_PEOPLE)
    return known and file != CONFIG and not _harmful(file.lower())


def _is_known(file: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of these, in the folder where readers look for it."""
    name = file.lower()
    return any(fnmatchcase(name, pattern.lower()) and pattern.count("/") == name.count("/") for pattern in patterns)


def _harmful(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _HARMFUL)


def _states(file: str, files: Mapping[str, int]) -> bool:
    """Whether a file may name others: a small JSON file, and no vocabulary, which is full of words."""
    name = PurePosixPath(file).name
    is_config = name == MODULES or fnmatchcase(name, "*config*.json")
    return is_config and file in files and 0 < files[file] <= _SMALL


def _modules(place: Place, files: Mapping[str, int]) -> list[_Module]:
    """Those that ``modules.json`` names, and those that routers among them have.

    Raises:
        BismoothError: ``modules.json`` is not what it must be, or names a place outside the folder.
    """
    found = []
    if MODULES in files:
        where, value = f"{place}/{MODULES}", read_value(place.local(MODULES))
        entries = value.get("modules", []) if isinstance(value, dict) else value
        for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
            kind, path = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
            if not isinstance(kind, str) or not isinstance(path, str):
                what = f"entry {number} has no type and path"
                raise BismoothError.of(where, what, "download the file again")
            if (folder := _inside(path)) is None:
                what = f"entry {number} has the path {path!r}, which is no folder here"
                raise BismoothError.of(where, what, "mend it")
            found.append(_Module(kind, folder, MODULES))
    routers = {os.path.join(module.folder, ROUTER) for module in found} | {ROUTER}
    routers |= {f"{module.folder}/{CONFIG}" for module in found if module.name in ("Router", "Asym")}
    for file in sorted(routers & files.keys()):
        value = read_value(place.local(file))
        types = value.get("types") if isinstance(value, dict) else None
        for name, kind in types.items() if isinstance(types, dict) else ():
            if isinstance(kind, str) and (folder := _inside(os.path.join(os.path.dirname(file), name))):
                found.append(_Module(kind, folder, file))
    return found


def _inside(path: str) -> str | None:
    """A path in its shortest form, ``""`` for the folder itself; ``None`` if it leads out of it."""
    short = os.path.normpath(path)
    return None if short.startswith(("/", "..")) else "" if short == "." else short


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
    return isinstance(value, dict) and bool(value.get("auto_map") or value.get("custom_pipelines"))


def elsewhere(place: Folder) -> str:
    """What to do about a folder without a config: give the one in it that has it, as in the Hub's cache."""
    for depth in ("*", "*/*"):
        for path in sorted(place.path.glob(f"{depth}/{CONFIG}")):
            if any(path.parent.glob("*.safetensors")):
                if place.has(MODULES) and depth == "*":
                    return (
                        f"vLLM reads it there: move what is in {path.parent} up into {place}, and set the path of that "
                        f'module in {MODULES} to ""'
                    )
                return f"give {path.parent}, which holds one"
    return "give the folder of a Hugging Face checkpoint"
