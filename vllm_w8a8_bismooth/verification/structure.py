"""Names, shapes and dtypes of a converted checkpoint, beside what its config says of them."""

from collections.abc import Collection, Iterator, Sequence

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.audit import audit
from vllm_w8a8_bismooth.checkpoint.basis import NAMES, Basis, Means
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.checkpoint.companions import module_problems
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, INDEX, read_json
from vllm_w8a8_bismooth.checkpoint.reader import FLOAT_DTYPES, Checkpoint, Header
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.errors import BismoothError, Problem
from vllm_w8a8_bismooth.model.layers import Layer
from vllm_w8a8_bismooth.verification.contents import AGAIN, SCALE
from vllm_w8a8_bismooth.verification.schemes import KEY, Schemes

_CONVERT = "convert the source again"


class Structure:
    """What the headers of a checkpoint hold, held against its config.

    Args:
        checkpoint: opened with INT8 among its dtypes.
        schemes: what its config says of linears; ``None`` if that cannot be read.
        marked: whether it says that bismooth made it.
        means: by which it may be laid out.

    Attributes:
        names: of the tensors.
        around: those outside the blocks that such a model has.
        layers: what each block should hold; empty if the config does not say.
        linears: INT8 linear in which files and config agree -> group size (``None`` = per-channel).
        ignored: linears that are float, as the config says.
        problems: what does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, schemes: Schemes | None, marked: bool, means: Means):
        self._headers, self._schemes, self._marked = checkpoint.headers, schemes, marked
        self.problems: list[Problem] = []
        self.known_by, self.tied = NAMES, False
        self.around: set[str] = set()
        self.record: Discovery | None = None
        self.layers = self._lay_out(checkpoint, means)
        self.names, inside = checkpoint.names, list(enumerate(self.layers))
        self._linears = {self.names.block(i) + n for i, layer in inside for n in layer.linears}
        routers = {self.names.block(i) + n for i, layer in inside for n in layer.routers}
        self._modules = {*self._linears, *routers, self.names.head.removesuffix(".weight")}
        self.linears = self._quantized()
        self.ignored = [name for name in self._in_float() if name in self._linears and self._leaves_in_float(name)]
        for problems in (
            self._stray_scales(),
            self._stray_int8(),
            self._floats(),
            self._packed(checkpoint.encodings),
            self._blocks(),
            _index(checkpoint),
            _names(checkpoint),
        ):
            self.problems += problems

    @property
    def basis(self) -> Basis:
        """What the layers are known by."""
        return Basis.of(self.known_by, self.record, self.layers)

    def _lay_out(self, checkpoint: Checkpoint, means: Means) -> list[Layer]:
        """What each block should hold, after the audit of names and shapes."""
        tensors = {name: header for name, header in self._headers.items() if not name.endswith(SCALE)}
        checkpoint.code = checkpoint.place.code() if means.trusted else None
        try:
            blueprint = Blueprint.of(checkpoint, means, tensors)
            self.known_by, self.record, self.tied = blueprint.known_by, blueprint.record, blueprint.tied
            checkpoint.names = blueprint.names
            self.around = {*blueprint.outside, *blueprint.optional}
            self.problems += checkpoint.show(blueprint.views)
            self._headers = checkpoint.headers
            tensors = {name: header for name, header in self._headers.items() if not name.endswith(SCALE)}
            sizes = blueprint.sizes
            self.problems += audit(checkpoint, blueprint, tensors)
            self.problems += module_problems(checkpoint.place)
            if max(sizes["blocks"], sizes.get("experts", 0)) <= len(tensors):  # else the audit has said so
                return blueprint.layers
        except BismoothError as error:
            self.problems += error.problems
        return []

    def _quantized(self) -> dict[str, int | None]:
        linears = {}
        for name, header in self._headers.items():
            if name.endswith(".weight") and header.dtype == "I8":
                try:
                    linears[name.removesuffix(".weight")] = self._group_size(name, header)
                except BismoothError as error:
                    self.problems += error.problems
        return linears

    def _group_size(self, name: str, weight: Header) -> int | None:
        """The group size of an INT8 weight, in which its scale and the config agree.

        Raises:
            BismoothError: they do not.
        """
        linear, scale = name.removesuffix(".weight"), self._headers.get(f"{name}_scale")
        if len(weight.shape) != 2:
            what = f"is INT8 of shape {list(weight.shape)}; only matrices can be"
            raise BismoothError.of(name, what, "convert again")
        if scale is None:
            raise BismoothError.of(f"{name}_scale", f"is missing; {name} is INT8", AGAIN)
        quantized, size = self._schemes.of(linear) if self._schemes else (True, _group_size_of(weight, scale))
        if not quantized:
            what = f"is stored as INT8, but {CONFIG} leaves it in float (by {KEY}.ignore, or no target names it)"
            raise BismoothError.of(linear, what, f"mend {CONFIG} or {_CONVERT}")
        rows, columns = weight.shape
        shape = (rows, 1) if size is None else (rows, columns // size)
        if scale.shape != shape or not grouping.fits(columns, size):
            says = "per-channel" if size is None else f"per group of {size} columns"
            raise BismoothError.of(
                f"{name}_scale",
                f"has shape {list(scale.shape)}; {CONFIG} says {says}, which is {list(shape)} for {rows} x {columns}",
                f"mend the targets in {CONFIG} or {_CONVERT}",
            )
        if scale.dtype not in (("F32",) if self._marked else FLOAT_DTYPES):
            raise BismoothError.of(f"{name}_scale", f"has dtype {scale.dtype}, not F32", _CONVERT)
        return size

    def _in_float(self) -> Iterator[str]:
        """Modules whose weights are float, though INT8 weights may be under their names."""
        for name, header in self._headers.items():
            module = name.removesuffix(".weight")
            if module != name and module in self._modules and header.dtype != "I8":
                yield module

    def _leaves_in_float(self, module: str) -> bool:
        return self._schemes is not None and not self._schemes.quantizes(module)

    def _stray_scales(self) -> Iterator[Problem]:
        for name in self._headers:
            weight = name.removesuffix("_scale")
            if name.endswith(SCALE) and (weight not in self._headers or self._headers[weight].dtype != "I8"):
                yield Problem(name, f"is the scale of no INT8 weight ({weight})", "remove it or convert again")

    def _stray_int8(self) -> Iterator[Problem]:
        for name, header in self._headers.items():
            module = name.removesuffix(".weight")
            stray = module == name or module not in self._modules
            if header.dtype == "I8" and self.layers and stray and not name.endswith(SCALE):
                yield Problem(name, "is INT8, but no linear", _CONVERT)

    def _floats(self) -> Iterator[Problem]:
        """What is float, but should be INT8."""
        for module in self._in_float():
            name = f"{module}.weight"
            stored = f"is stored as {self._headers[name].dtype}"
            if self._leaves_in_float(module):
                continue
            if self._marked and module in self._linears:
                yield Problem(name, f"{stored}, not INT8", _CONVERT)
            elif self._schemes is not None:
                yield Problem(module, f"{stored}, but {CONFIG} says INT8", f"name it in {KEY}.ignore or {_CONVERT}")

    def _packed(self, packed: Collection[str]) -> Iterator[Problem]:
        """Linears whose rows are packed, but must not be, and the other way round: vLLM reads them by the config."""
        experts = {self.names.block(i) + n for i, layer in enumerate(self.layers) for n in layer.experts}
        of_rows = self._linears - experts if self._schemes is not None and self._schemes.packed else set()
        for linear, size in self.linears.items():
            expected, name = size is None and linear in of_rows, f"{linear}.weight"
            if expected and name not in packed:
                yield Problem(name, f"is stored as INT8, and by {CONFIG} in rows of four and eight bits", _CONVERT)
            elif name in packed and not expected:
                what = "is stored in rows of four and eight bits, as no experts, heads and per-group linears can be"
                yield Problem(name, what, _CONVERT)

    def _blocks(self) -> Iterator[Problem]:
        for i, layer in enumerate(self.layers):
            for fused, parts in layer.fused.items():
                yield from self._siblings(self.names.block(i), fused, parts)
            yield from self._experts({self.names.block(i) + n for n in layer.experts})

    def _siblings(self, block: str, fused: str, parts: Sequence[str]) -> Iterator[Problem]:
        """vLLM merges ``parts`` into ``fused``: they must have one granularity, which that name must be given too."""
        kinds = {part: (True, self.linears[block + part]) for part in parts if block + part in self.linears}
        kinds |= {part: (False, None) for part in parts if block + part in self.ignored}
        if len(kinds) < len(parts):
            return
        if len(set(kinds.values())) > 1:
            what = f"its parts differ in (INT8, group_size): {kinds}; vLLM fuses them"
            yield Problem(block + fused, what, "convert again")
        elif self._schemes is not None and self._marked:
            answer: object
            try:
                answer = self._schemes.of(block + fused)
            except BismoothError as error:
                answer = error.problems[0].what
            if answer != kinds[parts[0]]:
                names = ", ".join(parts)
                what = f"{CONFIG} gives the name under which vLLM fuses {names} another granularity ({answer})"
                yield Problem(block + fused, what, _CONVERT)

    def _experts(self, experts: set[str]) -> Iterator[Problem]:
        """The experts of a block are served alike."""
        if 0 < len(floats := sorted(experts.intersection(self.ignored))) < len(experts):
            what = f"is float as {len(floats)} of its block's {len(experts)} experts' linears; vLLM serves all alike"
            yield Problem(floats[0], what, "convert again")
        sizes = {linear: self.linears[linear] for linear in sorted(experts) if linear in self.linears}
        first = next(iter(sizes), "")
        if other := next((linear for linear in sizes if sizes[linear] != sizes[first]), None):
            what = f"has group_size {sizes[other]}, {first} {sizes[first]}; vLLM serves all experts of a block alike"
            yield Problem(other, what, "convert again")


def _group_size_of(weight: Header, scale: Header) -> int | None:
    """What the shapes alone say, where no config does."""
    groups = scale.shape[-1] if scale.shape else 1
    return None if groups == 1 else max(1, weight.shape[1] // max(1, groups))


def _names(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Names that a conversion mends, and that vLLM does not know."""
    if checkpoint.renamed:
        what = f"{checkpoint.renamed} by a conversion, but vLLM reads them as they stand"
        yield Problem(", ".join(checkpoint.files[:1]), what, _CONVERT)


def _index(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What vLLM does not pass over in the index, a wrong total, and shards beside those that hold the tensors."""
    if checkpoint.unlike:
        yield Problem(INDEX, f"{checkpoint.unlike}: vLLM refuses the folder", "remove the index, or convert again")
        return
    files = {header.file for header in checkpoint.stored.values()}
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        if path.name not in files:
            yield Problem(path.name, "holds no tensor of this checkpoint, but lies in its folder", "remove it")
    if not (checkpoint.folder / INDEX).exists():
        return
    metadata = read_json(checkpoint.folder / INDEX).get("metadata")
    stored = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stored != checkpoint.nbytes():
        yield Problem(INDEX, f"metadata.total_size is {stored!r}, the tensors have {checkpoint.nbytes()} bytes", AGAIN)
