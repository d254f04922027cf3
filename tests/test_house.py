"""The house: imports point down, packages are declared, the README tells the truth, ruff is clean."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlxq"

# Imports point down this picture, never up, never sideways. A folder's name covers all that is in it.
PICTURE = """
    __main__
    cli
    doctor
    sampled  tune
    chat  autotune  evaluate  parity  train
    checkpoint.embedded
    __init__
    torch_model
    convert  load
    ptq  checkpoint
    qat
    nn  optim
    ops  rules
    bridge
    format  cache  progress
"""
LAYER = {unit: depth for depth, line in enumerate(PICTURE.split("\n")) for unit in line.split()}

FROM_NN_UP = ("nn", "optim", "qat.mlx", "ptq", "checkpoint", "load", "torch_model", "convert", "chat")
FROM_NN_UP += ("autotune", "evaluate", "parity", "train", "sampled", "doctor")
TERMINAL = ("checkpoint.summary", "convert", "chat", "autotune", "evaluate", "parity", "train")
TERMINAL += ("sampled", "doctor", "cli", "progress")
# Which third-party modules may be imported, and where. Besides these, files named for torch may import torch.
MAY_IMPORT = {
    "numpy": ("",),
    "mlx": ("bridge", "ops.native", *FROM_NN_UP),
    "mlx_lm": FROM_NN_UP,
    # .bin files are PyTorch's own, and so are the processes of torchrun
    "torch": (
        "bridge",
        "ops.cuda",
        "torch_model",
        "checkpoint.huggingface",
        "checkpoint.ranks",
        "train.blocks",
    ),
    "cupy": ("bridge", "ops.cuda"),
    "transformers": ("checkpoint", "torch_model", "train.torch"),
    "tokenizers": ("checkpoint",),
    "jinja2": ("chat",),
    "gguf": ("checkpoint.gguf",),
    "safetensors": ("checkpoint", "load", "convert"),
    "huggingface_hub": ("checkpoint", "load", "convert"),
    "packaging": ("doctor",),
    "rich": TERMINAL,
    "markdown_it": ("chat",),
    "matplotlib": ("evaluate",),
    "prompt_toolkit": ("chat",),
}


def module_name(path: Path) -> str:
    """Dotted name below mlxq: "ops.native"; "ops" is the folder's __init__, "__init__" is mlxq's own."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def covers(unit: str, module: str) -> bool:
    return unit == "" or module == unit or module.startswith(unit + ".")


def unit_of(module: str) -> str:
    """The most specific name in the picture that covers a module."""
    found = [unit for unit in LAYER if covers(unit, module)]
    assert found, f"mlxq.{module} is not in the picture of tests/test_house.py"
    return max(found, key=len)


def imports(path: Path, is_module) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it; is_module tells modules from names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if is_module(full) else node.module)
    return names


def is_our_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {module_name(path): imports(path, is_our_module) for path in SOURCES}


def wrong_way(imports_of: dict[str, set[str]]) -> list[str]:
    """Imports inside mlxq that do not point down the picture."""
    wrong = []
    for module, names in imports_of.items():
        for name in names:
            if not name.startswith("mlxq."):  # `import mlxq` itself is for mlxq.__version__
                continue
            target = name.removeprefix("mlxq.")
            if target == "_ext":
                if module != "ops.native":
                    wrong.append(f"mlxq.{module} imports mlxq._ext; only ops.native may")
                continue
            here, there = unit_of(module), unit_of(target)
            if here != there and LAYER[there] <= LAYER[here]:
                wrong.append(f"mlxq.{module} imports {name}, which is not below it")
    return wrong


def misplaced(imports_of: dict[str, set[str]]) -> list[str]:
    """Third-party imports that stand where they may not."""
    wrong = []
    for module, names in imports_of.items():
        for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"mlxq"}:
            allowed = MAY_IMPORT.get(name)
            if allowed is None:
                wrong.append(f"mlxq.{module} imports {name}, which has no line in MAY_IMPORT")
            elif not any(covers(unit, module) for unit in allowed) and name not in module.split("."):
                wrong.append(f"mlxq.{module} imports {name}")
    return wrong


def test_imports_point_down_and_never_sideways():
    assert not wrong_way(IMPORTS)


@pytest.mark.parametrize(
    "module, name",
    [
        ("format", "mlxq.ops"),
        ("ops.native", "mlxq.rules"),
        ("nn.mlx", "mlxq.load"),
        ("convert", "mlxq.load"),
        ("nn.mlx", "mlxq._ext"),
    ],
)
def test_an_import_up_or_sideways_would_be_seen(module, name):
    assert len(wrong_way({module: {name}})) == 1


