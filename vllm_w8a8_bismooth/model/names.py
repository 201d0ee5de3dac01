"""What a checkpoint calls its tensors: where its decoder stands among them, and what wrappers left in front of it."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.model.classes import HEADS

_BLOCK = re.compile(r"(?P<trunk>|.*?\.)layers\.(?P<index>0|[1-9]\d*)\.(?P<inside>.+)")
_INSIDE = re.compile(r"(?P<index>0|[1-9]\d*)\.(?P<inside>.+)")
_NUMBERED = re.compile(r"(?:.*?\.)?(?P<index>0|[1-9]\d*)\.(?P<inside>.+)")
EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
"""The number of an expert in a name."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""What torch.compile, FSDP, activation checkpointing and data parallelism put among the parts of a name."""
_PEFT = "base_model.model."
_KNOWN = ("model.", "")
"""The trunks that readers of checkpoints look for."""
_PARTS = ("layers.", "embed_tokens.", "norm.", "rotary_emb.")
"""What the names of a decoder's tensors begin with where nothing stands before them."""
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module)\b"
)


@dataclass(frozen=True)
class Names:
    """The names around the blocks of a decoder.

    Attributes:
        blocks: what the name of every tensor inside a block begins with, before the block's number.
        embedding: its tensor.
        norm: the gain of the norm behind the last block; ``None`` where there is none.
        head: the language model's.
    """

    blocks: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    norm: str | None = "model.norm.weight"
    head: str = "lm_head.weight"

    @classmethod
    def behind(cls, trunk: str) -> "Names":
        """Those that begin with ``model.`` in a causal LM, and with nothing where the bare decoder was saved, as
        embedding models are."""
        return cls(f"{trunk}layers.", f"{trunk}embed_tokens.weight", f"{trunk}norm.weight")

    @classmethod
    def among(cls, names: Collection[str]) -> "Names":
        """Those of a checkpoint; of several stacks of blocks that one counts beside which the embedding stands, and of
        several such that one whose name readers know."""
        trunks = _trunks(names)

        def order(trunk: str) -> tuple:
            return f"{trunk}embed_tokens.weight" not in names, trunk not in _KNOWN, -trunks[trunk], trunk

        return cls.behind(min(trunks, key=order, default="model."))

    @property
    def stack(self) -> str:
        """The last part of :attr:`blocks`: ``layers``."""
        return self.blocks.removesuffix(".").rpartition(".")[2]

    @property
    def trunk(self) -> str:
        """What stands before that."""
        return self.blocks.removesuffix(f"{self.stack}.")

    def block(self, index: int) -> str:
        """What the names of the tensors inside a block begin with."""
        return f"{self.blocks}{index}."

    def inside(self, name: str) -> tuple[int, str] | None:
        """The block of a full name, and the name inside it; ``None`` outside the blocks."""
        match = _INSIDE.fullmatch(name, len(self.blocks)) if name.startswith(self.blocks) else None
        return (int(match["index"]), match["inside"]) if match else None


def _trunks(names: Collection[str]) -> Counter[str]:
    """What stands in front of ``layers.`` -> how many tensors' names begin so."""
    return Counter(match["trunk"] for match in map(_BLOCK.fullmatch, names) if match)


def block_of(name: str) -> tuple[int, str] | None:
    """The block of a full name inside one, and the name inside it, whatever its model is: the first number in it."""
    match = _NUMBERED.fullmatch(name)
    return (int(match["index"]), match["inside"]) if match else None


def kind_of(linear: str) -> tuple[str, int]:
    """What a linear is in every block (``q_proj``; all experts as one: ``experts.*.up_proj``), and its block."""
    place = block_of(linear)
    assert place is not None, linear
    block, name = place
    for part in ("self_attn.", "mlp.", "block_sparse_moe."):
        name = name.removeprefix(part)
    return re.sub(r"\.\d+\.", ".*.", name), block


def template(name: str) -> str:
    """A name with ``{}`` for the number of an expert."""
    return EXPERT.sub("{}", name, count=1)


