"""The training loop: its loss against float64, never worse than the start, resume, two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxq import bridge, ops, qat
from mlxq.format import Format
from mlxq.nn.mlx import QuantizedEmbedding, QuantizedLinear
from mlxq.qat import mlx as qm
from mlxq.qat import training
from mlxq.qat.training import Batch, Schedule, distil, run, trainer_for

VOCAB, DIM = 48, 64
FRAMEWORKS = ["torch", "mlx"]
QUIET = {**os.environ, "MLXQ_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
QUIET["PYTHONPATH"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def one_thread():
    """Waiting threads cost tiny models more than they give."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


class MlxModel(nn.Module):
    """Two tables, a hidden layer: logits (B, T, VOCAB) of the token and the one before."""

    def __init__(self, weights=None):
        super().__init__()
        self.embed, self.hidden, self.head = (
            nn.Embedding(VOCAB, DIM),
            nn.Linear(DIM, DIM),
            nn.Linear(DIM, VOCAB, bias=False),
        )
        if weights is not None:
            self.load_weights([(name, mx.array(value)) for name, value in weights.items()])

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)])
        return self.head(x + mx.tanh(self.hidden(x)))


def torch_model(weights):
    torch = pytest.importorskip("torch", reason="needs the package torch")

    class TorchModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(VOCAB, DIM)
            self.hidden = torch.nn.Linear(DIM, DIM)
            self.head = torch.nn.Linear(DIM, VOCAB, bias=False)

        def forward(self, ids):
            x = self.embed(ids)
            x = x + torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
            return self.head(x + torch.tanh(self.hidden(x)))

    model = TorchModel()
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
    return model


def float_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (VOCAB, DIM), "hidden.weight": (DIM, DIM), "hidden.bias": (DIM,)}
    shapes["head.weight"] = (VOCAB, DIM)
    return {
        n: (rng.standard_normal(s) * (0.25 if "head" in n else 0.5)).astype(np.float32)
        for n, s in shapes.items()
    }


def make(framework, packed=True, bits=2):
    """(student, teacher) on the same weights; a packed student has its matrices rounded to nearest."""
    weights = float_weights()
    if framework == "mlx":
        student, teacher = MlxModel(weights), MlxModel(weights)
        if packed:
            fmt = Format(bits, 32)
            student.embed = QuantizedEmbedding.from_packed(ops.quantize(student.embed.weight, fmt))
            student.hidden = QuantizedLinear.from_packed(
                ops.quantize(student.hidden.weight, fmt), student.hidden.bias
            )
            student.head = QuantizedLinear.from_packed(ops.quantize(student.head.weight, fmt))
        return student, teacher
    from mlxq.nn import torch as packed_layers

    student, teacher = torch_model(weights), torch_model(weights)
    if packed:
        student.embed = packed_layers.QuantizedEmbedding.from_embedding(student.embed, bits, 32)
        for name in ("hidden", "head"):
            layer = packed_layers.QuantizedLinear.from_linear(getattr(student, name), bits, 32)
            setattr(student, name, layer)
    return student, teacher


def batches(count=8, rows=4, length=12, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, (rows, length)) for _ in range(count)]


def logits_of(model, tokens):
    if isinstance(model, nn.Module):
        return bridge.to_numpy(model(mx.array(tokens))).astype(np.float64)
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).double().numpy()


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_is_float64s_kl_or_cross_entropy_of_the_scored_tokens(framework):
    student, teacher = make(framework)
    (tokens,) = batches(1)
    scored = np.random.default_rng(5).random(tokens.shape) < 0.5
    p, q = (log_softmax(logits_of(m, tokens))[:, :-1] for m in (teacher, student))
    kl = (np.exp(p) * (p - q)).sum(-1)
    entropy = -np.take_along_axis(q, tokens[:, 1:, None], -1)[..., 0]
    for scores, where in ((None, np.ones_like(kl, bool)), (scored, scored[:, 1:])):
        batch = Batch(tokens, scores)
        assert abs(trainer_for(student, teacher).evaluate([batch]) - kl[where].mean()) < 1e-5
        assert abs(trainer_for(student, None).evaluate([batch]) - entropy[where].mean()) < 1e-5
        assert abs(trainer_for(student, teacher).step(batch, 1e-9) - kl[where].mean()) < 1e-5


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_scales_alone_bring_a_packed_student_nearer_and_leave_its_words(framework):
    student, teacher = make(framework)
    before = bridge.to_numpy(student.hidden.packed.words).copy()
    outcome = distil(student, teacher, batches(), steps=60, learning_rate=5e-3)
    assert outcome.student is student and outcome.best < 0.85 * outcome.start
    assert np.array_equal(bridge.to_numpy(student.hidden.packed.words), before)
    held = [Batch(b) for b in batches()[-1:]]
    assert abs(trainer_for(student, teacher).evaluate(held) - outcome.best) < 1e-6


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_never_ends_worse_than_it_began(framework):
    student, teacher = make(framework)
    before = logits_of(student, batches()[0])
    outcome = distil(student, teacher, batches(), steps=6, learning_rate=3.0, evaluate_every=2)
    assert min(loss for step, loss in outcome.evaluations if step) > outcome.start == outcome.best
    assert np.array_equal(logits_of(student, batches()[0]), before)
    worse = distil(student, teacher, batches(), steps=6, learning_rate=3.0, keep_best=False)
    assert worse.best > worse.start


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fake_quantized_weights_train_and_convert_to_what_was_measured(framework):
    config = qat.IntxFakeQuantizeConfig("int2", group_size=32, is_dynamic=False, range_learning=True)
    student, teacher = make(framework, packed=False)
    if framework == "torch":
        from mlxq.qat import torch as sides
    else:
        sides = qm
    sides.quantize_(student, qat.QATConfig(weight_config=config))
    outcome = distil(student, teacher, batches(), trainable="all", steps=60, learning_rate=3e-3)
    assert outcome.best < 0.5 * outcome.start
    tokens = batches()[0]
    y = logits_of(student, tokens)
    sides.quantize_(student, qat.QATConfig(step="convert"))
    np.testing.assert_allclose(logits_of(student, tokens), y, atol=1e-4)


