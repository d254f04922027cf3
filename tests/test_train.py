"""`mlxq train`: from a folder to a folder, on both back ends, killed and resumed."""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from test_qat_training import QUIET, check_two_processes, free_ports, run_together
from tiny_models import make_hf_model

import mlxq.train
from mlxq import bridge, cli, format, ops
from mlxq.convert import convert
from mlxq.format import Packed
from mlxq.load import load
from mlxq.qat.training import Batch, trainer_for
from mlxq.train import Settings, data, train

torch = pytest.importorskip("torch", reason="needs the package torch")

TEXT = "The cat sat on the mat and the rat sat in the hat. " * 60
BACKENDS = ["torch", "mlx"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(float folder, 2-bit folder, text file) of a tiny random Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("llama", folder / "float")
    convert(folder / "float", folder / "w2", bits=2, group_size=64, progress=False)
    (folder / "text.txt").write_text(TEXT)
    return folder / "float", folder / "w2", folder / "text.txt"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that are killed: sums are in the same order, and waiting threads cost nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(model, text, **changes):
    basis = {"length": 24, "batch": 2, "evaluate": 4, "steps": 8, "data": (str(text),), "learning_rate": 2e-3}
    return Settings(str(model), **(basis | changes))


def held_out_loss(given: Settings, folder, teacher):
    """What mlx-lm's own layers make of the folder, on the rows that training held out."""
    student, tokenizer = mlx_lm.load(str(folder))
    float_model, _ = mlx_lm.load(str(teacher))
    _, held = data.rows(given, tokenizer)
    return trainer_for(student, float_model).evaluate(data.batches(held, given.batch))


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """(settings, outcome, folder) of a float model trained for 2 bits, by back end and ranges; made once."""

    @functools.cache
    def made(backend, ranges):
        options = {"qat": True, "bits": 2, "embedding_bits": 8, "learning_rate": 1e-3}
        given = settings(models[0], models[2], backend=backend, ranges=ranges, **options)
        folder = tmp_path_factory.mktemp("trained") / "out"
        return given, train(given, folder, progress=False), folder

    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranges", ["learned", "dynamic"])
def test_a_float_model_becomes_a_quantized_one_that_mlx_lm_runs_to_the_loss_that_was_measured(
    models, trained, backend, ranges
):
    given, outcome, folder = trained(backend, ranges)
    assert outcome.finished and outcome.best < outcome.start
    assert abs(held_out_loss(given, folder, models[0]) / outcome.best - 1) < 1e-3
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == 2 and config["quantization"]["lm_head"]["bits"] == 8
    report = json.loads((folder / "training.json").read_text())
    assert report["best"] == outcome.best and len(report["losses"]) == 8
    model, _ = load(folder)
    assert type(model.model.layers[0].mlp.up_proj).__module__ == "mlxq.nn.mlx"
    assert not folder.with_name("out.training").exists()


def two_workers(out, source, quantized, text):
    """In each of two processes: runs of one loop and of `mlxq train`, whole and sharded."""
    import test_qat_training

    torch.set_num_threads(1)
    test_qat_training.worker("torch", out)
    stop_at = iter([False] * 3 + [True])
    given = settings(source, text, qat=True, bits=2, embedding_bits=8, learning_rate=1e-3, batch=1)
    asked = mlxq.train._asked_to_stop
    mlxq.train._asked_to_stop = lambda: contextlib.nullcontext(lambda: next(stop_at))
    part = train(given, out + "-qat", fsdp=True, progress=False)
    assert not part.finished and len(part.losses) == 3
    mlxq.train._asked_to_stop = asked
    train(given, out + "-qat", fsdp=True, progress=False, resume=True)
    given = settings(quantized, text, teacher=source, batch=1, steps=3)
    train(given, out + "-scales", fsdp=True, progress=False)
    train(replace(held_settings(out, text), batch=1), out + "-held", fsdp=True, progress=False)
    Path(out + f"-chosen{os.environ['RANK']}").write_text(json.dumps(chosen_shards(given)))


def held_settings(out, text):
    """Of a bfloat16 model with biases and one table at both ends, whose weights train in float32."""
    return settings(out + "-tied", text, qat=True, bits=4, batch=2, steps=3, learning_rate=1e-4)


def chosen_shards(given):
    """What is cut up by itself: no GPU, two large ones, a small one, small ones and told not to."""
    import mlxq.train.torch as backend

    large, small = 1 << 40, 1 << 10
    of_rank_1 = small if os.environ["RANK"] == "1" else large
    found = []
    with backend.session("cpu"):
        for memory, told in ((None, None), (large, None), (of_rank_1, None), (small, False)):
            backend.gpu_bytes = lambda device, memory=memory: memory
            here = backend.Session("cpu", told)
            here.settle(Path(given.model), Path(given.teacher), given)
            found.append((here.sharded, here.options().get("sharded", False)))
    return found


@pytest.fixture(scope="module")
def in_two_processes(models, tmp_path_factory):
    """Where two_workers wrote, as torchrun would have started them with --nproc-per-node 2."""
    out = str(tmp_path_factory.mktemp("two") / "out")
    make_hf_model("qwen2", out + "-tied", "bfloat16")
    script = "import sys, test_train as t; t.two_workers(*sys.argv[1:])"
    command = [sys.executable, "-c", script, out, *map(str, models)]
    env = QUIET | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    run_together([(command, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)])
    return out


def test_two_processes_of_torch_follow_the_loss_curve_of_one_whole_or_sharded(in_two_processes):
    check_two_processes("torch", in_two_processes)


def test_models_are_cut_up_by_themselves_where_one_gpu_is_too_small(in_two_processes):
    for rank in (0, 1):
        found = json.loads(Path(in_two_processes + f"-chosen{rank}").read_text())
        assert found == [[False, False], [False, False], [True, True], [False, False]]


@pytest.mark.parametrize("quantized", [False, True])
def test_the_memory_that_decides_is_what_a_step_leaves_behind(models, quantized):
    from mlxq.train.torch import Session, bytes_to_train

    folder, train_what = (models[1], "scales") if quantized else (models[0], "all")
    here = Session("cpu", False)
    student, teacher = here.load(folder, None).module, here.load(models[0], None).module
    trainer = trainer_for(student, teacher, train_what)
    trainer.step(Batch(np.arange(16).reshape(2, 8)), 1e-4)
    count = sum(master.numel() for master in trainer.masters)
    whole = sum(
        t.nbytes for m in (student, teacher) for t in [*m.parameters(), *dict(m.named_buffers()).values()]
    )
    rotary = sum(b.nbytes for m in (student, teacher) for n, b in m.named_buffers() if "inv_freq" in n)
    moments = sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values() if t.ndim)
    gradients = sum(2 * parameter.nbytes for _, parameter in trainer.names)
    filled = whole - rotary + gradients + moments + 2 * 4 * count
    assert bytes_to_train(folder, models[0], settings(folder, models[2], train=train_what)) == filled


