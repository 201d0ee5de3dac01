"""What a checkpoint is for, as the Hub and ``vllm serve`` call it."""

from dataclasses import dataclass
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import CONFIG, read_json

_MODULES = "modules.json"  # of sentence-transformers, which loads the folder by it
_POOLING = " --runner pooling"


@dataclass(frozen=True)
class Task:
    """What a checkpoint is for.

    Attributes:
        pipeline: the Hub's name of the task; ``None`` is not known.
        tags: more tags that the Hub expects with it.
        runner: what ``vllm serve`` needs beside the name, with the space before it.
    """

    pipeline: str | None = None
    tags: tuple[str, ...] = ()
    runner: str = ""


def task_of(folder: Path) -> Task:
    """What a checkpoint's folder is for, by the architecture in its config and the files of sentence-transformers.

    Raises:
        BismoothError: its config cannot be read.
    """
    names = read_json(folder / CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    if name.endswith("ForSequenceClassification"):
        return Task("text-classification", runner=_POOLING)
    if (folder / _MODULES).is_file():  # embedding models may call themselves ForCausalLM
        return Task("sentence-similarity", ("sentence-transformers", "feature-extraction"), _POOLING)
    if name.endswith(("ForCausalLM", "LMHeadModel", "ChatGLMModel")):
        return Task("text-generation")
    if name.endswith("Model"):
        return Task("feature-extraction", runner=_POOLING)
    return Task()
