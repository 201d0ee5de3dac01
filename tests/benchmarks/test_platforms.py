"""What the tables of platforms in docs/serving.md say of tests is so. (They are on the page: tests/test_readme.py.)"""

import re

from benchmarks import platforms
from tests.support import aside
from vllm_w8a8_bismooth.serving import servers


def test_what_is_said_to_compile_is_what_the_tests_compile():
    with aside.process("tests.support.workers.targets") as call:
        compiled = set(call("table"))
    said = " ".join(proven for _, proven in platforms.proofs())
    versions = {f"sm_{major}{minor}" for major, minor in re.findall(r"\b(\d+)\.(\d)\b", said)}
    assert versions | set(re.findall(r"gfx\w+", said)) == compiled


def test_nothing_of_ours_on_a_gpu_is_said_to_have_run():
    found = dict(platforms.proofs())
    serving = {kernel for _, *cells in platforms.layers() for cell in cells for kernel in cell.split(servers.OR)}
    assert serving == {kernel.partition(" on ")[0] for kernel in found}
    for kernel, proven in found.items():
        assert not kernel.startswith("our") or ("CPU" in kernel) != ("**never run**" in proven)
