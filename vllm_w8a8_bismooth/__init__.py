"""W8A8 INT8 by bi-smoothing: an offline converter and a vLLM plugin (``--quantization w8a8_bismooth``)."""

import functools
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.api import convert, inspect, merge, preview, score, sites, verify

__version__ = "0.1.0"
FORMAT = "int-quantized"
"""How compressed-tensors calls the storage of our checkpoints: plain int8 weights and their scales."""
ROWS_FORMAT = "int4-int8-rows"
"""That of our checkpoints with 4-bit rows, which only the plugin reads, see :mod:`fourbits`."""
MARKER = "bismooth"
"""The key of ``quantization_config`` by which the plugin claims our checkpoints; other readers ignore it."""
NAME = "w8a8_bismooth"
"""How vLLM calls the quantization method of the plugin."""
__all__ = ["convert", "inspect", "merge", "preview", "register", "score", "sites", "verify"]


def __getattr__(name: str) -> Any:
    """The functions of :mod:`api`, imported when they are first used: vLLM imports this module in every process."""
    if name in __all__:
        from vllm_w8a8_bismooth import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@functools.cache
def register() -> None:
    """Entry point of ``vllm.general_plugins``: make the quantization method known to vLLM.

    vLLM calls this in every process it starts, without a guard of its own, so it must never raise: on a vLLM that
    this package does not fit, it logs one warning and every other model keeps working. Calling it again does nothing.
    """
    try:
        from vllm_w8a8_bismooth.serving import register as register_serving

        register_serving()
    except Exception as error:
        logging.getLogger("vllm.w8a8_bismooth").warning(
            "w8a8_bismooth is not available in this process: %s: %s", type(error).__name__, error
        )
