"""The class of transformers that a config asks for: its own config object, and models of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_w8a8_bismooth.discovery import widths
from vllm_w8a8_bismooth.discovery.bounds import check_bounds
from vllm_w8a8_bismooth.errors import BismoothError, Problem, UnknownModel, Unproven
from vllm_w8a8_bismooth.model.configs import decoded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ELSEWHERE = ("model_type", "quantization_config", "auto_map", "num_labels")
"""What a config is not built with: transformers would make up a name for each of any number of labels."""
_REMEDY = "mend config.json, or convert with --method rtn, which does not run the model"


def refused(what: str) -> Unproven:
    """The error of a config of which no model can be made."""
    return Unproven(Problem("config.json", what, _REMEDY))


def explained(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


class Origin:
    """The class of a config's models.

    Args:
        given: of ``config.json``.
        code: folder of the code that it names; ``None`` if none may run.

    Attributes:
        config: transformers' own object, with the defaults of its class.
        own: the class of its causal language model, where that is code of the model's own; else ``None``.

    Raises:
        BismoothError: the config is of no model, or its class refuses it.
        UnknownModel: transformers does not know the type, or it is code that may not run.
        Unproven: the model's own code refuses it, or needs a package that is not there.
    """

    def __init__(self, given: Mapping[str, Any], code: Path | None = None):
        check_bounds(given)
        named = given.get("auto_map")
        named = named if isinstance(named, dict) else {}
        entries = {key: decoded(value) for key, value in given.items() if key not in _ELSEWHERE}
        self.own: Any = None
        known = is_known(given.get("model_type"))
        self._theirs = code is not None and not known
        if not known and (code is None or "AutoConfig" not in named):
            raise _unknown(given, bool(named) and code is None)
        try:
            if code is not None and not known:
                self.config: PretrainedConfig = _loaded(named["AutoConfig"], code)(**entries)
                self.own = _loaded(named["AutoModelForCausalLM"], code)
            else:
                self.config = _known(given["model_type"], entries)
        except Exception as error:
            raise self.refusal(f"transformers refuses it ({explained(error)})", error) from None

    def refusal(self, what: str, error: Exception) -> BismoothError:
        """The error of a config that its class does not take.

        Args:
            what: in words.
            error: the class's. Where a package is missing, or the class is code of the model's own, the config may be
                right all the same.
        """
        if isinstance(error, ImportError) or self._theirs:
            return refused(what)
        return BismoothError.of("config.json", what, "mend it, or upgrade transformers if a later one takes it")

    def build(self, config: "PretrainedConfig", device: str = "cpu") -> "PreTrainedModel":
        """The causal language model of a config, whatever else belongs to it, in fp32.

        Raises:
            Exception: whatever its class raises.
        """
        with _quiet(), torch.device(device):
            make = self.own._from_config if self.own is not None else _auto_for(config).from_config
            model = make(config, attn_implementation="eager", dtype=torch.float32)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model.eval().requires_grad_(False)


def is_known(model_type: object) -> bool:
    """Whether transformers itself has a type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _unknown(given: Mapping[str, Any], has_code: bool) -> UnknownModel:
    import transformers

    what = f"model_type = {repr(given.get('model_type'))[:80]} is unknown to transformers {transformers.__version__}"
    without = "--method rtn converts it without smoothing"
    if has_code:
        what += ", and is code of the model's own, which does not run without --trust-remote-code"
        return UnknownModel(Problem("config.json", what, f"give that if you trust it; {without}"))
    return UnknownModel(Problem("config.json", what, f"upgrade transformers if a later one has it; {without}"))


def _known(model_type: str, entries: Mapping[str, Any]) -> "PretrainedConfig":
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **entries)


def _loaded(reference: str, code: Path) -> Any:
    """A class from a model's own code. A reference to another repository on a hub is not followed."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference.rpartition("--")[2], str(code), local_files_only=True)


def _auto_for(config: "PretrainedConfig") -> Any:
    """transformers' class that knows which class builds a language model of a config."""
    import transformers

    text, towers = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    autos = [text, towers, getattr(transformers, "AutoModelForMultimodalLM", towers)]
    if any(widths.is_tower(key, value) for key, value in config.to_dict().items()):
        autos = [*autos[1:], text]
    return next((auto for auto in autos if type(config) in auto._model_mapping), text)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
