"""Several vLLM engines, one after the other in one process: ``python -m tests.engines WINDOWS.npy FOLDER MODEL...``.

MODEL is a checkpoint folder, or ``folder@quantization`` for that ``--quantization``. For each, ``FOLDER/<name>.npy``
gets the log-probabilities of the windows' tokens as in :mod:`benchmarks.score`, and ``FOLDER/<name>.json`` the
quantization method that vLLM settled on, and how many linears run on which group size of ours (``"None"`` =
per-channel); the name is MODEL's, without the folders above it.
"""

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.score import engine_environment, score, start


def run(folder: Path, windows: np.ndarray, models: Sequence[str]) -> list[tuple[dict, np.ndarray]]:
    """Start the process; returns for each of ``models`` what the two files in ``folder`` hold."""
    np.save(folder / "windows.npy", windows)
    environment = engine_environment() | {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the model that the engine built
    }
    command = [sys.executable, "-m", "tests.engines", folder / "windows.npy", folder, *models]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    found = [folder / Path(model).name for model in models]
    for path in found:  # not the exit code: see tests.engine
        assert Path(f"{path}.json").exists(), f"{path}: {done.stdout.decode(errors='replace')[-3000:]}"
    return [(json.loads(Path(f"{path}.json").read_text()), np.load(f"{path}.npy")) for path in found]


def schemes(model) -> Counter:
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    found = (getattr(module, "scheme", None) for module in model.modules())
    return Counter(str(scheme.weight_group_size) for scheme in found if isinstance(scheme, W8A8Scheme))


def meet(model: str) -> None:
    """Registers the model's type as a class: vLLM starts a process for each of its own types to look at the class."""
    from vllm import ModelRegistry

    (name,) = json.loads(Path(model, "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def clean_up() -> None:
    """What an engine that nothing refers to any more leaves in the process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main(windows: np.ndarray, folder: Path, models: list[str]) -> None:
    for model in models:
        checkpoint, _, quantization = model.partition("@")
        meet(checkpoint)
        engine = start(checkpoint, windows.shape[1], quantization or None)
        answer = {
            "quantization": engine.llm_engine.model_config.quantization,
            "schemes": engine.apply_model(schemes)[0],
        }
        np.save(folder / f"{Path(model).name}.npy", score(engine, windows))
        (folder / f"{Path(model).name}.json").write_text(json.dumps(answer))
        del engine
        clean_up()


if __name__ == "__main__":
    main(np.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
