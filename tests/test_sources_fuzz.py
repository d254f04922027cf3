"""Damaged files of quantized sources: one sentence or some weights; no crash, no hang, no great memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from foreign_models import quantized_model
from test_sources_awq import SETTINGS as AWQ
from test_sources_awq import awq_layer
from test_sources_bitsandbytes import SETTINGS as NF4
from test_sources_bitsandbytes import nf4_layer
from test_sources_gptq import gptq_layer, settings

from mlxq.convert import convert

PROGRAM = Path(__file__).with_name("fuzz_sources.py")


def mlx_model(folder, **options):
    source = tiny_models.make_hf_model("llama", folder / "float", dtype="float16")
    convert(source, folder / "src", progress=False, **options)
    return folder / "src"


def compressed(folder, name):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from test_sources_compressed_tensors import block, quantizer

    return quantized_model(folder / "src", block(name), quantizer(name))[0]


def float_model(folder):
    return tiny_models.make_hf_model("llama", folder / "src", dtype="float16")


def gguf_model(folder):
    pytest.importorskip("gguf", reason="needs the package gguf")
    from gguf import GGMLQuantizationType as Type
    from test_gguf import write_gguf

    return write_gguf(float_model(folder), folder / "m.gguf", "llama", Type.Q4_0)


def gba_layer(base, values, rng):
    """Random codes and statistics in bitorch-engine's layout for 4 bits in groups of 32."""
    N, K = values.shape
    parts = {"qweight": ("I32", rng.integers(-(2**31), 2**31, (K // 8, N)).astype(np.int32))}
    parts["g_idx"] = ("I32", (np.arange(K) // 32).astype(np.int32))
    parts["qstatistic"] = ("U8", rng.integers(0, 256, (K // 32, 1, N), np.uint8))
    for part in ("qzeros_zeros", "qzeros_scales", "qscales_zeros", "qscales_scales"):
        parts[part] = ("F16", rng.uniform(0.01, 0.02, (K // 32, 1, 1)).astype(np.float16))
    return parts, values


def mxfp4_model(folder):
    from test_sources_mxfp4 import gpt_oss

    return gpt_oss(folder / "src")


SOURCES = {
    "float": float_model,
    "gguf": gguf_model,
    "gba": lambda folder: quantized_model(folder / "src", {"quant_method": "gba"}, gba_layer)[0],
    "mxfp4": mxfp4_model,
    "awq": lambda folder: quantized_model(folder / "src", AWQ, awq_layer(64))[0],
    "gptq": lambda folder: quantized_model(
        folder / "src", settings(4, 64, 1, True), gptq_layer(4, 64, 1, True)
    )[0],
    "nf4": lambda folder: quantized_model(folder / "src", NF4, nf4_layer(64, True))[0],
    "mlx": lambda folder: mlx_model(folder, bits=4, group_size=64),
    "int4": lambda folder: compressed(folder, "int4 groups, zeros"),
    "fp8": lambda folder: compressed(folder, "fp8 blocks"),
    "nvfp4": lambda folder: compressed(folder, "nvfp4"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_files_are_refused_in_one_sentence_or_read_and_planned(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    command = [sys.executable, str(PROGRAM), str(source), "0", "21"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    read, planned = map(int, run.stdout.split())
    assert 21 > read >= 5 and planned >= read  # the mutations do reach what is checked


@pytest.mark.parametrize(
    "part, said",
    [("qzeros", "tensors are missing: .*qzeros"), ("scales", "tensors are missing: .*scales")],
)
def test_a_part_that_is_missing_is_named(part, said, tmp_path):
    def without(base, values, rng):
        parts, wanted = awq_layer(64)(base, values, rng)
        return {k: v for k, v in parts.items() if k != part or "layers.1.mlp.up" not in base}, wanted

    source, _ = quantized_model(tmp_path / "src", AWQ, without)
    with pytest.raises(ValueError, match=said.replace(".*", r"model.layers.1.mlp.up_proj.")):
        convert(source, tmp_path / "q", progress=False)


def test_a_shape_that_lies_is_named(tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from test_sources_compressed_tensors import block, quantizer

    def lying(base, values, rng):
        parts, wanted = quantizer("int4 groups")(base, values, rng)
        return parts | {"weight_shape": ("I64", np.array([2**40, 2**40]))}, wanted

    source, _ = quantized_model(tmp_path / "src", block("int4 groups"), lying)
    with pytest.raises(ValueError, match="weight_shape .* does not fit"):
        convert(source, tmp_path / "q", progress=False)
    assert json.loads((source / "config.json").read_text())
