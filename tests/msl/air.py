"""Kernels of MLX as Apple's compiler made them, run by the harness' lanes: a check of it from outside.

The wheel's mlx.metallib holds LLVM bitcode, a module for each kernel. llvm-dis turns it into text, address
spaces are dropped from that, and llc makes machine code of this processor. What remains are some functions
named air.*, which are given here by the harness' own operations of simdgroups; so those are not checked. All
else is: what Apple's front end makes of types, conversions, indices, templates and the layout of matrices.
"""

import functools
import re
import shutil
import struct
import zipfile
from pathlib import Path

import mlx_kernels

from tools.msl import harness, source

LIBRARY = "mlx/lib/mlx.metallib"

# The lane's two elements of an 8x8 matrix are the first two of what AIR writes as all 64.
MULTIPLY = """
declare void @air_multiply(float, float, float, float, float, float, ptr)
define internal <64 x float> @{name}(<64 x {a}> %a, <64 x {b}> %b, <64 x float> %c) {{
  %out = alloca [2 x float]
{extracts}
  call void @air_multiply(float %a0, float %a1, float %b0, float %b1, float %c0, float %c1, ptr %out)
  %second = getelementptr float, ptr %out, i64 1
  %v0 = load float, ptr %out
  %v1 = load float, ptr %second
  %d0 = insertelement <64 x float> poison, float %v0, i64 0
  %d1 = insertelement <64 x float> %d0, float %v1, i64 1
  ret <64 x float> %d1
}}
"""

FUNCTIONS = """
#define AIR(type, name, ...) extern "C" __attribute__((used)) type name(__VA_ARGS__) __asm__
AIR(float, air_simd_sum, float)("air.simd_sum.f32");
AIR(void, air_wg_barrier, int, int)("air.wg.barrier");
AIR(void, air_simdgroup_barrier, int, int)("air.simdgroup.barrier");
AIR(float, air_float_of_int, int)("air.convert.f.f32.s.i32");
AIR(float, air_float_of_uint, uint)("air.convert.f.f32.u.i32");
AIR(int, air_min, int, int)("air.min.s.i32");
float air_simd_sum(float v) { return metal::simd_sum(v); }
void air_wg_barrier(int flags, int) { metal::threadgroup_barrier(metal::mem_flags(flags)); }
void air_simdgroup_barrier(int flags, int) { metal::simdgroup_barrier(metal::mem_flags(flags)); }
float air_float_of_int(int v) { return float(v); }
float air_float_of_uint(uint v) { return float(v); }
int air_min(int a, int b) { return a < b ? a : b; }
extern "C" __attribute__((used)) void air_multiply(float a0, float a1, float b0, float b1, float c0, float c1,
                                                   float* out) {
  metal::simdgroup_float8x8 a, b, c;
  a.elements = metal::float2(a0, a1);
  b.elements = metal::float2(b0, b1);
  c.elements = metal::float2(c0, c1);
  metal::simdgroup_multiply_accumulate(c, a, b, c);
  out[0] = c.elements.x;
  out[1] = c.elements.y;
}
typedef uint air_uint3 __attribute__((vector_size(16)));
// What llc calls to round to bfloat; the result is in the lowest bits of a vector register.
extern "C" __attribute__((used)) float __truncsfbf2(float v) {
  return msl::bits_as<float>(uint(msl::bfloat_bits(v)));
}
"""


@functools.cache
def tool(name: str) -> str | None:
    """llvm-dis or llc of the newest LLVM from 19 on, or None."""
    return next((t for v in range(30, 18, -1) if (t := shutil.which(f"{name}-{v}"))), None)


@functools.cache
def metallib() -> bytes:
    with zipfile.ZipFile(mlx_kernels.wheel()) as archive:
        return archive.read(LIBRARY)