def test_both_frameworks_follow_the_same_loss_curve():
    pytest.importorskip("torch", reason="needs the package torch")
    curves = []
    for framework in FRAMEWORKS:
        student, teacher = make(framework, bits=4)
        curves.append(distil(student, teacher, batches(), steps=12, learning_rate=1e-3))
    np.testing.assert_allclose(curves[0].losses, curves[1].losses, rtol=2e-3)
    assert abs(curves[0].best / curves[1].best - 1) < 1e-2


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_16_bit_scales_learn_by_steps_that_16_bits_would_lose(framework):
    student, teacher = make(framework, bits=4)
    if framework == "torch":
        import torch

        student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    else:
        student.set_dtype(mx.bfloat16), teacher.set_dtype(mx.bfloat16)
    outcome = distil(student, teacher, batches(), steps=40, learning_rate=1e-4, evaluate_every=10)
    assert "bfloat16" in str(student.head.scales.dtype)
    assert outcome.best < outcome.start
    held = [Batch(b) for b in batches()[-1:]]
    assert abs(trainer_for(student, teacher).evaluate(held) - outcome.best) < 1e-6


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_stopped_goes_on_to_the_same_losses(framework):
    data = [Batch(b) for b in batches()]
    train, held = data[:-1], data[-1:]
    schedule = Schedule(steps=14, rate=5e-3, evaluate_every=5)

    def trainer():
        return trainer_for(*make(framework))

    whole = run(trainer(), train, held, schedule)
    saved = []
    asked = iter(range(100))
    part = run(
        trainer(), train, held, schedule, save=lambda *s: saved.append(s), stop=lambda: next(asked) == 9
    )
    assert not part.finished and len(part.losses) == 9
    arrays, facts = saved[-1]
    facts = json.loads(json.dumps(facts))
    rest = run(trainer(), train, held, schedule, resume=(arrays, facts))
    assert rest.finished and rest.losses == whole.losses and rest.evaluations == whole.evaluations
    assert rest.seconds >= facts["seconds"] > 0


def test_minutes_end_a_run_and_count_what_a_resumed_run_spent():
    student, teacher = make("mlx")
    outcome = distil(student, teacher, batches(), minutes=0.02)
    assert outcome.losses and 1.2 <= outcome.seconds < 20
    schedule = Schedule(minutes=1.0)
    assert schedule.progress(5, 30.0) == 0.5 and schedule.progress(5, 90.0) == 1.0


def test_the_rate_rises_then_falls_and_every_epoch_has_each_batch_once():
    schedule = Schedule(steps=100, rate=1.0)
    rates = [schedule.rate_at(i / 100) for i in range(101)]
    assert rates[0] < 0.2 and max(rates) == rates[5] == 1.0 and abs(rates[-1] - training.LAST_RATE) < 1e-9
    assert rates[5:] == sorted(rates[5:], reverse=True)
    epochs = [[schedule.batch_at(e * 7 + i, 7) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"steps": None}, "steps or minutes"),
        ({"minutes": 1.0}, "steps or minutes"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None, "minutes": -1.0}, "minutes"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"trainable": "words"}, "words"),
        ({"batches": []}, "no batches"),
        ({"batches": [np.zeros((2, 1), int)]}, "T >= 2"),
        ({"batches": [np.zeros((2, 4))]}, "integers"),
        ({"batches": [np.zeros((2, 4), int)]}, "give eval_batches"),
        ({"student": "float"}, "no packed layer"),
        ({"student": object()}, "neither a torch nor an MLX"),
        ({"teacher": "torch"}, "two frameworks"),
    ],
)
def test_settings_that_do_not_exist_are_refused(change, says):
    student, teacher = make("mlx")
    arguments = {"student": student, "teacher": teacher, "batches": batches(3), "steps": 1} | change
    if arguments["student"] == "float":
        arguments["student"] = make("mlx", packed=False)[0]
    if arguments["teacher"] == "torch":
        arguments["teacher"] = make("torch")[1]
    with pytest.raises(ValueError, match=says):
        distil(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("batches"), **arguments)


