"""How vLLM meets our checkpoints: compressed-tensors' own config with our linears and experts."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme

from vllm_w8a8_bismooth import FORMAT, MARKER, NAME, ROWS_FORMAT, fourbits, switch
from vllm_w8a8_bismooth.serving import guard, moe, plan, planning, servers
from vllm_w8a8_bismooth.serving.choice import Choice
from vllm_w8a8_bismooth.serving.rows import RowsScheme
from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

logger = init_logger("vllm.w8a8_bismooth")

CHANNEL, GROUP, TENSOR, TOKEN = (QuantizationStrategy(s).value for s in ("channel", "group", "tensor", "token"))
SERVED = {
    (CHANNEL, TOKEN, True),
    (CHANNEL, TENSOR, False),
    (TENSOR, TOKEN, True),
    (TENSOR, TENSOR, False),
    (GROUP, TOKEN, True),
    (GROUP, GROUP, True),
}
"""What :class:`W8A8Scheme` serves: strategy of the weights, of the activations, whether the latter are dynamic."""


class BiSmoothConfig(CompressedTensorsConfig):
    """Symmetric W8A8 linears and experts run on this package's ops; the rest stays with compressed-tensors.

    Attributes:
        marked: whether the checkpoint is ours.
        rows: columns of a group in the rows of four bits that its per-channel linears have; ``None`` if they are INT8.
    """

    def get_name(self) -> str:
        return NAME

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "BiSmoothConfig":
        """Reads a raw ``quantization_config``.

        Raises:
            ValueError: linears are quantized in a way that this package has no kernels for, or none is; see also
                :func:`guard.check_patterns`; or compressed-tensors does not understand the config; or the environment
                asks for what is unknown, see :func:`switch.wanted` and :func:`planning.given`.
        """
        switch.wanted()
        planning.given()
        guard.check_patterns(config)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise ValueError(
                "config.json: config_groups of quantization_config is no object of objects; convert the model again"
            )
        rows = None
        if config.get("quant_method") == NAME:
            rows, config = _of_rows(config), {**config, "quant_method": "compressed-tensors", "format": FORMAT}
        groups = {name: group for name, group in groups.items() if group.get("weights")}
        found = {name: _unfit(group, config.get("format")) for name, group in groups.items()}
        reasons = [f"its config group {name!r} has {reason}" for name, reason in found.items() if reason]
        if reasons or not groups:
            raise ValueError(
                f"{NAME} cannot serve this checkpoint, because {' and '.join(reasons) or 'no linear is quantized'}; it "
                "serves symmetric INT8 weights and activations. Try vLLM's own kernels with --quantization "
                "compressed-tensors, or convert the model again, with `bismooth convert` or as llm-compressor's W8A8"
            )
        parsed = super().from_config(config)
        parsed.marked, parsed.rows = MARKER in config, rows
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
        """Asks :func:`moe.method_of` about experts; all else is left to compressed-tensors."""
        ours = moe.method_of(self, layer, prefix) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)

    def get_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        """Where rows have four bits, :class:`RowsScheme` for all per-channel linears; heads are INT8 all the same."""
        scheme = super().get_scheme(layer, layer_name)
        if scheme is None or self.rows is None or not isinstance(layer, LinearBase):
            return scheme
        weights = self.get_scheme_dict(layer, layer_name)["weights"]
        return RowsScheme(self.rows, self.packed_modules_mapping) if weights.strategy == CHANNEL else scheme

    def _get_scheme_from_parts(
        self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs, *args: Any, **kwargs: Any
    ) -> CompressedTensorsScheme:
        """Chooses :class:`W8A8Scheme`, or vLLM's own, by what :mod:`servers` says; :class:`Choice` where a plan may."""
        platform = servers.settle(logger)
        group_size = weight_quant.group_size if weight_quant.strategy == GROUP else None
        if group_size is not None:
            platform = replace(platform, per_group=servers.ours(platform.device, group_size))
        ours = functools.partial(
            W8A8Scheme,
            weight_group_size=group_size,
            activation_group_size=input_quant.group_size if input_quant.strategy == GROUP else None,
            per_tensor=weight_quant.strategy == TENSOR,
            static=not input_quant.dynamic,
            fused=self.packed_modules_mapping,
        )
        stock = functools.partial(super()._get_scheme_from_parts, weight_quant, input_quant, *args, **kwargs)
        could = servers.linears(platform, group_size is not None)
        planned = platform.planned and len(could) > 1
        makes = {each: stock if each == plan.STOCK else functools.partial(ours, announced=planned) for each in could}
        return Choice(makes, group_size, input_quant.strategy) if planned else makes[could[0]]()


def _of_rows(config: Mapping[str, Any]) -> int:
    """Columns of a group in the rows of four bits of a checkpoint of our own method.

    Raises:
        ValueError: it has a format that is not known here, or none.
    """
    if (stored := config.get("format")) != ROWS_FORMAT:
        raise ValueError(
            f"config.json: format of quantization_config is {stored!r}, and {NAME} has {ROWS_FORMAT!r}; convert the "
            "model again, or serve it with the release that converted it"
        )
    try:
        return fourbits.group_size_of(config)
    except ValueError as error:
        raise ValueError(f"config.json: quantization_config: {error}; convert the model again") from None


def _unfit(group: Mapping[str, Any], stored: str | None) -> str:
    """What in a config group of linears no kernel here is made for; ``""`` if they serve it.

    Args:
        group: one of the ``config_groups`` of a raw ``quantization_config``.
        stored: the format of groups that do not name theirs.
    """
    sides = {}
    for side, raw in (("weights", group["weights"]), ("activations", group.get("input_activations"))):
        if not raw:
            return f"{side} in float"
        quant = sides[side] = QuantizationArgs.model_validate(raw)
        if (quant.type, quant.num_bits) != (QuantizationType.INT, 8):
            return f"{side} in {QuantizationType(quant.type).value}{quant.num_bits}"
        if not quant.symmetric:
            return f"asymmetric {side}, with zero points"
    if group.get("output_activations"):
        return "quantized outputs"
    if (stored := group.get("format") or stored) != FORMAT:
        return f"the format {stored}"
    weights, inputs = sides.values()
    if (weights.strategy, inputs.strategy, inputs.dynamic) not in SERVED or weights.dynamic:
        ways = ["dynamically " if quant.dynamic else "" for quant in (weights, inputs)]
        return f"weights quantized {ways[0]}per {weights.strategy} and activations {ways[1]}per {inputs.strategy}"
    if inputs.strategy == GROUP and weights.group_size != inputs.group_size:
        return f"groups of {weights.group_size} weights and of {inputs.group_size} activations"
    return ""
