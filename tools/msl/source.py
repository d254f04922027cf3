"""Metal shader text, read as text: includes flattened, kernels found, address spaces taken out.

This is no parser of C++. It relies on the house's rules for shaders: a kernel is `[[kernel]] void name(...)`,
every parameter of it has an attribute, and `threadgroup T x[N];` stands alone on its line.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    kind      "pointer" or "reference" for a buffer, else the builtin's name, "thread_index_in_simdgroup"
    buffer    n of [[buffer(n)]], -1 for a builtin
    writable  whether the shader may write to the buffer
    """

    name: str
    kind: str
    buffer: int
    writable: bool


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]
    template: bool
    line: int


@dataclass(frozen=True)
class Constant:
    """`constant T name [[function_constant(index)]];`"""

    type: str
    name: str
    index: int


BUILTINS = {
    "thread_position_in_grid": "msl::position_in_grid()",
    "thread_position_in_threadgroup": "msl::position_in_threadgroup()",
    "threadgroup_position_in_grid": "msl::group_position()",
    "threads_per_threadgroup": "msl::group_threads()",
    "dispatch_threads_per_threadgroup": "msl::group_threads()",
    "threadgroups_per_grid": "msl::groups()",
    "threads_per_grid": "msl::threads_in_grid()",
    "grid_size": "msl::threads_in_grid()",
    "thread_index_in_threadgroup": "msl::Id{msl::thread_index(), 0, 0}",
    "thread_index_in_simdgroup": "msl::Id{msl::lane(), 0, 0}",
    "simdgroup_index_in_threadgroup": "msl::Id{msl::thread_index() / 32, 0, 0}",
    "simdgroups_per_threadgroup": "msl::Id{(msl::threads() + 31) / 32, 0, 0}",
    "threads_per_simdgroup": "msl::Id{32, 0, 0}",
    "thread_execution_width": "msl::Id{32, 0, 0}",
    "thread_index_in_quadgroup": "msl::Id{msl::lane() & 3, 0, 0}",
    "quadgroup_index_in_simdgroup": "msl::Id{msl::lane() / 4, 0, 0}",
    "quadgroup_index_in_threadgroup": "msl::Id{msl::thread_index() / 4, 0, 0}",
}

METAL_ATTRIBUTE = re.compile(
    r"\[\[\s*(?:kernel|host_name\s*\([^)]*\)|buffer\s*\(\s*\d+\s*\)|max_total_threads_per_threadgroup\s*\([^)]*\)|"
    + "|".join(sorted(BUILTINS, key=len, reverse=True))
    + r")\s*\]\]"
)
KERNEL = re.compile(
    r"(?:\[\[\s*kernel(?:\s*,[^\]]*)?\s*\]\](?:\s*\[\[[^\]]*\]\])*|\bkernel)\s+void\s+(\w+)\s*\("
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(?:"([^"]+)"|<([^>]+)>)[^\n]*$', re.MULTILINE)
THREADGROUP_ARRAY = re.compile(
    r"^(?P<indent>[ \t]*)(?:alignas\s*\([^)]*\)\s*)?threadgroup\s+"
    r"(?P<type>[\w:]+(?:\s*<[^;{}()*&]*>)?(?:::\w+)?)\s+"
    r"(?P<name>\w+)\s*(?P<size>(?:\[[^\]]*\]\s*)*);",
    re.MULTILINE,
)
FUNCTION_CONSTANT = re.compile(
    r"\bconstant\s+(?:constexpr\s+)?(\w+)\s+(\w+)\s*\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]\s*;"
)


