"""Metal shaders as CUDA text: NVRTC compiles them for an H100. tools/msl/h100_check.py runs them there."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shader_cases

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

from tools.msl import h100_check, harness, nvidia  # noqa: E402

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


# ---- the script for the H100, without one ------------------------------------------------------------------


class Machine:
    """What h100_check takes for a GPU: the CPU harness, whose outputs may be spoiled."""

    def __init__(self, cases, spoil=False):
        self.libraries = {c.file: harness.compile(c.file, [c.entry]) for c in cases}
        self.where = {harness.entry_name(c.entry): (0, "f") for c in cases}
        self.spoil = spoil

    def run(self, file, entry, buffers, grid, threads):
        self.libraries[file].run(entry, buffers, grid, threads)
        if self.spoil:
            for array in buffers.values():
                if isinstance(array, np.ndarray) and array.size and array.dtype == np.float32:
                    array.flat[0] += 1

    def module(self, file, entry):
        return SimpleNamespace(function=lambda entry: SimpleNamespace(num_regs=40, local_size_bytes=8))


@pytest.fixture(scope="module")
def every():
    return shader_cases.every()


def test_the_script_counts_what_is_right_and_names_what_is_not(every):
    cases = [next(c for c in every if c.kernel == kernel) for kernel in ("qmv", "sum_splits")]
    log = h100_check.run_cases(Machine(cases), cases, [0, 1])
    assert not log["failures"]
    for kernel in ("qmv", "sum_splits"):
        row = log["kernels"][kernel]
        assert row["instantiations"] == 1 and row["registers"] == 40 and row["spilled_bytes"] == 8
        assert 0 < row["worst_share_of_bound"] <= 1
    log = h100_check.run_cases(Machine(cases, spoil=True), cases, [0, 1])
    assert len(log["failures"]) == 2 and log["failures"][0].startswith("qmv<")


def test_the_script_sanitizes_each_kernel_at_each_width(every):
    chosen = [every[i] for i in h100_check.one_of_each(every)]
    assert {c.kernel for c in chosen} == set(shader_cases.KERNELS)
    widths = {(c.kernel, c.arguments[2]) for c in chosen if c.kernel in ("qmv", "qmm", "qmm_n", "gather_qmm")}
    assert len(widths) == 4 * 3
    types = {a for c in chosen for a in c.arguments if isinstance(a, str)}
    assert types == {"float", "half", "bfloat"}


@pytest.mark.parametrize("said, errors, ran", [
    ("child has run\n========= ERROR SUMMARY: 0 errors\n", 0, True),
    ("========= Invalid read\nchild has run\n========= ERROR SUMMARY: 3 errors", 3, True),
    ("Traceback\n========= ERROR SUMMARY: 0 errors\n", 0, False),
    ("child has run\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 2, True),
    ("========= Error: Device not supported\n", None, False),
])  # fmt: skip
def test_the_script_reads_what_a_sanitizer_says(monkeypatch, tmp_path, said, errors, ran):
    done = subprocess.CompletedProcess([], 0, stdout=said, stderr="")
    monkeypatch.setattr(h100_check.subprocess, "run", lambda *a, **k: done)
    answer = h100_check.sanitize("memcheck", tmp_path, ["one-of-each"], 10.0)
    assert (answer["errors"], answer["ran"]) == (errors, ran)
