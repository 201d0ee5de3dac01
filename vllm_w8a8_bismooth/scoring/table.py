"""The figures of a score as rows for people: on the console, and in a model card."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_w8a8_bismooth.scoring.divergence import Interval
    from vllm_w8a8_bismooth.scoring.result import Score


def rows(score: "Score") -> Iterator[tuple[str, str, str]]:
    """What it is, its value, and its 95 % confidence interval."""
    found = score.divergence
    yield "KL divergence, nats a token: mean", f"{found.kl:.2e}", _range(found.kl_interval, ".2e")
    yield "median", f"{found.kl_median:.2e}", ""
    yield "99.9th percentile", f"{found.kl_p999:.2e}", ""
    yield "worst", f"{found.kl_worst:.2e}", ""
    yield "same best token", f"{found.top1:.2%}", _range(found.top1_interval, ".2%")
    yield "perplexity of the source", f"{found.perplexity_source:.4f}", ""
    yield "perplexity of the checkpoint", f"{found.perplexity:.4f}", ""
    yield "change of log-perplexity", f"{found.log_ratio:+.5f}", _range(found.log_ratio_interval, "+.5f")


def worst(score: "Score") -> str:
    """Where the worst token is, in a sentence without a full stop; empty if none differs."""
    if not score.divergence.kl_worst:
        return ""
    window, place = score.divergence.worst
    text = f" ({score.worst_text!r})" if score.worst_text is not None else ""
    return f"The worst is token {place} of window {window}, number {score.worst_token}{text}; both count from 0"


def basis(score: "Score") -> str:
    """What was measured, and in what, in a sentence without a full stop."""
    source, checkpoint = score.dtypes
    dtype = source if source == checkpoint else f"{source} and {checkpoint}"
    tokens = f"{score.predicted:,} tokens in {score.windows} windows of {score.length}"
    return f"{tokens}, vLLM {score.vllm}, computed in {dtype}"


def markdown(score: "Score") -> str:
    """The section of a model card."""
    names = ", ".join(f"`{_plain(name)}`" for name in score.files[:4])
    more = f" and {len(score.files) - 4} more files" if len(score.files) > 4 else ""
    lines = [
        "## What INT8 does to the predictions",
        "",
        f"Measured by `bismooth score` against the original: {basis(score)}.",
        f"The text is {names}{more}, SHA-256 `{score.sha256}`.",
        "In brackets: 95 % confidence, from resampling whole windows.",
        "",
        "| | |",
        "|---|--:|",
        *(f"| {name} | {value}{f' ({interval})' if interval else ''} |" for name, value, interval in rows(score)),
    ]
    notes = [f"{note}." for note in score.notes]
    return "\n".join([*lines, *(["", " ".join(notes)] if notes else [])])


def _plain(name: str) -> str:
    """A name that Markdown cannot take for anything else."""
    return "".join(letter if letter.isalnum() or letter in "._ -" else "_" for letter in name)[:128]


def _range(interval: "Interval | None", form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
