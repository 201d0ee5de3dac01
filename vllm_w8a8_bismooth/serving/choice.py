"""A linear whose kernel is chosen when its shape is known."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.platforms import current_platform

from vllm_w8a8_bismooth import NAME, grouping
from vllm_w8a8_bismooth.serving import planning, trial
from vllm_w8a8_bismooth.serving.plan import Shape


class Choice(CompressedTensorsScheme):
    """Stands in for the scheme of a linear, and puts the one of the chosen kernel in its own place.

    That must be before there are weights, because each kernel wants them in a layout of its own.

    Args:
        makes: kernel -> makes the scheme that has it serve; the first serves unless a plan says otherwise.
        weight_group_size: columns that share a weight scale; ``None`` is per-channel.
        activations: what shares an activation scale, see :class:`plan.Shape`.
    """

    def __init__(self, makes: Mapping[str, trial.Make], weight_group_size: int | None, activations: str):
        self.makes = makes
        self.weight_group_size = weight_group_size
        self.activations = activations

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    def create_weights(
        self,
        layer: LinearBase,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **more: Any,
    ) -> None:
        """Choose, and leave the rest to the scheme that is chosen: ``layer.scheme`` from now on.

        Raises:
            ValueError: see :func:`planning.kernel_of`, and whatever that scheme raises.
        """
        kernel = next(iter(self.makes))
        columns, size = input_size_per_partition, self.weight_group_size
        if not (size and columns % size):  # which the scheme refuses
            shape = Shape(sum(output_partition_sizes), columns, grouping.groups(columns, size), self.activations)
            device = planning.here(current_platform.device_type)
            kernel = planning.kernel_of(shape, tuple(self.makes), device, params_dtype, self.makes)
            trial.serve(kernel, shape, device.type)
            _note(shape, kernel)
        layer.scheme = self.makes[kernel]()
        layer.scheme.create_weights(
            layer=layer,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **more,
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        layer.scheme.process_weights_after_loading(layer)

    def apply_weights(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return layer.scheme.apply_weights(layer, x, bias)


def _note(shape: Shape, kernel: str) -> None:
    """Have vLLM keep compiled graphs apart by who serves, as :func:`servers.settle` does."""
    with suppress(AssertionError):  # vLLM's, where nothing builds a model
        more = get_current_vllm_config().additional_config
        if isinstance(more, dict):
            more.setdefault(f"{NAME} plan", {})[str(shape)] = kernel
