"""The online half, the only one that imports vLLM. :mod:`versions` names the releases that it is made for."""

import functools


@functools.cache
def register() -> None:
    """Add ``w8a8_bismooth`` to vLLM's quantization methods, once; patches nothing.

    It must be cheap, because vLLM calls it in every process that it starts, whatever the model. What it imports of
    vLLM is loaded by then.

    Raises:
        Exception: whatever a vLLM that differs too much raises; the caller logs it.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_w8a8_bismooth import NAME
    from vllm_w8a8_bismooth.serving import versions
    from vllm_w8a8_bismooth.serving.claim import Claim

    register_quantization_config(NAME)(Claim)
    versions.warn_if_untested()
