"""Builds the extension for Apple silicon on any machine, and audits what it asks of libmlx.dylib.

    python tools/macos/check.py

The project's own metal/CMakeLists.txt, with clang from PyPI's ziglang as the compiler, MLX's public macOS
wheels and stub headers for the four framework headers that metal-cpp names, gives mlxq's module as Mach-O
for arm64. Then every symbol that it leaves undefined must come from libmlx.dylib's export table, from
Python, from libSystem or from libobjc. Prints a table; exits 1 on any finding.

Everything is kept in build/macos (about 600 MB); the first run needs a package index and takes minutes,
because zig compiles its libc++, later ones compile what changed. It shows that the sources compile and link
for macOS against this MLX. It does not run anything: nothing here was executed on Apple hardware, and the
module is not for shipping (zig links its own libc++ into it). It is not part of `make test`:
tests/test_macos_build.py audits the module that the last run left, and skips when there is none.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "macos"
STUBS = HERE / "stubs"
ZIG = "ziglang==0.17.1"
TARGET = (14, 0)  # macOS, what MLX's own wheels are for
PYTHON = "311"


# ---- Mach-O ------------------------------------------------------------------------------------------------


@dataclass
class MachO:
    """What a 64-bit Mach-O file says about itself."""

    cpu: int
    dylibs: list[str]
    rpaths: list[str]
    minimum_os: tuple[int, int] | None
    exports: set[str]  # from the export trie: what dyld looks symbols up in
    undefined: dict[str, str]  # symbol -> the dylib that the linker expects it in, "" where any may have it


ARM64 = 0x0100000C
_MAGIC = 0xFEEDFACF
_SYMTAB, _LOAD_DYLIB, _WEAK_DYLIB, _REEXPORT = 0x2, 0xC, 0x80000018, 0x8000001F
_RPATH, _BUILD_VERSION = 0x8000001C, 0x32
_EXPORTS_TRIE, _DYLD_INFO, _DYLD_INFO_ONLY = 0x80000033, 0x22, 0x80000022


def read_macho(path: Path) -> MachO:
    """The parts of a thin 64-bit Mach-O file that the audit needs. Raises ValueError for any other file."""
    data = Path(path).read_bytes()
    if len(data) < 32 or struct.unpack_from("<I", data)[0] != _MAGIC:
        raise ValueError(f"{path} is not a thin 64-bit Mach-O file")
    cpu, _, _, count = struct.unpack_from("<4I", data, 4)
    out = MachO(cpu, [], [], None, set(), {})
    symbols = None
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command in (_LOAD_DYLIB, _WEAK_DYLIB, _REEXPORT):
            out.dylibs.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == _RPATH:
            out.rpaths.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == _BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            out.minimum_os = (version >> 16, version >> 8 & 0xFF)
        elif command == _EXPORTS_TRIE:
            start, length = struct.unpack_from("<2I", data, at + 8)
            out.exports = _trie(data[start : start + length])
        elif command in (_DYLD_INFO, _DYLD_INFO_ONLY):
            start, length = struct.unpack_from("<2I", data, at + 40)
            out.exports = _trie(data[start : start + length])
        elif command == _SYMTAB:
            symbols = struct.unpack_from("<4I", data, at + 8)
        at += size
    if symbols:
        table, n, strings, _ = symbols
        for i in range(n):
            name, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, table + 16 * i)
            if kind & 0xE0 == 0 and kind & 0x0E == 0 and kind & 1:  # not a debug entry, undefined, external
                ordinal = description >> 8
                library = out.dylibs[ordinal - 1] if 0 < ordinal <= len(out.dylibs) else ""
                out.undefined[_text(data, strings + name)] = library
    return out


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _trie(data: bytes) -> set[str]:
    """Names in an export trie: a node is a payload's length, a payload, edges of (text, child's offset)."""
    names, todo = set(), [(0, b"")] if data else []
    while todo:
        at, prefix = todo.pop()
        payload, at = _uleb(data, at)
        if payload:
            names.add(prefix.decode())
        at += payload
        edges = data[at]
        at += 1
        for _ in range(edges):
            end = data.index(b"\0", at)
            child, next_edge = _uleb(data, end + 1)
            todo.append((child, prefix + data[at:end]))
            at = next_edge
    return names


def _uleb(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


# ---- the audit ---------------------------------------------------------------------------------------------


def tbd_symbols(path: Path) -> set[str]:
    """Every symbol that a text stub (.tbd) lists, for any target."""
    names = set()
    for block in re.findall(r"symbols:\s*\[(.*?)\]", path.read_text(), re.S):
        names.update(name.strip().strip("'\"") for name in block.split(","))
    return names


def abi_tag(path: Path) -> str:
    """The tag by which nanobind modules recognise each other; "" where the file has none."""
    found = re.search(rb"[a-z0-9_]*system_libcpp_abi\d+[a-z0-9_]*", Path(path).read_bytes())
    return found.group().decode() if found else ""


def audit(module: MachO, mlx: MachO, python: set, system: set, objc: set) -> tuple[dict, list[str]]:
    """({provider: symbols}, findings): who has each undefined symbol; what is wrong, one sentence each."""
    providers = {"libmlx.dylib": mlx.exports, "Python": python, "libSystem": system, "libobjc": objc}
    found = {name: [] for name in providers}
    findings = []
    for symbol in sorted(module.undefined):
        for name, has in providers.items():
            if symbol in has:
                found[name].append(symbol)
                break
        else:
            findings.append(f"nobody exports {symbol}")
    if module.cpu != ARM64:
        findings.append(f"not for arm64 (cpu type {module.cpu:#x})")
    if "_PyInit__ext" not in module.exports:
        findings.append("PyInit__ext is not exported: Python could not load the module")
    if module.minimum_os != TARGET:
        findings.append(f"built for macOS {module.minimum_os}, wanted {TARGET}")
    if "@rpath/libmlx.dylib" not in module.dylibs:
        findings.append(f"does not load @rpath/libmlx.dylib but {module.dylibs}")
    return found, findings


def audit_build(cache: Path = CACHE) -> tuple[Path, dict, list[str]]:
    """Audits the module that the last build left. Raises FileNotFoundError when there is none."""
    modules = sorted((cache / "cmake").glob("_ext*-darwin.so"))
    if not modules:
        raise FileNotFoundError(f"no module in {cache / 'cmake'}; run: python tools/macos/check.py")
    import nanobind

    python = Path(nanobind.cmake_dir(), "darwin-ld-cpython.sym").read_text()
    module, mlx = read_macho(modules[0]), read_macho(cache / "site/mlx/lib/libmlx.dylib")
    found, findings = audit(
        module,
        mlx,
        set(re.findall(r"-U (\S+)", python)),
        tbd_symbols(_zig_folder(cache) / "lib/libc/darwin/libSystem.tbd"),
        tbd_symbols(STUBS / "lib/libobjc.tbd"),
    )
    ours, theirs = abi_tag(modules[0]), abi_tag(next((cache / "site/mlx").glob("core.*.so")))
    if not ours or ours != theirs:
        findings.append(f"nanobind's ABI tag is {ours!r}, mlx.core's {theirs!r}: arrays could not be passed")
    return modules[0], found, findings


# ---- the build ---------------------------------------------------------------------------------------------


def _zig_folder(cache: Path) -> Path:
    return cache / "zig-py" / "ziglang"


def fetch(cache: Path) -> None:
    """The compiler and the macOS wheels, from the package index, once."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    if not (_zig_folder(cache) / "zig").exists():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(cache / "zig-py"), ZIG], check=True)
    version = re.search(r'"mlx==([0-9.]+)', (ROOT / "pyproject.toml").read_text()).group(1)
    done = cache / "site" / f"mlx-{version}.dist-info"
    if not done.exists():
        platform = [f"--platform=macosx_{TARGET[0]}_{TARGET[1]}_arm64", "--only-binary=:all:", "--no-deps"]
        names = [f"mlx=={version}", f"mlx-metal=={version}"]
        wheels = cache / "wheels"
        subprocess.run(
            [*pip, "download", *platform, f"--python-version={PYTHON}", "-d", str(wheels), *names], check=True
        )
        # mlx last: its folder says that all is done.
        for wheel in sorted(wheels.glob(f"mlx*-{version}-*.whl"), reverse=True):
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if not n.endswith(".metallib")]  # 147 MB of shaders
                archive.extractall(cache / "site", names)


