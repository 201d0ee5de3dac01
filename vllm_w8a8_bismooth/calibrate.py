"""Activation ranges from a text file, with one decoder block in memory at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_w8a8_bismooth.architectures import BLOCK, EMBEDDING, Architecture
from vllm_w8a8_bismooth.checkpoint import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError

WINDOW = 512
_PIECE = 2**16  # characters tokenized at once
_CHUNK = 4096  # tokens that pass through a block at once; bounds the MLP's intermediate


@dataclass(frozen=True)
class CalibrationText:
    """The documents of a calibration file and the SHA-256 of its bytes."""

    path: Path
    documents: tuple[str, ...]
    sha256: str


def read_text(path: Path) -> CalibrationText:
    """A ``.txt`` file (one document) or a ``.jsonl`` file (one ``{"text": ...}`` object a line).

    Raises:
        BismoothError: missing, empty, not UTF-8, another suffix, or a line that is not such an object.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise BismoothError(f"{path}: calibration text must be a .txt or .jsonl file, or 'none'")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise BismoothError(f"{path}: calibration file cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise BismoothError(f"{path}: not UTF-8 (byte {error.start}); convert the calibration file to UTF-8") from None
    documents = [text] if path.suffix == ".txt" else [_document(path, n, line) for n, line in _lines(text)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise BismoothError(f"{path}: the calibration file is empty; give it text, or use --calibration none")
    return CalibrationText(path, tuple(documents), hashlib.sha256(data).hexdigest())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _document(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise BismoothError(f'{path}: line {number} is not a JSON object with a string "text"')
    return value["text"]


def tokenize(text: CalibrationText, checkpoint: Checkpoint, budget: int) -> torch.Tensor:
    """Windows of equal length from the checkpoint's own tokenizer, each led by BOS where the tokenizer adds one.

    Args:
        text: the documents, taken in order.
        checkpoint: its folder holds the tokenizer, its config the vocabulary size and the longest position.
        budget: largest number of tokens.

    Returns:
        int64 ``[windows, length]`` with ``length <= 512`` and at most ``budget`` tokens in all.

    Raises:
        BismoothError: no tokenizer in the folder, or its ids exceed the model's vocabulary.
    """
    from transformers import AutoTokenizer

    ids: list[int] = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        lead = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
        # In pieces, because a document may be far longer than the budget; a seam costs at most one odd token.
        for piece in (d[i : i + _PIECE] for d in text.documents for i in range(0, len(d), _PIECE)):
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            if len(ids) >= budget:
                break
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise BismoothError(
            f"{checkpoint.folder}: no usable tokenizer ({type(error).__name__}: {error}); "
            "add tokenizer.json, or use --calibration none"
        ) from None
    if not ids:
        raise BismoothError(f"{text.path}: the checkpoint's tokenizer makes no tokens of it; use --calibration none")
    vocabulary = checkpoint.headers[EMBEDDING].shape[0]
    if max(ids) >= vocabulary:
        raise BismoothError(
            f"{checkpoint.folder}: the tokenizer gives id {max(ids)}, {EMBEDDING} has {vocabulary} rows; "
            "tokenizer and model do not belong together"
        )
    longest = checkpoint.config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else WINDOW
    length = max(1, min(WINDOW, longest, budget, len(ids) + len(lead)) - len(lead))
    count = max(1, min(budget // (length + len(lead)), len(ids) // length))
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(count, -1), windows], dim=1)


@torch.no_grad()
def activation_extents(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tokens: torch.Tensor,
    on_block: Callable[[int], None] = lambda index: None,
) -> list[dict[str, torch.Tensor]]:
    """Largest magnitude of each input channel at each site, over all tokens, from an fp32 forward pass.

    The model is built without storage; each decoder block's weights exist only while the tokens pass through it, so
    memory holds one block and the hidden states of the calibration tokens, whatever the depth.

    Args:
        checkpoint: source of config and weights.
        architecture: its sites say where to measure.
        tokens: int64 ``[windows, length]``.
        on_block: called with the index of each block that is done.

    Returns:
        One dict a block: site name -> fp32 ``[K]``.

    Raises:
        BismoothError: a weight is not finite, or a forward pass overflows (named by block and site).
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        model.rotary_emb = type(model.rotary_emb)(config=config)  # its tables are not in the checkpoint
    except Exception as error:  # as for tokenizers, transformers' own validation raises many types
        raise BismoothError(
            f"{checkpoint.folder}: transformers refuses config.json ({type(error).__name__}: {error}); mend it, "
            "or use --calibration none"
        ) from None
    model.norm = torch.nn.Identity()
    extents: list[dict[str, torch.Tensor]] = []
    for index, block in enumerate(model.layers):
        block.forward = _streamed(block, index, checkpoint, architecture, extents, on_block)
    embedded = checkpoint.read(EMBEDDING)[tokens].float()
    try:
        model(inputs_embeds=embedded, use_cache=False)
    except BismoothError:
        raise
    except Exception as error:
        raise BismoothError(
            f"{checkpoint.folder}: the forward pass failed in block {len(extents)} ({type(error).__name__}: {error}); "
            "check config.json, or use --calibration none"
        ) from error
    return extents


def _streamed(
    block: torch.nn.Module,
    index: int,
    checkpoint: Checkpoint,
    architecture: Architecture,
    extents: list[dict[str, torch.Tensor]],
    on_block: Callable[[int], None],
) -> Callable:
    """The block's forward, with weights that are read on entry and dropped on exit, and sites that record extents."""
    forward = block.forward

    def run(hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        prefix = BLOCK.format(index)
        block.load_state_dict({n: checkpoint.read(prefix + n).float() for n in block.state_dict()}, assign=True)
        seen: dict[str, torch.Tensor] = {}

        def recorder(site: str) -> Callable:
            def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                extent = inputs[0].abs().flatten(0, -2).amax(dim=0)
                seen[site] = torch.maximum(seen[site], extent) if site in seen else extent

            return record

        hooks = [
            block.get_submodule(site.consumers[0]).register_forward_pre_hook(recorder(site.name))
            for site in architecture.sites
        ]
        rows = max(1, _CHUNK // hidden.shape[1])
        outputs = torch.cat(
            [
                forward(hidden[i : i + rows], **{k: _rows(v, i, rows, len(hidden)) for k, v in kwargs.items()})
                for i in range(0, len(hidden), rows)
            ]
        )
        for hook in hooks:
            hook.remove()
        block.to("meta")
        for site, extent in seen.items():
            if not extent.isfinite().all():
                raise BismoothError(f"{prefix}* overflows at site {site} in calibration; the model itself is broken")
        extents.append(seen)
        on_block(index)
        return outputs

    return run


def _rows(value, start: int, count: int, batch: int):
    """The part of a batched argument (a mask ``[batch, 1, L, L]``) that goes with some windows; others pass whole."""
    batched = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[0] == batch
    return value[start : start + count] if batched else value
