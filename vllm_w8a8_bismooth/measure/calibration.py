"""Activation ranges from a text file, with one decoder block in memory at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import own
from vllm_w8a8_bismooth.measure.arithmetic import arithmetic
from vllm_w8a8_bismooth.measure.experts import Experts, separate_experts
from vllm_w8a8_bismooth.measure.text import transformers_config
from vllm_w8a8_bismooth.method.compensate import Gram
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.model.construction import Part
from vllm_w8a8_bismooth.recipe import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 64  # tokens measured at once, which fit a core's cache
_LARGEST = 1e19  # of an activation: fp32 holds its square, and norms take squares
_CHUNK = 1024  # tokens that pass through a block at once; bounds the MLP's intermediate


class Calibration:
    """The calibration tokens on their way through the model, one decoder block after the other.

    The model is built without storage: a block's weights are lent to it for the time of its forward pass.

    Args:
        source: of config, weights and names.
        tokens: int64 ``[windows, length]``.
        device: where the blocks run.
        compute_dtype: in which blocks run, as torch calls it; ``auto`` is that of :func:`arithmetic.arithmetic`.
        correlated: also gather how each site's inputs go together, fp32 ``[K, K]``.

    Attributes:
        source: as given.
        hidden: ``[windows, length, hidden]``, what the next block will read. May be replaced by what an earlier run
            had at the same place.
        grams: site name -> second moments of what it read in the last block; empty unless ``correlated``.
        unread: the experts of the last block that no token was sent to. They were measured on what others were given.

    Raises:
        BismoothError: transformers refuses the config.
    """

    @torch.no_grad()
    def __init__(
        self,
        source: Source,
        tokens: torch.Tensor,
        device: torch.device,
        compute_dtype: str = AUTO,
        correlated: bool = False,
    ):
        checkpoint, build = source.checkpoint, source.construction
        self.source = source
        self.grams: dict[str, Gram] = {}
        self.unread: list[int] = []
        self._correlated = correlated
        used = tokens.unique()  # the embedding's rows are read one by one: only those that occur exist
        if compute_dtype == AUTO:
            compute_dtype = arithmetic(checkpoint.headers[source.names.embedding].dtype, device.type)
        dtype = getattr(torch, compute_dtype)
        rows = torch.cat([checkpoint.rows(source.names.embedding, int(i), 1) for i in used]).to(dtype)
        config = transformers_config(checkpoint)
        try:
            model = own.decoder(checkpoint, dtype, build.decoder.removesuffix("."))
            if model is None:
                model = _decoder(config, dtype)
            self._blocks = list(model.get_submodule(build.blocks).children())
            with torch.device("meta"):
                separate_experts(self._blocks, build)
            embedding = model.get_submodule(build.embedding)
            embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
            embedding.padding_idx = None  # a number among all rows, of which only some are here
            embedding.register_forward_pre_hook(lambda module, ids: torch.searchsorted(used, ids[0]))
            if build.norm is not None:
                model.set_submodule(build.norm, torch.nn.Identity())
            read = {path: checkpoint.read(name).to(dtype) for path, name in build.outside.items()}
            model.load_state_dict(read, strict=False, assign=True)
            model.requires_grad_(False)
            self._forwards = [block.forward for block in self._blocks]
            given = [Given(build.returned) for _ in self._blocks]
            for block, stand_in in zip(self._blocks, given, strict=True):
                block.forward = stand_in
            for window in tokens.split(1):
                model(input_ids=window, use_cache=False)
        except Exception as error:
            what = f"calibration cannot run this model ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
            raise BismoothError.of(checkpoint.folder, what, "use --calibration none, or --method rtn") from None
        if given[0].hidden[0].ndim != 3:
            what = "its blocks read several hidden states of each token, which calibration does not carry"
            raise BismoothError.of(checkpoint.folder, what, "use --calibration none, or --method rtn")
        # One window at a time was given; ChatGLM's blocks have its length first.
        self._led_by_length = given[0].hidden[0].shape[0] != 1
        self.hidden = torch.cat([self._turned(hidden) for hidden in given[0].hidden]).to(device)
        self._arguments = [_each(lambda tensor: tensor.to(device), block.arguments) for block in given]

    def _turned(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states with the window first, or from that as the blocks have them: mostly, it is the same."""
        return hidden.transpose(0, 1) if self._led_by_length else hidden

    @contextmanager
    def lend(
        self, index: int, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[torch.nn.Module, Callable[[torch.Tensor, Sequence[int]], torch.Tensor]]]:
        """A block that has its weights until the context ends, and what runs it on ``[windows, length, hidden]`` of the
        windows with some numbers.

        Args:
            index: of the block.
            tensors: what is stored of it, by name inside the block, on the device.
            dtype: of weights and hidden states.

        Raises:
            BismoothError: anything fails inside the context (named by block).
        """
        block = self._blocks[index]
        arguments = _each(lambda t: t.to(dtype) if t.is_floating_point() else t, self._arguments[index])
        together = len(arguments) == 1 and _fit_all(arguments)
        try:
            build = self.source.construction
            state = {name: (build.parts(index, name), value.shape) for name, value in block.state_dict().items()}
            lent = {name: _parameter(tensors, parts, shape).to(dtype) for name, (parts, shape) in state.items()}
            block.load_state_dict(lent, assign=True)
            first = 0 if build.returned else ...

            def run(hidden: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
                done = []
                for piece, window in [(hidden, 0)] if together else zip(hidden.split(1), windows, strict=True):
                    places, names = arguments[window % len(arguments)]
                    done.append(self._turned(self._forwards[index](self._turned(piece), *places, **names)[first]))
                return torch.cat(done) if len(done) > 1 else done[0]

            yield block, run
        except Exception as error:
            raise BismoothError.of(
                self.source.checkpoint.folder,
                f"the forward pass failed in block {index} ({type(error).__name__}: {error})",
                "check config.json, or use --calibration none",
            ) from error
        finally:
            _take_back(block)
            for mixture in _mixtures(block):
                mixture.forget()

    @torch.no_grad()
    def advance(self, index: int, tensors: Mapping[str, torch.Tensor], threads: Threads) -> dict[str, Moments]:
        """Run block ``index`` on the hidden states, and measure what its sites read.

        Args:
            index: of the block that comes next.
            tensors: what is stored of it, by name inside the block, on the device.
            threads: not used; here as in :class:`prior.Prior`.

        Returns:
            Site name -> moments of its K input channels over all tokens. There are none of sites inside experts that
            are not modules of their own.

        Raises:
            BismoothError: the forward pass fails or overflows (named by block and site).
        """
        built, prefix = partial(self.source.construction.built, index), self.source.names.block(index)
        seen: dict[str, Moments] = {}
        self.grams = {}

        def recorder(site: str) -> Callable:
            def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                rows = inputs[0].flatten(0, -2)
                found = seen.setdefault(site, Moments.none(rows.shape[1], rows.device))
                for piece in rows.split(_ROWS):
                    found.add(piece.to(torch.float32, copy=True))
                if self._correlated:
                    self.grams.setdefault(site, Gram.none(rows.shape[1], rows.device)).add(rows.float())

            return record

        with self.lend(index, tensors, self.hidden.dtype) as (block, run):
            modules = dict(block.named_modules())
            hooks = [
                # Hook the last consumer: in a mixture, only the router sees every token.
                modules[place].register_forward_pre_hook(recorder(site.name))
                for site in self.source.layers[index].sites
                if (place := built(site.consumers[-1])) in modules
            ]
            step = max(1, _CHUNK // self.hidden.shape[1])
            for windows in torch.arange(len(self.hidden)).split(step):
                hidden = self.hidden[windows[0] : windows[-1] + 1]  # a view: the states are replaced in place
                hidden.copy_(run(hidden, windows.tolist()))
            self.unread = [expert for mixture in _mixtures(block) for expert in mixture.read_rest()]
            for hook in hooks:
                hook.remove()
        sizes = {f"at site {name}": float(found.largest.max()) for name, found in seen.items() if found.rows}
        low, high = self.hidden.aminmax()
        sizes["in the residual stream behind it"] = float(torch.maximum(-low, high))
        for place, size in sizes.items():
            if not size < _LARGEST:
                dtype = str(self.hidden.dtype).removeprefix("torch.")
                raise _unbounded(f"{prefix}*", f"calibration, computed in {dtype}, meets", size, place)
        return {site: found for site, found in seen.items() if found.rows}


def _unbounded(where: str, meets: str, size: float, place: str) -> BismoothError:
    """The problem that a value is none, or too large: only in the latter case another method may do."""
    if math.isnan(size):
        remedy = (
            "mend config.json (rms_norm_eps, rope_theta and the like) or the weights: the model computes no numbers"
        )
        return BismoothError.of(where, f"{meets} NaN {place}", remedy)
    remedy = "repair the model, or convert it with --method rtn, which does not run it"
    return BismoothError.of(where, f"{meets} the value {size:.3g} {place}: fp32 cannot hold its square", remedy)


class Given:
    """Stands in for a block's forward: notes what it is given, and passes the hidden states on.

    Args:
        returned: how many things the block returns in a tuple; 0 where it returns hidden states alone.

    Attributes:
        hidden: what it was given in each call.
        calls: all else, those by place, and by name.
    """

    def __init__(self, returned: int):
        self._returned = returned
        self.hidden: list[torch.Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._alike = True

    @property
    def arguments(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Those of each call, or one if all had the same: masks and positions fit all windows, which have one length
        and no padding; embeddings of the tokens that go into every block (Gemma 4) do not."""
        return self.calls[:1] if self._alike else self.calls

    def __call__(self, *places: Any, **names: Any) -> Any:
        hidden, *others = places if places else (names.pop("hidden_states"),)
        now = tuple(others), names
        self._alike = self._alike and all(map(torch.equal, _tensors(self.calls[:1]), _tensors(now)))
        self.hidden.append(hidden)
        self.calls.append(now)
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden


def _mixtures(block: torch.nn.Module) -> list[Experts]:
    return [module for module in block.modules() if isinstance(module, Experts)]


def _parameter(tensors: Mapping[str, torch.Tensor], parts: Sequence[Part], shape: Sequence[int]) -> torch.Tensor:
    """A parameter of some shape, from what is stored of it; of stacked experts, each one's are put together."""
    if not any("{}" in part.tensor for part in parts):
        return _joined(tensors, parts)
    each = ([replace(part, tensor=part.tensor.format(e)) for part in parts] for e in range(shape[0]))
    return torch.stack([_joined(tensors, own) for own in each])


def _joined(tensors: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """A parameter, from what is stored of it."""
    pieces = []
    for part in parts:
        stored = tensors[part.tensor]
        rows = stored if part.into is None else stored[part.start : part.start + part.into[1]]
        pieces.append(rows.mT if part.transposed else rows)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1 if parts[0].transposed else 0)


def _take_back(block: torch.nn.Module) -> None:
    """Leave a block without its weights. Buffers stay: not all of them are in the checkpoint."""
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


def _decoder(config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """transformers' bare decoder; parameters without storage."""
    from transformers import AutoModel

    # sdpa would drop the soft cap on attention logits without a word
    capped = getattr(config, "attn_logit_softcapping", None)
    plain = capped or not AutoModel._model_mapping[type(config)]._supports_sdpa
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation="eager" if plain else "sdpa").eval()
    _materialize_buffers(model)
    return model


def _materialize_buffers(model: "PreTrainedModel") -> None:
    """Values for the buffers that no checkpoint holds (rotary tables, Gemma's embedding scale), as from_pretrained
    gives them: by the model's own initialization, which on parameters without storage does nothing."""
    for module in model.modules():
        buffers = list(module.named_buffers(recurse=False))
        for name, buffer in buffers:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():  # also of those without, which may fill what is inside them
        model._init_weights(module)


def _fit_all(arguments: Any) -> bool:
    """Whether what a block is given for one window does for several at once: BLOOM's and Falcon's ALiBi begins with the
    heads of every window."""
    return all(tensor.ndim < 3 or len(tensor) == 1 for tensor in _tensors(arguments))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All that are nested in arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _each(change: Callable[[torch.Tensor], torch.Tensor], value):
    """Nested arguments with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(change, item) for key, item in value.items()}
    return type(value)(_each(change, item) for item in value) if isinstance(value, tuple | list) else value
