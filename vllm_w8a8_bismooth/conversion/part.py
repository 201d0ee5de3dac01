"""A part of a conversion: what one of several machines made of some blocks, and all that merging needs beside it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth import __version__
from vllm_w8a8_bismooth.checkpoint.basis import Basis, Means
from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, SINGLE, Folder, copy, partial_folder, read_json, sha256
from vllm_w8a8_bismooth.checkpoint.journal import FOLDER, differences
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.recipe import INT8, Recipe, names_of_hashes
from vllm_w8a8_bismooth.report.outcome import Outcome

PART = "part.json"
_SOURCE = "source"
AGAIN = "copy the part again from where it is whole, or convert it again into another folder"


def write(
    folder: Path,
    source: Source,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    checksums: Mapping[str, str],
    outcome: Outcome,
) -> None:
    """Write what goes beside the shards of a part.

    Args:
        folder: to write into.
        source: what was converted.
        identity, provenance, checksums: see :class:`Part`, which reads them.
        outcome: the :class:`outcome.Outcome`.
    """
    assert outcome.part is not None
    place, outline = source.checkpoint.place, outline_of(source)
    kept = f"{_SOURCE}/{place.path.resolve().name}"  # by its name, which the model card shows
    for relative in outline["files"]:
        copy(place.path / relative, folder / kept / relative)
    content = {
        "blocks": [outcome.part.start, outcome.part.stop],
        "identity": _shared(identity),
        "provenance": provenance,
        "layout": source.basis.json(),
        "source": {"folder": kept, "hub_id": place.hub_id, "revision": place.revision, **outline},
        "checksums": checksums,
        "linears": outcome.linears,
        "sites": list(outcome.sites.values()),
        "shards": outcome.files,
        "used": None if outcome.used is None else outcome.used.json(),
    }
    content = json.loads(json.dumps(content))
    (folder / PART).write_text(json.dumps({"sha256": _digest(content), "part": content}))


def read(folder: Path, outcome: Outcome) -> None:
    """Put into the outcome of a part what its folder says, which is just this part; see :class:`Part`."""
    found = Part(folder)
    outcome.linears, outcome.sites, outcome.files = found.linears, found.sites, found.shards
    outcome.written_bytes, outcome.recipe = found.nbytes(), found.recipe
    outcome.used = found.used


class Part:
    """A finished part, of which only ``part.json`` has been read.

    Attributes:
        folder: of the part.
        digest: SHA-256 of what ``part.json`` says.
        blocks: those that it holds. With the first of the model comes everything outside the blocks.
        identity: recipe, layout, device and versions, which all parts of a checkpoint share.
        recipe: complete but for the source's fingerprint.
        provenance: see :func:`pipeline.complete`.
        outline: of the source, see :func:`outline_of`.
        checksums: of those of the source's tensors that were read, see :class:`files.Checksum`.
        linears, sites: what was made of them, see :class:`outcome.Outcome`.
        shards: files of tensors -> SHA-256.
        used: what of the calibration text was really used; ``None`` is data-free.
        basis: what the layout of the source rests on.

    Raises:
        BismoothError: on construction, if the folder holds no finished part, or one of another version's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / PART).is_file():
            for unfinished in (folder, partial_folder(folder)):
                if (unfinished / FOLDER).is_dir():
                    raise BismoothError.of(unfinished, "not finished", "run the command again that began it")
            remedy = "give the folder of a part, as convert --blocks makes it"
            raise BismoothError.of(folder / PART, "not found", remedy)
        stored = read_json(folder / PART)
        content, self.digest = stored.get("part"), stored.get("sha256")
        if not isinstance(content, dict) or self.digest != _digest(content):
            what = "damaged, it does not have the SHA-256 that it names"
            raise BismoothError.of(folder / PART, what, AGAIN)
        self.identity: dict[str, Any] = content["identity"]
        version = self.identity["versions"]["vllm_w8a8_bismooth"]
        if version != __version__:
            what = f"made by bismooth {version}, and this is {__version__}"
            raise BismoothError.of(folder, what, f"merge with bismooth {version}, or convert again with this one")
        self.blocks, self.recipe = range(*content["blocks"]), Recipe(**self.identity["recipe"])
        self.provenance: dict[str, Any] = content["provenance"]
        self.outline: dict[str, Any] = {key: content["source"][key] for key in ("files", "headers")}
        self.checksums: dict[str, str] = content["checksums"]
        self.linears: dict[str, dict[str, Any]] = content["linears"]
        self.sites: dict[int, list[dict[str, Any]]] = dict(zip(self.blocks, content["sites"], strict=True))
        self.shards: dict[str, str] = content["shards"]
        self.used = None if content.get("used") is None else Used.of(content["used"])
        self._source = content["source"]
        try:
            self.basis = Basis.of_json(content["layout"]) if "layout" in content else None
        except ValueError as error:
            raise BismoothError.of(folder / PART, f"its layout cannot be read ({error})", AGAIN) from None

    def source(self) -> Source:
        """The checkpoint that it was made from, but for the values of its tensors."""
        stored = self._source
        outline = _Outline(
            self.folder / stored["folder"], stored["hub_id"], stored["revision"], self.outline["headers"]
        )
        return Source(outline, Means(known=self.basis, untied=self.recipe.head == INT8))

    def problems(self) -> Iterator[Problem]:
        """What is absent or damaged of it, as far as that is seen without reading its shards."""
        for relative, digest in self.outline["files"].items():
            path = self.folder / self._source["folder"] / relative
            if not path.is_file():
                yield Problem(str(path), "absent", AGAIN)
            elif sha256(path) != digest:
                yield Problem(str(path), f"does not have the SHA-256 that {PART} names", AGAIN)
        for shard in self.shards:
            try:
                self.header(shard)
            except BismoothError as error:
                yield from error.problems

    def header(self, shard: str) -> tuple[int, dict[str, Any]]:
        """See :class:`files.Place`."""
        path = self.folder / shard
        if not path.is_file():
            raise BismoothError.of(path, "absent", AGAIN)
        try:
            return Folder(self.folder).header(shard)
        except BismoothError as error:
            raise BismoothError(*(replace(problem, remedy=AGAIN) for problem in error.problems)) from None

    def files(self) -> dict[str, str]:
        """Everything that lies beside ``part.json``, as it names it -> SHA-256."""
        kept = {f"{self._source['folder']}/{file}": digest for file, digest in self.outline["files"].items()}
        return {**self.shards, **kept}

    def nbytes(self) -> int:
        """Bytes of all tensors that it holds."""
        offsets = (entry["data_offsets"] for shard in self.shards for entry in self.header(shard)[1].values())
        return sum(last - first for first, last in offsets)

    def names(self) -> dict[str, str]:
        """See :func:`recipe.names_of_hashes`."""
        return names_of_hashes(asdict(self.recipe), self.provenance)

    def unlike(
        self, identity: Mapping[str, Any], outline: Mapping[str, Any], checksums: Mapping[str, str]
    ) -> list[str]:
        """How it differs from another conversion, as readable lines; of the checksums those count that both know."""
        both = self.checksums.keys() & checksums.keys()
        pairs = {
            "is another": (self.outline["files"], outline["files"]),
            "has another shape or dtype": (self.outline["headers"], outline["headers"]),
            "has other values": tuple({name: known[name] for name in both} for known in (self.checksums, checksums)),
        }
        return [
            *differences(self.identity, json.loads(json.dumps(_shared(identity)))),
            *(
                f"the source's {name} {what}"
                for what, (mine, others) in pairs.items()
                for name in sorted(mine.keys() | others.keys())
                if mine.get(name) != others.get(name)
            ),
        ]


@dataclass(frozen=True)
class _Outline(Folder):
    """A checkpoint's folder without its weights, and their headers, as if all were in one file."""

    headers: Mapping[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, int]:
        return super().files() | {SINGLE: 0}

    def has(self, file: str) -> bool:
        return file == SINGLE or super().has(file)

    def header(self, file: str) -> tuple[int, dict[str, Any]]:
        return 0, dict(self.headers)


def outline_of(source: Source) -> dict[str, Any]:
    """A checkpoint but for the values of its tensors: SHA-256 of its ``files``, and the ``headers`` of the tensors in
    their order, as they are stored, with offsets that only hold sizes."""
    place = source.checkpoint.place
    return {
        "files": {path.as_posix(): sha256(place.path / path) for path in (Path(CONFIG), *map(Path, companions(place)))},
        "headers": {
            name: {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [0, header.nbytes]}
            for name, header in source.checkpoint.stored.items()
        },
    }


def _shared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts of a checkpoint have in common of the identity of a run."""
    return {key: identity.get(key) for key in ("recipe", "layout", "device", "versions")}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
