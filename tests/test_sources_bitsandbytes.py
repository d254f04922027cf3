"""bitsandbytes checkpoints against the published formulas, and against the library where it is installed."""

import json

import numpy as np
import pytest
import tiny_models
from foreign_models import close_to_half, logits, quantized_model, read_mlx, relative_error, write_parts

from mlxq.checkpoint.bitsandbytes import join
from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.tensors import FileTensor, map_file
from mlxq.convert import convert

# bitsandbytes.functional.get_4bit_type("nf4")
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def nf4_layer(blocksize: int, nested: bool):
    def quantize(base, values, rng):
        N, K = values.shape
        flat = values.astype(np.float32).reshape(-1)
        blocks = np.pad(flat, (0, -len(flat) % blocksize)).reshape(-1, blocksize)
        absmax = np.abs(blocks).max(1).astype(np.float32)
        state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float16", "shape": [N, K]}
        parts = {}
        if nested:
            table = np.linspace(-1, 1, 256, dtype=np.float32)
            offset = float(absmax.mean())
            wide = np.pad(absmax - np.float32(offset), (0, -len(absmax) % 256)).reshape(-1, 256)
            outer = np.abs(wide).max(1).astype(np.float32)
            codes = np.abs((wide / outer[:, None])[..., None] - table).argmin(-1).reshape(-1)[: len(absmax)]
            absmax = table[codes] * np.repeat(outer, 256)[: len(absmax)] + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts |= {
                "weight.absmax": ("U8", codes.astype(np.uint8)),
                "weight.nested_absmax": ("F32", outer),
                "weight.nested_quant_map": ("F32", table),
            }
        else:
            parts["weight.absmax"] = ("F32", absmax)
        codes = np.abs((blocks / absmax[:, None])[..., None] - NF4).argmin(-1).astype(np.uint8).reshape(-1)
        codes = codes[: len(flat)]
        even = np.pad(codes, (0, len(codes) % 2))
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts |= {
            "weight": ("U8", (even[0::2] << 4 | even[1::2])[:, None]),
            "weight.quant_map": ("F32", NF4),
            "weight.quant_state.bitsandbytes__nf4": ("U8", text),
        }
        return parts, (NF4[codes].astype(np.float64) * np.repeat(absmax, blocksize)[: len(flat)]).reshape(
            N, K
        )

    return quantize


def load(path, parts):
    write_parts(path, {f"l.{k}": v for k, v in parts.items()})
    mapped = map_file(path)
    return {k: FileTensor(mapped, e) for k, e in read_header(path)[0].items()}


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("N, K, blocksize", [(24, 128, 64), (7, 100, 64), (5, 33, 128), (130, 64, 4096)])
def test_nf4_is_the_published_formula_in_any_shape(N, K, blocksize, nested, tmp_path):
    values = np.random.default_rng(N).standard_normal((N, K)) / 8
    parts, wanted = nf4_layer(blocksize, nested)("l", values, None)
    joined = join(load(tmp_path / "f.safetensors", parts), SETTINGS)
    assert list(joined) == ["l.weight"]
    found = joined["l.weight"].read(0, N)
    assert np.abs(found - wanted).max() < 1e-6
    # 33 columns: row 1 begins in the middle of a byte, row 2 does not
    for start in (1, 2):
        assert np.array_equal(joined["l.weight"].read(start, start + 3), found[start : start + 3])


@pytest.mark.parametrize("kind", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
def test_four_bits_are_bitsandbytes_own(kind, nested, tmp_path):
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    functional = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes").functional
    weight = (torch.randn(48, 320, generator=torch.manual_seed(0)) / 16).to(torch.float16)
    data, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    kinds = {torch.uint8: "U8", torch.float32: "F32"}
    packed = {f"weight.{k}": (kinds[v.dtype], v.numpy()) for k, v in state.as_dict(packed=True).items()}
    parts = {"weight": ("U8", data.numpy())} | packed
    found = join(load(tmp_path / "f.safetensors", parts), SETTINGS)["l.weight"].read(0, 48)
    wanted = functional.dequantize_4bit(data, state).double().numpy()
    assert np.abs(found - wanted).max() <= 2.0**-11 * np.abs(wanted).max()  # it rounds to float16


def test_a_four_bit_model_is_quantized_again_and_that_is_said(tmp_path):
    source, weights = quantized_model(tmp_path / "src", SETTINGS, nf4_layer(64, True))
    report = convert(source, tmp_path / "q", bits=8, progress=False)
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < 3e-2
    assert [notice for notice in report.notices if "14 layers" in notice and "NF4" in notice]


def test_int8_rows_are_repacked(tmp_path):
    def quantize(base, values, rng):
        largest = np.abs(values).max(1).astype(np.float32)
        codes = np.rint(values * 127 / largest[:, None]).astype(np.int8)
        parts = {
            "weight": ("I8", codes),
            "SCB": ("F32", largest),
            "weight_format": ("U8", np.zeros((), np.uint8)),
        }
        return parts, codes.astype(np.float64) * largest[:, None] / 127

    source, weights = quantized_model(
        tmp_path / "src", {"quant_method": "bitsandbytes", "load_in_8bit": True}, quantize
    )
    report = convert(source, tmp_path / "q", progress=False)
    found = read_mlx(tmp_path / "q")
    for path, wanted in weights.items():
        if "proj" in path:
            close_to_half(found[path], wanted, 255)
    assert {layer.stored for layer in report.layers} == {"8-bit/128", "float16"}
    assert not report.notices
