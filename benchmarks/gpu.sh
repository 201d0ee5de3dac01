#!/usr/bin/env bash
# One short visit to a GPU in one command: what it is, whether all works there, how fast; the most valuable first.
#
#     benchmarks/gpu.sh pack                 # before, where there is a network: what the visit needs, into .gpu/
#     benchmarks/gpu.sh [SECTION ...]        # there; default: all, in the order of the list below
#     benchmarks/gpu.sh --dry [SECTION ...]  # anywhere: every section that can, on a CPU and small; no figure counts
#
# The machine needs torch >= 2.11 for CUDA 13, transformers 5, nvcc 13 and Python 3.12, and no network. It gets this tree
# and, as git ignores them, what is named below; at most 64 MiB in all. The trained models are 32 MiB of the tree, and no
# section needs them. So before the visit, after the last commit (`pack` says what all weighs, and only that if it ran
# before):
#
#     benchmarks/gpu.sh --dry
#     git sparse-checkout set --no-cone '/*' '!*.safetensors' '!*.jsonl.xz' '!docstrings/' '!headers/'
#     TORCH_CUDA_ARCH_LIST=9.0a BISMOOTH_CUDA=1 python setup.py build_ext --inplace    # where nvcc is; else there
#     python -m benchmarks.cutlass_baseline                                            # likewise
#     benchmarks/gpu.sh pack
#     git sparse-checkout disable                                                      # after the visit
#
# and then, as one visit has 15 minutes in all, in two calls, the second right after the first:
#
#     carry                                                            call
#     .gpu  vllm_w8a8_bismooth/_C.so  build/cutlass                    benchmarks/gpu.sh build check quick tiles
#     the same                                                         benchmarks/gpu.sh gemm quant linear
#
# and in later visits, in calls of ten minutes:
#
#     .gpu  vllm_w8a8_bismooth/_C.so                                   benchmarks/gpu.sh serve     # goes on if repeated
#     .gpu/kernels.tar.xz .gpu/commit  vllm_w8a8_bismooth/_C.so         benchmarks/gpu.sh sanitize
#
# `serve` goes on from build/serve, which stays on the machine while it is held. MODEL=random:llama3-70b-tp8-shard serves
# another model.
#
# The order: kernels that are there (build; no time where they were brought along), then three minutes for what the
# machine is, the gate, the tests and a verdict (check), because no other figure counts where that is bad. Then ours,
# Triton's and vLLM's side by side (quick), and what better tiles would gain, of ours and of Triton's (tiles). All linears
# (gemm), the quantization of activations and both together (quant, linear) follow; then what the sanitizer finds.
# `serve` matters as much as `gemm`, but fills what it gets, so it is last and has calls of its own.
#
# Each section has its own time limit and failures do not stop the next. BUDGET (seconds, default 590) bounds the whole:
# sections that no longer fit are named at the end, for the next call. Results, at most 8 files, go to $OUT (default
# build/gpu, or build/gpu-dry): log.txt, and a JSON of each measurement, which fills while it runs. The exit status is 1
# if a section failed, after all have run; a section that was left out, cut short or not begun did not fail. Ctrl-C ends
# the section that runs and begins no other; the summary is said all the same.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
device=cuda dry='' collect='' rehearse='' small='' out=${OUT:-build/gpu} model=${MODEL:-random:llama3-8b}

declare -A limit=([build]=240 [check]=180 [quick]=140 [tiles]=180 [gemm]=280 [quant]=60 [linear]=240 [sanitize]=280
    [serve]=580)
order=(build check quick tiles gemm quant linear sanitize serve)

