"""The self-test with an emulated GPU, see :mod:`tests.support.workers.selftest`."""

import json
import sys
from collections.abc import Sequence

from tests.support.emulation import ROOT
from vllm_w8a8_bismooth.ops.selftest.examination import Limits

LIMITS = Limits(start=100, case=8, whole=200)


def command(tiles: Sequence[int], **broken: str) -> list[str]:
    """What runs it where kernels of GPU 0 are broken in some ways."""
    return of_gpus(tiles, {0: broken})


def of_gpus(tiles: Sequence[int], broken: dict[int, dict[str, str]]) -> list[str]:
    script = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    asked = json.dumps({"tiles": tiles, "broken": broken})
    return [sys.executable, "-c", script, "tests.support.workers.selftest", asked]
