"""Models whose code is their own: built like those of transformers, where that code may run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.discovery.origin import Origin


def origin_of(checkpoint: Checkpoint) -> "Origin":
    """The classes of a checkpoint's model.

    Raises:
        BismoothError: transformers, or its own code, refuses the config.
    """
    from vllm_w8a8_bismooth.discovery.origin import Origin

    settings = {key: value for key, value in checkpoint.config.items() if key != "num_labels"}
    return Origin(settings, checkpoint.code)


def language_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The causal language model by its own code, its parameters without storage; ``None`` where it has no such code.

    Buffers have their values: nothing but the constructors can say how they come about.

    Raises:
        Exception: whatever its class raises.
    """
    if checkpoint.code is None or (made := origin_of(checkpoint)).own is None:
        return None
    with _without_storage():
        return made.own._from_config(made.config, dtype=dtype, attn_implementation="eager").eval()


def decoder(checkpoint: Checkpoint, dtype: torch.dtype, path: str) -> Any:
    """The same without its head; ``path`` is that of the bare decoder in it, empty where that is all of it."""
    model = language_model(checkpoint, dtype)
    if model is None or path:
        return model and model.get_submodule(path)
    head = model.get_output_embeddings()
    for name in [name for name, module in model.named_modules() if module is head]:
        model.set_submodule(name, torch.nn.Identity())
    return model


@contextmanager
def _without_storage() -> Iterator[None]:
    """While active, parameters lose their values as soon as a module has them, and buffers keep theirs."""
    from transformers.initialization import no_init_weights

    register = torch.nn.Module.register_parameter

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