# $dry, $collect, $rehearse and $small are words or nothing; sections run in a shell of their own.
# shellcheck disable=SC2086,SC2329
{
    section_build() {
        if [ $device = cpu ]; then # compiles nothing: that takes minutes
            [ -e vllm_w8a8_bismooth/_C.so ] || leave_out "no compiled kernels: python setup.py build_ext --inplace"
            kernels_load
        else # one architecture: the machine's; a library that was brought along is used as it is
            export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} BISMOOTH_CUDA=1
            kernels_load || { $python setup.py build_ext --inplace && kernels_load; } || return
            $python -m benchmarks.cutlass_baseline || echo "no CUTLASS baseline"
        fi
    }
    section_check() { # stops itself before its limit, so that a verdict is said; without an engine it does with less
        bring_engine
        $python -m benchmarks.check --device $device $dry --json "$out/check.json"
    }
    section_quick() {
        $rehearse $python -m benchmarks.gemm --device $device ${dry:---quick} $small --json "$out/quick.json"
    }
    section_gemm() { $python -m benchmarks.gemm --device $device $dry --json "$out/gemm.json"; }
    section_quant() { $python -m benchmarks.quant --device $device $dry --json "$out/quant.json"; }
    section_linear() {
        local m=${dry:+1,5}
        $rehearse $python -m benchmarks.gemm --device $device $dry $small --linear --m "${m:-1,16,64,256,1024,4096}" \
            --json "$out/linear.json"
    }
    section_sanitize() { run_tests sanitizer; }
    section_tiles() { $rehearse $python -m benchmarks.tiles $dry --json "$out/tiles.json"; }
    section_serve() {
        bring_engine || leave_out "the engine needs .gpu/kernels.tar.xz too"
        ! lacks vllm || leave_out "no vLLM here: carry .gpu, made by benchmarks/gpu.sh pack"
        export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
        [ -z "$dry" ] || rm -f build/serve/random-tiny/runs-*.json # or it would find nothing left to do
        $python -m benchmarks.serve "$model" ${dry:+--quick --arms per-channel} --json "$out/serve-${model//:/-}.json"
    }
    run_tests() {
        set -o pipefail
        $python -m pytest -q --tb=short -p no:cacheprovider -m gpu $collect -k "$1" tests/ops/test_gpu.py |
            tee build/gpu-tests.txt || return
        [ -n "$dry" ] || grep -q " passed" build/gpu-tests.txt || leave_out "every test was skipped"
    }
    bring_engine() { # where .gpu has one, for what runs next
        [ -z "$dry" ] && unpack engine || return 0
        [ -e "${VLLM_LIBRARY:-}" ] || return
        ln -sf "$VLLM_LIBRARY" build/gpu-engine/vllm/_C_stable_libtorch.abi3.so
        export PYTHONPATH=$PWD/build/gpu-engine:$PYTHONPATH
    }
    leave_out() { echo "left out: $1"; exit 77; }
    kernels_load() { $python -c "from vllm_w8a8_bismooth import ops; raise SystemExit(not ops.has_kernel('$device'))"; }
    lacks() { [ "$($python -c "import importlib.util as u; print(u.find_spec('$1') is None)")" = True ]; }
}

# Whether build/gpu-$1 is there, unpacked from .gpu now or before.
unpack() {
    local to=build/gpu-$1
    if [ ! -e "$to" ] && [ -e ".gpu/$1.tar.xz" ]; then
        rm -rf "$to.partial"
        mkdir -p "$to.partial" && $python -m tarfile -e ".gpu/$1.tar.xz" "$to.partial" && mv "$to.partial" "$to"
    fi
    [ -e "$to" ]
}

if [ "${1:-}" = pack ]; then exec "$python" -m benchmarks.pack; fi
if [ "${1:-}" = --dry ]; then
    shift
    device=cpu dry=--dry collect=--collect-only out=${OUT:-build/gpu-dry} model=random:tiny
    rehearse='env TRITON_INTERPRET=1' small='--shapes tp1.o' # Triton's interpreter takes its time
fi
for name in "$@"; do
    [ -n "${limit[$name]:-}" ] || { echo "no section $name; there are: ${order[*]}" >&2; exit 2; }
done
[ $# -gt 0 ] && order=("$@")

began=$SECONDS
log=$out/log.txt
mkdir -p "$out" build
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
BENCHMARK_COMMIT=$(git describe --always --abbrev=40 --dirty 2>/dev/null || cat .gpu/commit 2>/dev/null)
export BENCHMARK_COMMIT
if [ -z "$dry" ] && unpack kernels; then
    export PYTHONPATH=$PWD/build/gpu-kernels/site:$PYTHONPATH
    export VLLM_LIBRARY=$PWD/build/gpu-kernels/_C_stable_libtorch.abi3.so
fi

export python device dry collect rehearse small out model
for name in "${order[@]}"; do export -f "section_$name"; done
export -f run_tests bring_engine leave_out kernels_load lacks unpack
summary=() late=() failed=0 stopped=''
trap 'stopped=130' INT
trap 'stopped=143' TERM
for name in "${order[@]}"; do
    left=$((${BUDGET:-590} - SECONDS + began))
    if [ $left -lt 20 ] || [ -n "$stopped" ]; then late+=("$name"); continue; fi
    seconds=$((limit[$name] < left ? limit[$name] : left))
    start=$SECONDS
    echo "== $name (at most $seconds s)" | tee -a "$log"
    lines=$(wc -l <"$log")
    # In the background, because a trap waits for what is in the foreground.
    timeout --kill-after=5 $seconds bash -c "section_$name" >>"$log" 2>&1 &
    wait $!
    status=$?
    if [ -n "$stopped" ]; then kill $! 2>/dev/null; wait $!; status=$stopped; fi
    tail -n "+$((lines + 1))" "$log" | tail -n 40
    case $status in
        0) verdict=ok ;;
        77) verdict="left out ($(tail -n 1 "$log" | sed 's/^left out: //'))" ;;
        124 | 137) verdict="cut short" ;;
        130 | 143) verdict=stopped ;;
        *) verdict="failed ($status)" failed=1 ;;
    esac
    summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
done
{
    echo "== summary of $BENCHMARK_COMMIT"
    printf '%s\n' "${summary[@]}"
    [ ${#late[@]} -eq 0 ] || echo "not begun: benchmarks/gpu.sh ${late[*]}"
} | tee -a "$log"
exit ${stopped:-$failed}
