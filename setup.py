"""Compile csrc/ into `vllm_w8a8_bismooth/_C.so`: plain functions on torch's stable ABI, no Python symbols, one file for
every Python and every torch from 2.11 on, built against whichever torch (also a CPU one) the target environment holds.

Environment:
    BISMOOTH_CPU, BISMOOTH_CUDA: 1 requires these kernels, 0 leaves them out. Unset, CPU kernels are built where that is
        possible, and CUDA kernels, which take minutes, where also a GPU is seen, torch is built for CUDA, or
        TORCH_CUDA_ARCH_LIST is set.
    TORCH_CUDA_ARCH_LIST: CUDA architectures, such as "8.0 9.0a 12.0+PTX" (default: every supported one); those that
        have no kernels, or that nvcc does not know, are left out.
    CUDA_HOME, CXX, MAX_JOBS: as usual.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# One place for every kind of installation, also an editable or isolated one: what has not changed is compiled once.
OBJECTS = ROOT / "build/kernels"

# One compilation of csrc/cpu/kernels.cpp per instruction-set level, the fastest first. The last runs everywhere.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
CPU_LEVELS = {
    "amx": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": [],
}
if platform.machine() != "x86_64":
    CPU_LEVELS = {"portable": []}
# -ffp-contract=off: the numerics contract rounds products and sums separately. The other two let loops become vectors.
CPU_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

CUDA_ARCHES = ["8.0", "8.9", "9.0a", "10.0", "12.0+PTX"]
CUDA_FLAGS = ["-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xcompiler=-fPIC", "-diag-suppress=177"]
# What ptxas must not say: it would mean wgmma instructions in a row, or registers not handed over.
CUDA_FATAL = ("C7508", "C7510", "setmaxnreg ignored")


def find_torch() -> Path | None:
    """The folder of torch, also from within an isolated build, which hides but does not remove the environment's."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")


def find_cutlass() -> Path | None:
    """The headers of the wheel `nvidia-cutlass`, without importing it."""
    try:
        files = importlib.metadata.distribution("nvidia-cutlass").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    header = next((f for f in files if f.as_posix().endswith("source/include/cute/tensor.hpp")), None)
    return Path(header.locate()).parents[1] if header else None


