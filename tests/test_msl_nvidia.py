"""Metal shaders as CUDA text: NVRTC compiles them for an H100. tools/msl/h100_check.py runs them there."""

import sys
from pathlib import Path

import pytest
import shader_cases

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

from tools.msl import harness, nvidia  # noqa: E402

needs_nvrtc = pytest.mark.skipif(
    nvidia.nvrtc_library() is None, reason="needs NVRTC: package nvidia-cuda-nvrtc==13.0.* or a CUDA toolkit"
)


def test_cuda_text_has_one_function_for_each_instantiation():
    entries = [shader_cases.all_entries("qmv")[i] for i in (0, 100, 500)]
    program = nvidia.cuda(shader_cases.SHADERS / "qmv.metal", entries)
    assert list(program.functions) == [harness.entry_name(e) for e in entries]
    for function in program.functions.values():
        assert program.text.count(f"__global__ void {function}(void* b0, void* b1") == 1
    for word in ("threadgroup T", "[[buffer", "[[kernel]]", "const device"):
        assert word not in program.text.split('"entries"')[0].split('#line 1 "qmv.metal"')[1]


def test_threadgroup_arrays_become_shared_memory():
    text = nvidia.cuda(shader_cases.SHADERS / "qmm.metal", [shader_cases.all_entries("qmm")[0]]).text
    assert "__shared__ uint word_tile[2 * BN * (bits + 1)];" in text


@needs_nvrtc
@pytest.mark.parametrize("kernel", shader_cases.KERNELS)
def test_nvrtc_compiles_every_kernel_for_sm_90(kernel):
    entries = shader_cases.all_entries(kernel)
    entries = list(dict.fromkeys([entries[0], entries[-1]]))  # the two ends of all types, widths and tiles
    program = nvidia.cuda(shader_cases.SHADERS / shader_cases.KERNELS[kernel]["file"], entries)
    code = nvidia.cubin(program, "sm_90")
    assert all(function.encode() in code for function in program.functions.values())


@needs_nvrtc
def test_nvrtc_compiles_all_that_the_language_tests_use():
    folder = ROOT / "tests" / "msl"
    entries = [("identifiers", ""), ("constants", ""), ("vectors", "")]
    entries += [(k, t) for k in ("simd_operations", "matrices") for t in ("float", "half", "bfloat")]
    nvidia.cubin(nvidia.cuda(folder / "language.metal", entries, function_constants={0: True}))
    entries = [("row_sums", "8"), ("count", "true"), ("turn", "true")]
    nvidia.cubin(nvidia.cuda(folder / "planted.metal", entries))


@needs_nvrtc
def test_what_nvrtc_refuses_is_said_in_its_words():
    broken = "[[kernel]] void broken(device float* y [[buffer(0)]]) { y[0] = no_such_thing; }"
    with pytest.raises(harness.CompileError, match=r'source0.metal"?\(1\).*no_such_thing'):
        nvidia.cubin(nvidia.cuda(broken, [("broken", "")]))
