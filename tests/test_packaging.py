"""The wheel and the sdist hold what they should, run outside the checkout, and survive without the extension.

That they build and run on CPython 3.10 to 3.13 is `make wheels`: four compilations are too long for a test.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READ_AT_RUN_TIME = (".py", ".h", ".cu", ".cuh", ".txt")  # suffixes of the package's files

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None,
    reason="needs the packages of pyproject's build-system.requires, which `make test` installs",
)


def run(*command, **options) -> str:
    """Standard output of a command. Fails the test, with what it said, when it does not exit with 0."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_in(site: Path, code: str, *args: str) -> str:
    """Output of code where `mlxq` can only come from the folder site: -S keeps editable installs out."""
    paths = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return run(sys.executable, "-S", "-c", code, *args, cwd=site)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", str(folder), ".", cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, str(folder), cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site), str(wheel))
    return site


def sources(folder: str, *suffixes: str) -> set[str]:
    found = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return {p.relative_to(ROOT).as_posix() for p in found}


def test_the_wheel_holds_the_package_and_one_extension_for_this_python(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    extension = f"mlxq/_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    package = {name for name in names if name.startswith("mlxq/")}
    assert package == sources("mlxq", *READ_AT_RUN_TIME) | {extension}
    outside = {name.split("/")[0] for name in names - package}
    assert outside == {"mlxq-0.1.0.dist-info"}
    assert f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in wheel.name
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_all_that_the_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = sources("metal", ".cpp", ".h", ".txt", ".metal") | sources("mlxq", *READ_AT_RUN_TIME)
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.endswith((".so", ".o", ".pyc")) or name[0] == "."}
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"docs", "metal", "mlxq", "tests", "tools"}


def test_mlx_is_pinned_exactly_and_mlx_lm_to_a_minor(wheel):
    metadata = zipfile.ZipFile(wheel).read("mlxq-0.1.0.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
    versions = {v for r in required for v in re.findall(r"^mlx(?:\[cpu\])?([=<>].*?);", r)}
    assert len(versions) == 1 and re.fullmatch(r"==\d+\.\d+\.\d+", versions.pop())
    lm = [r.split(";")[0].strip() for r in required if r.startswith("mlx-lm")]
    assert lm
    for requirement in lm:
        bounds = dict(re.findall(r"(>=|<)(0\.\d+)", requirement))
        low, high = (int(bounds[sign].split(".")[1]) for sign in (">=", "<"))
        assert high == low + 1, requirement
    extras = re.findall(r"^Provides-Extra: (.*)$", metadata, re.M)
    assert sorted(extras) == ["cuda", "dev", "gguf", "plot", "qwix", "test", "torch"]


# Quantize, multiply, differentiate; the answer of each against float64.
USE = """
import warnings
import mlx.core as mx, numpy as np
from mlxq import ops
from mlxq.format import Format, Packed
from mlxq.ops import reference
rng = np.random.default_rng(0)
w, x = (mx.array(rng.standard_normal(s, dtype=np.float32)) for s in ((24, 128), (5, 128)))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for bits in (2, 3, 4, 8):
        packed = ops.quantize(w, Format(bits, 64))
        want = reference.qmm(x, packed)
        assert np.linalg.norm(np.array(ops.qmm(x, packed)) - want) < 1e-5 * np.linalg.norm(want)
        stacked = (a.reshape(3, 8, -1) for a in (packed.words, packed.scales, packed.biases))
        experts = Packed(*stacked, packed.format)
        got = ops.gather_qmm(x[:3, None], experts, rhs_indices=mx.array([2, 0, 1]))
        want = reference.gather_qmm(x[:3, None], experts, None, np.array([2, 0, 1]))
        assert np.linalg.norm(np.array(got) - want) < 1e-5 * np.linalg.norm(want)
        slope = mx.grad(lambda x: ops.qmm(x, packed).sum())(x)
        want = np.broadcast_to(reference.dequantize(packed).sum(0), (5, 128))
        assert np.linalg.norm(np.array(slope) - want) < 1e-5 * np.linalg.norm(want)
print(*(w.message for w in said), sep="\\n")
"""


def test_the_wheel_runs_without_the_checkout_on_its_own_kernels(installed):
    where = "import mlxq; from mlxq import ops; print(mlxq.__file__); assert ops.native_available()"
    assert Path(run_in(installed, where).strip()).is_relative_to(installed)
    assert run_in(installed, USE).strip() == ""


@pytest.fixture(scope="module")
def without_extension(installed, tmp_path_factory) -> Path:
    """The installed package with an extension that cannot be loaded."""
    site = tmp_path_factory.mktemp("broken") / "site"
    shutil.copytree(installed, site)
    (extension,) = (site / "mlxq").glob("_ext*")
    extension.write_bytes(b"not a shared library")
    return site


def test_operations_without_the_extension_run_on_stock_mlx_and_say_so_once(without_extension):
    said = run_in(without_extension, USE).strip().split("\n")
    assert len(said) == 1
    assert "could not be loaded" in said[0] and "Stock MLX operations are used instead" in said[0]


def test_a_model_without_the_extension_converts_loads_and_answers(without_extension, tmp_path):
    from tiny_models import make_hf_model

    source = make_hf_model("qwen3_moe", tmp_path / "float", "float32", seed=1)
    code = """
from mlx_lm import generate
import mlx.core as mx
from mlxq import load, ops
from mlxq.convert import convert
convert(sys.argv[1], sys.argv[2], bits=4, group_size=32, progress=False)
model, tokenizer = load(sys.argv[2])
assert not ops.native_available()
assert any(type(m).__module__ == "mlxq.nn.mlx" for m in model.modules())
generate(model, tokenizer, "hello", max_tokens=4)
print(mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item())
"""
    assert run_in(without_extension, code, str(source), str(tmp_path / "mlx")).strip().endswith("True")


# An extension for another mlx loads, and then its probe does not know mx.array: nanobind says TypeError.
WRONG_MLX = """
import types, mlxq
def probe(array): raise TypeError("probe(): incompatible function arguments.")
mlxq._ext = sys.modules["mlxq._ext"] = types.SimpleNamespace(probe=probe, MLX_VERSION="0.31.9")
"""


def test_a_wrong_mlx_gives_one_sentence_and_the_way_out(installed):
    code = WRONG_MLX + "from mlxq import ops; print(ops.native_available(), ops.native_error())"
    said = run_in(installed, code).strip()
    assert said.startswith("False mlxq's compiled kernels were built for mlx 0.31.9 and this is mlx ")
    assert said.endswith("run: pip install mlx==0.31.9") and "\n" not in said


def test_with_a_wrong_mlx_everything_still_runs_and_says_so_once(installed):
    said = run_in(installed, WRONG_MLX + USE).strip().split("\n")
    assert len(said) == 1 and "pip install mlx==0.31.9" in said[0]