def follow(framework, **options):
    """(student, outcome) of a short run; in one process or in several."""
    student, teacher = make(framework, bits=4)
    outcome = distil(student, teacher, batches(), steps=8, learning_rate=1e-3, evaluate_every=4, **options)
    return student, outcome


def worker(framework, out):
    """One of two processes: writes losses, evaluations, trained scales and extents of its parts, by run."""
    found = []
    if framework == "torch":
        import torch.distributed as dist

        from mlxq.qat.torch import sharding

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        student, outcome = follow(framework)
        found.append((outcome.losses, outcome.evaluations, student.embed.scales.tolist(), None))
        student, outcome = follow(framework, sharded=True)
        extents = {name: len(sharding.local(p)) for name, p in student.named_parameters()}
        assert student.embed.weight.shape[0] == VOCAB  # words stay whole
        sharding.make_whole(student)
        trained = student.embed.scales.tolist() if rank == 0 else None
        found.append((outcome.losses, outcome.evaluations, trained, extents))
    else:
        rank = mx.distributed.init().rank()
        student, outcome = follow(framework)
        found.append((outcome.losses, outcome.evaluations, student.embed.scales.tolist(), None))
    Path(out + str(rank)).write_text(json.dumps(found))


def free_ports(count):
    """TCP ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_together(runs):
    """Run (command, environment) at the same time, and see each end well."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env=env, **pipes) for command, env in runs]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), said


def check_two_processes(framework, out):
    """What two workers wrote is what one process finds."""
    found = [json.loads(Path(out + str(rank)).read_text()) for rank in (0, 1)]
    student, alone = follow(framework)
    mine = bridge.to_numpy(student.embed.packed.scales)
    assert len(found[0]) == (2 if framework == "torch" else 1)
    for first, second in zip(*found, strict=True):
        assert first[:2] == second[:2]
        np.testing.assert_allclose(first[0], alone.losses, rtol=1e-4)
        np.testing.assert_allclose(first[1], alone.evaluations, rtol=1e-4)
        np.testing.assert_allclose(first[2], mine, atol=1e-4)
    if framework == "torch":
        parts = [found[rank][1][3] for rank in (0, 1)]
        whole = {name: len(p) for name, p in student.named_parameters()}
        assert {n: parts[0][n] + parts[1][n] for n in whole} == whole and 0 < parts[0]["embed.scales"] < VOCAB


def test_two_processes_of_mlx_follow_the_loss_curve_of_one(tmp_path):  # torch's are in test_train.py
    hosts, out = tmp_path / "hosts.json", str(tmp_path / "rank")
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    script = "import sys, test_qat_training as t; t.worker(*sys.argv[1:])"
    command = [sys.executable, "-c", script, "mlx", out]
    env = QUIET | {"MLX_HOSTFILE": str(hosts)}  # what mlx.launch --backend ring sets
    run_together([(command, env | {"MLX_RANK": str(rank)}) for rank in (0, 1)])
    check_two_processes("mlx", out)


@pytest.mark.parametrize("cost, most", [(0.1, 10), (10.0, 4), (60.0, 2)])
def test_evaluations_of_a_timed_run_leave_most_of_it_for_steps(cost, most, monkeypatch):
    """A clock that only steps (a second) and evaluations move; two minutes."""

    class Clocked:
        rank, ranks, now = 0, 1, 0.0

        def step(self, batch, rate):
            self.now += 1.0
            return 1.0

        def evaluate(self, batches):
            self.now += cost
            return 1.0 / (1.0 + self.now)

        def agree(self, *values):
            return list(values)

        def weights(self):
            return {}

        def load_weights(self, weights):
            pass

    trainer = Clocked()
    monkeypatch.setattr(training.time, "monotonic", lambda: trainer.now)
    outcome = run(trainer, [Batch(np.zeros((1, 2), int))], [], Schedule(minutes=2.0))
    assert len(outcome.evaluations) <= most, "measured too often"
    between = len(outcome.evaluations) - 2  # on the way; the start and the end are always measured
    assert between * cost <= (training.MEASURING + 0.05) * 120
    assert len(outcome.losses) >= 120 - len(outcome.evaluations) * cost - 1
    if cost < 1:
        assert len(outcome.evaluations) >= training.EVALUATIONS
