"""Several vLLM engines, one after the other in one process: ``python -m tests.engines WINDOWS.npy FOLDER MODEL...``.

For each model, ``FOLDER/<its name>.npy`` gets the log-probabilities of the windows' tokens as in
:mod:`benchmarks.score`, and ``FOLDER/<its name>.json`` the quantization method that vLLM settled on, and how many
linears run on which group size of ours (``"None"`` = per-channel).
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.score import score, start


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
        meet(model)
        engine = start(model, windows.shape[1])
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
