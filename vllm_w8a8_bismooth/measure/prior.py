"""Activations estimated from the weights alone: variances carried from the embedding through the blocks."""

from collections.abc import Iterator, Mapping

import torch

from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.method.columns import Columns, indices
from vllm_w8a8_bismooth.method.moments import ORDER, Moments
from vllm_w8a8_bismooth.method.rows import Fold, Threads
from vllm_w8a8_bismooth.model.layers import Layer, Site

_ROWS, _RUN = 4096, 64  # of the embedding that are looked at, and how many in a row
_EXTREME = 4.0  # standard deviations of the largest of some 16,000 normal values
_NODES = torch.linspace(-6, 6, 241, dtype=torch.float64)
_DENSITY = (_NODES.square() / -2).exp() / (_NODES.square() / -2).exp().sum()


def _normal(order: int) -> float:
    """E|z|^order of a standard normal z."""
    return float((_NODES.abs() ** order * _DENSITY).sum())


class Prior:
    """Stands in for :class:`calibration.Calibration` where there is no calibration text.

    Every channel is taken to be normal and independent of the others. The embedding's rows give the variances of the
    residual stream; a norm multiplies by its gain; a linear adds up its row; what ``o_proj`` and ``down_proj`` (or the
    norms behind them) write is added to the stream. Multipliers of embeddings and residuals, means, correlations and
    the mixing over positions by attention are left out: only ratios between the channels of one site matter here.

    Sites behind ``v_proj`` get nothing: there the estimate did not help on any of three models.

    Args:
        source: of weights and names.
        device: where the blocks are.

    Attributes:
        hidden: fp32 ``[hidden]``, variances of the residual stream before the next block. May be replaced by what an
            earlier run had at the same place.
    """

    def __init__(self, source: Source, device: torch.device):
        self._source = source
        checkpoint, embedding = source.checkpoint, source.names.embedding
        vocabulary = checkpoint.headers[embedding].shape[0]
        stride = max(_RUN, vocabulary * _RUN // _ROWS)
        starts = range(0, vocabulary, stride)
        runs = [checkpoint.rows(embedding, i, min(_RUN, vocabulary - i)).float() for i in starts]
        self.hidden = (sum(run.square().sum(dim=0) for run in runs) / sum(map(len, runs))).to(device)

    def advance(self, index: int, tensors: Mapping[str, torch.Tensor], threads: Threads) -> dict[str, Moments]:
        """What the sites of a block read; the next call is about the next block.

        Args:
            index: of the block that comes next.
            tensors: what is stored of it, by name inside the block, on the device.
            threads: that look through the weights.

        Returns:
            Site name -> moments of its K input channels.

        Raises:
            BismoothError: the weights are so large that fp32 cannot hold what they make.
        """
        layer = self._source.layers[index]
        norms = [site for site in layer.sites if site.producer not in layer.linears]
        halves = [site for site in norms if site.channels == len(self.hidden)]
        posts = list(layer.posts.items()) if len(layer.posts) == len(halves) else []
        found: dict[str, Moments] = {}
        for site in norms:
            gain = tensors[f"{site.producer}.weight"].float() + site.offset
            rms = gain.abs()
            if site in halves:
                rms = (self.hidden / self.hidden.mean().clamp(min=1e-30)).sqrt() * rms
            bias = tensors.get(f"{site.producer}.bias")
            rms = Columns.of(site).spread(rms if bias is None else torch.hypot(rms, bias.float()))
            found[site.name] = _moments(rms, rms * _normal(ORDER) ** (1 / ORDER))
            written = self._write(layer, site, rms, tensors, found, threads)
            if posts and site in halves:
                post, offset = posts[halves.index(site)]
                written = (tensors[f"{post}.weight"].float() + offset).square()
            self.hidden = self.hidden + written
        seen = {"the residual stream": self.hidden} | {f"site {name}": moments.high for name, moments in found.items()}
        for place, sizes in seen.items():
            if not sizes.isfinite().all():
                raise BismoothError.of(
                    f"{self._source.names.block(index)}*",
                    f"what the weights up to here make of the embedding overflows at {place}",
                    "no sound model has such weights, repair them",
                )
        return found

    def _write(
        self,
        layer: Layer,
        behind: Site,
        rms: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        found: dict[str, Moments],
        threads: Threads,
    ) -> torch.Tensor:
        """Variances that one half of a block adds to the stream; notes the sites inside it in ``found``."""

        def rows(linear: str, columns: torch.Tensor) -> torch.Tensor:
            size = Fold(columns=columns).row_norms(tensors[f"{linear}.weight"], threads)
            bias = tensors.get(f"{linear}.bias")
            return size if bias is None else torch.hypot(size, bias.float())

        written = torch.zeros_like(self.hidden)
        for consumer in (name for name in behind.consumers if name in layer.writers):
            written += rows(consumer, rms).square()
        for site in _inside(layer, behind):
            size = rows(site.producer, rms)[indices(site.rows)]
            if site.gate is not None:
                gate = rows(site.gate, rms)[: site.channels]
                size, high = _gated(size, gate, 2), _gated(size, gate, ORDER)
                found[site.name] = _moments(size, high)
            for consumer in (name for name in site.consumers if name in layer.writers):
                share = len(layer.experts & layer.writers) if consumer in layer.experts else 1
                written += rows(consumer, Columns.of(site).spread(size)).square() / share
        return written


def _inside(layer: Layer, behind: Site) -> Iterator[Site]:
    """The sites whose producers read what the norm of another site wrote."""
    return (site for site in layer.sites if site.producer in behind.consumers)


def _gated(size: torch.Tensor, gate: torch.Tensor, order: int) -> torch.Tensor:
    """fp32 ``[K]``: ``E[|silu(g) u|^order]^(1/order)`` for normal g and u with these standard deviations.

    Other gates (GELU) differ from SiLU by less than this whole estimate does from the truth.
    """
    opened = torch.nn.functional.silu(gate.double().cpu().unsqueeze(1) * _NODES).abs()
    mean = (opened**order * _DENSITY).sum(dim=1) * _normal(order)
    return (mean ** (1 / order)).float().to(size.device) * size


def _moments(rms: torch.Tensor, high: torch.Tensor) -> Moments:
    """Moments of one row, from each channel's RMS and its norm of order :data:`ORDER`, fp32 ``[K]``."""
    unit = rms.double().square().mean().sqrt().clamp(min=1e-30)
    return Moments(1, rms * _EXTREME, (rms.double() / unit) ** 2, (high.double() / unit) ** ORDER)
