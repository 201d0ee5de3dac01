"""Conversions by llm-compressor, in an environment of its own: it cannot share vLLM's.

    PYTHON llm_compressor.py SRC DST TOKENS.npy KINDS.json

KINDS is name -> ``config_groups`` of compressed-tensors, for all linears but ``lm_head``; DST/name is written for each.
TOKENS, int64 ``[windows, length]``, calibrate what is static. Kinds whose name begins with ``gptq`` have their weights
rounded by GPTQ, after SmoothQuant; the others' are rounded to nearest.
"""

import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: str, destination: Path, tokens: np.ndarray, groups: dict, gptq: bool) -> None:
    rounding = (GPTQModifier if gptq else QuantizationModifier)(config_groups=groups, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(
        model=model,
        recipe=[SmoothQuantModifier(smoothing_strength=0.8), rounding] if gptq else [rounding],
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    model.save_pretrained(destination, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(destination)


if __name__ == "__main__":
    source, destination, tokens, kinds = sys.argv[1:]
    for name, groups in json.loads(Path(kinds).read_text()).items():
        convert(source, Path(destination, name), np.load(tokens), groups, gptq=name.startswith("gptq"))
