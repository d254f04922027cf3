"""The command line: what it imports, what it prints, how it ends."""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models

import mlxq
from mlxq import cli

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def mlxq_command(*arguments, **options):
    command = [sys.executable, "-m", "mlxq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120, **options)


@pytest.mark.parametrize("line", (["--help"], ["chat", "--help"], ["convert", "--help"], ["--version"]))
def test_help_loads_no_framework(line):
    code = (
        "import sys\nfrom mlxq.cli import main\n"
        f"try:\n    main({line!r})\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'torch', 'numpy', 'rich', 'prompt_toolkit'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    # The bar is 0.3 s of wall clock on a quiet machine; what other processes take is not the program's.
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert mlxq_command("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_names_every_command_and_version_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("chat", "convert", "inspect", "doctor"))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mlxq {mlxq.__version__}\n"


@pytest.mark.parametrize("line", ([], ["convrt"], ["convert"], ["convert", "a", "b", "--bits", "four"]))
def test_a_wrong_command_line_is_one_sentence_and_exit_2(line, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(line)
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == ""
    assert said.err.startswith("mlxq: ") and "Try: mlxq" in said.err


def ends_with(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(cli.doctor, "run", run)
    return cli.main(["doctor"])


def test_bad_input_is_one_line_and_exit_2_and_our_own_mistakes_keep_their_traceback(monkeypatch, capsys):
    assert ends_with(monkeypatch, ValueError("qmm: x has K=1")) == 2
    assert capsys.readouterr().err == "mlxq: qmm: x has K=1\n"
    assert ends_with(monkeypatch, PermissionError(13, "Permission denied", "/there")) == 2
    assert capsys.readouterr().err == "mlxq: /there: Permission denied\n"
    with pytest.raises(ZeroDivisionError):
        ends_with(monkeypatch, ZeroDivisionError())
    monkeypatch.setenv("MLXQ_TRACEBACK", "1")
    with pytest.raises(ValueError):
        ends_with(monkeypatch, ValueError("x"))


def test_ctrl_c_is_exit_130(monkeypatch):
    assert ends_with(monkeypatch, KeyboardInterrupt()) == 130


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mlxq", "inspect", str(ROOT / "none")]
    code = (
        "import sys\nfrom mlxq import cli\n"
        "cli.doctor.run = lambda args: print('x' * 100000) or 0\n"
        "sys.exit(cli.main(['doctor']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=ENV)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_convert_passes_every_flag_on(monkeypatch, capsys, tmp_path):
    import mlxq.convert
    from mlxq.checkpoint.summary import Layer, Summary
    from mlxq.rules import QuantizationRule

    seen = {}

    def convert(src, dst, **settings):
        seen.update(settings, src=src, dst=dst)
        report = Summary(Path(dst), "a model", seconds=1.0)
        report.layers.append(Layer("a/b", "4-bit/64", 64, 36, 0.1, 1.0))
        return report

    monkeypatch.setattr(mlxq.convert, "convert", convert)
    rules = tmp_path / "rules.json"
    rules.write_text('[{"module_path": "c", "weight_qtype": "int8"}]')
    line = "convert S D --bits 2 --group-size 32 --dtype float16 --embedding-bits 8"
    flags = f" --rule a=bits:8 --rule b=bits:none --rules {rules} --allow-unused-rules"
    flags += " --quantization-rule mlx --overwrite --allow-nonfinite --trust-remote-code --method gptq"
    flags += " --calibration C --target-bpw 3.5 --plan P --costs K --max-memory 3GB --no-resume --dry-run"
    assert cli.main((line + flags).split()) == 0
    assert seen == {
        "src": "S", "dst": "D", "bits": 2, "group_size": 32, "dtype": "float16", "embedding_bits": 8,
        "rules": ["a=bits:8", "b=bits:none", QuantizationRule(module_path="c", weight_qtype="int8")],
        "allow_unused_rules": True, "quantization_rule": "mlx", "overwrite": True,
        "allow_nonfinite": True, "trust_remote_code": True, "method": "gptq", "calibration": "C",
        "target_bpw": 3.5, "plan": "P", "costs": "K", "max_memory": "3GB", "resume": False, "dry_run": True,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "a/b" in out and "4-bit/64" in out and "mlxq chat D" in out
    cli.main(["convert", "S", "D"])
    wanted = {"src": "S", "dst": "D", "quantization_rule": "affine", "resume": True}
    assert {k: v for k, v in seen.items() if v} == wanted


def test_convert_then_inspect_a_model_and_refuse_to_write_over_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    source = tiny_models.make_hf_model("llama", tmp_path / "hf")
    target = str(tmp_path / "mlx")
    assert cli.main(["convert", str(source), target, "--bits", "4", "--rule", "lm_head=bits:8"]) == 0
    assert "total" in capsys.readouterr().out
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]["bits"] == 4
    assert cli.main(["inspect", target]) == 0
    out = capsys.readouterr().out
    assert "4-bit/64" in out and "8-bit/64" in out and "bits/weight" in out
    assert cli.main(["convert", str(source), target]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlxq: ") and "exists" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "line, said",
    [
        (["inspect", "/no/such/model"], "/no/such/model does not exist"),
        (["convert", "/no/such/model", "D"], "/no/such/model"),
        (["convert", "/", "D", "--rule", "x"], "a rule is written PATTERN"),
        (["convert", "/", "D", "--bits", "7"], "7"),
    ],
)
def test_bad_arguments_are_named(line, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlxq: ") and said in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_warning_of_ours_is_one_line(capsys):
    before = warnings.showwarning
    try:
        cli.main(["--version"])
    except SystemExit:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = cli._show_warning
            warnings.warn("mlxq's compiled kernels could not be loaded", RuntimeWarning, stacklevel=1)
            warnings.warn("somebody else's", UserWarning, stacklevel=1)
    finally:
        warnings.showwarning = before
    ours, other = capsys.readouterr().err.splitlines()[:2]
    assert ours == "mlxq: mlxq's compiled kernels could not be loaded"
    assert "UserWarning: somebody else's" in other
