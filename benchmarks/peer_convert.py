"""One conversion by llm-compressor, run by `benchmarks.convert` in an environment of its own: it cannot share vLLM's.

    PYTHON peer_convert.py rtn|model-free|smoothquant SRC DST CALIBRATION

Prints, as the last line, JSON: ``seconds`` from the end of the imports to the end of the last write, and ``versions``.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS, LENGTH = 16, 256


def rtn(source: str, destination: str, calibration: Path) -> None:
    """Round to nearest through the model, as the project's examples do."""
    _oneshot(source, destination, [_w8a8()])


def model_free(source: str, destination: str, calibration: Path) -> None:
    """Round to nearest shard by shard, without the model: the way whose memory does not grow with the checkpoint."""
    model_free_ptq(source, destination, scheme="W8A8", ignore=["lm_head", "model.embed_tokens"])


def smoothquant(source: str, destination: str, calibration: Path) -> None:
    """SmoothQuant by the default pipeline, then rounding. Batches larger than the default, 1, save nothing on a CPU."""
    recipe = [SmoothQuantModifier(smoothing_strength=0.5), _w8a8()]
    windows = _windows(source, calibration)
    _oneshot(source, destination, recipe, dataset=windows, num_calibration_samples=WINDOWS, max_seq_length=LENGTH)


METHODS = {"rtn": rtn, "model-free": model_free, "smoothquant": smoothquant}


def _w8a8() -> QuantizationModifier:
    return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])


def _oneshot(source: str, destination: str, recipe: list, **data) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(destination, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(destination)


def _windows(source: str, calibration: Path) -> Dataset:
    """The windows that `bismooth` cuts from the text: BOS, then the next tokens."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(calibration.read_text(), add_special_tokens=False).input_ids
    step = LENGTH - 1
    windows = [[tokenizer.bos_token_id, *ids[i * step : (i + 1) * step]] for i in range(WINDOWS)]
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * LENGTH] * WINDOWS})


if __name__ == "__main__":
    method, source, destination, calibration = sys.argv[1:]
    started = time.perf_counter()
    METHODS[method](source, destination, Path(calibration))
    seconds = time.perf_counter() - started
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    print(json.dumps({"seconds": seconds, "versions": versions}), flush=True)
