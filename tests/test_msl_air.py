"""MLX's kernels as Apple's compiler made them give, bit for bit, what the harness makes of their source."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "msl")]  # tools/ is no installed package

import air  # noqa: E402
import mlx_kernels  # noqa: E402
from test_msl_harness import TYPES, affine, as_type  # noqa: E402

KERNELS = [
    ("affine_qmv_fast_float_gs_64_b_4_batch_0_pr_0_hgs_0_r_4", "float", 4),
    ("affine_qmv_fast_float16_t_gs_64_b_2_batch_0_pr_0_hgs_0_r_4", "half", 2),
    ("affine_qmm_t_float_gs_64_b_4_alN_false_batch_0", "float", 4),
    ("affine_qmm_t_float_gs_64_b_8_alN_false_batch_0", "float", 8),
    ("affine_qmm_t_bfloat16_t_gs_64_b_4_alN_false_batch_0", "bfloat", 4),
]


@pytest.fixture(autouse=True)
def tools():
    if air.tool("llvm-dis") is None or air.tool("llc") is None:
        pytest.skip("needs llvm-dis and llc 19 or newer: apt-get install llvm-22")
    if isinstance(mlx_kernels.wheel(), str):
        pytest.skip(mlx_kernels.wheel())


@pytest.mark.parametrize("name, type_, bits", KERNELS)
def test_apples_code_and_the_harness_give_the_same_bits(name, type_, bits, tmp_path):
    matrix = "qmm_t" in name
    m, n, k = (40, 70, 128) if matrix else (2, 16, 1024)
    words, scales, biases, _ = affine(bits, type_, n, k)
    x = as_type(np.random.default_rng(4).normal(size=(m, k)), type_)
    sizes = {5: np.int32(k), 6: np.int32(n)} | ({7: np.int32(m)} if matrix else {})
    sizes |= mlx_kernels.no_batch(8 if matrix else 7)
    grid, threads = ((3, 2, 1), (32, 2, 2)) if matrix else ((m, n // 8, 1), (32, 2, 1))
    flags = "false, false" if matrix else "false"
    entry = ("affine_qmm_t" if matrix else "affine_qmv_fast", f"{type_}, 64, {bits}, {flags}")
    outputs = []
    for lib in (mlx_kernels.quantized([entry]), air.library(name, entry, tmp_path)):
        y = np.full((m, n), 0x7E00 if type_ == "bfloat" else np.nan, TYPES[type_])
        lib.run(entry, {0: words, 1: scales, 2: biases, 3: x, 4: y, **sizes}, grid, threads, seed=2)
        outputs.append(y)
    assert outputs[0].tobytes() == outputs[1].tobytes()
    assert len(np.unique(outputs[0])) > n  # numbers, not a constant
