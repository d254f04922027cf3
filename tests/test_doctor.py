"""doctor sees what is wrong, says it, and exits 1; and finds nothing wrong here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxq import cli, doctor, format, ops
from mlxq.ops import reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


@pytest.fixture
def few(monkeypatch):
    """A self-test of one format, for what has to be run again after breaking something."""
    monkeypatch.setattr(format, "KERNEL_BITS", (4,))
    monkeypatch.setattr(format, "BITS", (4,))
    monkeypatch.setattr(format, "GROUP_SIZES", (64,))


def failed(found):
    return {check["name"]: check["detail"] for check in found["checks"] if not check["ok"]}


def test_nothing_is_wrong_here_and_every_kernel_of_every_family_ran(found):
    assert failed(found) == {} and found["ok"]
    names = {check["name"] for check in found["checks"]}
    assert {"compiled kernels", "quantizer", "stock"} <= names
    here = {name for name in ops.kernel_calls() if name.partition(":")[0] in ops.isa_levels()}
    assert here and here <= names
    assert {name.partition(":")[0] for name in here} == set(ops.isa_levels())


def test_what_it_found_is_plain_json_and_names_versions_devices_and_kernels(found):
    assert json.loads(json.dumps(found)) == found
    assert {"mlxq", "python", "mlx", "mlx-lm"} <= set(found["versions"])
    assert {"MLX default", "Metal", "CUDA", "GPU streams of MLX"} <= set(found["devices"])
    assert found["cpu"]["threads"] >= 1 and found["cpu"]["families"] == list(ops.isa_levels())
    rows = found["kernels"]
    assert len(rows) == len(format.BITS) * len(format.GROUP_SIZES) * len(format.STORAGE) * 2
    for row in rows:
        stock = set(row["kernels"].values()) == {"stock"}
        assert stock == (row["bits"] not in format.KERNEL_BITS)


def test_a_wrong_answer_is_found_and_named(few, monkeypatch):
    right = reference.qmm

    def skewed(x, packed, transpose=True):
        answer = right(x, packed, transpose)
        return answer * 1.02 if transpose and "bfloat16" in str(x.dtype) else answer

    monkeypatch.setattr(reference, "qmm", skewed)
    wrong = failed(doctor.examine())
    assert wrong and all("x=bfloat16" in text and "transpose=True" in text for text in wrong.values())


def test_nan_is_a_wrong_answer(few, monkeypatch):
    right = ops.qmm
    monkeypatch.setattr(ops, "qmm", lambda x, w, transpose=True: right(x, w, transpose) * float("nan"))
    assert any("WRONG" in text for text in failed(doctor.examine()).values())


def test_a_kernel_that_did_not_run_when_forced_is_found(few, monkeypatch):
    monkeypatch.setattr(ops, "kernel_for", lambda *_, **__: "avx9:gemm")
    wrong = failed(doctor.examine())
    assert "avx9:gemm was announced" in wrong["forced kernels"]


def test_a_kernel_that_no_case_reached_is_found(few, monkeypatch):
    calls, family = ops.kernel_calls, ops.isa_levels()[0]
    monkeypatch.setattr(ops, "kernel_calls", lambda: calls() | {f"{family}:forgotten": 0})
    assert f"{family}:forgotten" in failed(doctor.examine())["coverage"]


def test_a_quantizer_with_other_bits_is_found(few, monkeypatch):
    right = ops.quantize

    def off_by_one(w, fmt, **settings):
        packed = right(w, fmt, **settings)
        return format.Packed(np.bitwise_xor(packed.words, 1), packed.scales, packed.biases, fmt)

    monkeypatch.setattr(ops, "quantize", off_by_one)
    assert "differs from numpy for 4-bit/64" in failed(doctor.examine())["quantizer"]


def test_a_dependency_of_another_version_is_found_with_the_command_that_helps(monkeypatch):
    declared = ["mlx==9.9", "mlx-lm>=0.1,<9", "numpy", "torch==1; extra == 'torch'", "nothing-like-it>=1"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: declared)
    checks = {check["name"]: check for check in doctor._requirements()}
    assert set(checks) == {"mlx", "mlx-lm", "nothing-like-it"}
    assert checks["mlx-lm"]["ok"] and not checks["mlx"]["ok"]
    assert "pip install 'mlx==9.9'" in checks["mlx"]["detail"]
    assert checks["nothing-like-it"]["detail"].startswith("missing")


def test_an_extension_that_does_not_load_is_exit_1_and_the_rest_is_still_examined():
    code = (
        "import sys\nsys.modules['mlxq._ext'] = None\n"
        "from mlxq import cli, format\n"
        "format.KERNEL_BITS, format.BITS, format.GROUP_SIZES = (4,), (4,), (64,)\n"
        "sys.exit(cli.main(['doctor', '--json']))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert list(failed(found)) == ["compiled kernels"]
    assert "could not be loaded" in failed(found)["compiled kernels"]
    assert "stock" in {check["name"] for check in found["checks"]}


@pytest.fixture
def examined(found, monkeypatch):
    """doctor with the results that are there already."""
    monkeypatch.setattr(doctor, "examine", lambda: found)
    return found


def test_the_screen_and_the_report_show_the_same_and_the_report_can_be_read_back(examined, tmp_path, capsys):
    assert cli.main(["doctor", "--report", str(tmp_path / "r.txt")]) == 0
    said, report = capsys.readouterr(), (tmp_path / "r.txt").read_text()
    assert "checks passed" in said.out and "r.txt" in said.err
    for check in examined["checks"]:
        assert check["name"] in said.out and check["name"] in report
    assert json.loads(report.partition("```json")[2].rstrip().removesuffix("```")) == examined
    assert "\x1b" not in report


def test_json_is_all_there_is_on_stdout_and_a_failure_is_exit_1(examined, monkeypatch, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == examined
    bad = examined | {"checks": [{"name": "x", "ok": False, "detail": "broken"}], "ok": False}
    monkeypatch.setattr(doctor, "examine", lambda: bad)
    assert cli.main(["doctor"]) == 1
    assert "1 of 1 checks failed" in capsys.readouterr().out


def test_formats_that_share_their_kernels_are_one_line(examined, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["doctor"])
    table = capsys.readouterr().out.partition("Kernels on CPU")[2].partition("Self-test")[0]
    stock = [line for line in table.splitlines() if "1 3 5 6" in line]
    assert len(stock) == 1 and stock[0].count("stock") == 3
