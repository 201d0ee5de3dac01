"""What the layout of a model rests on: what was found out, a file that somebody gave, or bare names."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.discovery.reading import read
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.model.kinds import kinds_of
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.progress import Progress, silent

DISCOVERY, GIVEN, NAMES = "discovery", "file", "names"
_LIBRARIES = ("transformers", "torch")
"""What a record depends on beside this package."""


@dataclass(frozen=True)
class Basis:
    """What is known of a model, and from where.

    Attributes:
        by: :data:`DISCOVERY`, :data:`GIVEN` (a file, proven like what is found out) or :data:`NAMES` (guessed, without
            sites).
        sha256: of what it says.
        versions: of what said so.
        record: of what was found out or given.
    """

    by: str
    sha256: str
    versions: Mapping[str, str]
    record: Discovery | None = None

    @classmethod
    def of(cls, by: str, record: Discovery | None, layers: Sequence[Layer]) -> "Basis":
        """What this version of everything says.

        Args:
            by, record: see the class.
            layers: of all blocks, for what has no record.
        """
        versions = {"vllm_w8a8_bismooth": __version__} | {name: _version(name) for name in _LIBRARIES}
        sha256 = _hash([asdict(kind) for kind in kinds_of(layers)]) if record is None else digest(record)
        return cls(by, sha256, versions, record)

    def json(self) -> dict[str, Any]:
        """For recipe.json."""
        found: dict[str, Any] = {"from": self.by, "sha256": self.sha256, "versions": dict(self.versions)}
        return found if self.record is None else {**found, "record": self.record.to_json()}

    @classmethod
    def of_json(cls, value: object) -> "Basis":
        """The inverse of :meth:`json`, of a file that is not trusted.

        Raises:
            ValueError: it is not of that form.
        """
        if not isinstance(value, dict) or value.get("from") not in (DISCOVERY, GIVEN, NAMES):
            raise ValueError("it does not say where the sites are from")
        versions, sha256 = value.get("versions"), value.get("sha256")
        if not isinstance(versions, dict) or not all(isinstance(v, str) for v in (*versions.values(), sha256)):
            raise ValueError("it does not say of which versions they are")
        if value["from"] == NAMES:
            return cls(NAMES, str(sha256), versions)
        record = read(value.get("record"))
        if digest(record) != sha256:
            raise ValueError("the record does not have the SHA-256 beside it")
        return cls(value["from"], str(sha256), versions, record)

    @property
    def identity(self) -> dict[str, str]:
        """By which one conversion is told from another."""
        return {"from": self.by, "sha256": self.sha256}


@dataclass(frozen=True)
class Means:
    """By what a model may be known.

    Attributes:
        given: a record that somebody gave; it is proven before it is used, and nothing is searched for.
        known: what an earlier step has proven, used as it is.
        trusted: whether code that the checkpoint holds and its config names may run.
        untied: whether a tied head is to be taken for a tensor of its own, see :mod:`untied`.
        progress: of what has to be found out.
    """

    given: Discovery | None = None
    known: Basis | None = None
    trusted: bool = False
    untied: bool = False
    progress: Progress = silent


def digest(record: Discovery) -> str:
    """SHA-256 of what a record says, which the figures of its proof are no part of: these depend on the machine."""
    said = replace(record, seconds=0.0).to_json()
    del said["proof"]
    return _hash(said)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
