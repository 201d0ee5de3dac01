"""What is found out of a model from its config alone, for people and for ``--sites``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.findings import layers_of
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.model.kinds import Kind, kinds_of


@dataclass(frozen=True)
class Sites:
    """What a model's blocks hold, and where magnitude can move between their tensors.

    Attributes:
        source: what was asked for.
        record: everything that was found out; its ``to_json`` is what ``--sites`` takes.
        kinds: of blocks, for people.
    """

    source: str
    record: Discovery
    kinds: list[Kind]


def find(config: Mapping[str, Any], source: str, code: Path, means: Means) -> Sites:
    """Find out, or prove what is given.

    Args:
        config: a parsed ``config.json``. It is not trusted.
        source: what to call it.
        code: the folder with the model's own code.
        means: whether that may run; a record that is given.

    Raises:
        BismoothError: see :func:`discover.discover`.
    """
    record = discover(config, code if means.trusted else None, means.progress, means.given)
    return Sites(source, record, kinds_of(layers_of(record)))
