"""One conversion by llm-compressor, in an environment of its own: it cannot share vLLM's.

    PYTHON peer_convert.py rtn|model-free|smoothquant SRC DST [CALIBRATION] [--strength ALPHA]

Run by `benchmarks.convert` for its speed and by `benchmarks.peer` for its accuracy. CALIBRATION is text, of which 16
windows of 256 tokens are taken, or a ``.npy`` file of tokens, int64 ``[windows, length]``, taken as they are.
Prints, as the last line, JSON: ``seconds`` from the end of the imports to the end of the last write, and ``versions``.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS, LENGTH = 16, 256


def rtn(source: str, destination: str, calibration: Path | None, strength: float) -> None:
    """Round to nearest through the model, as the project's examples do."""
    _oneshot(source, destination, [_w8a8()])


def model_free(source: str, destination: str, calibration: Path | None, strength: float) -> None:
    """Round to nearest shard by shard, without the model: the way whose memory does not grow with the checkpoint."""
    model_free_ptq(source, destination, scheme="W8A8", ignore=["lm_head", "model.embed_tokens"])


def smoothquant(source: str, destination: str, calibration: Path, strength: float) -> None:
    """SmoothQuant by the default pipeline, then rounding. Batches larger than the default, 1, save nothing on a CPU."""
    windows = _tokens(source, calibration)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": np.ones_like(windows)})
    count, length = windows.shape
    recipe = [SmoothQuantModifier(smoothing_strength=strength), _w8a8()]
    _oneshot(source, destination, recipe, dataset=data, num_calibration_samples=count, max_seq_length=length)


METHODS = {"rtn": rtn, "model-free": model_free, "smoothquant": smoothquant}


def _w8a8() -> QuantizationModifier:
    return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])


def _oneshot(source: str, destination: str, recipe: list, **data) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(destination, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(destination)


def _tokens(source: str, calibration: Path) -> np.ndarray:
    """The windows of a ``.npy`` file, or those that `bismooth` cuts from the text: BOS, then the next tokens."""
    if calibration.suffix == ".npy":
        return np.load(calibration)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(calibration.read_text(), add_special_tokens=False).input_ids
    step = LENGTH - 1
    return np.array([[tokenizer.bos_token_id, *ids[i * step : (i + 1) * step]] for i in range(WINDOWS)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("calibration", type=Path, nargs="?", help="needed by smoothquant")
    parser.add_argument("--strength", type=float, default=0.5, help="of SmoothQuant: 1 moves all into the weights")
    arguments = parser.parse_args()
    if arguments.method == "smoothquant" and arguments.calibration is None:
        parser.error("smoothquant needs CALIBRATION")
    started = time.perf_counter()
    METHODS[arguments.method](arguments.source, arguments.destination, arguments.calibration, arguments.strength)
    seconds = time.perf_counter() - started
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    print(json.dumps({"seconds": seconds, "versions": versions}), flush=True)
