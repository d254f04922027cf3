"""What a Metal front end would say, as far as it can be known without one: clang twice, a vocabulary, a lint.

Each check returns a list of complaints, empty when there are none. None of them is Apple's compiler; together
they see a missing or wrong address space, writes to constants, what the language leaves out of C++, and words
that no kernel of MLX uses.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

from tools.msl import source

HERE = Path(__file__).resolve().parent
VECTOR = r"(?:uchar|ushort|uint|ulong|char|short|int|long|float|half)[234]"

# Address spaces are real, so that clang compares them. What is newer than Metal 3's C++14 is an error.
PLAIN = ("-x", "c++", "-std=c++14", "-Werror=c++17-extensions", "-Werror=c++20-extensions")
# C++ for OpenCL refuses what a GPU language refuses: function pointers, new, virtual, exceptions, casts
# between address spaces. It is C++17.
OPENCL = ("-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-DMSL_OPENCL")


@functools.cache
def clang() -> str | None:
    """The newest clang++ of version 19 or later, or None. Apple's counts otherwise and lacks OpenCL."""
    for version in range(30, 18, -1):
        found = shutil.which(f"clang++-{version}")
        if found:
            return found
    found = shutil.which("clang++")
    if found:
        said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"version (\d+)", said)
        if version and int(version[1]) >= 19 and "Apple" not in said:
            return found
    return None


def front_text(text: str, instantiate) -> str:
    """A flattened shader as clang takes it: threadgroup variables and vector constructors look different."""

    def array(match: re.Match) -> str:
        type_, name, size = match["type"], match["name"], match["size"]
        return (
            f"{match['indent']}threadgroup {type_} (&{name}){size} = *(threadgroup {type_}(*){size})0;"
            if size
            else f"{match['indent']}threadgroup {type_}& {name} = *(threadgroup {type_}*)0;"
        )

    text = source.FUNCTION_CONSTANT.sub(r"constant \1 \2 = 0;", text)
    text = re.sub(rf"\b({VECTOR})\s*\((?!\s*\))", r"make_\1(", text)
    text = source.THREADGROUP_ARRAY.sub(array, text)
    text = source.METAL_ATTRIBUTE.sub("", text)
    text = re.sub(r"\bkernel\s+(?=void\b)", "", text)
    uses = []
    for name, arguments in instantiate:
        if arguments.strip():
            uses.append(f"template decltype({name}<{arguments}>) {name}<{arguments}>;")
    header = f'#include "{HERE / "front.h"}"'
    return "\n".join([header, text, '#line 1 "entries"', *uses]) + "\n"


def front_end(sources, instantiate, flags=PLAIN, include=(), replace=None) -> list[str]:
    """Errors of clang for shaders and instantiations, as harness.compile takes them; flags PLAIN or OPENCL.

    Instantiations with bfloat are left out under OPENCL, which has no such type.
    """
    if flags == OPENCL:
        instantiate = [e for e in instantiate if "bfloat" not in e[1]]
    text = front_text(source.flatten(sources, include, replace), instantiate)
    command = [clang(), *flags, "-fsyntax-only", "-ferror-limit=0", "-Wno-everything", "-"]
    command += [f for f in flags if f.startswith("-Werror")]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if re.search(r":\d+: (?:fatal )?error: ", line)]
    if done.returncode and not errors:
        errors = [done.stderr[-1000:]]
    return errors


# In Metal's specification, but not in MLX's kernels.
SPECIFIED = {"atomic_uint"}


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", source.without_comments(text)))


def vocabulary(text: str, mlx_headers: Path) -> list[str]:
    """Metal's words in a shader that no kernel of MLX uses; mlx_headers is the wheel's folder of kernels."""
    known = set()
    for header in sorted(mlx_headers.rglob("*.h")):
        known |= words(header.read_text(encoding="utf-8"))
    text = source.without_comments(text)
    metal = words((HERE / "front.h").read_text()) & words(text)
    for attribute in re.findall(r"\[\[([^\]]*)\]\]", text):
        metal |= words(attribute)
    return sorted(metal - known - SPECIFIED)


FORBIDDEN = {
    "double": "double", "goto": "goto", "new": "new", "delete": "delete", "virtual": "virtual",
    "try": "exceptions", "throw": "exceptions", "catch": "exceptions", "dynamic_cast": "run-time types",
    "typeid": "run-time types", "asm": "assembly", "thread_local": "thread_local", "printf": "printf",
}  # fmt: skip
MATH = (
    "abs|ceil|clamp|clz|copysign|cos|ctz|exp|exp2|fabs|floor|fma|fmax|fmin|fmod|isinf|isnan|isfinite|ldexp|log|log2|max"
    "|min|popcount|pow|rint|round|rsqrt|select|sign|sin|sqrt|tanh|trunc"
)
TOGETHER = (
    r"\b(?:threadgroup_barrier|simdgroup_barrier|simd_\w+|quad_\w+|simdgroup_(?:load|store|multiply\w*))\s*\("
)
BUILTIN_TYPES = {
    "void", "bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "float", "half",
    "bfloat", "size_t", "auto", "int8_t", "uint8_t", "int16_t", "uint16_t", "int32_t", "uint32_t", "int64_t",
    "uint64_t",
}  # fmt: skip


