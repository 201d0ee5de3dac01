"""What a self-test found, and the file that keeps it for the next process on the same device."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.ops import kernels
from vllm_w8a8_bismooth.ops.selftest.cases import Tile
from vllm_w8a8_bismooth.ops.shelf import Shelf

_SHELF = Shelf("selftest", "verdict", "the self-test runs anew")


@dataclass(frozen=True)
class Verdict:
    """What can be relied on.

    Attributes:
        tiles: the compiled products that fit the device.
        names: all that was to be tried.
        faults: of those, what failed -> how.
        problem: why nothing is known of what was not tried, or ``""``. It may be gone the next time.
    """

    tiles: Sequence[Tile] = ()
    names: Sequence[str] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def lost(self) -> dict[str, str]:
        """Granularities that no product is left for -> why."""
        found = {}
        for granularity in kernels.GRANULARITIES:
            its = [tile.name for tile in self.tiles if tile.granularity == granularity]
            if all(name in self.faults for name in its):
                first = next(iter(its), None)
                found[granularity] = f"{first}: {self.faults[first]}" if first else "no kernel fits this device"
        return found

    def words(self) -> str:
        """One line."""
        if self.problem and not self.names:
            return f"the self-test did not run ({self.problem})"
        passed = f"{len(self.names) - len(self.faults)} of {len(self.names)} kernels passed the self-test"
        if not self.faults:
            return passed
        name, fault = next(iter(self.faults.items()))
        more = f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
        return f"{passed}; not {name} ({fault}){more}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Verdict":
        """Raises an exception of any kind if that is not what :meth:`to_json` made."""
        tiles = tuple(Tile(**tile) for tile in stored["tiles"])
        names, faults = tuple(map(str, stored["names"])), {str(k): str(v) for k, v in stored["faults"].items()}
        if not names or stored["problem"] or not all(tile.name in names for tile in tiles) or not {*faults} <= {*names}:
            raise ValueError("it is no whole verdict")
        return cls(tiles, names, faults)


def sources() -> str:
    """A hash of the compiled library, and of the self-test itself."""
    digest = sha256(kernels.LIBRARY_FILE.read_bytes() if kernels.LIBRARY_FILE.exists() else b"")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def folder() -> Path:
    """Of the files, in the user's cache."""
    return _SHELF.folder()


def kept(key: Mapping[str, Any]) -> Verdict | None:
    """The verdict on a device, if one is kept.

    Args:
        key: all that it depends on.
    """
    return _SHELF.read(key, Verdict.from_json)


def keep(key: Mapping[str, Any], verdict: Verdict) -> None:
    """Write a whole verdict, at once or not at all; a cache that cannot be written is none."""
    if not verdict.problem:
        _SHELF.write(key, verdict.to_json())


def alone(key: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Have other processes on such a device wait, so that one self-test serves them all. Where files cannot be locked,
    nobody waits."""
    return _SHELF.alone(key)
