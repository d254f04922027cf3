"""Interrupted conversions, memory limits, dry runs, and conversions by several processes."""

import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxq.checkpoint import journal
from mlxq.checkpoint.memory import Watch, anonymous_bytes, parse_bytes
from mlxq.checkpoint.partial import kept_folder, partial_folder
from mlxq.checkpoint.ranks import Ranks, share
from mlxq.convert import convert
from mlxq.format import Format, quantize
from mlxq.ptq import estimate
from mlxq.ptq.awq import Change
from mlxq.ptq.calibrated import Spool

# Converts argv[1] to argv[2]; is killed after the tensor argv[3], whose line is in the journal by then.
KILLED = """
    import os, signal, sys
    import mlxq.convert
    from mlxq.checkpoint import journal

    journal.FLUSH_BYTES = 0
    write, seen = mlxq.convert._write, []

    def counted(step, *rest):
        if seen and seen[-1] == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(step.name)
        print(step.name, flush=True)
        return write(step, *rest)

    mlxq.convert._write = counted
    mlxq.convert.convert(sys.argv[1], sys.argv[2], max_shard_bytes=60_000, progress=False)
"""


def run(src, dst, stop_after="") -> tuple[int, list[str]]:
    """(exit status, names of the tensors that were written) of a conversion in its own process."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(src), str(dst), stop_after]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.split()


def contents(folder) -> dict[str, bytes]:
    """Every file but the card, which tells the folder's name and the time that it took."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / "README.md"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def llama(tmp_path):
    return tiny_models.make_hf_model("llama", tmp_path / "src", dtype="float16")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(source, partial folder) of a conversion that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    source = tiny_models.make_hf_model("llama", folder / "src", dtype="float16")
    run(source, folder / "out" / "q", FIRST)
    return source, next((folder / "out").iterdir())


@pytest.fixture
def again(killed, tmp_path):
    """(source, folder): a conversion to `folder / q` was killed."""
    shutil.copytree(killed[1], tmp_path / "out" / killed[1].name)
    return killed[0], tmp_path / "out"


FIRST, SECOND = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"


def test_a_conversion_that_is_killed_twice_goes_on_and_equals_an_uninterrupted_one(llama, tmp_path):
    out = tmp_path / "out"
    code, first = run(llama, out / "q", FIRST)
    assert code != 0 and first[-1] == FIRST
    code, second = run(llama, out / "q", SECOND)
    assert code != 0 and second[-1] == SECOND and not set(first) & set(second)
    assert not (out / "q").exists() and len(list(out.iterdir())) == 1
    code, third = run(llama, out / "q")
    assert code == 0 and not set(third) & {*first, *second}
    report = convert(llama, tmp_path / "whole", max_shard_bytes=60_000, progress=False)
    assert {*first, *second, *third} == {
        layer.path.replace("/", ".") + (".weight" if "bit" in layer.stored else "") for layer in report.layers
    }
    assert contents(out / "q") == contents(tmp_path / "whole")
    assert [path.name for path in out.iterdir()] == ["q"]


def test_the_report_of_a_resumed_run_is_that_of_a_whole_one(again, tmp_path):
    source, out = again
    resumed = convert(source, out / "q", max_shard_bytes=60_000, progress=False)
    whole = convert(source, tmp_path / "whole", max_shard_bytes=60_000, progress=False)
    assert resumed.layers == whole.layers


@pytest.mark.parametrize("change", ["bits", "no_resume", "source"])
def test_other_arguments_or_another_source_start_anew(change, again, monkeypatch):
    llama, out = again
    seen = []
    import mlxq.convert

    write = mlxq.convert._write

    def noted(step, *rest):
        seen.append(step.name)
        return write(step, *rest)

    monkeypatch.setattr(mlxq.convert, "_write", noted)
    options = {"bits": {"bits": 3}, "source": {}, "no_resume": {"resume": False}}[change]
    if change == "source":
        file = llama / "model.safetensors"
        old = file.stat()
        os.utime(file, ns=(1, old.st_mtime_ns + 1))
    report = convert(llama, out / "q", max_shard_bytes=60_000, progress=False, **options)
    if change == "source":
        os.utime(file, ns=(1, old.st_mtime_ns))
    assert len(seen) == len(report.layers)
    assert [path.name for path in out.iterdir()] == ["q"]