def functions(text: str) -> dict[str, str]:
    """{name: body} of every function of a shader; overloads are joined."""
    found: dict[str, str] = {}
    for match in re.finditer(r"\b(\w+)\s*\([^;{}]*\)\s*(?:const\s*)?\{", text):
        if match[1] in ("if", "for", "while", "switch"):
            continue
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found[match[1]] = found.get(match[1], "") + text[match.end() : end]
    return found


def recursion(text: str) -> list[str]:
    bodies = functions(text)
    calls = {
        name: {other for other in bodies if re.search(rf"\b{other}\s*(?:<[^;(]*>)?\s*\(", body)}
        for name, body in bodies.items()
    }

    def reaches(start: str) -> bool:
        seen, todo = set(), list(calls[start])
        while todo:
            f = todo.pop()
            if f == start:
                return True
            if f not in seen:
                seen.add(f)
                todo += calls[f]
        return False

    return [f for f in calls if reaches(f)]


def lint(name: str, raw: str) -> list[str]:
    """What the house's rules for shaders forbid in one file's text; "file:line: why" each."""
    complaints = []
    text = source.without_comments(raw)

    def say(position: int, why: str) -> None:
        complaints.append(f"{name}:{text.count(chr(10), 0, position) + 1}: {why}")

    for match in re.finditer(r"[^\x00-\x7f]", raw):  # MLX hands the source on as ASCII, comments too
        complaints.append(f"{name}:{raw.count(chr(10), 0, match.start()) + 1}: not ASCII")
    for match in re.finditer(r"\b(" + "|".join(FORBIDDEN) + r")\b", text):
        say(match.start(), f"{FORBIDDEN[match[1]]} is not in Metal")
    for match in re.finditer(r"\bstd::|\(\s*\*\s*\w+\s*\)\s*\(", text):
        say(match.start(), f"not in Metal: {match[0]}")
    for match in re.finditer(r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])", text):
        say(match.start(), f"literal {match[0]} has no suffix f or h")
    types = BUILTIN_TYPES | set(re.findall(r"\b(?:typename|class|struct)\s+(\w+)", text))
    spaces = r"\b(?:device|constant|threadgroup|thread)\b"
    pointer = r"(?<![\w:>])((?:\w+\s+)*)(\w+)\s*(?:<[\w\s,:]*>)?\s*[*&]\s*(?:const\s+)?(\w+)?\s*[,)=;\[>(]"
    for match in re.finditer(pointer, text):
        if match[2] in types and not re.search(spaces, match[1]):
            say(match.start(), f"pointer or reference without an address space: {match[0].strip()}")
    for match in re.finditer(rf"(?<![\w:.>])(?:{MATH})\s*\(", text):
        say(match.start(), f"math call without metal::, {match[0]}")
    for match in re.finditer(r"\.(?:[xyzw]{2,4}|[rgba]{1,4}|lo|hi|even|odd)\b(?!\s*\()", text):
        say(match.start(), f"swizzle {match[0]}")
    for match in re.finditer(r"\[\[\s*buffer\s*\(\s*(\d+)\s*\)", text):
        if int(match[1]) > 30:
            say(match.start(), f"buffer {match[1]}: 30 is the last")
    for match in re.finditer(r"\[\[\s*threadgroup\s*\(", text):
        say(match.start(), "threadgroup memory as a kernel's argument")
    for match in re.finditer(r"#\s*define\s+(device|constant|threadgroup|thread|kernel)\b", text):
        say(match.start(), f"macro named {match[1]}")
    library = {f"metal_{part}" for part in ("stdlib", "simdgroup", "simdgroup_matrix", "atomic", "math")}
    for match in re.finditer(r"#\s*include\s+<([^>]*)>", text):
        if match[1] not in library:
            say(match.start(), f"#include <{match[1]}>")
    position = 0
    for line in text.splitlines(keepends=True):
        if len(re.findall(TOGETHER, line)) > 1:
            say(position, "two operations of a simdgroup on one line")
        position += len(line)
    for function in recursion(text):
        complaints.append(f"{name}: {function} calls itself")
    return complaints