def bitcode(name: str) -> bytes:
    """LLVM bitcode of one kernel. Raises KeyError for a name that the library has not."""
    data = metallib()
    at = data.find(b"NAME" + struct.pack("<H", len(name) + 1) + name.encode() + b"\0")
    if at < 0:
        raise KeyError(name)
    fields = {}
    while data[at : at + 4] != b"ENDT":
        size = struct.unpack_from("<H", data, at + 4)[0]
        fields[data[at : at + 4]] = data[at + 6 : at + 6 + size]
        at += 6 + size
    section = struct.unpack_from("<Q", data, 0x48)[0]
    start = section + struct.unpack("<QQQ", fields[b"OFFT"])[2]
    return data[start : start + struct.unpack("<Q", fields[b"MDSZ"])[0]]


def flat(text: str) -> str:
    """AIR without address spaces and target, for a processor that has one memory."""
    text = re.sub(r"^target .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s*addrspace\(\d\)", "", text)
    text = re.sub(r"@llvm\.memcpy\.p\d\.p\d\.", "@llvm.memcpy.p0.p0.", text)
    text = re.sub(r"(= internal unnamed_addr global \[[^\]]*\]) undef", r"\1 zeroinitializer", text)

    def multiply(match: re.Match) -> str:
        name, types = match[1], re.findall(r"<64 x (\w+)>", match[2])
        lines = []
        for operand, type_ in zip("abc", types, strict=True):
            for i in range(2):
                value = f"%{operand}{i}"
                raw = value if type_ == "float" else f"{value}.raw"
                lines.append(f"  {raw} = extractelement <64 x {type_}> %{operand}, i64 {i}")
                if raw != value:
                    lines.append(f"  {value} = fpext {type_} {raw} to float")
        return MULTIPLY.format(name=name, a=types[0], b=types[1], extracts="\n".join(lines))

    declared = r"^declare <64 x float> @(air\.simdgroup_matrix_8x8_multiply_accumulate\S*?)(\(.*?\)) .*$"
    return re.sub(declared, multiply, text, flags=re.MULTILINE)


def library(name: str, entry: tuple[str, str], folder: Path) -> harness.Library:
    """MLX's kernel `name` of the metallib behind the entry of quantized.h that it was compiled from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "air.bc").write_bytes(bitcode(name))
    harness.call([tool("llvm-dis"), str(folder / "air.bc"), "-o", str(folder / "air.ll")])
    (folder / "flat.ll").write_text(flat((folder / "air.ll").read_text()))
    llc = [tool("llc"), "-O2", "-relocation-model=pic", "-fp-contract=off", "-filetype=obj"]
    llc += [flag.replace("-march", "-mcpu") for flag in harness.machine_flags()]
    harness.call([*llc, str(folder / "flat.ll"), "-o", str(folder / "air.o")])

    lib = mlx_kernels.quantized([entry])
    kernel = lib.kernels[entry[0]]
    types, values = [], []
    for p in kernel.parameters:
        if p.buffer >= 0:
            types.append("void*")
            values.append(f"b[{p.buffer}]")
        elif p.kind == "threadgroup_position_in_grid":
            types.append("air_uint3")
            values.append("air_uint3{msl_group.position.x, msl_group.position.y, msl_group.position.z, 0}")
        else:
            types.append("uint")
            values.append(f"uint({source.BUILTINS[p.kind]})")
    text = harness.module_text(lib.text, lib.kernels, [entry], {})
    text = re.sub(r"MSL_EXPORT void msl_entry_0\(.*", "", text) + FUNCTIONS
    text += f'AIR(void, air_kernel, {", ".join(types)})("{name}");\n'
    text += f"MSL_EXPORT void msl_entry_0(void* const* b) {{ air_kernel({', '.join(values)}); }}\n"
    (folder / "entry.cpp").write_text(text)
    flags = [*harness.COMMON_FLAGS, *harness.machine_flags(), *harness.SHADER_FLAGS]
    harness.call([lib.cxx, *flags, "-c", str(folder / "entry.cpp"), "-o", str(folder / "entry.o")])
    runtime = harness.runtime_object(lib.folder, lib.cxx)
    objects = [str(folder / "entry.o"), str(folder / "air.o"), str(runtime)]
    link = [lib.cxx, "-shared", *objects, "-o", str(folder / "air.so")]
    harness.call([*link, "-Wl,-Bsymbolic", "-lm", "-ldl"])
    lib.modules[0, False] = harness.Module(folder / "air.so")
    return lib
