"""tools/sanitize_cuda.py with a sanitizer that only counts what the tests print."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools/ is no installed package

import sanitize_cuda  # noqa: E402

SANITIZER = """#!{python}
import os, re, subprocess, sys
if "--version" in sys.argv:
    sys.exit(print("NVIDIA sanitizer\\nVersion 0"))
tool, command = sys.argv[2], sys.argv[sys.argv.index(sys.executable) :]
ours = sys.argv[sys.argv.index("--kernel-name") + 1].removeprefix("regex=")
if command[1] == "-c":  # what is planted
    kernel, = re.findall(r"void (\\w+)\\(", command[2])
    fitting = ("__shared__" in command[2]) == (tool == "racecheck")
    found = int(re.search(ours, kernel) is not None and fitting and os.environ.get("BLIND") != tool)
else:
    done = subprocess.run(command, capture_output=True, text=True)
    found = (done.stdout.count("RACE!") if tool == "racecheck" else 0)
    print(done.stdout + done.stderr)
print(f"========= {{'ERROR' if tool == 'memcheck' else 'RACECHECK'}} SUMMARY: {{found}} hazards")
sys.exit(0 if command[1] == "-c" else done.returncode)  # racecheck has warnings, too: they count
"""
TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("n", range(3))
def test_one(n):
    with open({log!r}, "a") as log:
        log.write(f"one{{n}} {{os.environ['MLXQ_NVRTC_OPTIONS']}};")
        log.write(f" on {{os.environ.get('CUDA_VISIBLE_DEVICES')}};")
        log.write(f" times {{os.environ['MLXQ_TEST_REPEATS']}};")

@pytest.mark.parametrize("n", [1, 2])
def test_racy(n):
    print("========= Error: RACE!\\n" * (n == 2))

def test_skipped():
    pytest.skip("no GPU")

def test_wrong():
    assert os.path.exists({mended!r})

def test_slow():
    time.sleep(0 if os.path.exists({mended!r}) else 60)

def test_other():
    raise SystemError
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*options) -> (exit code, result file)."""
    (tmp_path / "bin").mkdir()
    for name, text in (("compute-sanitizer", SANITIZER.format(python=sys.executable)),
                       ("nvidia-smi", "#!/bin/sh\necho 'GPU 0: A GPU (UUID: 1)'\n")):  # fmt: skip
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    log, mended, tests = tmp_path / "log", tmp_path / "mended", tmp_path / "test_it.py"
    tests.write_text(TESTS.format(log=str(log), mended=str(mended)))
    out = tmp_path / "out.json"

    def call(*options):
        arguments = [
            "sanitize_cuda.py",
            "--out",
            out,
            "--tests",
            tests,
            "--jobs",
            "3",
            "-k",
            "not other",
            *options,
        ]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        return sanitize_cuda.main(), json.loads(out.read_text()) if out.exists() else None

    call.log, call.mended, call.tests, call.out = log, mended, tests, out
    return call


def test_only_what_passed_with_nothing_found_is_clean_and_each_finding_has_its_test(run):
    code, result = run("--each", "8")
    assert (
        code == 1 and result["gpu"] == "GPU 0: A GPU" and result["planted"] == {"racecheck": 1, "memcheck": 1}
    )
    said = {
        tool: {name: row["said"] for name, row in found.items()} for tool, found in result["tests"].items()
    }
    clean = {"::test_one[0]", "::test_one[1]", "::test_one[2]", "::test_racy[1]"}
    for tool, more in (("racecheck", set()), ("memcheck", {"::test_racy[2]"})):
        assert {name for name, words in said[tool].items() if words == "clean"} == clean | more
        assert "no GPU" in said[tool]["::test_skipped"] and "SUMMARY: 0" in said[tool]["::test_wrong"]
        assert said[tool]["::test_slow"] == "more than 8 s" and not result["left"][tool]
        assert "::test_other" not in said[tool]
    words = said["racecheck"]["::test_racy[2]"].splitlines()
    assert words == ["========= Error: RACE!", "========= RACECHECK SUMMARY: 1 hazards"]
    log = run.log.read_text()
    assert (
        "-DARRIVALS=32" in log
        and "one0 -lineinfo;" in log
        and set(re.findall("times .*?;", log)) == {"times 1;"}
    )

    run.mended.touch()  # a second call looks only at what was not clean
    run.log.unlink()
    code, result = run("--tools", "racecheck")
    found = result["tests"]["racecheck"]
    assert code == 1 and found["::test_slow"]["said"] == found["::test_wrong"]["said"] == "clean"
    assert not run.log.exists() and result["tests"]["memcheck"]["::test_wrong"]["said"] != "clean"
    assert run("--tools", "racecheck", "-k", "one or slow or wrong")[0] == 0

    run.tests.write_text(run.tests.read_text() + "\n")  # other tests: all over again
    assert run("--tools", "racecheck", "-k", "one")[0] == 0 and run.log.exists()


@pytest.mark.parametrize("visible, seen", [(None, {"0", "1"}), ("1", {"1"}), ("2,0", {"2", "0"})])
def test_several_gpus_take_turns(run, monkeypatch, tmp_path, visible, seen):
    listed = "GPU 0: A (UUID: 1)\nGPU 1: A (UUID: 2)" + "\nGPU 2: B (UUID: 3)" * (visible is not None)
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, result = run("-k", "one")
    names = {None: "GPU 0: A, GPU 1: A", "1": "GPU 1: A", "2,0": "GPU 2: B, GPU 0: A"}
    assert code == 0 and result["gpu"] == names[visible]
    assert set(re.findall(r" on (\w+);", run.log.read_text())) == seen


def test_without_a_sanitizer_the_tool_says_where_it_comes_from(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="no compute-sanitizer in PATH"):
        run()


def test_what_there_is_no_time_for_is_named(run):
    code, result = run("--limit", "4", "--tools", "racecheck")
    assert code == 1 and len(result["left"]["racecheck"]) == 8 and not result["tests"]["racecheck"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_sanitizer_that_misses_what_is_planted_ends_the_run(run, monkeypatch, capsys, tool):
    monkeypatch.setenv("BLIND", tool)
    assert run() == (1, None)
    assert f"{tool} does not find what is planted" in capsys.readouterr().err


def test_all_kernels_and_no_others_are_looked_at():
    names = sanitize_cuda.kernels()
    started = sum(path.read_text().count("__global__ void") for path in (ROOT / "mlxq/ops").glob("*.cu"))
    assert len(names) == len(set(names)) == started >= 11 and {"qmv", "add_parts", "by_expert"} <= set(names)


def test_the_selection_holds_every_kind_of_kernel():
    names = sanitize_cuda.selected(sanitize_cuda.TESTS, sanitize_cuda.EXPRESSION)
    first = [name.split("[")[0] for name in names[: len({name.split("[")[0] for name in names})]]
    assert len(set(first)) == len(first) >= 12  # one of each function before the second of any
    kinds = "in_parts transposed gathered experts_equal int8_have every_format many_rows cluster captured"
    for words in (*kinds.split(), "quantize"):
        assert any(words in name for name in names), words
    with pytest.raises(SystemExit, match="no tests are selected by 'nothing'"):
        sanitize_cuda.selected(sanitize_cuda.TESTS, "nothing")
