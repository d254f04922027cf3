"""compressed-tensors checkpoints against the library that writes and reads them."""

import numpy as np
import pytest
import tiny_models
from foreign_models import close_to_half, logits, quantized_model, read_mlx, relative_error, write_parts

from mlxq.checkpoint.compressed_tensors import join
from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.tensors import FileTensor, map_file
from mlxq.convert import convert

torch = pytest.importorskip("torch", reason="compressed-tensors needs torch")
library = pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

STORED = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip

# format, arguments of the weights, dtype of the scales
CASES = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, torch.float16),
    "int4 groups, zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
        torch.float16,
    ),
    "int4 rows": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, torch.float16),
    "int8 groups": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 128}, torch.float16),
    "int3 groups, zeros": (
        "pack-quantized",
        {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        torch.float16,
    ),
    "int5 rows": ("pack-quantized", {"num_bits": 5, "strategy": "channel"}, torch.float16),
    "int8 W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.float16),
    "int8 W8A8, zeros": (
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, torch.float16,
    ),
    "int8 tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, torch.float16),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, torch.float16),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, torch.float16),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 48]},
        torch.float16,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        torch.float32,
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        torch.float32,
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        torch.float32,
    ),
}  # fmt: skip
INTEGERS = [name for name in CASES if name.startswith("int")]


def scales_and_zeros(weight: torch.Tensor, args: QuantizationArgs, dtype):
    """Some scales and zero points of the shapes that the library wants; how good they are does not matter."""
    N, K = weight.shape
    size = args.group_size if args.strategy in ("group", "tensor_group") else K
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
        blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
        largest = blocks.abs().amax((1, 3))
    elif args.strategy == "tensor":
        largest = weight.abs().max().reshape(1)
    else:
        largest = weight.reshape(N, -1, size).abs().amax(-1)
    top = {4: 6.0, 8: 448.0}[args.num_bits] if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    scales = (largest / top).to(dtype)
    if args.scale_dtype is torch.uint8:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    zeros = None
    if not args.symmetric:
        limit = 2 ** (args.num_bits - 2)
        zeros = torch.randint(-limit, limit, scales.shape, generator=torch.manual_seed(1)).to(torch.int8)
    return scales, zeros