def cuda_unused(torch: Path) -> str | None:
    """Why nothing here could run CUDA kernels; None where something could, or where architectures were named.

    A torch built for CUDA counts without a GPU: container images are built on machines that have none.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or (torch / "lib/libtorch_cuda.so").exists():
        return None
    try:
        if not subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            return None
    except FileNotFoundError:
        pass
    return "there is no GPU and torch is not built for CUDA; BISMOOTH_CUDA=1 compiles them all the same"


def wanted(name: str, missing: str | None, unused: str | None = None) -> bool:
    """Whether to build the CPU or CUDA kernels, given what is missing for it and why nobody would run them; says why
    not.
    """
    asked = os.environ.get(f"BISMOOTH_{name}")
    if asked not in (None, "0", "1"):
        sys.exit(f"BISMOOTH_{name}={asked}: it must be 0, 1 or unset")
    if asked == "0":
        print(f"{name} kernels: left out, as BISMOOTH_{name}=0 asks")
        return False
    if missing:
        if asked == "1":
            sys.exit(f"BISMOOTH_{name}=1, but {missing}")
        print(f"{name} kernels: left out, because {missing}; the torch reference works without them", file=sys.stderr)
        return False
    if unused and asked is None:
        print(f"{name} kernels: left out, because {unused}", file=sys.stderr)
        return False
    return True


def architectures(listed: str, known: str) -> list[str]:
    """Those to compile for, with a line on the others.

    Args:
        listed: TORCH_CUDA_ARCH_LIST, which is often written for torch's own kernels.
        known: what ``nvcc --list-gpu-arch`` prints.
    """
    asked, virtual = listed.replace(";", " ").split(), re.findall(r"compute_(\d+)", known)
    kept = []
    for arch in asked:
        major, _, minor = arch.partition("+")[0].partition(".")
        if major.isdigit() and int(major) >= 8 and f"{major}{minor.rstrip('af')}" in virtual:
            kept.append(arch)
    if left_out := [arch for arch in asked if arch not in kept]:
        needed = "they need a number from 8.0 on, which this nvcc knows"
        print(f"CUDA kernels: not for {', '.join(left_out)} of TORCH_CUDA_ARCH_LIST: {needed}", file=sys.stderr)
    return kept if asked else CUDA_ARCHES


def gencode(arches: list[str]) -> list[str]:
    """Machine code for each architecture, and for "X+PTX" also the PTX that later ones compile."""
    flags = []
    for arch in arches:
        number, _, ptx = arch.partition("+")
        number = number.replace(".", "").replace("90", "90a").replace("aa", "a")  # wgmma is of sm_90a alone
        for code in ["sm", "compute"] if ptx else ["sm"]:
            flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        torch, nvcc, cutlass = find_torch(), find_nvcc(), find_cutlass()
        compiler = os.environ.get("CXX", "g++")
        no_torch = None if torch else "torch is not installed in this environment"
        no_cxx = None if shutil.which(compiler) else f"there is no compiler {compiler}"
        no_nvcc = None if nvcc else "there is no nvcc (CUDA toolkit)"
        no_cutlass = None if cutlass else "the headers of nvidia-cutlass are not installed"
        self.steps = []  # (command, source, object)
        common = [
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{CSRC}",
        ]
        if torch:
            common += [f"-I{torch / 'include'}"]
        if wanted("CPU", no_torch or no_cxx):
            levels = "".join(f"X({level})" for level in CPU_LEVELS)
            self.add([compiler, *common, *CPU_FLAGS, f"-DW8A8_LEVELS(X)={levels}"], CSRC / "cpu/ops.cpp")
            for level, flags in CPU_LEVELS.items():
                command = [compiler, *common, *CPU_FLAGS, *flags, f"-DW8A8_LEVEL={level}"]
                self.add(command, CSRC / "cpu/kernels.cpp", f"kernels_{level}.o")
        cuda = sorted((CSRC / "cuda").glob("*.cu"))
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        arches = architectures(listed, run([nvcc, "--list-gpu-arch"])) if nvcc and listed else CUDA_ARCHES
        no_arch = None if arches else f"TORCH_CUDA_ARCH_LIST={listed} has none that they run on"
        no_cuda = no_torch or no_cxx or no_nvcc or no_cutlass or no_arch
        if cuda and wanted("CUDA", no_cuda, torch and cuda_unused(torch)):
            host = [f for f in common if f.startswith(("-std", "-D", "-I"))]
            command = [nvcc, *host, "-DUSE_CUDA", f"-I{cutlass}", *CUDA_FLAGS, *gencode(arches), f"-ccbin={compiler}"]
            for source in cuda:
                self.add(command, source)
            # nvcc may be a script somewhere else, so it is asked where its libraries are.
            places = shlex.split(re.search("LIBRARIES=(.*)", run([nvcc, "--dryrun", "-link", "none.o"])).group(1))
            self.cuda_libraries = [*places, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        else:
            self.cuda_libraries = []
        if not self.steps:
            return
        self.torch, self.cxx = torch, compiler
        super().run()

    def add(self, command: list[str], source: Path, name: str | None = None) -> None:
        self.steps.append((command, source, OBJECTS / source.parent.name / (name or source.stem + ".o")))

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            list(pool.map(lambda step: self.compile(*step), self.steps))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(o) for _, _, o in self.steps]
        # libtorch_cpu alone: its name resolves to the library that torch has loaded, on CUDA builds too.
        libraries = [f"-L{self.torch / 'lib'}", "-ltorch_cpu", *self.cuda_libraries, "-Wl,--exclude-libs,ALL", "-s"]
        run([self.cxx, "-shared", "-o", str(target), *objects, *libraries])

    def compile(self, command: list[str], source: Path, target: Path) -> None:
        used, record = target.with_suffix(".d"), target.with_suffix(".command")
        command = [*command, "-MMD", "-MF", str(used), "-c", str(source), "-o", str(target)]
        if not self.force and up_to_date(target, used, record, shlex.join(command)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        began = time.monotonic()
        log = run(command)
        fatal = [line for line in log.splitlines() if any(word in line for word in CUDA_FATAL)]
        if fatal:
            sys.exit(f"{source.name}: ptxas gave up what the kernel relies on:\n" + "\n".join(fatal))
        record.write_text(shlex.join(command))
        print(f"compiled {target.relative_to(OBJECTS)} in {time.monotonic() - began:.0f} s", flush=True)


def up_to_date(target: Path, used: Path, record: Path, command: str) -> bool:
    """Whether this command wrote the target after the last change of each file that it includes."""
    if not (target.exists() and used.exists() and record.exists() and record.read_text() == command):
        return False
    inputs = [Path(p) for p in used.read_text().replace("\\\n", " ").partition(": ")[2].split()]
    return all(p.exists() and p.stat().st_mtime < target.stat().st_mtime for p in inputs)


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """No Python ABI is involved: one wheel per platform."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("vllm_w8a8_bismooth._C", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
