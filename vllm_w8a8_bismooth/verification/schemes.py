"""What ``quantization_config`` says of each linear, as compressed-tensors itself reads and matches it."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vllm_w8a8_bismooth import FORMAT, NAME
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.errors import BismoothError, Problem

KEY = "quantization_config"
_AGAIN = "convert the source again"


def config_problems(config: object) -> Iterator[Problem]:
    """What is wrong with ``quantization_config`` itself, whatever it says of the linears."""
    if not isinstance(config, dict):
        yield Problem(CONFIG, f"{KEY} is {config!r}: not a quantized checkpoint", "give the folder of a converted one")
        return
    for key, expected in (("quant_method", "compressed-tensors"), ("format", FORMAT)):
        if config.get("quant_method") != NAME and config.get(key) != expected:  # else its weights are read by it
            yield Problem(CONFIG, f"{KEY}.{key} is {config.get(key)!r}, not {expected!r}", _AGAIN)


class Schemes:
    """The schemes that a ``quantization_config`` gives to linears.

    Attributes:
        packed: whether per-channel linears are rows of four and eight bits.

    Raises:
        BismoothError: on construction, if compressed-tensors cannot read the config.
    """

    def __init__(self, config: Mapping[str, Any]):
        from compressed_tensors.quantization import QuantizationConfig

        self.packed = config.get("quant_method") == NAME
        self._linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        self._targets: dict[str, Any] = {}
        try:
            parsed = QuantizationConfig.model_validate(copy.deepcopy(config))
            self._ignore = parsed.ignore or []
            for scheme in parsed.config_groups.values():
                for target in scheme.targets:
                    self._targets.setdefault(target, scheme)
            for pattern in (*self._ignore, *self._targets):
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except Exception as error:  # of the library, whose kinds are its own
            lines = " ".join(str(error).split())
            raise BismoothError.of(CONFIG, f"{KEY} is not read by compressed-tensors ({lines})", _AGAIN) from None

    def of(self, linear: str) -> tuple[bool, int | None]:
        """Whether a linear is INT8, and its group size (``None`` = per-channel).

        Raises:
            BismoothError: it is quantized in another way.
        """
        from compressed_tensors.utils.match import is_match, match_targets

        matched = match_targets(linear, self._linear, self._targets)
        if not matched or is_match(linear, self._linear, self._ignore):
            return False, None
        return True, self._size(linear, matched[0])

    def unknown(self) -> str | None:
        """What is said of a target that is not INT8 as vLLM's plain format or ours has it; ``None`` if all are."""
        for target in self._targets:
            try:
                self._size(CONFIG, target)
            except BismoothError as error:
                return error.problems[0].what.removeprefix(f"{CONFIG}: ")
        return None

    def _size(self, linear: str, target: str) -> int | None:
        """The group size that a target gives to a linear.

        Raises:
            BismoothError: it is quantized in another way.
        """
        scheme = self._targets[target]
        weights, inputs = scheme.weights, scheme.input_activations
        for side, arguments, dynamic in (("weights", weights, False), ("input_activations", inputs, True)):
            if arguments is None:
                raise _unlike(linear, target, f"leaves {side} in float; it is not W8A8")
            expected = (8, "int", True, dynamic)
            kind = (arguments.num_bits, arguments.type, bool(arguments.symmetric), bool(arguments.dynamic))
            if kind != expected:
                says = f"has {side} of num_bits, type, symmetric, dynamic = {kind}; expected {expected}"
                raise _unlike(linear, target, says)
        strategies = (weights.strategy, inputs.strategy)
        if strategies == ("channel", "token"):
            return None
        if strategies == ("group", "token") or (
            strategies == ("group", "group") and weights.group_size == inputs.group_size
        ):
            return weights.group_size
        raise _unlike(
            linear,
            target,
            f"has strategies {strategies} with group_size {weights.group_size} and {inputs.group_size}; "
            "expected channel and token, or group and group of one size",
        )

    def quantizes(self, linear: str) -> bool:
        """Whether a linear is quantized in any way."""
        try:
            return self.of(linear)[0]
        except BismoothError:
            return True


def _unlike(linear: str, target: str, says: str) -> BismoothError:
    return BismoothError.of(linear, f"{CONFIG}: target {target!r} {says}", _AGAIN)