def test_third_party_modules_are_imported_only_where_the_house_allows():
    assert not misplaced(IMPORTS)
    assert {n.split(".")[0] for n in IMPORTS["format"]} - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize(
    "module, name", [("format", "mlx.core"), ("ops.reference", "torch"), ("nn.mlx", "cupy"), ("cli", "attrs")]
)
def test_a_misplaced_third_party_import_would_be_seen(module, name):
    assert len(misplaced({module: {name}})) == 1
    assert not misplaced({"nn.torch": {"torch.nn"}, "ops.cuda": {"cupy"}})


def test_the_declared_packages_are_the_imported_ones():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    declared = set(re.findall(r'^ *"([A-Za-z0-9_-]+)', required, re.M))
    declared |= {"torch", "cupy", "matplotlib"}  # extras
    for extra in ("torch==", "cupy-", "matplotlib"):
        assert re.search(rf'\n\w+ = \["{extra}', text)
    imported = {n.split(".")[0] for names in IMPORTS.values() for n in names}
    imported -= {*sys.stdlib_module_names, "mlxq"}
    names = {name.lower().replace("-", "_").removesuffix("_py") for name in declared}
    assert imported | {"cupy"} == names


# Blocks the imports of the modules named in argv[1] and then runs argv[2].
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
exec(sys.argv[2])
"""


def run_blocked(modules: str, code: str) -> str:
    """Output of a fresh interpreter that cannot import some modules. Fails when it does not exit with 0."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED, modules, code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_mlxq_and_its_operations_work_without_torch_cupy_and_transformers():
    code = """
import numpy as np, mlx.core as mx, mlxq, mlxq.rules
from mlxq import ops, format
w = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
for array in (w, mx.array(w)):
    packed = ops.quantize(array, format.Format(8, 64))
    error = np.linalg.norm(np.array(ops.qmm(array, packed)) - w @ w.T) / np.linalg.norm(w @ w.T)
    assert 0 < error < 1e-2, error
print(mlxq.__version__)
"""
    assert run_blocked("torch,cupy,transformers", code).strip() == "0.1.0"


def test_the_command_line_explains_itself_without_loading_any_framework():
    code = "from mlxq.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert not e.code"
    assert "convert" in run_blocked("mlx,mlx_lm,torch,transformers,cupy,gguf,huggingface_hub", code)


def tracked_files() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip("this folder is not a git checkout")
    return [name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


def readme_block(heading: str) -> str:
    """The first fenced block below a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1]
    return section.split("```", 2)[1].split("\n", 1)[1]


def tree_of(block: str) -> dict[str, list[str]]:
    """folder -> names or patterns that the README's tree lists directly in it ("" is the checkout)."""
    tree, stack = {"": []}, [(-1, "")]
    for line in filter(str.strip, block.split("\n")):
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        while stack[-1][0] >= indent:
            stack.pop()
        folder = stack[-1][1]
        tree.setdefault(folder, []).extend(name.rstrip("/") for name in names)
        if names[-1].endswith("/"):
            stack.append((indent, f"{folder}/{names[-1].rstrip('/')}".lstrip("/")))
    return tree


def test_the_readme_shows_the_tree_that_is_there():
    """Each name in the tree exists; a folder whose contents are listed lists all of them (patterns count)."""
    files = tracked_files()
    entries: dict[str, set[str]] = {}
    for name in files:
        parts = name.split("/")
        for depth in range(len(parts)):
            entries.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    tree = tree_of(readme_block("The tree"))
    missing = [
        f"{folder}/{name}"
        for folder, names in tree.items()
        for name in names
        if not fnmatch.filter(entries.get(folder, ()), name)
    ]
    assert not missing, f"in the README's tree but not in git: {missing}"
    unlisted = [
        f"{folder}/{entry}"
        for folder, names in tree.items()
        for entry in entries[folder]
        if not any(fnmatch.fnmatch(entry, name) for name in names)
    ]
    assert not unlisted, f"in git but not in the README's tree: {unlisted}"


def test_the_readme_names_every_environment_variable_that_the_code_reads():
    read = set()
    for path in [*SOURCES, *(ROOT / "metal").rglob("*.cpp")]:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if "environ" in line or "getenv" in line:
                read.update(re.findall(r"MLXQ_[A-Z_]+", line))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert read and read == set(re.findall(r"^\| `(MLXQ_[A-Z_]+)`", readme, re.M))


def test_the_readme_example_runs_as_it_stands(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", readme_block("In Python")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "MLXQ_TRACEBACK": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == readme_output("In Python")


def readme_output(heading: str) -> str:
    """The second fenced block below a heading: what the first prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n", 1)[1].split("```")[3].split("\n", 1)[1].strip()


def test_the_readme_tables_are_those_of_the_newest_results():
    check = [sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"]
    assert subprocess.run(check).returncode == 0, "run: python tools/readme_tables.py"


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="needs the package ruff: pip install 'mlxq[dev]'")
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
