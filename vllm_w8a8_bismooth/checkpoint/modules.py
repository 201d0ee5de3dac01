"""The weights of sentence-transformers' modules, held against their configs: vLLM leaves out what does not load."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, SINGLE, Place, read_json
from vllm_w8a8_bismooth.errors import BismoothError, Problem

_WEIGHTS = ("weight", "linear.weight", "dense.weight")
"""What vLLM takes for the matrix of a linear, in the order in which it looks."""
_FEATURES = ("out_features", "in_features")


def weight_problems(place: Place, folder: str, is_linear: bool) -> Iterator[Problem]:
    """What is wrong with a module's ``model.safetensors``, by its header, and with its config.

    Args:
        place: of the checkpoint.
        folder: of the module; it has the file.
        is_linear: whether it is a Dense of sentence-transformers, whose tensors are known.
    """
    file = f"{folder}/{SINGLE}"
    try:
        _, entries = place.header(file)
    except BismoothError as error:
        yield from (replace(problem, where=file) for problem in error.problems)
        return
    if is_linear:
        try:
            config = read_json(place.local(f"{folder}/{CONFIG}"))
        except BismoothError as error:
            yield from error.problems
            return
        yield from _linear_problems(folder, config, entries)


def _linear_problems(folder: str, config: Mapping[str, Any], entries: Mapping[str, Any]) -> Iterator[Problem]:
    file, said = f"{folder}/{SINGLE}", f"{folder}/{CONFIG}"
    sizes = [config.get(key) for key in _FEATURES]
    if absent := [key for key, size in zip(_FEATURES, sizes, strict=True) if type(size) is not int or size < 1]:
        what = f"says {absent[0]} = {config.get(absent[0])!r}, which is no size of a linear"
        yield Problem(said, what, "download the folder again or mend it")
        return
    weight = next((name for name in _WEIGHTS if name in entries), None)
    if weight is None:
        holds = ", ".join(sorted(entries)[:4]) or "nothing"
        what = f"holds none of {', '.join(_WEIGHTS)}, by which a linear's matrix is found ({holds})"
        yield Problem(file, what, "download the folder again, or save the module with those names")
        return
    expected = {weight: sizes}
    if config.get("bias", True):
        expected[weight.removesuffix("weight") + "bias"] = sizes[:1]
    for name, shape in expected.items():
        if name not in entries:
            what = f"holds no {name}, but {said} says that the linear has a bias"
            yield Problem(file, what, f"download the folder again, or set bias to false in {said} if it has none")
        elif list(entries[name]["shape"]) != shape:
            what = f"{name} has shape {list(entries[name]['shape'])}, {said} says {shape}"
            yield Problem(file, what, "download the folder again or mend the one that is wrong")
