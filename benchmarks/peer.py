"""W8A8 INT8 checkpoints by llm-compressor, for comparison of accuracy.

    python -m benchmarks.peer PYTHON SRC DST TOKENS.npy [--strength ALPHA] [--method smoothquant|rtn]

PYTHON is the interpreter of an environment with llm-compressor (`pip install llmcompressor` into a fresh one). Weights
are rounded per output channel, activations quantized dynamically per token, ``lm_head`` stays; SmoothQuant at strength
alpha comes first, calibrated on exactly the given tokens, so that two tools can be given the same.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

_SCRIPT = Path(__file__).with_name("peer_convert.py")


def convert(
    python: str, source: Path, destination: Path, tokens: np.ndarray, strength: float = 0.5, method: str = "smoothquant"
) -> dict[str, str]:
    """Convert in a process of that environment.

    Args:
        python: interpreter with llm-compressor.
        source: unquantized checkpoint folder.
        destination: folder to write; compressed-tensors, ``int-quantized``.
        tokens: int64 ``[windows, length]`` for calibration.
        strength: of SmoothQuant, share of the activations' range that is moved into the weights.
        method: of ``peer_convert.py``.

    Returns:
        Distribution -> version, of what made the checkpoint.

    Raises:
        RuntimeError: it failed; the message ends with the tail of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch, "tokens.npy"), tokens)
        # The script writes logs where it stands.
        paths = [str(Path(path).resolve()) for path in (_SCRIPT, source, destination, Path(scratch, "tokens.npy"))]
        command = [os.path.abspath(python), paths[0], method, *paths[1:], "--strength", str(strength)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)  # of this environment
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llm-compressor failed on {source} ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["versions"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--method", choices=("smoothquant", "rtn"), default="smoothquant")
    arguments = vars(parser.parse_args())
    print(json.dumps(convert(**arguments | {"tokens": np.load(arguments["tokens"])})))