def unwrapped(names: Collection[str], own: str | None = "model.") -> tuple[dict[str, str], str | None]:
    """Names as they are without what wrappers added, which no reader of checkpoints knows, and with what it looks for.

    Taken away are the parts that torch.compile, FSDP and data parallelism add, wherever they stand, and any other
    beginning that all names have (``base_model.model.`` of PEFT), or all of the decoder have, beside a head without it.
    What the model's class has there is added where it is absent beside a head: no reader looks for it elsewhere.

    Args:
        names: of all tensors.
        own: what the class has before its decoder's names, see :func:`classes.trunk_of`; ``None`` if that is not
            known, and then only what wrappers add inside the names is taken away.

    Returns:
        Name -> name in the result, and a note on what was taken away or added, ``None`` if nothing was.

    Raises:
        BismoothError: two tensors would have one name, there are tensors of an adapter that was not merged, or several
            models.
    """
    if adapter := next(filter(_ADAPTER.search, sorted(names)), None):
        raise BismoothError.of(
            adapter,
            "belongs to an adapter (PEFT) that was not merged into the weights",
            "merge it with model.merge_and_unload() of PEFT, then save with model.save_pretrained(FOLDER)",
        )
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    taken = sorted({part for name in names for part in name.split(".") if part in _WRAPPERS})
    around, instead = "", ""
    if own is not None:
        around, instead = _around(plain.values(), own)
    if around:
        plain = {
            name: instead + short.removeprefix(around) if short.startswith(around) else short
            for name, short in plain.items()
        }
        taken.append(around)
    if not taken:
        return _led(plain, own or "")
    back: dict[str, str] = {}
    for name, short in plain.items():
        if (other := back.setdefault(short, name)) != name:
            remedy = "remove one of them, or save the model again from the object inside the wrapper"
            raise BismoothError.of(name, f"and {other} are both {short} without {' and '.join(taken)}", remedy)
    what = " and ".join(repr(part) for part in taken)
    note = f"the tensors' names hold {what}, which a wrapper left; they are read and written without"
    plain, more = _led(plain, own or "")
    return plain, f"{note}; {more}" if more else note


def _around(names: Collection[str], own: str) -> tuple[str, str]:
    """What all names of a decoder begin with although its class does not call them so, and what they should have.

    Raises:
        BismoothError: there are several models.
    """
    trunk = Names.among(names).trunk
    known = next((end for end in (own, "model.") if end and f".{trunk}".endswith(f".{end}")), None)
    around = trunk.removesuffix(known) if known else trunk
    around = _PEFT if trunk.startswith(_PEFT) else around
    instead = "model." if around == trunk != _PEFT and trunk.endswith("model.") else ""  # language_model.
    if around and not all(name.startswith(around) for name in names):
        _check_alone(names)
        instead = (own or "model.") if around == trunk else ""
    return around, instead


def _led(plain: dict[str, str], own: str) -> tuple[dict[str, str], str | None]:
    """Names with what the class has before them where they are those of a bare decoder beside a head, and a note."""
    head = next((name for name in plain.values() if name.startswith(("lm_head.", *HEADS))), None)
    if not own or head is None or not plain or Names.among(plain.values()).trunk:
        return plain, None
    led = {name: own + short if short.startswith(_PARTS) else short for name, short in plain.items()}
    return led, (
        f"the names of the decoder's tensors lack the {own!r} under which they are looked for where {head} is beside "
        "them; they are written with it"
    )


def _check_alone(names: Collection[str]) -> None:
    """Raises :class:`BismoothError` if there are several decoders, of which nothing says which one is meant."""
    trunks = sorted(_trunks(names))
    whole = [trunk for trunk in trunks if f"{trunk}embed_tokens.weight" in names] or trunks
    if len(whole) > 1:
        raise BismoothError.of(
            " and ".join(f"{trunk}layers" for trunk in whole),
            "are blocks of several models, and none of them is called model.layers or layers",
            "keep only the tensors of the one that is meant",
        )
