"""What vLLM's table of quantization methods holds of us: which checkpoints are ours, without what serves them."""

import logging
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_w8a8_bismooth import FORMAT, MARKER

NAME = "w8a8_bismooth"


class Claim(QuantizationConfig):
    """Stands in for :class:`config.BiSmoothConfig`, whose import takes a second, until a checkpoint needs it.

    vLLM asks this class which checkpoints it takes and for the config of such a one; it makes no instance of it.
    """

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint: with our marker always, any W8A8 INT8 compressed-tensors one when asked by name.

        vLLM calls this for every model that it loads, so any input is tolerated. On a vLLM that lacks what
        :mod:`config` builds on, it logs why and claims none; vLLM then serves the checkpoint by itself, or refuses.
        """
        if not isinstance(hf_quant_cfg, Mapping) or hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        asked = user_quant == NAME and _all_w8a8(hf_quant_cfg)
        marked = user_quant in (None, NAME) and MARKER in hf_quant_cfg
        if not (asked or marked):
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
        """A :class:`config.BiSmoothConfig`."""
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


def _all_w8a8(config: Mapping) -> bool:
    """Whether a raw ``quantization_config`` stores plain int8 and all its groups have 8-bit weights and activations."""
    groups = config.get("config_groups")
    if config.get("format") != FORMAT or not isinstance(groups, Mapping) or not groups:
        return False
    sides = [
        group.get(side) if isinstance(group, Mapping) else None
        for group in groups.values()
        for side in ("weights", "input_activations")
    ]
    return all(isinstance(s, Mapping) and s.get("num_bits") == 8 and s.get("type") == "int" for s in sides)
