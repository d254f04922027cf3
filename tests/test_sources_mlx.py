"""MLX models as a source: codes that go on unchanged, and modes that are quantized again."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from foreign_models import read_mlx, relative_error

from mlxq.convert import convert


def read(folder):
    return mx.load(str(folder / "model.safetensors"))


@pytest.mark.parametrize("arch", ("llama", "qwen3_moe", "gemma3_text"))
@pytest.mark.parametrize("bits, group_size", [(4, 64), (3, 32), (8, 128)])
def test_a_model_that_is_converted_again_stays_as_it_is(arch, bits, group_size, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src", dtype="float16")
    convert(source, tmp_path / "once", bits=bits, group_size=group_size, embedding_bits=8, progress=False)
    report = convert(tmp_path / "once", tmp_path / "twice", progress=False)
    once, twice = read(tmp_path / "once"), read(tmp_path / "twice")
    assert once.keys() == twice.keys() and all(mx.array_equal(once[k], twice[k]) for k in once)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text()
    assert report.relative_error == 0 and not report.notices


def test_narrower_codes_are_chosen_again_from_what_the_source_stands_for(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src", dtype="float16")
    convert(source, tmp_path / "eight", bits=8, group_size=64, progress=False)
    report = convert(tmp_path / "eight", tmp_path / "four", bits=4, progress=False)
    assert {layer.stored for layer in report.layers} == {"4-bit/64", "float16"}
    assert [notice for notice in report.notices if "8-bit/64 codes do not fit 4-bit/64" in notice]
    convert(source, tmp_path / "direct", bits=4, group_size=64, progress=False)
    original = read(source)["model.layers.1.mlp.up_proj.weight"]
    detour, direct = (
        relative_error(
            read_mlx(tmp_path / name)["model.layers.1.mlp.up_proj.weight"], np.array(original, np.float64)
        )
        for name in ("four", "direct")
    )
    assert detour < 1.01 * direct  # 8 bits add (1/17)^2 of the variance


def test_wider_formats_hold_the_same_weights(tmp_path):
    source = tiny_models.make_hf_model("qwen3_moe", tmp_path / "src", dtype="float16")
    convert(source, tmp_path / "four", bits=4, group_size=128, progress=False)
    convert(tmp_path / "four", tmp_path / "wide", bits=6, group_size=32, progress=False)
    four, wide = read_mlx(tmp_path / "four"), read_mlx(tmp_path / "wide")
    assert four.keys() == wide.keys() and all(np.array_equal(four[k], wide[k]) for k in four)


@pytest.mark.parametrize("arch", ("llama", "qwen3_moe"))
@pytest.mark.parametrize("mode", ("mxfp4", "nvfp4", "mxfp8"))
def test_small_floats_of_mlx_are_read_as_mlx_reads_them(mode, arch, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src", dtype="float16")
    mlx_lm.convert(str(source), str(tmp_path / "stock"), quantize=True, q_mode=mode)
    report = convert(tmp_path / "stock", tmp_path / "q", bits=8, group_size=32, progress=False)
    stock, found = read(tmp_path / "stock"), read_mlx(tmp_path / "q")
    bits, group = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    for name in (name.removesuffix(".scales") for name in stock if name.endswith(".scales")):
        if "biases" in "".join(k for k in stock if k.startswith(f"{name}.")):
            continue  # a router in 8-bit affine
        wanted = mx.dequantize(stock[f"{name}.weight"], stock[f"{name}.scales"], None, group, bits, mode=mode)
        assert (
            relative_error(found[f"{name}.weight"], np.array(wanted.astype(mx.float32))) < 6e-3
        )  # 8-bit grid
    assert [notice for notice in report.notices if "-bit floats" in notice]
