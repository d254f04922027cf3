"""MLX's own quantized kernels on the harness: an independent check that it means what Metal means.

The headers come from the public wheel mlx-metal for macOS at test time; nothing of them is kept here.
"""

import functools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from tools.msl import harness

VERSION = "0.32.4"
WHEEL = f"mlx_metal-{VERSION}-py3-none-macosx_14_0_arm64.whl"
KERNELS = "mlx/include/mlx/backend/metal/kernels/"

# Stand-ins for headers that need real address spaces or more of Metal than the quantized kernels use.
POINTER_ELEMENT = """
namespace metal {
template <typename T> using remove_addrspace_t = remove_const_t<T>;
template <typename T> struct pointer_element {};
template <typename T> struct pointer_element<T*> { using type = remove_const_t<T>; };
template <typename T> using pointer_element_t = typename pointer_element<remove_const_t<T>>::type;
}
"""
UTILS = """
typedef bfloat bfloat16_t;
typedef half float16_t;
namespace metal {}
using namespace metal;
template <typename T> struct Limits { static T max() { return numeric_limits<T>::max(); } };
template <> struct Limits<float> {
  static constexpr float max = __builtin_huge_valf();
  static constexpr float min = -__builtin_huge_valf();
};
struct complex64_t {
  float real, imag;
};
template <bool condition, typename T, typename F>
struct ConditionalType {
  using type = conditional_t<condition, T, F>;
};
template <typename I>
I elem_to_loc(I at, const int* shape, const int64_t* strides, int dimensions) {
  I place = 0;
  for (int i = dimensions - 1; i >= 0; i--) {
    place += (at % shape[i]) * I(strides[i]);
    at /= shape[i];
  }
  return place;
}
"""


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlxq" / "mlx-metal"


@functools.cache
def wheel() -> Path | str:
    """The wheel, downloaded once with pip; a string that says why it cannot be had."""
    path = cache() / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0"]
        command += ["--only-binary", ":all:", "--platform", "macosx_14_0_arm64", "--dest", str(path.parent)]
        command += [f"mlx-metal=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"package mlx-metal=={VERSION} cannot be had: pip download takes more than 300 s"
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return f"package mlx-metal=={VERSION} cannot be had: {reason}"
    return path


@functools.cache
def headers() -> Path:
    """The folder that `mlx/backend/metal/kernels/...` is in, unpacked once."""
    folder = cache() / VERSION
    with zipfile.ZipFile(wheel()) as archive:
        for name in archive.namelist():
            if name.startswith(KERNELS) and not (folder / name).exists():
                archive.extract(name, folder)
    return folder / "mlx" / "include"


def sources() -> tuple[list, list[Path], dict[str, str]]:
    """Sources, include folders and replacements of quantized.h, which is the last source."""
    folder = headers()
    kernels = folder / "mlx/backend/metal/kernels"
    prefix = "mlx/backend/metal/kernels/steel/"
    replace = {prefix + "utils/type_traits.h": POINTER_ELEMENT}
    parts = [UTILS, *(kernels / "steel/gemm" / name for name in ("loader.h", "mma.h"))]
    parts += [kernels / "quantized_utils.h", kernels / "quantized.h"]
    return parts, [folder], replace


def quantized(instantiate) -> harness.Library:
    """Kernels of quantized.h for this CPU; instantiate as in harness.compile."""
    parts, include, replace = sources()
    return harness.compile(parts, instantiate, include=include, replace=replace)


def no_batch(first: int) -> dict[int, np.ndarray]:
    """The eight buffers from `first` on that describe batches, for none."""
    i, many = np.int32(0), np.zeros(1, np.int64)
    one = np.ones(1, np.int32)
    values = [i, one, many, i, one, many, many, many]
    return {first + n: v.copy() if isinstance(v, np.ndarray) else v for n, v in enumerate(values)}
