"""Decides which checkpoints are ours, without importing what serves them."""

import logging
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_w8a8_bismooth import MARKER, NAME


class Claim(QuantizationConfig):
    """Stands in for :class:`config.BiSmoothConfig`, whose import takes a second, until a checkpoint needs it.

    vLLM keeps this class in its table of quantization methods, and asks it which checkpoints it takes and for their
    config. It makes no instance of it.
    """

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint of our own method, and one of compressed-tensors with our marker, or asked for by name.

        vLLM calls this for every model that it loads, so any input is tolerated. On a vLLM that lacks what
        :mod:`config` builds on, it logs why and claims none; vLLM then serves the checkpoint by itself, or refuses.
        """
        method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, Mapping) else None
        if method not in ("compressed-tensors", NAME) or user_quant not in (None, NAME):
            return None
        if method != NAME and user_quant is None and MARKER not in hf_quant_cfg:
            return None
        try:
            from vllm_w8a8_bismooth.serving import config  # noqa: F401
        except Exception as error:
            logging.getLogger("vllm.w8a8_bismooth").warning(
                "w8a8_bismooth cannot serve this checkpoint with this vLLM: %s: %s", type(error).__name__, error
            )
            return None
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Makes a :class:`config.BiSmoothConfig`."""
        from vllm_w8a8_bismooth.serving.config import BiSmoothConfig

        return BiSmoothConfig.from_config(config)

    @staticmethod
    def get_config_filenames() -> list[str]:
        """vLLM asks where else to look when config.json has no quantization_config.

        Raises:
            ValueError: always; ours are there.
        """
        raise ValueError(
            f"--quantization {NAME} serves INT8 checkpoints, but this one's config.json has no quantization_config: "
            "convert the model with `bismooth convert`, or leave the flag out"
        )