def test_a_sharded_run_stops_goes_on_and_writes_what_one_process_writes(in_two_processes, trained, models):
    given, outcome, folder = trained("torch", "learned")
    sharded = Path(in_two_processes + "-qat")
    report = json.loads((sharded / "training.json").read_text())
    np.testing.assert_allclose(report["losses"][:5], outcome.losses[:5], rtol=5e-4)
    np.testing.assert_allclose(report["losses"], outcome.losses, rtol=1e-2)  # sums round codes the other way
    assert abs(report["best"] / outcome.best - 1) < 1e-2
    assert abs(held_out_loss(given, sharded, models[0]) / report["best"] - 1) < 1e-3
    mine, theirs = (mx.load(str(f / "model.safetensors")) for f in (folder, sharded))
    assert set(mine) == set(theirs)
    for name in mine:
        assert (mine[name].shape, mine[name].dtype) == (theirs[name].shape, theirs[name].dtype)


def test_a_bfloat16_model_that_is_held_in_float32_is_cut_up_too(in_two_processes, models, tmp_path):
    alone = train(held_settings(in_two_processes, models[2]), tmp_path / "out", progress=False)
    sharded = Path(in_two_processes + "-held")
    losses = json.loads((sharded / "training.json").read_text())["losses"]
    np.testing.assert_allclose(losses, alone.losses, rtol=2e-2)  # products in bfloat16
    mine, theirs = (mx.load(str(f / "model.safetensors")) for f in (tmp_path / "out", sharded))
    assert {n: (a.shape, a.dtype) for n, a in mine.items()} == {
        n: (a.shape, a.dtype) for n, a in theirs.items()
    }
    for name in (name for name in mine if name.endswith(".scales")):
        assert mx.allclose(mine[name], theirs[name], rtol=2e-2, atol=1e-4), name


