"""Supported vLLM releases, and names that only some of them have.

What all of them have, serving/ imports from vLLM itself. What a release has is looked up, not concluded from its
number. The tests hold this module, and all else in serving/, against the oldest and the newest release.
"""

import importlib
import logging
from typing import Any

import vllm

TESTED = ((0, 26), (0, 33))
"""The oldest and the newest release that the tests cover."""

SINCE = {
    "_FUSED_ACT_QUANT": ("vllm.model_executor.layers.fusion.fused_act_quant", (0, 30)),
}
"""Names that some releases lack: name -> its module, the first release that has it."""


def find(name: str) -> Any | None:
    """What :data:`SINCE` lists under this name, or ``None`` where this vLLM lacks it."""
    module, _ = SINCE[name]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def warn_if_untested() -> None:
    oldest, newest = TESTED
    if not oldest <= tuple(getattr(vllm, "__version_tuple__", ())[:2]) <= newest:
        logging.getLogger("vllm.w8a8_bismooth").warning(
            "vLLM %s is outside the range that w8a8_bismooth is tested with (%s to %s)",
            vllm.__version__,
            *(".".join(map(str, release)) for release in TESTED),
        )
