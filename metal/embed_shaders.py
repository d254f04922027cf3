"""Writes a C++ file that holds the text of every shader: python embed_shaders.py OUT SHADER.metal ...

Metal compiles a shader at run time from one string, without an include path, so `#include "..."` is
replaced by the file it names, once each. Metal's own headers (`#include <...>`) stay. The text must be
ASCII: MLX hands it over as such.
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"\s*$')


def flatten(path: Path, seen: set[Path] | None = None) -> str:
    """The shader's text with its own includes in place. Raises ValueError for text that is not ASCII."""
    seen = set() if seen is None else seen
    path = path.resolve()
    if path in seen:
        return ""
    seen.add(path)
    data = path.read_bytes()
    if not data.isascii():
        line = next(i for i, text in enumerate(data.split(b"\n"), 1) if not text.isascii())
        raise ValueError(f"{path}:{line}: a shader must be ASCII")
    out = []
    for line in data.decode("ascii").splitlines():
        include = INCLUDE.match(line)
        if include:
            out.append(flatten(path.parent / include[1], seen))
        elif not line.startswith("#pragma once"):
            out.append(line + "\n")
    return "".join(out)


def literal(text: str) -> str:
    """The text as C++ string literals, each short enough for every compiler."""
    size = 8000
    return "\n".join(f'R"msl({text[i : i + size]})msl"' for i in range(0, len(text), size))


def main(out: str, *shaders: str) -> None:
    parts = ['#include "metal_host.h"\n', "namespace mlxq {\n", "const ShaderText shader_texts[] = {"]
    for path in sorted(Path(shader) for shader in shaders):
        parts.append(f'    {{"{path.stem}",\n{literal(flatten(path))}}},')
    parts += ["};\n", f"const int shader_text_count = {len(shaders)};\n", "}  // namespace mlxq", ""]
    Path(out).write_text("\n".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