@pytest.mark.parametrize("damage", ["journal", "line", "shard"])
def test_a_damaged_partial_folder_is_not_believed(damage, again, tmp_path):
    llama, out = again
    [partial] = out.iterdir()
    log = partial / "journal-0.jsonl"
    if damage == "journal":
        log.write_text("{" + log.read_text())
    elif damage == "line":
        log.write_text(log.read_text()[:-30])
    else:
        for shard in partial.glob("model*.safetensors"):
            os.truncate(shard, min(shard.stat().st_size, 3000))
    convert(llama, out / "q", max_shard_bytes=60_000, progress=False)
    convert(llama, tmp_path / "whole", max_shard_bytes=60_000, progress=False)
    assert contents(out / "q") == contents(tmp_path / "whole")


def test_an_interrupt_says_where_the_half_is_and_what_goes_on(llama, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(KeyboardInterrupt, match="the same command goes on where it stopped"):
        with partial_folder(tmp_path / "m" / "q", digest="d") as folder:
            log = journal.Journal(folder, "d")
            log.add("t", {}, 1, [])
            log.flush([])
            raise KeyboardInterrupt
    with partial_folder(tmp_path / "m" / "q", digest="d") as folder:
        assert journal.read(folder, "d") == {"t": {}}
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["q"]


def test_two_conversions_at_once_do_not_share_a_partial_folder(llama, tmp_path):
    (tmp_path / "m").mkdir()
    with partial_folder(tmp_path / "m" / "q", digest="d") as folder:
        journal.Journal(folder, "d").flush([])
        code = "import sys; from pathlib import Path; from mlxq.checkpoint.partial import partial_folder\n"
        code += f"with partial_folder(Path({str(tmp_path / 'm' / 'q')!r}), digest='d') as f: print(f)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 0 and str(folder) not in other.stdout and folder.exists()
        (tmp_path / "m" / "q").rmdir()


def test_a_kept_folder_is_found_again_by_the_same_conversion_only(tmp_path):
    dst = tmp_path / "q"

    def interrupted(digest: str, resume: bool = True) -> bool:
        """Whether the folder of the run before is found; this one leaves one."""
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            with kept_folder(dst, "tune", digest, resume) as folder:
                found = (folder / "work").exists()
                (folder / "work").mkdir(exist_ok=True)
                with pytest.raises(FileExistsError, match="another process is making it"):
                    with kept_folder(dst, "tune", digest):
                        pass
                raise KeyboardInterrupt
        return found

    assert [interrupted(*a) for a in (("a",), ("a",), ("b",), ("b",), ("b", False))] == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="bad"), kept_folder(dst, "tune", "b"):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt, match="nothing was done yet"), kept_folder(dst, "tune", "b"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# Converts argv[1] to argv[2] with measured bits, tells each thing that it does, and is killed at one.
CALIBRATED = """
    import os, signal, sys
    import mlxq.convert
    from mlxq.checkpoint import journal
    from mlxq.ptq import calibrated

    journal.FLUSH_BYTES = 0
    calibrated.KEEP_SECONDS = 0

    def telling(owner, name, words):
        function = getattr(owner, name)

        def told(*args, **options):
            said = words(*args)
            made = function(*args, **options)
            print(said, flush=True)
            if said == sys.argv[4]:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        setattr(owner, name, told)

    telling(mlxq.convert, "sensitivities", lambda *args: "measured")
    telling(calibrated.Spool, "save", lambda spool, path, packed: path)
    telling(mlxq.convert, "_write", lambda step, *args: step.name)
    mlxq.convert.convert(sys.argv[1], sys.argv[2], calibration=sys.argv[3], **OPTIONS)
"""
MEASURED = {"method": "awq+gptq", "target_bpw": 4.2, "max_shard_bytes": 60_000, "progress": False}


def test_a_conversion_on_text_that_is_killed_thrice_measures_and_solves_once(llama, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(str(n * n) for n in range(400)))
    code = textwrap.dedent(CALIBRATED).replace("OPTIONS", repr(MEASURED))

    def told(place="") -> list[str]:
        command = [sys.executable, "-c", code, *map(str, (llama, out / "q", text, place))]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout.split()
        assert (done.returncode != 0 and said[-1] == place) if place else done.returncode == 0, done.stderr
        return said

    assert told("measured") == ["measured"]
    assert told("model.layers.1.self_attn.v_proj")[0] == "measured"  # killed before they were on the disk
    third = told("model.layers.0.mlp.up_proj.weight")
    assert "measured" not in third and not any(p.startswith("model.layers.0") for p in third[:7])
    assert len([path for path in third if not path.endswith("weight")]) == 7  # of the second block
    fourth = told()
    assert all(path.endswith("weight") for path in fourth)
    assert {*fourth} & {*third} == {third[-1]}  # was not in the journal yet
    convert(llama, tmp_path / "whole", calibration=text, **MEASURED)
    assert contents(out / "q") == contents(tmp_path / "whole")
    assert [path.name for path in out.iterdir()] == ["q"]


def test_a_spool_of_other_settings_or_with_a_damaged_layer_is_not_gone_on_with(tmp_path):
    spool = Spool(tmp_path)
    packed = quantize(np.ones((4, 64), np.float32), Format(4, 64))
    spool.resume("a")
    spool.save("x", packed)
    spool.solved.append("x")
    spool.changes["x"] = Change(columns=np.arange(3.0), rows=None, offset=np.ones(2))
    spool.skipped = {"why": ["y"]}
    states = [[np.full((1, 2, 3), 10 * i + w, np.float32) for w in range(12)] for i in range(2)]
    spool.keep(7, states, last=True)
    assert Spool(tmp_path).resume("b") == (0, False, [])
    other = Spool(tmp_path)
    block, last, found = other.resume("a")
    assert (block, last, other.solved, other.skipped) == (7, True, ["x"], {"why": ["y"]})
    assert np.array_equal(found, states) and other.changes["x"].rows is None
    assert np.array_equal(other.changes["x"].columns, np.arange(3.0))
    os.truncate(tmp_path / "x.words.npy", 100)
    assert Spool(tmp_path).resume("a") == (0, False, [])
    spool.save("x", packed)
    os.truncate(tmp_path / "progress.npz", 300)
    assert Spool(tmp_path).resume("a") == (0, False, [])


# ---- memory

needs_proc = pytest.mark.skipif(anonymous_bytes() is None, reason="the system tells no anonymous memory")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("3GB", 3 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("800MiB", 800 << 20),
        ("2g", 2 * 10**9),
        (77, 77),
        ("5kb", 5000),
    ],
)
def test_amounts_of_memory(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 apples", "0", 0, "nan", "3e9", None, True, "1 PB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="amount of memory"):
        parse_bytes(text)


