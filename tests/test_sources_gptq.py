"""GPTQ and GBA checkpoints through convert, against the published formulas; act-order, exact and not."""

import json

import foreign_models
import numpy as np
import pytest
import tiny_models
from foreign_models import close_to_half, logits, quantized_model, read_mlx, relative_error, uniform_codes

from mlxq.convert import convert


def words_along_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, columns) codes as int32 words of 32 / bits rows each, the first row lowest."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), np.uint32)
    for row in range(codes.shape[0]):
        words[row // per_word] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    return words.view(np.int32)


def gptq_layer(bits: int, group: int, version: int, act_order: bool, only: str = "proj"):
    def quantize(base, values, rng):
        N, K = values.shape
        order = rng.permutation(K) if act_order and only in base else np.arange(K)
        codes, scales, zeros = uniform_codes(values[:, order], bits, group)  # groups of columns in this order
        if version == 1:
            zeros = np.maximum(zeros, 1)  # stored less one
        stored_zeros = (zeros - (version == 1)).astype(np.uint8)
        of = np.empty(K, np.int64)
        of[order] = np.arange(K) // group
        back = np.empty_like(codes)
        back[:, order] = codes
        parts = {
            "qweight": ("I32", words_along_rows(back.T, bits)),
            "qzeros": ("I32", np.ascontiguousarray(words_along_rows(stored_zeros, bits).T)),
            "scales": ("F16", np.ascontiguousarray(scales.T)),
            "g_idx": ("I32", of.astype(np.int32)),
        }
        # GPTQModel: weight = scales[g_idx] * (weight - zeros[g_idx])
        return parts, scales.astype(np.float64)[:, of] * (back.astype(np.float64) - zeros[:, of])

    return quantize


def settings(bits, group, version, act_order):
    named = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": False,
    } | named


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("bits, group", [(4, 64), (2, 32), (8, 128)])
def test_codes_are_repacked(bits, group, version, tmp_path):
    source, weights = quantized_model(
        tmp_path / "src", settings(bits, group, version, False), gptq_layer(bits, group, version, False)
    )
    report = convert(source, tmp_path / "q", progress=False)
    found = read_mlx(tmp_path / "q")
    for path, wanted in weights.items():
        if "proj" in path:
            close_to_half(found[path], wanted, (1 << bits) - 1)
    assert {layer.stored for layer in report.layers} == {f"{bits}-bit/{group}", "float16"}


@pytest.mark.parametrize("arch", ("llama", "phi3", "qwen3_moe"))
def test_act_order_of_the_second_layer_of_an_mlp_is_kept_exactly(arch, tmp_path):
    names = {"phi3": ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")}

    quantize = gptq_layer(4, 64, 1, True, only="down_proj")
    linear = foreign_models.LINEAR
    foreign_models.LINEAR = names.get(arch, linear)
    try:
        source, weights = quantized_model(tmp_path / "src", settings(4, 64, 1, True), quantize, arch=arch)
    finally:
        foreign_models.LINEAR = linear
    report = convert(source, tmp_path / "q", progress=False)
    assert not [notice for notice in report.notices if "quantized again" in notice]
    assert report.relative_error < 1e-2
    plain = tiny_models.make_hf_model(arch, tmp_path / "plain")
    write_floats(plain, weights)
    assert relative_error(logits(tmp_path / "q"), logits(plain)) < 3e-3  # float16 biases


def write_floats(folder, weights) -> None:
    tiny_models.write_safetensors(
        folder / "model.safetensors", {k: v.astype(np.float32) for k, v in weights.items()}, "float32"
    )


def test_act_order_elsewhere_is_quantized_again_and_said(tmp_path):
    source, weights = quantized_model(tmp_path / "src", settings(4, 64, 1, True), gptq_layer(4, 64, 1, True))
    report = convert(source, tmp_path / "q", bits=8, group_size=32, progress=False)
    [notice] = [notice for notice in report.notices if "quantized again" in notice]
    assert "12 layers" in notice and "act-order" in notice  # all but two down_proj
    plain = tiny_models.make_hf_model("llama", tmp_path / "plain")
    assert relative_error(logits(tmp_path / "q"), logits(plain, weights)) < 2e-2


def test_settings_may_lie_in_gptqs_own_file(tmp_path):
    source, weights = quantized_model(tmp_path / "src", {}, gptq_layer(4, 64, 1, False))
    (source / "quantize_config.json").write_text(json.dumps(settings(4, 64, 1, False)))
    convert(source, tmp_path / "q", progress=False)
    close_to_half(
        read_mlx(tmp_path / "q")["model.layers.1.mlp.up_proj.weight"],
        weights["model.layers.1.mlp.up_proj.weight"],
        15,
    )


def test_gba_is_known_by_its_tensors(tmp_path):
    def quantize(base, values, rng):
        codes, scales, zeros = uniform_codes(values, 4, 256)  # wide groups carry plain scales and zeros
        products = (scales.astype(np.float64) * zeros).astype(np.float16)
        of = np.arange(values.shape[1]) // 256
        parts = {
            "qweight": ("I32", words_along_rows(codes.T, 4)),
            "scales": ("F16", np.ascontiguousarray(scales.T)),
            "zeros": ("F16", np.ascontiguousarray(products.T)),
            "g_idx": ("I32", of.astype(np.int32)),
        }
        return parts, scales.astype(np.float64)[:, of] * codes - products.astype(np.float64)[:, of]

    source, weights = quantized_model(tmp_path / "src", {}, quantize)
    report = convert(source, tmp_path / "q", progress=False)
    found = read_mlx(tmp_path / "q")
    for path, wanted in weights.items():
        if "proj" in path:
            close_to_half(found[path], wanted, 15)
    assert {layer.stored for layer in report.layers} == {"4-bit/128", "float16"}
