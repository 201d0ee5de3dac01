"""What the name of a model's class, in ``architectures``, says of the checkpoint: its head, its decoder's name."""

from collections.abc import Mapping

HEADS = ("score", "classifier", "qa_outputs", "v_head", "value_head", "reward_head")
"""What the names of heads begin with that are no language model's."""
_KINDS = (
    ("ForCausalLM", "language"), ("ForConditionalGeneration", "language"), ("LMHeadModel", "language"),
    ("ChatGLMModel", "language"),
    ("RewardModel", "other"), ("Model", None),
)  # fmt: skip
"""Ending of a class's name -> its head, see :func:`head_of`."""
_TRUNKS = dict.fromkeys(
    (f"{family}ForQuestionAnswering" for family in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe")), "transformer."
)
"""Classes of transformers that do not call their decoder ``model``."""
_PLAIN = (
    *("gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)
"""Types whose other classes all do, so that what else stands before it was left by a wrapper."""
_IMPLIED = {
    "score.weight": "ForSequenceClassification",
    "qa_outputs.weight": "ForQuestionAnswering",
    "score.0.weight": "ForRewardModel",
}
"""Tensor of a head -> ending of the class that has it."""


_NO_CONFIG = "vLLM's class hands its head no quantization"
_NO_NAME = "vLLM's class gives its head no name, by which its quantization would be found"
_EMBEDDING = "vLLM's class always takes the embedding for its head"
_FLOAT_HEADS = {
    _NO_CONFIG: "alice_ai bloom dory falcon_h1 gpt_oss jamba mamba mamba2 opt plamo3 qwen3_next step3_text zamba2",
    _NO_NAME: "afmoe exaone_moe",
    _EMBEDDING: "cohere cohere2 cohere2_moe gemma2 gemma3n gemma3n_text",
}
"""Why vLLM, from 0.26 to 0.33, can only have a head in float -> types of models."""


def float_head(config: Mapping) -> str | None:
    """Why vLLM cannot serve the language model's head in INT8; ``None`` where nothing is known against it."""
    kind = config.get("model_type")
    return next((why for why, kinds in _FLOAT_HEADS.items() if kind in kinds.split()), None)


def class_of(config: Mapping) -> str:
    """The class that ``architectures`` names first; ``ForCausalLM`` where it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "ForCausalLM"


def head_of(config: Mapping) -> str | None:
    """Which head ``architectures`` says that the model has.

    Returns:
        ``language``; ``other`` for a classifier's or a reward's, like that of ``LlamaForSequenceClassification``;
        ``None`` for the bare decoder, like ``LlamaModel``, as embedding models are.
    """
    name = class_of(config)
    return next((kind for ending, kind in _KINDS if name.endswith(ending)), "other" if "For" in name else "language")


def trunk_of(config: Mapping) -> str | None:
    """What the names of the decoder's tensors begin with in files of this class, nothing for the bare decoder; ``None``
    where that is not known."""
    name = class_of(config)
    if config.get("model_type") not in _PLAIN:
        return None
    return _TRUNKS.get(name, "model.") if "For" in name or head_of(config) == "language" else ""


def family_of(config: Mapping) -> str:
    """What the names of a model type's classes begin with."""
    return "".join(part.capitalize() for part in config["model_type"].split("_"))


def implied_by(head: str) -> str | None:
    """The ending of the class that has a head with this tensor, if one is known."""
    return _IMPLIED.get(head)
