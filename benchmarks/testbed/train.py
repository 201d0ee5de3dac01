"""Train the test bed's models: small, and on text that any machine has.

    python -m benchmarks.testbed.train [python | headers | docstrings]
    python -m benchmarks.testbed.train --corpus

``python``, the one that the tests use, reads the committed corpus and so can be repeated exactly on any Python: 8.9 MB
of source from CPython 3.11.7 (tests and generated tables left out), PSF licence, one JSON object {"path", "text"} a
line. The other two differ from it in text, shape, model type and tying, so that what was tuned on one model can be
judged on others; they read what a vLLM environment has installed: the C++ headers of torch, and the docstrings of four
packages. Documents are split by the CRC-32 of their name: 1/50 held out (never seen in training or calibration), 1/50
for calibration (1/15 where the corpus is not committed), the rest for training.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import lzma
import math
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.testbed import BEDS, CORPUS

EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages"}
DOCUMENTED = ("torch", "sympy", "numpy", "networkx")
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCAB = 2048
WARMUP = 100

Documents = Iterator[tuple[str, str]]


def write_corpus() -> None:
    """Collect the interpreter's library into ``corpus.jsonl.xz``, ordered by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not EXCLUDED & set(p.relative_to(root).parts))
    with lzma.open(CORPUS, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as out:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="strict")
            out.write(json.dumps({"path": path.relative_to(root).as_posix(), "text": text}) + "\n")


def python_source() -> Documents:
    """The committed corpus."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield document["path"], document["text"]


def headers() -> Documents:
    """Every fourth C++ header that torch installs."""
    root = Path(importlib.util.find_spec("torch").origin).parent / "include"
    for path in sorted(root.rglob("*.h")):
        name = path.relative_to(root).as_posix()
        if zlib.crc32(name.encode()) % 4 == 0:
            yield name, path.read_text(encoding="utf-8", errors="replace")


def docstrings() -> Documents:
    """The docstrings of each module of some packages, joined."""
    for package in DOCUMENTED:
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            if text := "\n\n".join(dict.fromkeys(d for d in found if d)):
                yield f"{package}/{path.relative_to(root).as_posix()}", text


@dataclass(frozen=True)
class Training:
    """How one model is made: its text, its config, and the schedule."""

    documents: Callable[[], Documents]
    versions: tuple[str, ...]
    calibration_share: int
    config: dict[str, Any]
    seed: int
    window: int
    batch: int
    steps: int
    learning_rate: float


_SHARED = dict(vocab_size=VOCAB, max_position_embeddings=512, rope_theta=10000.0, bos_token_id=0, eos_token_id=1)
MODELS = {
    "python": Training(
        documents=python_source,
        versions=(),
        calibration_share=1,
        config=dict(
            model_type="llama",
            hidden_size=384,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            **_SHARED,
        ),
        seed=20260,
        window=512,
        batch=8,
        steps=2600,
        learning_rate=2e-3,
    ),
    "headers": Training(
        documents=headers,
        versions=("torch",),
        calibration_share=3,
        config=dict(
            model_type="llama",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=7,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            **_SHARED,
        ),
        seed=1,
        window=256,
        batch=16,
        steps=1000,
        learning_rate=3e-3,
    ),
    "docstrings": Training(
        documents=docstrings,
        versions=DOCUMENTED,
        calibration_share=3,
        config=dict(
            model_type="qwen2",
            hidden_size=320,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=5,
            num_key_value_heads=5,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            **_SHARED,
        ),
        seed=2,
        window=256,
        batch=16,
        steps=1000,
        learning_rate=2e-3,
    ),
}


def read_corpus(training: Training) -> dict[str, list[str]]:
    """The texts of the three splits: ``train``, ``calibration`` and ``heldout``."""
    splits: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    names = {0: "heldout"} | dict.fromkeys(range(1, 1 + training.calibration_share), "calibration")
    for name, text in training.documents():
        splits[names.get(zlib.crc32(name.encode()) % 50, "train")].append(text)
    return splits


def train_tokenizer(texts: list[str]):
    """Byte-level BPE with a BOS template, as LLaMA 3 has it; a ``PreTrainedTokenizerFast``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=512)


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 stream, each followed by EOS, without BOS."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, eos], dtype=np.uint16) for e in encoded])


def windows(stream: np.ndarray, starts, length: int, bos: int) -> torch.Tensor:
    """int64 [len(starts), length]: BOS, then the length - 1 tokens from each start."""
    rows = [np.concatenate([[bos], stream[s : s + length - 1]]) for s in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    logits = model(input_ids=batch[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model, stream: np.ndarray, length: int, bos: int, limit: int = 64) -> float:
    """Mean loss over the first ``limit`` consecutive windows of the held-out stream."""
    starts = range(0, min(len(stream) - length, limit * (length - 1)), length - 1)
    model.eval()
    losses = [loss_of(model, windows(stream, [s], length, bos)).item() for s in starts]
    model.train()
    return sum(losses) / len(losses)


def train(name: str, folder: Path) -> None:
    """Train tokenizer and model from the corpus, and write the assets into ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    training = MODELS[name]
    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    splits = read_corpus(training)
    tokenizer = train_tokenizer(splits["train"])
    streams = {name: encode(tokenizer, texts) for name, texts in splits.items()}
    bos = tokenizer.bos_token_id
    counts = np.bincount(streams["heldout"], minlength=VOCAB)
    p = counts[counts > 0] / counts.sum()
    unigram = float(-(p * np.log(p)).sum())
    print({name: len(s) for name, s in streams.items()}, f"unigram entropy {unigram:.3f} nats")

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**training.config), dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters")
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / training.steps))))
        ),
    )
    started = time.time()
    for step in range(training.steps):
        starts = rng.integers(0, len(streams["train"]) - training.window, size=training.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, windows(streams["train"], starts, training.window, bos))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.time() - started:6.0f} s", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    np.save(folder / "heldout.npy", streams["heldout"])
    (folder / "calibration.txt").write_text("\n\n".join(splits["calibration"]), encoding="utf-8")
    record = {
        "seed": training.seed,
        "steps": training.steps,
        "tokens_seen": training.steps * training.batch * training.window,
        "corpus_tokens": {name: len(s) for name, s in streams.items()},
        "parameters": parameters,
        "unigram_entropy_nats": unigram,
        "heldout_loss_nats": heldout_loss(model.float(), streams["heldout"], training.window, bos),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "text_from": {package: importlib.metadata.version(package) for package in training.versions},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="python")
    parser.add_argument("--corpus", action="store_true", help="rewrite the committed corpus instead of training")
    arguments = parser.parse_args()
    write_corpus() if arguments.corpus else train(arguments.model, BEDS[arguments.model].folder)