def without_comments(text: str) -> str:
    """The text with comments as blanks: every other character stays at its line and column."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)

    def blank(match: re.Match) -> str:
        return match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0])

    return pattern.sub(blank, text)


def flatten(sources, folders=(), replace=None) -> str:
    """One text: the sources in order, each #include "file" replaced by that file once and then dropped.

    sources   text, Path, or a list of both
    folders   searched for includes after the including file's own folder; for <...> includes too (those that
              are not found are dropped, as <metal_stdlib> is)
    replace   {path as it is included: text to use instead}

    #line keeps the places of errors. Raises FileNotFoundError for an #include "file" that is not there.
    """
    seen: set[str] = set()
    replace = replace or {}

    def expand(text: str, name: str, folder: Path | None) -> str:
        text = without_comments(text)

        def include(match: re.Match) -> str:
            quoted, angled = match[1], match[2]
            path = quoted or angled
            line = text.count("\n", 0, match.start()) + 2
            back = f'#line {line} "{name}"'
            if path in replace:
                if path in seen:
                    return ""
                seen.add(path)
                return f"{replace[path]}\n{back}"
            for candidate in [*([folder] if folder and quoted else []), *map(Path, folders)]:
                file = (candidate / path).resolve()
                if file.is_file():
                    if str(file) in seen:
                        return ""
                    seen.add(str(file))
                    return f"{expand(file.read_text(encoding='utf-8'), file.name, file.parent)}\n{back}"
            if angled:
                return ""
            raise FileNotFoundError(f'shader {name}: #include "{path}" is not there')

        body = INCLUDE.sub(include, re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+once", "", text, flags=re.MULTILINE))
        return f'#line 1 "{name}"\n{body}'

    parts = []
    for number, source in enumerate(sources if isinstance(sources, (list, tuple)) else [sources]):
        if isinstance(source, Path):
            key = str(source.resolve())
            if key not in seen:
                seen.add(key)
                parts.append(expand(source.read_text(encoding="utf-8"), source.name, source.resolve().parent))
        else:
            parts.append(expand(source, f"source{number}.metal", None))
    return "\n".join(parts) + "\n"


def split_arguments(text: str) -> list[str]:
    """Split at commas outside of (), [], {} and <>."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


def parameter(text: str, kernel: str, position: int) -> Parameter:
    attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]\s*$", text)
    if attribute:
        declaration, kind, number = text[: attribute.start()].strip(), attribute[1], attribute[2]
    else:  # Metal numbers such buffers in their order
        declaration, kind, number = text, "buffer", position
    name = re.search(r"(\w+)$", declaration)[1]
    if kind == "buffer":
        kind = "reference" if "&" in declaration else "pointer"
        if kind == "pointer" and "*" not in declaration:
            raise ValueError(f"kernel {kernel}: buffer `{declaration}` is neither a pointer nor a reference")
        pointee = declaration.split("*")[0].split("&")[0]
        writable = not re.search(r"\b(const|constant)\b", pointee)
        return Parameter(name, kind, int(number), writable)
    if kind not in BUILTINS:
        raise ValueError(f"kernel {kernel}: attribute [[{kind}]] is not built into the harness")
    return Parameter(name, kind, -1, False)


def kernels(text: str) -> dict[str, Kernel]:
    """Every kernel of a flattened text, by name. Raises ValueError for a parameter that cannot be bound."""
    found = {}
    for match in KERNEL.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        texts = split_arguments(text[match.end() : end - 1])
        parameters = tuple(parameter(p, match[1], i) for i, p in enumerate(texts))
        before = text[: match.start()].rstrip()
        template = before.endswith(">") and bool(re.search(r"\btemplate\s*<[^;{}]*>$", before))
        found[match[1]] = Kernel(match[1], parameters, template, text.count("\n", 0, match.start()) + 1)
    return found


def function_constants(text: str) -> list[Constant]:
    return [Constant(m[1], m[2], int(m[3])) for m in FUNCTION_CONSTANT.finditer(text)]


def without_address_spaces(text: str, threadgroup_array) -> str:
    """C++ without Metal's address spaces and attributes.

    threadgroup_array(type, name, size) -> text that stands for the variable `threadgroup type name size;`

    Raises ValueError for a threadgroup variable that is not alone on its line.
    """
    text = FUNCTION_CONSTANT.sub(r"static \1 \2; static bool \2_is_defined;", text)
    text = re.sub(r"\bis_function_constant_defined\s*\(\s*(\w+)\s*\)", r"\1_is_defined", text)
    text = THREADGROUP_ARRAY.sub(
        lambda m: m["indent"] + threadgroup_array(m["type"], m["name"], m["size"]), text
    )
    missed = re.search(r"^[ \t]*threadgroup\s[^*&()]*;", text, re.MULTILINE)
    if missed:
        raise ValueError(f"threadgroup variable not alone on its line: {missed[0].strip()}")
    text = METAL_ATTRIBUTE.sub("", text)
    text = re.sub(r"\bkernel\s+(?=void\b)", "", text)
    text = re.sub(r"\bconst\s+constant\b|\bconstant\s+const\b|\bconstant\b(?!\s+constexpr\b)", "const", text)
    text = re.sub(r"\bconstant\s+(?=constexpr\b)", "", text)
    return re.sub(r"\b(?:device|threadgroup|thread)\b(?!_)", "", text)
