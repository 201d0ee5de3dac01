"""The CUDA GEMM sources, unmodified, on the host emulation: equal to the reference for every tile, tail, group and
split, under any order of threads; and the emulation notices when a barrier is missing."""

import functools
import itertools
import re
import shutil

import pytest
import torch

from setup import gencode
from tests.support.emulation import CHANNEL, DEVICES, GROUP_128, GROUP_ANY, ROOT, Kernels, compile_library, problem
from vllm_w8a8_bismooth import ops  # noqa: F401 -- loads the compiled library
from vllm_w8a8_bismooth.ops import reference

if not shutil.which("g++"):
    pytest.skip("no g++ to compile the kernels for the host", allow_module_level=True)

TILES = 19
LLAMA = [  # (N, K) of LLaMA3-8B and of 70B under tensor parallelism 1, 2 and 4
    *[(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    *[(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    *[(5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)],
    *[(2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)],
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The matrices are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kernels():
    return Kernels(compile_library(ROOT / "tests/csrc/gemm.cpp"))


def groups_of(tile):
    """(K, groups) that a tile is built for: all granularities, and K that is no multiple of its blocks."""
    shapes = [(528, 1)] if tile.granularities >> CHANNEL & 1 else []
    shapes += [(640, 5)] if tile.granularities >> GROUP_128 & 1 else []
    return shapes + ([(192, 6), (320, 5), (512, 2), (288, 3)] if tile.granularities >> GROUP_ANY & 1 else [])


@functools.cache
def reference_of(m, n, k, groups, a_groups, dtype, bias):
    """Operands, the reference's result, and how far from it a kernel may be: nothing per channel."""
    a, b, a_scale, b_scale, offset = operands = problem(m, n, k, groups, a_groups, bias)
    if groups == 1:  # int32 sums are exact, and the epilogue rounds as the reference does
        return operands, reference.scaled_mm(a, b, a_scale, b_scale, dtype, offset), 0.0
    eps = torch.finfo(dtype).eps
    # fp32 sums of fused multiply-adds: apart from the last bit of a step the same as the reference
    products = torch.einsum("mgk,ngk->gmn", *(x.double().reshape(len(x), groups, k // groups) for x in (a, b)))
    terms = products * a_scale.double().t()[:, :, None] * b_scale.double().t()[:, None, :]
    offset = offset.double() if bias else torch.zeros(n, dtype=torch.float64)
    exact = terms.sum(0) + offset
    return operands, exact, (terms.abs().sum(0) + offset.abs()) * (groups + 2) * 2.0**-24 + exact.abs() * eps


def check(kernels, tile, m, n, k, groups, a_groups, dtype, bias=None, **options):
    (a, b, a_scale, b_scale, offset), expected, near = reference_of(m, n, k, groups, a_groups, dtype, bias)
    got = kernels.gemm(tile, a, b, a_scale, b_scale, dtype, offset, **options)
    where = f"{kernels.tiles[tile]} M={m} N={n} K={k} groups={groups} a_groups={a_groups} {dtype} {options}"
    assert ((got.double() - expected.double()).abs() <= near).all(), where


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "large"])
@pytest.mark.parametrize("index", range(TILES))
def test_tile_matches_reference(kernels, index, large):
    """Tails of M, N that is no multiple of any tile, every granularity, both kinds of activation scales."""
    tile = kernels.tiles[index]
    for k, groups in groups_of(tile):
        for a_groups in (False, True) if groups > 1 else (False,):
            tokens = (0, 1, 7, 8, 13, 70, 130, 300) if k == 528 or k == 640 else (13, 70)
            for i, m in enumerate(tokens):
                if large != (m > 70):
                    continue
                dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
                bias = (None, torch.bfloat16, torch.float32, torch.float16)[i % 4]
                check(kernels, index, m, 400, k, groups, a_groups, dtype, bias, seed=i, grid=2)


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 20), marks=pytest.mark.slow)], ids=["4 seeds", "16 more"]
)
@pytest.mark.parametrize("index", range(TILES))
def test_any_order_of_threads(kernels, index, seeds):
    """Few CTAs with many blocks, so that the ring of stages goes round."""
    k, groups = groups_of(kernels.tiles[index])[-1]
    k = {640: 1664, 528: 1808}.get(k, k)
    groups = 13 if k == 1664 else groups
    for seed in seeds:
        check(kernels, index, 21, 272, k, groups, groups > 1 and seed % 2 == 0, torch.bfloat16, seed=seed, grid=1)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [CHANNEL, GROUP_128])
def test_splits_are_exact(kernels, granularity):
    k, groups = (1552, 1) if granularity == CHANNEL else (1664, 13)
    tiles = [tile for tile in kernels.tiles if tile.splits[granularity]]
    assert len(tiles) == {CHANNEL: 16, GROUP_128: 7}[granularity]
    for tile, a_groups in itertools.product(tiles, {False, groups > 1}):
        for seed, (split, whole) in enumerate([(2, 0), (3, 0), (3, 2), (min(7, k // tile.block), 1)]):
            options = {"split": split, "whole": whole, "seed": seed, "grid": 3}
            check(kernels, tile.index, 70, 400, k, groups, a_groups, torch.bfloat16, torch.float32, **options)
            check(kernels, tile.index, 3, 400, k, groups, a_groups, torch.float32, **options)


def test_same_bits_whatever_tile_split_and_batch(kernels):
    """A token's result does not depend on the tokens beside it, nor on how the work is cut. True per group as well."""
    for k, groups, a_groups in ((1152, 1, False), (1152, 9, False), (1152, 9, True)):
        a, b, a_scale, b_scale, _ = problem(37, 144, k, groups, a_groups)
        expected = None
        for tile in kernels.tiles:
            if not tile.granularities >> (GROUP_128 if groups > 1 else CHANNEL) & 1:
                continue
            splits = tile.splits[GROUP_128 if groups > 1 else CHANNEL]
            for m, split in ((37, 1), (5, 1), *([(37, 2), (5, 3), (1, 2)] if splits else [])):
                got = kernels.gemm(tile.index, a[:m], b, a_scale[:m], b_scale, torch.float32, split=split, seed=m)
                expected = got if expected is None else expected
                assert torch.equal(got, expected[:m]), f"{tile} {m} {split} {groups}"


def test_extreme_codes_and_strides(kernels):
    """-128 everywhere is the largest sum; scales may lie in memory in any order."""
    a, b = (torch.full((16, 256), -128, dtype=torch.int8) for _ in range(2))
    for groups in (1, 2, 8):
        b_scale = torch.rand(groups, 16).t()
        a_scale = torch.rand(groups, 16).t()
        expected = reference.scaled_mm(a, b, a_scale if groups > 1 else a_scale[:, :1], b_scale, torch.float32)
        for tile in kernels.tiles:
            granularity = {1: CHANNEL, 2: GROUP_128, 8: GROUP_ANY}[groups]
            if tile.granularities >> granularity & 1:
                got = kernels.gemm(tile.index, a, b, a_scale, b_scale, torch.float32, seed=3)
                assert torch.allclose(got, expected, rtol=1e-6), f"{tile} {groups}"


def test_small_floats(kernels):
    """The emulated conversions are torch's, so that a wrong cast is the kernel's."""
    x = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-5, torch.tensor([0.0, -0.0, 65519.0, 65520.0, 1e9, -1e9])])
    for dtype, code in ((torch.bfloat16, 1), (torch.float16, 2)):
        half, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
        kernels.library.round_floats(*map(_pointer, (x, half)), len(x), code)
        kernels.library.widen_halves(*map(_pointer, (half, back)), len(x), code)
        assert torch.equal(half, x.to(dtype)) and torch.equal(back, half.float())


def _pointer(tensor):
    import ctypes

    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.slow
def test_schedule_covers_everything_once(kernels):
    shapes = [(1, 16, 16), (130, 400, 272), (300, 1040, 1552), (5000, 2560, 1024)]
    for (m, n, k), tile, split, whole in itertools.product(shapes, kernels.tiles, (1, 3, 8), (0, 1, 1 << 20)):
        tiles, units = kernels.units(m, n, k, tile.index, whole, split)
        blocks = -(-k // tile.block)
        covered = {}
        for token_tile, weight_tile, begin, end, split_tile, part in units:
            assert 0 <= token_tile * tile.tokens < m and 0 <= weight_tile * tile.weights * tile.cluster < n
            assert (split_tile < 0) == (whole > 0 and len(covered) < min(whole, tiles)) and part < split
            covered.setdefault((token_tile, weight_tile), []).append((begin, end))
        assert len(covered) == tiles
        for ranges in covered.values():
            assert ranges[0][0] == 0 and ranges[-1][1] == blocks
            assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))


@pytest.mark.parametrize("device", DEVICES)
def test_choice_is_sane(kernels, device):
    capability, sms, shared, memory = DEVICES[device]
    for (n, k), granularity in itertools.product(LLAMA, (CHANNEL, GROUP_128, GROUP_ANY)):
        before = 0.0
        for m in (1, 2, 8, 16, 17, 32, 64, 65, 128, 256, 512, 1024, 2048, 4096, 8192):
            index, whole, split, clocks = kernels.choose(m, n, k, granularity, capability, sms, shared, memory)
            where = f"{device} {m} {n} {k} {granularity}: {kernels.tiles[index]} split {split}"
            tile = kernels.tiles[index]
            assert tile.granularities >> granularity & 1 and tile.shared[granularity] <= shared, where
            assert not tile.wgmma or capability == 90, where
            tiles, units = kernels.units(m, n, k, index, whole, split)
            assert split == 1 or tile.splits[granularity] and all(unit[3] > unit[2] for unit in units), where
            held = 1 if tile.wgmma else max(1, 233472 // tile.shared[granularity])  # at most, by a multiprocessor
            assert (tiles - whole) * split * tile.cluster <= sms * held or split == 1, (
                where
            )  # the last wave is one wave
            assert tile.tokens <= 64 or m > 16, where  # decode does not multiply much padding
            assert clocks >= before * 0.999, where  # more tokens never take less time
            before = clocks
            if capability == 90 and m >= 1024 and granularity != GROUP_ANY:
                assert tile.wgmma and tile.tokens * tile.weights >= 192 * 128, where
        if granularity == CHANNEL:  # decode has as much in flight as memory brings in a thousand clocks
            index, whole, split, _ = kernels.choose(1, n, k, granularity, capability, sms, shared, memory)
            tiles, units = kernels.units(1, n, k, index, whole, split)
            tile, where = kernels.tiles[index], f"{device} {n} {k}: {index}, {len(units)} units"
            assert len(units) * (tile.tokens + tile.weights) * tile.cluster * tile.ring[CHANNEL] >= 1000 * memory, where


def test_choice_follows_the_loaded_code(kernels):
    """Not the device: PTX for 8.0 on Hopper has no wgmma, and code for 8.9 no tile of more than 99 KiB."""
    assert kernels.device(90, 90, 132, 232448) == (90, 132, 232448)
    assert kernels.device(80, 80, 108, 166912) == (80, 108, 166912)
    assert kernels.device(89, 80, 142, 101376) == (89, 142, 101376)  # its rates, with the code of 8.0
    assert kernels.device(103, 100, 148, 232448) == (100, 148, 232448)
    assert kernels.device(121, 120, 48, 101376) == (120, 48, 101376)
    for code, shared in ((80, 232448), (86, 101376), (89, 101376)):
        device = kernels.device(90, code, 132, 232448)
        assert device == (code, 132, shared)
        for (n, k), m, granularity in itertools.product(LLAMA, (1, 64, 4096), (CHANNEL, GROUP_128, GROUP_ANY)):
            tile = kernels.tiles[kernels.choose(m, n, k, granularity, *device)[0]]
            assert not tile.wgmma and tile.shared[granularity] <= shared
    assert kernels.device(87, 86, 16, 166912) == (87, 16, 101376)  # 8.7 runs the binaries of 8.6


def test_architectures_of_a_build():
    """As torch reads TORCH_CUDA_ARCH_LIST: "+PTX" adds PTX to the machine code."""
    assert gencode(["8.0", "9.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_too_little_shared_memory_is_no_choice(kernels):
    assert kernels.choose(1, 4096, 4096, CHANNEL, 80, 108, 16384)[0] == -1


@pytest.mark.parametrize("device", DEVICES)
def test_choice_leaves_out_what_it_must(kernels, device):
    """One by one, until none is left; the next choice is then the best of the others."""
    capability, sms, shared, memory = DEVICES[device]
    for (n, k), m, granularity in itertools.product(LLAMA[:4], (1, 64, 4096), (CHANNEL, GROUP_128, GROUP_ANY)):
        left_out, before = [], 0.0
        fitting = [
            tile
            for tile in kernels.tiles
            if tile.granularities >> granularity & 1
            and tile.shared[granularity] <= shared
            and (capability == 90 or not tile.wgmma)
        ]
        for _ in fitting:
            tile, _, split, clocks = kernels.choose(m, n, k, granularity, capability, sms, shared, memory, left_out)
            assert tile not in left_out and clocks >= before
            assert kernels.choose(m, n, k, granularity, capability, sms, shared, memory, left_out, splits=False)[2] == 1
            before = clocks
            left_out.append(tile)
        assert sorted(left_out) == [tile.index for tile in fitting]
        assert kernels.choose(m, n, k, granularity, capability, sms, shared, memory, left_out)[0] == -1


def test_captured_launches_share_no_tickets(kernels):
    """A graph may run beside any launch: eager ones go round in their own ring, and graphs find none in the end."""
    take, most, ring, captured = kernels.library.take_tickets, 4096, 1 << 20, 1 << 22
    before, eager, graphs = -1, set(), []
    while (first := take(0, 4000, True)) >= 0:
        graphs.append(range(first, first + 4000))
        at = take(0, most - 1, False)
        assert at != before and 0 <= at < ring
        before = at
        eager.add(at + most - 2)  # the last of its places
    assert len(graphs) == captured // 4000 and len(eager) * most > ring  # the ring went round
    assert max(eager) < graphs[0].start and graphs[-1].stop <= ring + most + captured
    assert all(left.stop == right.start for left, right in itertools.pairwise(graphs))
    assert take(0, 4000, True) < 0 and take(1, 4000, True) == ring + most  # another device has its own


def test_plugin_can_ask_what_is_supported():
    """At load, before there are activations; needs no GPU."""
    unsupported = getattr(torch.ops.w8a8_bismooth, "gemm_unsupported", None)
    if unsupported is None:
        pytest.skip("built without CUDA kernels (nvcc or nvidia-cutlass is missing)")
    assert unsupported(4096, 14336, None, 90) == unsupported(4096, 14336, 128, 80) == unsupported(16, 96, 32, 120) == ""
    assert unsupported(16, 48, None, 90) == unsupported(16, 48, 48, 90) == ""
    assert "below 80" in unsupported(4096, 4096, None, 75)
    assert "multiples of 16" in unsupported(4100, 4096, None, 90)
    assert "multiples of 16" in unsupported(4096, 4104, None, 90)
    assert "group_size = 16 is not a multiple of 32" in unsupported(4096, 4096, 16, 90)
    assert "131072" in unsupported(16, 1 << 17, None, 90)
    with pytest.raises(RuntimeError, match="K = 96 is not a multiple of group_size = 64"):
        unsupported(16, 96, 64, 90)


# Mutants: what is replaced, by what, and the kernels (tile, K, groups, options) of which one must then fail.
MMA, EXCHANGE, HOPPER, CLUSTER, NARROW, TURNS = 9, 7, 3, 5, 14, 17  # tiles
LONG, GROUPED = {"k": 1808, "groups": 1}, {"k": 1664, "groups": 13}
MUTANTS = {
    "mma: block not awaited by all": (
        "gemm_mma.cuh",
        "__syncthreads();  // the block has landed for all",
        "if (mutant != {}) __syncthreads();  //",
        [(MMA, LONG)],
    ),
    "mma: copies awaited too late": (
        "gemm_mma.cuh",
        "ptx::cp_async_wait<STAGES - 2>();",
        "mutant == {} ? ptx::cp_async_wait<STAGES - 1>() : ptx::cp_async_wait<STAGES - 2>();",
        [(MMA, LONG)],
    ),
    "mma: exchange read too early": (
        "gemm_mma.cuh",
        "__syncthreads();  // the loop's own",
        "if (mutant != {}) __syncthreads();  //",
        [(EXCHANGE, GROUPED)],
    ),
    "mma: staging over the last stage": (
        "gemm_mma.cuh",
        "__syncthreads();  // shared memory is free",
        "if (mutant != {}) __syncthreads();  //",
        [(MMA, {"k": 640, "groups": 1})],  # the last block lies where outputs are staged
    ),
    "split: ticket taken before all have written": (
        "epilogue.cuh",
        "  sync();\n  if (thread == 0) {",
        "  if (mutant != {}) sync();\n  if (thread == 0) {",
        [(MMA, LONG | {"split": 2}), (HOPPER, LONG | {"split": 2, "grid": 3})],
    ),
    "split: ticket read before it is taken": (
        "epilogue.cuh",
        "  sync();\n  if (*flag",
        "  if (mutant != {}) sync();\n  if (*flag",
        [(MMA, LONG | {"split": 2}), (HOPPER, LONG | {"split": 2, "grid": 3})],
    ),
    "split: ticket not reset": (
        "epilogue.cuh",
        "if (thread == 0) gemm.tickets",
        "if (mutant != {} && thread == 0) gemm.tickets",
        [(MMA, LONG | {"split": 2})],
    ),
    "split: last part not the last": (
        "epilogue.cuh",
        "*flag + 1 != unsigned(gemm.schedule.split)",
        "*flag + 1 != unsigned(gemm.schedule.split) - (mutant == {})",
        [(MMA, LONG | {"split": 3})],
    ),
    "split: groups added by the first part": (
        "gemm_mma.cuh",
        "if (comes_last(",
        "if ((mutant == {}) != comes_last(",
        [(MMA, GROUPED | {"split": 2}), (EXCHANGE, GROUPED | {"split": 2})],
    ),
    "split: groups of a warpgroup added by its first part": (
        "gemm_wgmma.cuh",
        "if (comes_last(",
        "if ((mutant == {}) != comes_last(",
        [(NARROW, GROUPED | {"split": 2, "grid": 3})],
    ),
    "turns: the other's blocks not counted": (
        "gemm_wgmma.cuh",
        "count += unit.end - unit.begin;",
        "count += (mutant != {}) * (unit.end - unit.begin);",
        [(TURNS, LONG)],
    ),
    "turns: both have every tile": (
        "gemm_wgmma.cuh",
        "if (TURNS && tiles % 2 != warpgroup) {",
        "if (TURNS && mutant != {} && tiles % 2 != warpgroup) {",
        [(TURNS, LONG)],
    ),
    "wgmma: full stage not awaited": (
        "gemm_wgmma.cuh",
        "ptx::mbarrier_wait(full + stage",
        "if (mutant != {}) ptx::mbarrier_wait(full + stage",
        [(HOPPER, LONG)],
    ),
    "wgmma: empty stage not awaited": (
        "gemm_wgmma.cuh",
        "ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);\n          if",
        "if (mutant != {}) ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);\n          if",
        [(HOPPER, LONG)],
    ),
    "wgmma: scales gathered too early": (
        "gemm_wgmma.cuh",
        "ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);\n#pragma",
        "if (mutant != {}) ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);\n#pragma",
        [(HOPPER, GROUPED)],
    ),
    "wgmma: arrival ahead of the scales": (
        "gemm_wgmma.cuh",
        "ptx::cp_async_arrive(full + stage);",
        "mutant == {} ? ptx::mbarrier_arrive(full + stage) : ptx::cp_async_arrive(full + stage);",
        [(HOPPER, GROUPED)],
    ),
    "wgmma: stage released while it is read": (
        "gemm_wgmma.cuh",
        "release((count - 1) % STAGES);\n        } else",
        "release((count - (mutant != {})) % STAGES);\n        } else",
        [(HOPPER, LONG)],
    ),
    "wgmma: registers read too early": (
        "gemm_wgmma.cuh",
        "ptx::wgmma_wait<0>(sums);\n            if",
        "mutant == {} ? ptx::wgmma_wait<1>(sums) : ptx::wgmma_wait<0>(sums);\n            if",
        [(HOPPER, GROUPED)],
    ),
    "wgmma: released while scales are read": (
        "gemm_wgmma.cuh",
        "if (!A_GROUPS && slab",
        "if ((!A_GROUPS || mutant == {0}) && slab",
        [(HOPPER, GROUPED)],
    ),
    "wgmma: one lane speaks for its warp": (
        "gemm_wgmma.cuh",
        "__syncwarp();\n      const",
        "if (mutant != {}) __syncwarp();\n      const",
        [(HOPPER, GROUPED)],
    ),
    "wgmma: staging stored before it is filled": (
        "gemm_wgmma.cuh",
        "sync();\n          store_rows",
        "if (mutant != {}) sync();\n          store_rows",
        [(HOPPER, LONG)],
    ),
    "wgmma: staging filled before it is stored": (
        "gemm_wgmma.cuh",
        "sync();  // before the staging",
        "if (mutant != {}) sync();  //",
        [(HOPPER, LONG)],
    ),
    "wgmma: token scales not awaited": (
        "gemm_wgmma.cuh",
        "sync();  // a_scales are there",
        "if (mutant != {}) sync();  //",
        [(HOPPER, {"k": 272, "groups": 1})],
    ),
    "cluster: started before barriers exist": (
        "gemm_wgmma.cuh",
        "ptx::cluster_sync();\n  } else",
        "mutant == {} ? __syncthreads() : ptx::cluster_sync();\n  } else",
        [(CLUSTER, LONG)],
    ),
    "cluster: stage released for one CTA only": (
        "gemm_wgmma.cuh",
        "ptx::mbarrier_arrive_remote(empty + stage, to);",
        "mutant == {} ? ptx::mbarrier_arrive(empty + stage) : ptx::mbarrier_arrive_remote(empty + stage, to);",
        [(CLUSTER, LONG)],
    ),
    "cluster: left too early": (
        "gemm_wgmma.cuh",
        "ptx::cluster_sync();  // a CTA must not end",
        "if (mutant != {}) ptx::cluster_sync();  //",
        [(CLUSTER, LONG)],
    ),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """All mutants in one library, which are switched on by number."""
    folder = tmp_path_factory.mktemp("mutants")
    sources = {p.name: p.read_text() for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".h", ".cuh")}
    for number, (name, (file, old, new, _)) in enumerate(MUTANTS.items(), 1):
        assert sources[file].count(old) == 1, f"{name}: {old!r} is {sources[file].count(old)} times in {file}"
        sources[file] = sources[file].replace(old, re.sub(r"\{0?\}", str(number), new))
    sources["ptx.h"] += "\ninline int mutant = 0;\n"
    for name, text in sources.items():
        (folder / name).write_text(text)
    only = sum(1 << tile for tile in (MMA, EXCHANGE, HOPPER, CLUSTER, NARROW, TURNS))
    flags = ["-DMUTANTS", f"-DONLY_TILES={only}u", "-Wno-parentheses", "-Wno-misleading-indentation"]
    return Kernels(compile_library(ROOT / "tests/csrc/gemm.cpp", *flags, include=folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_emulation_notices(mutants, name):
    """20 seeds find every mutant, and nothing where there is none."""
    number = list(MUTANTS).index(name) + 1 if name else 0
    sound = [(MMA, LONG), (EXCHANGE, GROUPED), (HOPPER, GROUPED), (CLUSTER, LONG), (TURNS, LONG)]
    cases = MUTANTS[name][3] if name else sound
    mutants.library.set_mutant(number)
    found = False
    for seed, (tile, options) in itertools.product(range(1, 21 if name else 3), cases):
        sizes = {"m": 70, "n": 272, "a_groups": options["groups"] > 1, "dtype": torch.bfloat16}
        try:
            check(mutants, tile, **(sizes | {"grid": 1, "seed": seed} | options))
        except (AssertionError, RuntimeError):
            found = True
            break
    mutants.library.set_mutant(0)
    assert found == (name is not None)
