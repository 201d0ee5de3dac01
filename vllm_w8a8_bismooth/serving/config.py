"""How vLLM meets our checkpoints: compressed-tensors' own config with one more scheme."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.platforms import current_platform

from vllm_w8a8_bismooth import FORMAT, MARKER, ops
from vllm_w8a8_bismooth.serving import guard, moe
from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

logger = init_logger("vllm.w8a8_bismooth")

NAME = "w8a8_bismooth"
CHANNEL, GROUP, TOKEN = (QuantizationStrategy(s).value for s in ("channel", "group", "token"))


class BiSmoothConfig(CompressedTensorsConfig):
    """Symmetric dynamic W8A8 linears and experts run on this package's ops; the rest stays with compressed-tensors."""

    def get_name(self) -> str:
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint: with our marker always, any W8A8 INT8 compressed-tensors one when asked by name.

        vLLM calls this for every model that it loads, so any input is tolerated.
        """
        if not isinstance(hf_quant_cfg, Mapping) or hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        asked = user_quant == NAME and _all_w8a8(hf_quant_cfg)
        marked = user_quant in (None, NAME) and MARKER in hf_quant_cfg
        return NAME if asked or marked else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "BiSmoothConfig":
        """From a raw ``quantization_config``.

        Raises:
            ValueError: see :func:`guard.check_patterns`; or compressed-tensors does not understand the config.
        """
        guard.check_patterns(config)
        parsed = super().from_config(config)
        parsed.marked = MARKER in config
        return parsed

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Check the files of our own checkpoints; vLLM calls this once, before its workers load anything.

        Raises:
            ValueError: see :func:`guard.check_files`.
        """
        super().maybe_update_config(model_name, *args, **kwargs)
        if self.marked:
            guard.check_files(Path(model_name))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """:func:`moe.method_of` has the first word on experts."""
        ours = moe.method_of(self, layer, prefix) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)

    def _get_scheme_from_parts(
        self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs | None, *args: Any, **kwargs: Any
    ) -> CompressedTensorsScheme:
        """Ours where :class:`W8A8Scheme` fits, the stock scheme otherwise."""
        plain = (kwargs.get("format") or self.quant_format) == FORMAT and kwargs.get("output_quant") is None
        if plain and _is_int8(weight_quant, dynamic=False) and _is_int8(input_quant, dynamic=True):
            strategies = (weight_quant.strategy, input_quant.strategy)
            if strategies == (CHANNEL, TOKEN):
                if reason := reason_for_stock():
                    logger.info_once("w8a8_bismooth: per-channel linears run on vLLM's own kernel, because %s", reason)
                else:
                    return W8A8Scheme(None, None, self.packed_modules_mapping)
            if strategies == (GROUP, TOKEN):
                return W8A8Scheme(weight_quant.group_size, None, self.packed_modules_mapping)
            if strategies == (GROUP, GROUP) and weight_quant.group_size == input_quant.group_size:
                return W8A8Scheme(weight_quant.group_size, input_quant.group_size, self.packed_modules_mapping)
        return super()._get_scheme_from_parts(weight_quant, input_quant, *args, **kwargs)


def reason_for_stock() -> str | None:
    """Why vLLM's own kernel, which is faster than the torch reference, should serve per-channel linears, if it should.

    Not on CUDA of compute capability 10 and above, for which vLLM picks an INT8 kernel that fails (vLLM issue 54311).
    """
    if current_platform.is_cpu():
        return None
    if not ops.has_kernel(current_platform.device_type):
        newest = current_platform.is_cuda() and current_platform.has_device_capability(100)
        return None if newest else "this package was installed without its kernels for this device"
    if not current_platform.has_device_capability(80):
        return "this package's kernels need compute capability 8.0"
    return None


def _is_int8(quant: QuantizationArgs | None, dynamic: bool) -> bool:
    return (
        quant is not None
        and quant.num_bits == 8
        and quant.type == QuantizationType.INT
        and bool(quant.symmetric)
        and bool(quant.dynamic) == dynamic
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