def toolchain(cache: Path) -> dict[str, Path]:
    """Scripts that CMake can take for Apple's clang, ar and ranlib: zig's, for macOS, with the stubs."""
    start = f"""#!{sys.executable}
import os, sys
zig = {str(_zig_folder(cache) / "zig")!r}
os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = {str(cache / "zig-cache")!r}
"""
    clang = f"""args = []
for arg in sys.argv[1:]:
    if arg.startswith("-Wl,@"):  # nanobind's list of Python's symbols: zig's linker reads no such file
        args += ["-undefined", "dynamic_lookup"]
    elif arg == "-bundle":  # crashes zig's linker; Python loads dylibs as well
        args.append("-shared")
    elif not arg.startswith("-march="):  # zig's target already has an M1's instructions
        args.append(arg)
target = ["-target", "aarch64-macos.{TARGET[0]}.{TARGET[1]}", "-I{STUBS}", "-L{STUBS / "lib"}"]
os.execv(zig, [zig, "c++", *target, *args])
"""
    texts = {"c++": clang}
    for name in ("ar", "ranlib"):
        texts[name] = f"os.execv(zig, [zig, {name!r}, *sys.argv[1:]])\n"
    for name, text in texts.items():
        script = cache / name
        if not script.exists() or script.read_text() != start + text:
            script.write_text(start + text)
            script.chmod(0o755)
    return {name: cache / name for name in texts}


