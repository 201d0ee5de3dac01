"""Several vLLM engines, one after the other in one process:
``python -m tests.support.workers.engines WINDOWS.npy MODELS.json FOLDER``.

``MODELS.json`` holds a name for each engine -> ``model``, a checkpoint's folder, perhaps ``options`` for ``vllm.LLM``,
and ``reload``, whether to lose the INT8 weights in the end and load them again. ``FOLDER/<name>.npy`` gets the
log-probabilities of the windows' tokens as in :mod:`benchmarks.score`, ``FOLDER/<name>-reloaded.npy`` those afterwards,
and ``FOLDER/<name>.json`` the quantization method that vLLM settled on, how many linears run on which group size of
ours (``"None"`` = per-channel), and how many layers of experts; or the error that the engine ended in.
"""

import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.score import engine_environment, score, start


def run(folder: Path, windows: np.ndarray, models: dict[str, dict]) -> tuple[dict[str, dict], str]:
    """Start the process; returns name -> answer, with ``logprobs`` (and ``reloaded``) in it, and all that was printed.

    Engines that the process did not come to have no answer.
    """
    question = folder / "windows.npy", folder / "models.json"
    np.save(question[0], windows)
    question[1].write_text(json.dumps(models, default=str))
    environment = engine_environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to look at the model that the engine built
    }
    command = [sys.executable, "-m", "tests.support.workers.engines", *question, folder]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    answers = {}
    for name in models:
        if (answer := folder / f"{name}.json").exists():
            arrays = {"logprobs": folder / f"{name}.npy", "reloaded": folder / f"{name}-reloaded.npy"}
            answers[name] = json.loads(answer.read_text())
            answers[name] |= {key: np.load(path) for key, path in arrays.items() if path.exists()}
    return answers, done.stdout.decode(errors="replace")


def schemes(model) -> Counter:
    """How many linears run on which group size of ours (``"None"`` = per-channel)."""
    if "vllm_w8a8_bismooth.serving.scheme" not in sys.modules:  # then none does, and a process without plugins stays so
        return Counter()
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    found = (getattr(module, "scheme", None) for module in model.modules())
    return Counter(str(scheme.weight_group_size) for scheme in found if isinstance(scheme, W8A8Scheme))


def experts(model) -> Counter:
    """The same of layers of experts."""
    from vllm_w8a8_bismooth.serving.moe import Experts

    found = (getattr(module, "quant_method", None) for module in model.modules())
    return Counter(str(method.weight_group_size) for method in found if isinstance(method, Experts))


def erase(model) -> None:
    """Overwrite what the INT8 linears and experts hold, so that only reloading brings it back."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or name.endswith("weight_scale"):
            parameter.data.zero_()


def meet(model: str) -> None:
    """Registers the model's type as a class: vLLM starts a process for each of its own types to look at the class."""
    from vllm import ModelRegistry

    (name,) = json.loads(Path(model, "config.json").read_text())["architectures"]
    if name in ModelRegistry.models:  # else vLLM tries transformers' class
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def clean_up() -> None:
    """What an engine that nothing refers to any more leaves in the process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def ask(windows: np.ndarray, output: Path, model: str, options: dict | None = None, reload: bool = False) -> dict:
    try:
        meet(model)
        engine = start(model, windows.shape[1], **options or {})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    np.save(output, score(engine, windows))
    if reload:
        engine.apply_model(erase)
        engine.collective_rpc("reload_weights")
        np.save(output.with_name(f"{output.stem}-reloaded.npy"), score(engine, windows))
    return {
        "quantization": engine.llm_engine.model_config.quantization,
        "schemes": engine.apply_model(schemes)[0],
        "experts": engine.apply_model(experts)[0],
    }


def main(windows: np.ndarray, models: dict[str, dict], folder: Path) -> None:
    for name, request in models.items():
        answer = ask(windows, folder / f"{name}.npy", **request)
        (folder / f"{name}.json").write_text(json.dumps(answer))
        clean_up()


if __name__ == "__main__":
    main(np.load(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
