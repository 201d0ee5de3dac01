"""What vLLM with the plugin says of several checkpoints:
``python -m tests.support.workers.refusals ANSWERS.json MODEL...``.

They are loaded one after the other in one process. The answers are model -> what was raised (the whole chain of
messages), or ``None`` where it could be served and gave a token.
"""

import gc
import json
import sys
from pathlib import Path


def attempt(model: str) -> str | None:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        engine = LLM(model, enforce_eager=True, max_model_len=64, disable_log_stats=True)
        engine.generate(["x"], SamplingParams(max_tokens=1), use_tqdm=False)
        return None
    except Exception as error:
        chain, told = error, []
        while chain is not None:
            told.append(f"{type(chain).__name__}: {chain}")
            chain = chain.__cause__ or chain.__context__
        return "\n".join(told)
    finally:
        engine = None
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({model: attempt(model) for model in sys.argv[2:]}))