def build(cache: Path) -> None:
    """The module, by the project's own CMakeLists.txt, into cache/cmake."""
    folder = cache / "cmake"
    tools = toolchain(cache)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    low = ["nice", "-n", "10"] if os.name == "posix" else []
    configure = {
        "CMAKE_SYSTEM_NAME": "Darwin",
        "CMAKE_SYSTEM_PROCESSOR": "arm64",
        "CMAKE_CXX_COMPILER": tools["c++"],
        "CMAKE_AR": tools["ar"],
        "CMAKE_RANLIB": tools["ranlib"],
        "CMAKE_OSX_DEPLOYMENT_TARGET": f"{TARGET[0]}.{TARGET[1]}",
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_INSTALL_NAME_TOOL": "true",  # for installing, which this does not do
        "Python_EXECUTABLE": sys.executable,
        "MLX_DIR": cache / "site/mlx/share/cmake/MLX",
        "SKBUILD_SOABI": f"cpython-{PYTHON}-darwin",
    }
    flags = [f"-D{name}={value}" for name, value in configure.items()]
    command = ["cmake", "-S", str(ROOT / "metal"), "-B", str(folder), "-G", "Ninja", *flags]
    subprocess.run([*low, *command], check=True, env=environment)
    subprocess.run([*low, "cmake", "--build", str(folder), "-j", "1"], check=True, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of everything (default: build/macos)"
    )
    cache = parser.parse_args().cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    fetch(cache)
    build(cache)
    module, found, findings = audit_build(cache)
    size = f"{module.stat().st_size:,} bytes"
    print(f"\n{module.relative_to(cache)}: Mach-O, arm64, macOS {TARGET[0]}.{TARGET[1]}, {size}")
    print(f"{'provider':14} undefined symbols")
    for provider, symbols in found.items():
        print(f"{provider:14} {len(symbols)}")
    for symbol in found["libmlx.dylib"]:
        if "metal" in symbol or "3MTL" in symbol or "2NS" in symbol:
            print(f"  {symbol}")
    for finding in findings:
        print(f"FINDING: {finding}")
    print("Compiled, linked and audited; not run: no Apple hardware here." if not findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
