"""Train the test bed: a small LLaMA on the source of Python's standard library.

    python -m benchmarks.testbed.train            # corpus.jsonl.xz -> model/, heldout.npy, calibration.txt
    python -m benchmarks.testbed.train --corpus   # rewrite corpus.jsonl.xz from the running interpreter's library

The committed corpus makes the run repeatable on any Python: 8.9 MB of source from CPython 3.11.7 (tests and
generated tables left out), PSF licence, one JSON object {"path", "text"} a line. Files are split by the CRC-32
of their path: 1/50 held out (never seen in training or calibration), 1/50 for calibration, the rest for training.
"""

import argparse
import json
import lzma
import math
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
CORPUS = HERE / "corpus.jsonl.xz"
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages"}
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

SEED = 20260
VOCAB = 2048
WINDOW = 512
BATCH = 8
STEPS = 2600
LEARNING_RATE = 2e-3
WARMUP = 100

ARCHITECTURE = dict(
    vocab_size=VOCAB,
    hidden_size=384,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=1,
)


def write_corpus() -> None:
    """Collect the interpreter's library into ``corpus.jsonl.xz``, ordered by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not EXCLUDED & set(p.relative_to(root).parts))
    with lzma.open(CORPUS, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as out:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="strict")
            out.write(json.dumps({"path": path.relative_to(root).as_posix(), "text": text}) + "\n")


def read_corpus() -> dict[str, list[str]]:
    """The texts of the three splits: ``train``, ``calibration`` and ``heldout``."""
    splits: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    names = {0: "heldout", 1: "calibration"}
    with lzma.open(CORPUS, "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            split = names.get(zlib.crc32(document["path"].encode()) % 50, "train")
            splits[split].append(document["text"])
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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=WINDOW)


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 stream, each followed by EOS, without BOS."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, eos], dtype=np.uint16) for e in encoded])


def windows(stream: np.ndarray, starts, bos: int) -> torch.Tensor:
    """int64 [len(starts), WINDOW]: BOS, then the WINDOW - 1 tokens from each start."""
    rows = [np.concatenate([[bos], stream[s : s + WINDOW - 1]]) for s in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    logits = model(input_ids=batch[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model, stream: np.ndarray, bos: int, limit: int = 64) -> float:
    """Mean loss over the first ``limit`` consecutive windows of the held-out stream."""
    starts = range(0, min(len(stream) - WINDOW, limit * (WINDOW - 1)), WINDOW - 1)
    model.eval()
    losses = [loss_of(model, windows(stream, [s], bos)).item() for s in starts]
    model.train()
    return sum(losses) / len(losses)


def train() -> None:
    """Train tokenizer and model from the corpus and write the assets beside this file."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    splits = read_corpus()
    tokenizer = train_tokenizer(splits["train"])
    streams = {name: encode(tokenizer, texts) for name, texts in splits.items()}
    bos = tokenizer.bos_token_id
    counts = np.bincount(streams["heldout"], minlength=VOCAB)
    p = counts[counts > 0] / counts.sum()
    unigram = float(-(p * np.log(p)).sum())
    print({name: len(s) for name, s in streams.items()}, f"unigram entropy {unigram:.3f} nats")

    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters")
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS))))
        ),
    )
    started = time.time()
    for step in range(STEPS):
        starts = rng.integers(0, len(streams["train"]) - WINDOW, size=BATCH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, windows(streams["train"], starts, bos))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.time() - started:6.0f} s", flush=True)

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    np.save(HERE / "heldout.npy", streams["heldout"])
    (HERE / "calibration.txt").write_text("\n\n".join(splits["calibration"]), encoding="utf-8")
    record = {
        "seed": SEED,
        "steps": STEPS,
        "tokens_seen": STEPS * BATCH * WINDOW,
        "corpus_tokens": {name: len(s) for name, s in streams.items()},
        "parameters": parameters,
        "unigram_entropy_nats": unigram,
        "heldout_loss_nats": heldout_loss(model.float(), streams["heldout"], bos),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
    }
    (HERE / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", action="store_true", help="rewrite the corpus instead of training")
    write_corpus() if parser.parse_args().corpus else train()
