"""The online half: the only place that imports vLLM. Tested with vLLM 0.32; written for 0.26 to 0.33."""

import logging

WRITTEN_FOR = ((0, 26), (0, 33))
_registered = False


def register() -> None:
    """Add ``w8a8_bismooth`` to vLLM's quantization methods, once; patches nothing.

    Raises:
        Exception: whatever a vLLM that differs too much raises on import; the caller logs it.
    """
    global _registered
    if _registered:
        return
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_w8a8_bismooth.serving.config import NAME, BiSmoothConfig

    release = tuple(vllm.__version_tuple__[:2])
    if not WRITTEN_FOR[0] <= release <= WRITTEN_FOR[1]:
        logging.getLogger("vllm.w8a8_bismooth").warning(
            "vLLM %s is outside the range this package was made for (%s to %s)",
            vllm.__version__,
            *(".".join(map(str, v)) for v in WRITTEN_FOR),
        )
    register_quantization_config(NAME)(BiSmoothConfig)
    _registered = True