def test_sharded_scales_learn_and_words_survive(in_two_processes, models, tmp_path):
    source, quantized, text = models
    given = settings(quantized, text, teacher=str(source), steps=3)
    alone = train(given, tmp_path / "out", progress=False)
    sharded = Path(in_two_processes + "-scales")
    np.testing.assert_allclose(
        json.loads((sharded / "training.json").read_text())["losses"], alone.losses, rtol=1e-4
    )
    files = (quantized, tmp_path / "out", sharded)
    before, mine, theirs = (mx.load(str(f / "model.safetensors")) for f in files)
    for name in before:
        if name.endswith(".weight"):
            assert mx.array_equal(before[name], theirs[name]), name
        assert mx.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_a_quantized_model_learn_from_its_float_model(models, tmp_path, backend):
    source, quantized, text = models
    given = settings(quantized, text, teacher=str(source), backend=backend)
    outcome = train(given, tmp_path / "out", progress=False)
    assert outcome.best < outcome.start
    assert abs(held_out_loss(given, quantized, source) / outcome.start - 1) < 1e-3
    assert abs(held_out_loss(given, tmp_path / "out", source) / outcome.best - 1) < 1e-3
    before, after = (mx.load(str(f / "model.safetensors")) for f in (quantized, tmp_path / "out"))
    assert set(before) == set(after)
    changed = {n.rpartition(".")[2] for n in before if not mx.array_equal(before[n], after[n])}
    assert changed == {"scales", "biases"}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """(float folder, its quantized folder) by dtype, bits and method of a tiny Llama; made once."""

    @functools.cache
    def made(dtype, bits, method):
        folder = tmp_path_factory.mktemp("starts")
        make_hf_model("llama", folder / "float", dtype)
        convert(folder / "float", folder / "start", bits=bits, group_size=64, method=method, progress=False)
        return folder / "float", folder / "start"

    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "method, dtype, bits",
    [
        *(("gptq", dtype, bits) for dtype in ("float32", "bfloat16") for bits in (2, 4, 8)),
        *(("rtn", "bfloat16", bits) for bits in (4, 8)),
    ],
)
def test_qat_begins_where_it_says_code_for_code(starts, models, backend, dtype, bits, method):
    source, folder = starts(dtype, bits, method)
    given = settings(source, models[2], qat=True, bits=bits, backend=backend)
    if method == "gptq":  # else rounding, which is where learned ranges begin by themselves
        given = replace(given, start=str(folder))
    side = importlib.import_module(f"mlxq.train.{backend}")
    with side.session("cpu") as here:
        model = here.load(source, None)
        here.prepare(model, given)
        before = values_of(model.module)
        written = {path: value for path, value in here.finished(model, given) if isinstance(value, Packed)}
    # A float32 bias comes back from the middle of its group's range to rounding.
    near = {"rtol": 0, "atol": 0} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-7}
    stored = mx.load(str(folder / "model.safetensors"))
    assert len(written) == len([name for name in stored if name.endswith(".scales")]) > 10
    for path, packed in written.items():
        assert np.array_equal(before[path], as_float32(ops.dequantize(packed, dtype))), path
        assert np.array_equal(bridge.to_numpy(packed.words), np.array(stored[f"{path}.weight"])), path
        for part in ("scales", "biases"):
            mine = getattr(packed, part)
            np.testing.assert_allclose(as_float32(mine), as_float32(stored[f"{path}.{part}"]), **near)
            assert format.dtype_name(mine) == dtype


def as_float32(array) -> np.ndarray:
    return bridge.to_numpy(array).astype(np.float32)


