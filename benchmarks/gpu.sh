#!/usr/bin/env bash
# One short visit to a GPU in one command: build, check, measure; the most valuable first.
#
#     benchmarks/gpu.sh pack                 # before, where there is a network: what the visit needs goes into .gpu/
#     benchmarks/gpu.sh [SECTION ...]        # there; default: all, in the order of the list below
#
# The machine needs torch >= 2.11 for CUDA 13, nvcc 13 and Python 3.12, and no network. It gets this tree and, ignored
# by git, `.gpu` (37 MB: vLLM's kernels, CUTLASS headers, test tools) and, to save time there,
# `vllm_w8a8_bismooth/_C.so` and `build/cutlass` if they were built before; what is missing is built there.
#
# Each section has its own time limit and failures do not stop the next. BUDGET (seconds, default 590) bounds the whole:
# sections that no longer fit are named at the end, for the next call. Results, at most 8 files, go to $OUT (default
# build/gpu): log.txt, and a JSON of each measurement, which fills while it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}

declare -A limit=([build]=240 [test]=200 [quick]=100 [gemm]=280 [quant]=60 [sanitize]=280 [tiles]=180 [linear]=240)
order=(build test quick gemm quant sanitize tiles linear)

section_build() {
    # One architecture here: the machine's. A library that was brought along is used as it is.
    if [ -e vllm_w8a8_bismooth/_C.so ]; then
        echo "_C.so was brought along"
    else
        export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} BISMOOTH_CUDA=1
        $python setup.py build_ext --inplace || return
    fi
    $python -m benchmarks.cutlass_baseline || echo "no CUTLASS baseline"
    $python -c 'from vllm_w8a8_bismooth import ops; assert ops.has_kernel("cuda"), "the library has no CUDA kernels"'
}
section_test() { $python -m pytest -q --tb=short -p no:cacheprovider -m gpu -k "not sanitizer" tests/test_gpu.py; }
section_quick() { $python -m benchmarks.gemm --device cuda --quick --json "$out/quick.json"; }
section_gemm() { $python -m benchmarks.gemm --device cuda --json "$out/gemm.json"; }
section_quant() { $python -m benchmarks.quant --json "$out/quant.json"; }
section_sanitize() { $python -m pytest -q --tb=short -p no:cacheprovider -m gpu -k sanitizer tests/test_gpu.py; }
section_tiles() { $python -m benchmarks.tiles --json "$out/tiles.json"; }
section_linear() {
    $python -m benchmarks.gemm --device cuda --linear --m 1,16,64,256,1024,4096 --json "$out/linear.json"
}

# Blanks the machine code for other architectures where there is code for the one asked for; nothing moves.
thin='
import struct, sys
data, keep = bytearray(sys.stdin.buffer.read()), (2, int(sys.argv[1]))  # kind 2: ELF
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
sys.stdout.buffer.write(data)
'

pack() {
    set -e
    mkdir -p .gpu/wheels
    git describe --always --abbrev=40 --dirty >.gpu/commit
    local pip=($python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
    for platform in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        pip+=(--platform "${platform}_x86_64")
    done
    "${pip[@]}" -d .gpu/wheels nvidia-cutlass==4.2.0.0 \
        pytest pluggy iniconfig pygments packaging hypothesis sortedcontainers
    if [ ! -e .gpu/vllm.so.xz ]; then # of a wheel of 300 MB, the one library with its INT8 kernels, for Hopper
        "${pip[@]}" -d .gpu/download vllm==0.26.0
        unzip -p .gpu/download/vllm-*.whl vllm/_C_stable_libtorch.abi3.so | $python -c "$thin" 90 | xz -T0 >.gpu/partial
        mv .gpu/partial .gpu/vllm.so.xz
        rm -r .gpu/download
    fi
    du -sh .gpu
}

if [ "${1:-}" = pack ]; then pack; exit; fi
for name in "$@"; do
    [ -n "${limit[$name]:-}" ] || { echo "no section $name; there are: ${order[*]}" >&2; exit 2; }
done
[ $# -gt 0 ] && order=("$@")

mkdir -p "$out"
log=$out/log.txt
began=$SECONDS
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/build/site:$PWD${PYTHONPATH:+:$PYTHONPATH}
BENCHMARK_COMMIT=$(git describe --always --abbrev=40 --dirty 2>/dev/null || cat .gpu/commit 2>/dev/null)
export BENCHMARK_COMMIT
if [ -d .gpu/wheels ] && [ ! -d build/site ]; then
    $python -m pip install --quiet --no-index --no-deps --no-compile --target build/site .gpu/wheels/*.whl
fi
if [ -e .gpu/vllm.so.xz ] && [ ! -e build/vllm.so ]; then xz -dc .gpu/vllm.so.xz >build/vllm.so; fi
[ -e build/vllm.so ] && export VLLM_LIBRARY=$PWD/build/vllm.so
{ nvidia-smi; nvcc --version; $python -c 'import torch; print("torch", torch.__version__)'; } >>"$log" 2>&1

for name in "${order[@]}"; do export -f "section_$name"; done
export python out
summary=() late=()
for name in "${order[@]}"; do
    left=$((${BUDGET:-590} - SECONDS + began))
    if [ $left -lt 20 ]; then late+=("$name"); continue; fi
    seconds=$((limit[$name] < left ? limit[$name] : left))
    start=$SECONDS
    echo "== $name (at most $seconds s)" | tee -a "$log"
    timeout --kill-after=5 $seconds bash -c "section_$name" >"$out/.section" 2>&1
    status=$?
    cat "$out/.section" >>"$log"
    tail -n 40 "$out/.section"
    rm -f "$out/.section"
    case $status in 0) verdict=ok ;; 124 | 137) verdict="cut short" ;; *) verdict="failed ($status)" ;; esac
    summary+=("$(printf '%-10s %-12s %4d s' "$name" "$verdict" $((SECONDS - start)))")
done
{
    echo "== summary of $BENCHMARK_COMMIT"
    printf '%s\n' "${summary[@]}"
    [ ${#late[@]} -eq 0 ] || echo "no time left for: benchmarks/gpu.sh ${late[*]}"
} | tee -a "$log"