def written(count: int) -> mmap.mmap:
    """New memory of its own, written to; malloc may hand out what the process has already."""
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, count, mmap.PAGESIZE):
        memory[page] = 1
    return memory


@needs_proc
def test_anonymous_memory_counts_what_is_written_and_not_what_is_mapped(tmp_path):
    before = anonymous_bytes()
    held = written(50_000_000)
    assert 45e6 < anonymous_bytes() - before < 60e6
    held.close()
    (tmp_path / "f").write_bytes(bytes(50_000_000))
    before = anonymous_bytes()
    assert np.memmap(tmp_path / "f", np.uint8, mode="r").sum() == 0
    assert anonymous_bytes() - before < 10e6


@needs_proc
def test_the_watch_sees_a_peak_and_stops_at_the_limit():
    with Watch(anonymous_bytes() + 20_000_000) as memory:
        memory.check()
        held = written(60_000_000)
        deadline = time.monotonic() + 20
        while memory.peak <= memory.limit and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread looks
        held.close()
        with pytest.raises(ValueError, match="more than the limit"):
            memory.check()


@needs_proc
def test_a_limit_that_is_too_low_is_refused_and_a_high_one_is_kept(llama, tmp_path):
    with pytest.raises(ValueError, match="50 MB of memory are too little, .* are needed: rows have"):
        convert(llama, tmp_path / "q", max_memory="50MB", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    report = convert(llama, tmp_path / "q", max_memory="4GB", progress=False)
    assert [n for n in report.notices if "of anonymous memory were in use; 4 GB were allowed" in n]
    assert 0 < report.peak_memory < 4e9
    convert(llama, tmp_path / "free", progress=False)
    assert contents(tmp_path / "q") == contents(tmp_path / "free")


@needs_proc
def test_calibration_is_refused_before_it_begins_and_stopped_while_it_goes_on(llama, tmp_path, monkeypatch):
    import mlxq.convert

    begun = []

    def note(name: str) -> None:
        function = getattr(mlxq.convert, name)

        def noted(*args, **options):
            begun.append(name)
            return function(*args, **options)

        monkeypatch.setattr(mlxq.convert, name, noted)

    note("quantize_blocks")
    note("sensitivities")
    monkeypatch.setattr(mlxq.convert, "anonymous_bytes", lambda: 0)  # as if the process were small
    common = {"max_memory": "104MB", "progress": False}  # rounding would do
    for options in ({"method": "gptq"}, {"method": "awq"}, {"method": "rtn", "target_bpw": 4}):
        with pytest.raises(ValueError, match="^convert: 104 MB .* too little, about .* are needed"):
            convert(llama, tmp_path / "q", **common, **options)
    assert not begun
    monkeypatch.setattr(mlxq.convert, "_check_calibration", lambda *args: None)
    for options, what in (({"method": "gptq"}, "quantize_blocks"), ({"target_bpw": 4}, "sensitivities")):
        with pytest.raises(ValueError, match="^[0-9.]+ GB of anonymous memory were in use, more than"):
            convert(llama, tmp_path / "q", **common, **options)
        assert begun.pop() == what and not begun
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# ---- dry run


@pytest.mark.parametrize("arch", ("qwen3_moe",))
def test_a_dry_run_plans_what_a_run_writes_and_writes_nothing(arch, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src", dtype="float16")
    planned = convert(source, tmp_path / "q", bits=3, embedding_bits=8, dry_run=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    report = convert(source, tmp_path / "q", bits=3, embedding_bits=8, progress=False)
    assert [(x.path, x.stored, x.bytes) for x in planned.layers] == [
        (x.path, x.stored, x.bytes) for x in report.layers
    ]
    assert planned.planned.disk == sum(p.stat().st_size for p in (tmp_path / "q").glob("model*.safetensors"))
    assert report.planned is None


def test_a_dry_run_expects_of_each_method_the_time_and_memory_that_it_takes(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(600)))
    common = {"calibration": text, "progress": False}
    planned = {
        method: convert(llama, tmp_path / "q", method=method, dry_run=True, **common).planned
        for method in ("rtn", "gptq", "awq", "awq+gptq")
    }
    report = convert(llama, tmp_path / "q", method="gptq", **common)
    # Samples of larger layers on a machine that does other things too; that of rtn alone is 100 times less.
    assert report.seconds / 8 < planned["gptq"].seconds < 8 * report.seconds
    assert planned["rtn"].seconds < planned["gptq"].seconds / 8
    assert planned["rtn"].seconds < planned["awq"].seconds < planned["awq+gptq"].seconds
    tokens = next(int(n.split()[2]) for n in report.notices if n.startswith("gptq on"))
    # outer: embedding, head and the last norm; states: float and quantized
    least = 4 * (2 * 320 * 128 + 128) + 2 * 4 * tokens * 128
    assert planned["gptq"].memory - planned["rtn"].memory > least - 48 * (1 << 18)


def test_what_is_expected_of_calibration_follows_from_shapes_and_rates(monkeypatch):
    monkeypatch.setattr(estimate, "_product_seconds", lambda: 1e-9)
    monkeypatch.setattr(estimate, "_rates", lambda sample, fmt: (1e-6, 1e-8))
    dense = [estimate.Task((320, 192), Format(4, 32)), estimate.Task((192, 320), Format(2, 32))]
    passes = estimate.PASSES * estimate.STREAMED * 122_880 * 5000 * 1e-9
    hessians = 2 * estimate.INPUTS * 5000 * (192**2 + 320**2) * 1e-9
    solving = 61_440 * (2e-6 + 512e-8)
    assert estimate.seconds(dense, 5000, "gptq") == pytest.approx(passes + hessians + solving)
    wide = [estimate.Task((320, 192), Format(8, 32))]
    assert estimate.seconds(wide, 5000, "gptq") == 0 == estimate.seconds([], 5000, "awq")
    experts = [estimate.Task((8, 320, 192), Format(4, 32))]
    one = [estimate.Task((2560, 192), Format(4, 32))]
    fewer = estimate.seconds(one, 5000, "gptq") - estimate.seconds(experts, 5000, "gptq", 2)
    assert fewer == pytest.approx(0.75 * estimate.PASSES * estimate.STREAMED * 491_520 * 5000 * 1e-9)
    common = {"block_weights": 10**6, "outer": [10**5], "tokens": 5000, "width": 200, "method": "gptq"}
    held = [estimate.peak_bytes([blocks], **common) for blocks in (dense, [*dense, dense[0]])]
    assert held[1] - held[0] == pytest.approx(4 * estimate.INPUTS * 5000 * 192, abs=2)
    states = estimate.peak_bytes([dense], **common | {"tokens": 10**4}) - held[0]
    assert states == pytest.approx(5000 * (2 * 4 * 200 + 4 * estimate.INPUTS * 512), abs=2)
    assert held[0] > 4 * 1_100_000 + estimate.SOLVER_BYTES * 61_440 + estimate.SQUARE_BYTES * 320**2


def test_a_dry_run_of_pickled_weights_copies_none_of_them(llama, tmp_path):
    torch = pytest.importorskip("torch", reason="pickles of tensors need torch")
    state = {k: torch.from_numpy(np.array(v)) for k, v in mx.load(str(llama / "model.safetensors")).items()}
    whole = convert(llama, tmp_path / "a", dry_run=True, progress=False)
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    assert convert(llama, tmp_path / "b", dry_run=True, progress=False).layers == whole.layers


def test_the_command_line_prints_the_plan(llama, tmp_path, capsys):
    from mlxq.cli import main

    assert main(["convert", str(llama), str(tmp_path / "q"), "--dry-run", "--max-memory", "4GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing is written. It would take about" in said and "total" in said
    assert main(["convert", str(llama), str(tmp_path / "q"), "--max-memory", "lots"]) == 2


# ---- several processes

WORKER = """
    import sys
    from mlxq.convert import convert
    convert(sys.argv[1], sys.argv[2], max_shard_bytes=int(sys.argv[3]), progress=False)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environments(kind: str, folder, size: int) -> list[dict[str, str]]:
    """What mlx.launch and torchrun set for each process."""
    ports = free_ports(size)
    if kind == "mlx":
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(size)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "WORLD_SIZE": str(size)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


@pytest.mark.parametrize("kind", ("mlx", "torch"))
def test_two_processes_write_what_one_writes(kind, llama, tmp_path):
    if kind == "torch":
        pytest.importorskip("torch", reason="torchrun is torch's")
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(llama), str(out / "q"), "60000"]
    processes = [
        subprocess.Popen(command, env=os.environ | added, stderr=subprocess.PIPE, text=True)
        for added in environments(kind, tmp_path, 2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    convert(llama, tmp_path / "one", max_shard_bytes=60_000, progress=False)
    assert contents(out / "q") == contents(tmp_path / "one")
    assert [path.name for path in out.iterdir()] == ["q"]


MEASURER = """
    import sys
    import mlxq.convert
    measure = mlxq.convert.sensitivities

    def counted(model, read, windows, wanted, *args, **options):
        print(*wanted, sep="\\n", flush=True)
        return measure(model, read, windows, wanted, *args, **options)

    mlxq.convert.sensitivities = counted
    mlxq.convert.convert(sys.argv[1], sys.argv[2], calibration=sys.argv[3], **OPTIONS)
"""


def test_two_processes_share_the_measuring_and_write_what_one_writes(llama, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(str(n * n) for n in range(300)))
    options = {"method": "gptq", "target_bpw": 4.2, "progress": False}
    code = textwrap.dedent(MEASURER).replace("OPTIONS", repr(options))
    command = [sys.executable, "-c", code, str(llama), str(out / "q"), str(text)]
    processes = [
        subprocess.Popen(command, env=os.environ | added, stdout=subprocess.PIPE, text=True)
        for added in environments("mlx", tmp_path, 2)
    ]
    measured = [process.communicate(timeout=300)[0].split() for process in processes]
    assert not any(process.returncode for process in processes)
    assert not {*measured[0]} & {*measured[1]} and 5 < len(measured[0]) < 11
    assert sorted(measured[0] + measured[1]) == sorted(
        path.removesuffix(".weight") for path in tiny_models.tensor_shapes("llama") if "norm" not in path
    )
    convert(llama, tmp_path / "one", calibration=text, **options)
    assert contents(out / "q") == contents(tmp_path / "one")
    assert [path.name for path in out.iterdir()] == ["q"]


def test_what_stops_one_process_stops_the_other(llama, tmp_path):
    out = tmp_path / "out"
    spoiled = dict(mx.load(str(llama / "model.safetensors")))
    spoiled["model.norm.weight"] = mx.full((128,), mx.nan, mx.float16)
    mx.eval(spoiled)
    mx.save_safetensors(str(llama / "model.safetensors"), spoiled)
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(llama), str(out / "q"), "60000"]
    processes = [
        subprocess.Popen(command, env=os.environ | added, stderr=subprocess.PIPE, text=True)
        for added in environments("mlx", tmp_path, 2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes)
    assert all("NaN or Inf" in text for text in said), said
    assert sum("another process of this conversion stopped" in text for text in said) >= 1
    assert list(out.iterdir()) == []


class Some(Ranks):
    """One of several ranks that are not there, on named machines."""

    def __init__(self, rank: int, hosts: list[str]):
        self.rank, self.size, self.hosts = rank, len(hosts), hosts

    def _gather(self, text: str) -> list[str]:
        return self.hosts


@pytest.mark.parametrize("hosts", (["a"] * 3, ["a", "b", "c"], ["a", "a", "b"]))
def test_every_tensor_has_one_writer_and_machines_share_no_file(hosts):
    rng = np.random.default_rng(0)
    sizes = {f"t{i}": int(n) for i, n in enumerate(rng.integers(1, 1000, 60))}
    files = {name: f"f{int(name[1:]) // 6}" for name in sizes}
    shares = [share(Some(rank, hosts), sizes, files) for rank in range(3)]
    assert sorted(name for part in shares for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in shares]
    assert max(loads) < 1.5 * min(loads)
    if len(set(hosts)) > 1:
        owners = [{files[name] for name in part} for part in shares]
        assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