def compressed(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of one layer as the library stores them, and the weight that it makes of them."""
    form, arguments, dtype = CASES[name]
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    scales, zeros = scales_and_zeros(weight, args, dtype)
    state = {"weight": weight.to(dtype), "weight_scale": scales}
    if zeros is not None:
        state["weight_zero_point"] = zeros
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        state["weight_scale"] = (scales * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    compressor = BaseCompressor.load_from_registry(form)
    parts = compressor.compress(dict(state), scheme)
    wanted = compressor.decompress(dict(parts), scheme)["weight"]
    return {k: v for k, v in parts.items() if v is not None}, wanted


def block(name: str) -> dict:
    form, arguments, _ = CASES[name]
    said = {k: v for k, v in arguments.items() if k != "scale_dtype"} | {
        "symmetric": arguments.get("symmetric", True)
    }
    group = {"targets": ["Linear"], "weights": {"type": "int"} | said, "format": form}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


def raw(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    plain = tensor.detach().contiguous()
    kind = STORED[plain.dtype]
    if plain.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        plain = plain.view(torch.uint16 if plain.dtype == torch.bfloat16 else torch.uint8)
    return kind, plain.numpy()


def exact(parts: dict[str, torch.Tensor], name: str) -> np.ndarray | None:
    """What the parts of an int8 or e4m3 layer stand for in float64; the library rounds more."""
    if "weight" not in parts or "blocks" in name or name == "mxfp8":
        return None
    scale = parts["weight_scale"].double()
    zero = parts["weight_zero_point"].double() if "weight_zero_point" in parts else 0
    return (scale * (parts["weight"].double() - zero)).numpy()


@pytest.mark.parametrize("N, K", [(24, 128), (33, 384)])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_librarys(name, N, K, tmp_path):
    weight = torch.randn(N, K, generator=torch.manual_seed(N)) / K**0.5
    parts, wanted = compressed(name, weight)
    write_parts(tmp_path / "f.safetensors", {f"l.{k}": raw(v) for k, v in parts.items()})
    mapped = map_file(tmp_path / "f.safetensors")
    tensors = {k: FileTensor(mapped, e) for k, e in read_header(tmp_path / "f.safetensors")[0].items()}
    joined = join(tensors, block(name))
    assert list(joined) == ["l.weight"]
    found = joined["l.weight"].read(0, N)
    assert np.array_equal(found[5:9], joined["l.weight"].read(5, 9))
    # The library computes in the dtype of the scales, nvfp4 and mxfp4 in bfloat16: we round nothing.
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[wanted.dtype]
    difference = np.abs(found - wanted.double().numpy())
    assert (difference <= 2 * unit * np.abs(found).max(axis=1, keepdims=True)).all()
    if (better := exact(parts, name)) is not None:
        assert np.abs(found - better).max() <= 1e-6 * np.abs(better).max()


def quantizer(name):
    def quantize(base, values, rng):
        parts, wanted = compressed(name, torch.from_numpy(values))
        return {k: raw(v) for k, v in parts.items()}, wanted.double().numpy()

    return quantize


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_are_repacked(name, tmp_path):
    source, weights = quantized_model(tmp_path / "src", block(name), quantizer(name))
    report = convert(source, tmp_path / "q", progress=False)
    found, bits = read_mlx(tmp_path / "q"), CASES[name][1]["num_bits"]
    for path, wanted in weights.items():
        if "proj" in path:
            close_to_half(found[path], wanted, (1 << bits) - 1)
    assert not [notice for notice in report.notices if "quantized again" in notice]
    assert report.relative_error < 1e-2
    group = CASES[name][1].get("group_size", 128)
    assert {layer.stored for layer in report.layers} == {f"{bits}-bit/{group}", "float16"}


@pytest.mark.parametrize("name", ["int4 groups, zeros", "fp8 blocks", "nvfp4"])
def test_a_model_computes_with_the_librarys_weights(name, tmp_path):
    source, weights = quantized_model(tmp_path / "src", block(name), quantizer(name))
    report = convert(source, tmp_path / "q", bits=8 if name[0] != "i" else None, progress=False)
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < (2e-3 if name[0] == "i" else 3e-2)
    assert bool(report.notices) == (name[0] != "i")  # floats are quantized again, and that is said


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_mxfp4_keeps_its_codes_in_mlxs_own_mode(arch, tmp_path):
    source, weights = quantized_model(tmp_path / "src", block("mxfp4"), quantizer("mxfp4"), arch=arch)
    report = convert(source, tmp_path / "q", progress=False)
    assert not report.notices and {layer.stored for layer in report.layers} >= {"mxfp4"}
    plain = tiny_models.make_hf_model(arch, tmp_path / "plain")
    stacked = dict(weights)
    for layer in range(2) if arch == "qwen3_moe" else ():
        for projection in ("gate_proj", "up_proj", "down_proj"):
            at = f"model.layers.{layer}.mlp."
            parts = [stacked.pop(f"{at}experts.{e}.{projection}.weight") for e in range(4)]
            stacked[f"{at}switch_mlp.{projection}.weight"] = np.stack(parts)
    # the same weights to the last bit, and MLX's products of either kind in float32
    assert relative_error(logits(tmp_path / "q"), logits(plain, stacked)) < 1e-4


def test_experts_keep_their_codes_through_stacking(tmp_path):
    name = "int4 groups"
    source, weights = quantized_model(tmp_path / "src", block(name), quantizer(name), arch="qwen3_moe")
    convert(source, tmp_path / "q", progress=False)
    found = read_mlx(tmp_path / "q")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        wanted = np.stack([weights[f"model.layers.1.mlp.experts.{e}.{projection}.weight"] for e in range(4)])
        close_to_half(found[f"model.layers.1.mlp.switch_mlp.{projection}.weight"], wanted, 15)


def test_act_order_is_dequantized_and_said(tmp_path):
    name, seen = "int4 groups", {}

    def quantize(base, values, rng):
        parts, wanted = compressed(name, torch.from_numpy(values))
        order = torch.from_numpy(rng.permutation(values.shape[1]) // 32).to(torch.int32)
        scale = parts["weight_scale"].double().numpy()
        codes = torch.round(wanted.double() / parts["weight_scale"].double().repeat_interleave(32, 1)).numpy()
        seen[f"{base}.weight"] = codes * scale[:, order.numpy()]
        return {k: raw(v) for k, v in (parts | {"weight_g_idx": order}).items()}, seen[f"{base}.weight"]

    source, weights = quantized_model(tmp_path / "src", block(name), quantize)
    report = convert(source, tmp_path / "q", bits=8, group_size=32, progress=False)
    assert [notice for notice in report.notices if "act-order" in notice]
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < 2e-2


def test_targets_give_layers_their_own_widths(tmp_path):
    def quantize(base, values, rng):
        return quantizer("int8 groups" if "down_proj" in base else "int4 groups")(base, values, rng)

    settings = block("int4 groups")
    settings["config_groups"] |= {
        "group_1": block("int8 groups")["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    }
    source, weights = quantized_model(tmp_path / "src", settings, quantize)
    report = convert(source, tmp_path / "q", progress=False)
    assert {layer.stored for layer in report.layers} == {"4-bit/32", "8-bit/128", "float16"}
    found = read_mlx(tmp_path / "q")
    for path, wanted in weights.items():
        if "proj" in path:
            close_to_half(found[path], wanted, 255 if "down" in path else 15)


@pytest.mark.parametrize("block_shape", [[128, 128], [32, 64]])
def test_fp8_blocks_of_deepseek_and_qwen(block_shape, tmp_path):
    def quantize(base, values, rng):
        N, K = values.shape
        rows, columns = block_shape
        scales = rng.uniform(0.5, 2, (-(-N // rows), -(-K // columns))).astype(np.float32) / 448
        wide = np.repeat(np.repeat(scales, rows, 0)[:N], columns, 1)[:, :K]
        codes = torch.from_numpy(values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        parts = {"weight": raw(codes), "weight_scale_inv": ("F32", scales)}
        return parts, codes.double().numpy() * wide

    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block_shape}
    source, weights = quantized_model(tmp_path / "src", settings, quantize)
    report = convert(source, tmp_path / "q", bits=8, group_size=32, progress=False)
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < 2e-2
    assert [notice for notice in report.notices if "8-bit floats" in notice]
