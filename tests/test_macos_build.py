"""The macOS check (tools/macos/check.py): what it reads, what it finds, and the module of its last run.

The check itself cross-compiles for minutes and is run by hand; nothing here was executed on Apple hardware.
"""

import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "macos"))

import check  # noqa: E402

MLX, PYTHON, SYSTEM, OBJC = "_mlx", "_PyLong_FromLong", "_malloc", "_objc_msgSend"


def macho(exports: bytes, undefined: list[tuple[str, int]]) -> bytes:
    """A Mach-O file with these load commands and tables, and nothing else."""

    def string(command: int, text: str, before: bytes) -> bytes:
        body = before + text.encode() + b"\0"
        body += b"\0" * (-len(body) % 8)
        return struct.pack("<2I", command, 8 + len(body)) + body

    commands = [string(0xC, "@rpath/libmlx.dylib", struct.pack("<4I", 24, 0, 0, 0))]
    commands.append(string(0x8000001C, "@loader_path", struct.pack("<I", 12)))
    commands.append(struct.pack("<6I", 0x32, 24, 1, 14 << 16, 0, 0))
    size = sum(map(len, commands)) + 16 + 24
    at = 32 + size
    commands.append(struct.pack("<4I", 0x80000033, 16, at, len(exports)))
    strings, table = b"\0", b""
    for name, ordinal in undefined:
        table += struct.pack("<IBBHQ", len(strings), 1, 0, ordinal << 8, 0)
        strings += name.encode() + b"\0"
    table += struct.pack("<IBBHQ", 1, 0x0F, 1, 0, 64)  # a defined symbol
    table += struct.pack("<IBBHQ", 1, 0x20, 0, 0, 0)  # a debug entry
    where = at + len(exports)
    symtab = struct.pack("<6I", 2, 24, where, len(undefined) + 2, where + len(table), len(strings))
    commands.append(symtab)
    header = struct.pack("<8I", 0xFEEDFACF, check.ARM64, 0, 6, len(commands), size, 0, 0)
    return header + b"".join(commands) + exports + table + strings


# root -> "_Py" -> {"Init__ext", "X"}: the trie shares prefixes; payloads are two bytes long.
TRIE = (
    b"\x00\x01_Py\x00\x07" + b"\x00\x02Init__ext\x00\x17X\x00\x1b" + b"\x02\x00\x00\x00" + b"\x02\x00\x00\x00"
)


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "module.so"
    path.write_bytes(macho(TRIE, [(MLX, 1), (PYTHON, 0xFE), (SYSTEM, 0xFE)]))
    return check.read_macho(path)


def everyone():
    return check.MachO(check.ARM64, [], [], None, {MLX}, {}), {PYTHON}, {SYSTEM}, {OBJC}


def test_the_reader_finds_exports_undefined_symbols_and_load_commands(module):
    assert module.exports == {"_PyInit__ext", "_PyX"}
    assert module.undefined == {"_mlx": "@rpath/libmlx.dylib", "_PyLong_FromLong": "", "_malloc": ""}
    assert module.rpaths == ["@loader_path"]
    assert module.minimum_os == (14, 0)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "elf").write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(ValueError, match="not a thin 64-bit Mach-O file"):
        check.read_macho(tmp_path / "elf")


def test_symbols_are_found_at_whoever_exports_them(module):
    found, findings = check.audit(module, *everyone())
    assert findings == []
    assert found == {"libmlx.dylib": [MLX], "Python": [PYTHON], "libSystem": [SYSTEM], "libobjc": []}


@pytest.mark.parametrize(
    "plant, finding",
    [
        (lambda m: m.undefined.update({"__ZN5utilsEv": ""}), "nobody exports __ZN5utilsEv"),
        (lambda m: m.exports.clear(), "PyInit__ext is not exported: Python could not load the module"),
        (lambda m: setattr(m, "cpu", 0x01000007), "not for arm64 (cpu type 0x1000007)"),
        (lambda m: setattr(m, "minimum_os", (15, 0)), "built for macOS (15, 0), wanted (14, 0)"),
        (lambda m: m.dylibs.clear(), "does not load @rpath/libmlx.dylib but []"),
    ],
)
def test_each_planted_fault_is_a_finding(module, plant, finding):
    plant(module)
    assert check.audit(module, *everyone())[1] == [finding]


def test_the_module_of_the_last_check_asks_for_nothing_that_is_missing():
    """With Metal inside: the host code's calls into libmlx are among the symbols that were found there."""
    try:
        path, found, findings = check.audit_build()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if path.stat().st_mtime < (ROOT / "metal/CMakeLists.txt").stat().st_mtime:
        pytest.skip(f"{path} is older than metal/CMakeLists.txt; run: python tools/macos/check.py")
    assert findings == []
    symbols = " ".join(found["libmlx.dylib"])
    for call in ("6Device11get_library", "6Device10get_kernel", "14CommandEncoder21dispatch_threadgroups"):
        assert call in symbols
