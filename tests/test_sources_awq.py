"""AWQ checkpoints against AutoAWQ's published formula, written out here."""

import numpy as np
import pytest
import tiny_models
from foreign_models import (
    close_to_half,
    logits,
    quantized_model,
    read_mlx,
    relative_error,
    uniform_codes,
    write_parts,
)

from mlxq.checkpoint.awq import join
from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.tensors import FileTensor, map_file
from mlxq.convert import convert

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # WQLinear_GEMM: column ORDER[i] of eight goes to bits 4 i


def awq_words(codes: np.ndarray) -> np.ndarray:
    """(rows, N) codes as int32 (rows, N / 8), one nibble after the other."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate(ORDER):
            words[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq_layer(group):
    def quantize(base, values, rng):
        codes, scales, zeros = uniform_codes(values, 4, group)
        of = np.arange(values.shape[1]) // group
        parts = {
            "qweight": ("I32", awq_words(codes.T)),
            "qzeros": ("I32", awq_words(zeros.T)),
            "scales": ("F16", scales.T),
        }
        return parts, (codes.astype(np.float64) - zeros[:, of]) * scales.astype(np.float64)[:, of]

    return quantize


@pytest.mark.parametrize(
    "N, K, group", [(8, 32, 32), (24, 160, 32), (72, 384, 128), (16, 96, 96), (40, 100, 50)]
)
def test_codes_are_autoawqs_in_any_shape(N, K, group, tmp_path):
    values = np.random.default_rng(N).standard_normal((N, K)) / 8
    parts, wanted = awq_layer(group)("l", values, None)
    write_parts(tmp_path / "f.safetensors", {f"l.{k}": v for k, v in parts.items()})
    mapped = map_file(tmp_path / "f.safetensors")
    tensors = {k: FileTensor(mapped, e) for k, e in read_header(tmp_path / "f.safetensors")[0].items()}
    if group not in (32, 128):
        from mlxq.checkpoint.awq import AwqTensor

        tensor = AwqTensor(tensors["l.qweight"], tensors["l.qzeros"], tensors["l.scales"], group)
    else:
        tensor = join(tensors, SETTINGS | {"group_size": group})["l.weight"]
    assert tensor.shape == (N, K)
    assert np.abs(tensor.read(0, N) - wanted).max() < 1e-6  # one float32 product and sum
    assert np.array_equal(tensor.read(3, 7), tensor.read(0, N)[3:7])


def test_a_model_is_repacked_and_computes_with_awqs_weights(tmp_path):
    source, weights = quantized_model(tmp_path / "src", SETTINGS, awq_layer(64))
    report = convert(source, tmp_path / "q", progress=False)
    found = read_mlx(tmp_path / "q")
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        if "proj" in name:
            close_to_half(found[name], wanted, 15)
        else:
            assert np.array_equal(found[name], wanted), name
    assert {layer.stored for layer in report.layers} == {"4-bit/64", "float16"}
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < 2e-3  # float16 biases


def test_smaller_groups_and_more_bits_hold_the_same_weights(tmp_path):
    source, _ = quantized_model(tmp_path / "src", SETTINGS, awq_layer(64))
    convert(source, tmp_path / "own", progress=False)
    convert(source, tmp_path / "small", group_size=32, progress=False)
    convert(source, tmp_path / "wide", bits=8, progress=False)
    own, small, wide = (read_mlx(tmp_path / name) for name in ("own", "small", "wide"))
    for name in (name for name in own if "proj" in name):
        assert np.array_equal(own[name], small[name]) and np.array_equal(own[name], wide[name])


def test_what_does_not_fit_is_quantized_again_and_said(tmp_path):
    source, _ = quantized_model(tmp_path / "src", SETTINGS, awq_layer(64))
    report = convert(source, tmp_path / "q", bits=3, progress=False)
    assert [
        n for n in report.notices if "quantized again, 14 layers" in n and "4-bit/64 codes do not fit" in n
    ]
    assert report.relative_error > 0.05


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", 7, "ipex"])
def test_other_layouts_of_awq_are_refused(version, tmp_path):
    source, _ = quantized_model(tmp_path / "src", SETTINGS | {"version": version}, awq_layer(64))
    with pytest.raises(ValueError, match="version: .*; built: gemm"):
        convert(source, tmp_path / "q", progress=False)
