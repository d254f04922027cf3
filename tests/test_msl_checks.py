"""The stand-ins for Metal's front end see what they claim to see, and find nothing in our shaders."""

import sys
from pathlib import Path

import pytest
import shader_cases

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "msl")]  # tools/ is no installed package

import mlx_kernels  # noqa: E402

from tools.msl import checks, harness  # noqa: E402

needs_clang = pytest.mark.skipif(checks.clang() is None, reason="needs clang++ 19: apt-get install clang-19")
needs_harness = pytest.mark.skipif(harness.absent() is not None, reason=str(harness.absent()))
FILES = sorted(p for p in shader_cases.SHADERS.iterdir() if p.suffix in (".h", ".metal"))
MODES = {"plain": checks.PLAIN, "opencl": checks.OPENCL}


def shader(body: str, before: str = "") -> str:
    """A kernel on x (const) and y with a body, the body's first line being line 5."""
    return f"""#include <metal_stdlib>
using namespace metal; {before}
template <typename T>
[[kernel]] void k(const device T* x [[buffer(0)]], device T* y [[buffer(1)]], constant T& n [[buffer(2)]]) {{
{body}
}}
"""


RIGHT = """
  threadgroup float4 part[4];
  part[0] = float4(1.0f, 2.0f, metal::max(3.0f, 4.0f), simd_sum(1.0f));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const thread float4* p = nullptr;
  if (p == nullptr && n > 0) y[0] = static_cast<T>(part[0].x) + x[0];"""

# {what is wrong: (shader, which modes of clang see it)}
WRONG = {
    "a pointer without its space": (shader("y[0] = f(x);", "METAL_FUNC float f(float* x);"), "plain opencl"),
    "a write to a const buffer": (shader("x[0] = y[0];"), "plain opencl"),
    "a write to a constant": (shader("n = 1;"), "plain opencl"),
    "threadgroup memory as device memory": (
        shader("  threadgroup T t[4];\n  device T* p = t;\n  p[0] = 0;"),
        "plain opencl",
    ),
    "a cast to another space": (shader("  threadgroup T t[4];\n  y[0] = *(device T*)t;"), "opencl"),
    "a pointer to a function": (shader("float (*g)(float) = f;", "float f(float);"), "opencl"),
    "a virtual function": (shader("y[0] = 0;", "struct A { virtual int f(); };"), "opencl"),
    "new": (shader("y[0] = *(new T);"), "opencl"),
    "an exception": (shader("try { y[0] = 0; } catch (int) {}"), "opencl"),
    "C++ of after 2014": (shader("if constexpr (sizeof(T) == 4) y[0] = 0;"), "plain"),
    "a function that Metal has not": (shader("y[0] = metal::frobnicate(y[1]);"), "plain opencl"),
}


@needs_clang
@pytest.mark.parametrize("mode", MODES)
def test_a_right_shader_passes_both_front_ends(mode):
    entries = [("k", "float"), ("k", "half")]
    assert checks.front_end(shader(RIGHT), entries, MODES[mode]) == []


@needs_clang
@pytest.mark.parametrize("what", WRONG)
def test_a_front_end_sees(what):
    text, modes = WRONG[what]
    for mode, flags in MODES.items():
        errors = checks.front_end(text, [("k", "float")], flags)
        assert bool(errors) == (mode in modes.split()), errors
        assert all(error.startswith("source0.metal:") for error in errors)


def test_apples_clang_is_not_taken_for_one_with_opencl(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    taken = {"Apple clang version 21.0.0 (clang-2100.1)": None, "clang version 21.1.0": "clang++"}
    for version, found in taken.items():
        (tmp_path / "clang++").write_text(f"#!/bin/sh\necho '{version}'\n")
        (tmp_path / "clang++").chmod(0o755)
        assert checks.clang.__wrapped__() == (found and str(tmp_path / found))


@needs_harness
def test_a_float_becomes_a_bfloat_only_by_a_cast(tmp_path):
    good, bad = shader("y[0] = static_cast<T>(1.5f);"), shader("y[0] = 1.5f;")
    harness.compile(good, [("k", "bfloat")], cache_dir=tmp_path)
    with pytest.raises(harness.CompileError, match="source0.metal:5"):
        harness.compile(bad, [("k", "bfloat")], cache_dir=tmp_path)


@needs_clang
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", shader_cases.KERNELS)
def test_our_shaders_pass_both_front_ends(kernel, mode):
    entries = shader_cases.all_entries(kernel)
    entries = list(dict.fromkeys([entries[0], entries[len(entries) // 2], entries[-1]]))
    file = shader_cases.SHADERS / shader_cases.KERNELS[kernel]["file"]
    assert checks.front_end(file, entries, MODES[mode]) == []


LINT = {
    "float y = 0.5;": "suffix",
    "double y = 0;": "double",
    "goto end;": "goto",
    "float y = std::sqrt(2.0f);": "std::",
    "float y = sqrt(2.0f);": "without metal::",
    "void f(float* x) {}": "address space",
    "void f(const uint& x) {}": "address space",
    "for (int i = 0; i < n; i++) { float* p = q; }": "address space",
    "y = v.xy;": "swizzle",
    "void f(device float* x [[buffer(31)]]) {}": "30 is the last",
    "void f(threadgroup float* x [[threadgroup(0)]]) {}": "argument",
    "#define device": "macro",
    "#include <cmath>": "#include",
    "y = simd_sum(x) + simd_max(x);": "one line",
    "int f(int n) { return n == 0 ? 1 : n * f(n - 1); }": "calls itself",
    "int g(int n) { return h(n); }\nint h(int n) { return g(n); }": "calls itself",
    "// \u00e9": "ASCII",
}


@pytest.mark.parametrize("text", LINT)
def test_the_lint_sees(text):
    complaints = checks.lint("file.metal", "\n" + text)
    assert complaints and all(LINT[text] in c for c in complaints)
    assert complaints[0].startswith("file.metal:")


@pytest.mark.parametrize("text", [
    "float y = 0.5f + 1e-3f; // a double, goto end, x.xy, sqrt(2)", "y = metal::sqrt(1.0h) + v.x;",
    "int y = a * b; y = a & b; y = f(a * b, c & d);", "void f(const device float* x, thread uint& n) {}",
    "y = x[i].thread_elements()[0];", "threadgroup_barrier(mem_flags::mem_threadgroup);",
])  # fmt: skip
def test_the_lint_lets_pass(text):
    assert checks.lint("file.metal", text) == []


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_our_shaders_pass_the_lint(file):
    assert checks.lint(file.name, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_our_shaders_use_no_word_of_metal_that_mlx_does_not(file):
    if isinstance(mlx_kernels.wheel(), str):
        pytest.skip(mlx_kernels.wheel())
    assert checks.vocabulary(file.read_text(), mlx_kernels.headers() / "mlx/backend/metal/kernels") == []


def test_a_word_that_mlx_does_not_use_is_named():
    if isinstance(mlx_kernels.wheel(), str):
        pytest.skip(mlx_kernels.wheel())
    text = "[[max_total_threadgroups_per_mesh_grid(1)]] void f() { y = quad_shuffle_up(mulhi(x, x), 1); }"
    found = checks.vocabulary(text, mlx_kernels.headers() / "mlx/backend/metal/kernels")
    assert found == ["max_total_threadgroups_per_mesh_grid", "mulhi", "quad_shuffle_up"]