def values_of(module) -> dict[str, np.ndarray]:
    """What every fake-quantized weight is seen as; each is held in float32."""
    found = {}
    for path, layer in module.named_modules():
        quantizer = getattr(layer, "weight_fake_quantizer", None)
        if quantizer is not None:
            assert {format.dtype_name(a) for a in (layer.weight, quantizer.scale)} == {"float32"}
            value = quantizer(layer.weight)
            found[path] = as_float32(value.detach() if isinstance(module, torch.nn.Module) else value)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_model_trains_and_is_written_in_bfloat16_with_the_loss_that_was_measured(
    starts, models, tmp_path, backend
):
    source, folder = starts("bfloat16", 4, "rtn")
    given = settings(source, models[2], qat=True, bits=4, backend=backend, learning_rate=3e-5)
    outcome = train(given, tmp_path / "out", progress=False)
    assert outcome.best < outcome.start
    assert held_out_loss(given, folder, source) == pytest.approx(outcome.start, rel=0.02)
    assert held_out_loss(given, tmp_path / "out", source) == pytest.approx(outcome.best, rel=0.02)
    dtypes = {str(a.dtype) for a in mx.load(str(tmp_path / "out" / "model.safetensors")).values()}
    assert dtypes == {"mlx.core.uint32", "mlx.core.bfloat16"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_qat_begins_with_the_codes_of_a_start_and_ends_no_worse(models, tmp_path, backend):
    convert(models[0], tmp_path / "gptq", bits=2, group_size=64, method="gptq", progress=False)
    given = settings(models[0], models[2], backend=backend, qat=True, bits=2, learning_rate=2e-4)
    given = replace(given, start=str(tmp_path / "gptq"))
    outcome = train(given, tmp_path / "out", progress=False)
    begun = held_out_loss(given, tmp_path / "gptq", models[0])
    assert outcome.start == pytest.approx(begun, rel=1e-3)
    rounded = train(replace(given, start=None, steps=1), tmp_path / "rounded", progress=False)
    assert abs(outcome.start - rounded.start) > 0.05 * begun
    assert outcome.best < outcome.start
    with pytest.raises(ValueError, match="--start wants 4-bit"):
        train(replace(given, bits=4), tmp_path / "other", progress=False)


def test_the_card_says_what_was_trained_from_what_on_which_text_and_what_came_of_it(models, tmp_path):
    source, quantized, text = models
    given = settings(quantized, text, teacher=str(source), steps=2, backend="mlx")
    outcome = train(given, tmp_path / "better", progress=False)
    card = " ".join((tmp_path / "better" / "README.md").read_text().split())
    assert "# better w2, trained by mlxq" in card and "rounded to the nearest" not in card
    for words in (
        "scales and biases, in 2 steps of 2 x 24 tokens",
        "KL divergence from the predictions of float",
        "Text: text.txt; held out: every tenth row of it",
        f"Held-out loss: {outcome.start:.4f} before, {outcome.best:.4f} after",
        "bits per weight, all included",
    ):
        assert words in card, card
    assert not list((tmp_path / "better").glob("*.part"))


def test_a_tied_model_keeps_one_table(models, tmp_path):
    make_hf_model("qwen3", tmp_path / "float")
    for backend in BACKENDS:
        given = settings(tmp_path / "float", models[2], qat=True, embedding_bits=8, backend=backend, steps=2)
        outcome = train(given, tmp_path / backend, progress=False)
        assert not any("lm_head" in name for name in mx.load(str(tmp_path / backend / "model.safetensors")))
        assert abs(held_out_loss(given, tmp_path / backend, tmp_path / "float") / outcome.best - 1) < 1e-3


def command(models, dst):
    source, quantized, text = map(str, models)
    arguments = ["train", quantized, str(dst), "--teacher", source, "--data", text, "--steps", "30"]
    return arguments + ("--length 24 --evaluate 4 --learning-rate 2e-3 --backend torch --device cpu".split())


def steps_of(state: Path) -> int:
    try:
        with np.load(state) as stored:
            return len(json.loads(stored["facts"].tobytes())["losses"])
    except (OSError, ValueError, KeyError):
        return 0


def wait_for_steps(state: Path, still_runs) -> None:
    end = time.monotonic() + 120
    while steps_of(state) < 3:
        assert still_runs() and time.monotonic() < end
        time.sleep(0.005)


def kill(models, dst, state) -> None:
    script = (
        "import sys, mlxq.train as t; from functools import partial;"
        "t.train = partial(t.train, save_every=0.0);"
        "from mlxq.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *command(models, dst)], env=QUIET)
    wait_for_steps(state, lambda: process.poll() is None)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def terminate(models, dst, state) -> None:
    """SIGTERM to this very process, which trains."""

    def send():
        wait_for_steps(state, lambda: True)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert cli.main(command(models, dst)) == 130
    sender.join()


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory):
    given = settings(models[1], models[2], teacher=str(models[0]), steps=30)
    return given, train(given, tmp_path_factory.mktemp("whole") / "out", progress=False)


@pytest.mark.parametrize("how", [kill, terminate])
def test_a_killed_run_resumes_to_the_same_loss_curve(models, uninterrupted, tmp_path, how, monkeypatch):
    dst, state = tmp_path / "out", tmp_path / "out.training" / "state.npz"
    with monkeypatch.context() as patch:
        patch.setattr(mlxq.train, "train", functools.partial(train, save_every=0.0))
        how(models, dst, state)
    assert 3 <= steps_of(state) < 30 and not dst.exists()
    given, whole = uninterrupted
    with pytest.raises(FileExistsError, match="add --resume"):
        train(given, dst, progress=False)
    with pytest.raises(ValueError, match="seed was 0, is 7"):
        train(replace(given, seed=7), dst, resume=True, progress=False)
    train(given, dst, resume=True, progress=False)
    resumed = json.loads((dst / "training.json").read_text())
    np.testing.assert_allclose(resumed["losses"], whole.losses, rtol=1e-5)
    np.testing.assert_allclose(
        [e[1] for e in resumed["evaluations"]][-1], whole.evaluations[-1][1], rtol=1e-5
    )
    assert not (tmp_path / "out.training").exists()


def test_a_damaged_state_is_refused(models, tmp_path):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "state.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="damaged"):
        train(settings(models[1], models[2], teacher=str(models[0])), tmp_path / "out", resume=True)


def test_the_readme_example_of_fake_quantization_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Training for the codes\n", 1)[1]
    _, commands, _, example, _, printed, *_ = section.split("```")
    assert "mlxq train" in commands
    monkeypatch.chdir(tmp_path)
    exec(compile(example.removeprefix("python\n"), "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() == printed.strip()


# Data.


class Tokenizer:
    """One token a letter; a chat is <role>text</> for each message."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 200 for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"<{m['role'][0]}>{m['content']}/" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def test_only_what_an_assistant_says_is_scored_in_a_chat(tmp_path):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more?"},
        {"role": "assistant", "content": "no"},
    ]
    lines = [{"messages": chat}, {"prompt": "2+2", "completion": "4"}, {"text": "plain"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    given = Settings("m", data=(str(path),), eval_data=(str(path),), length=64)
    rows, held = data.rows(given, Tokenizer())
    assert len(rows) == len(held) == 3
    text = "<u>hi/<a>yes/<u>more?/<a>no/"
    said = "".join(c for c, scored in zip(text, rows[0][1], strict=True) if scored)
    assert said == "yes/no/"
    assert rows[1][1].sum() == len("4/") and rows[2][1].all()
    (batch,) = data.batches(rows, 3)
    assert batch.tokens.shape == (3, len(text)) and batch.targets.sum() == len("yes/no/") + 2 + 4
    (spread,) = data.batches(rows[:1], 1, ranks=3)
    assert spread.tokens.shape[0] == 3 and spread.targets[1:].sum() == 0


def test_every_tenth_row_is_held_out_and_never_trained_on(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(chr(40 + i // 16 % 80) for i in range(16 * 50)))
    rows, held = data.rows(Settings("m", data=(str(path),), length=16, evaluate=3), Tokenizer())
    assert len(rows) == 45 and len(held) == 3
    assert not {tuple(row) for row, _ in rows} & {tuple(row) for row, _ in held}


@pytest.mark.parametrize(
    "line", ['{"prompt": "x"}', "no json", "[1]", '{"messages": [{"role": "user"}]}', '{"text": 3}']
)
def test_a_line_of_another_form_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good enough"}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        data.rows(Settings("m", data=(str(path),)), Tokenizer())


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"steps": None}, "--steps or --minutes"),
        ({"minutes": 1.0}, "--steps or --minutes"),
        ({"bits": 7, "qat": True}, "7-bit"),
        ({"qat": True, "train": "scales"}, "give a quantized MODEL"),
        ({"backend": "jax"}, "jax"),
        ({"loss": "hinge"}, "hinge"),
        ({"length": 1}, "length"),
        ({"qat": True}, "quantized already"),
        ({"teacher": None}, "--teacher"),
        ({"model": "float"}, "add --qat"),
        ({"device": "tpu9"}, "tpu9"),
        ({"backend": "mlx", "device": "tpu9"}, "tpu9"),
        ({"length": 10**6}, "too few"),
        ({"data": ("nowhere.txt",)}, "nowhere.txt"),
        ({"train": "scales", "model": "float", "qat": True}, "quantized MODEL"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(models, tmp_path, changes, says):
    source, quantized, text = models
    given = {"model": str(quantized), "teacher": str(source)} | changes
    if given["model"] == "float":
        given["model"] = str(source)
    with pytest.raises((ValueError, OSError), match=says):
        train(settings(given.pop("model"), text, **given), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
