"""Damaged files of quantized sources: one sentence or some weights; no crash, no hang, no great memory."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from foreign_models import quantized_model
from test_sources_awq import SETTINGS as AWQ
from test_sources_awq import awq_layer
from test_sources_bitsandbytes import SETTINGS as NF4
from test_sources_bitsandbytes import nf4_layer
from test_sources_gptq import gptq_layer, settings

from mlxq.convert import convert

# Reads rows of every tensor of argv[1] after each of argv[2] seeded mutations of its files.
MUTATE = """
    import json, random, resource, signal, sys, traceback
    from pathlib import Path

    from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint

    source, count = Path(sys.argv[1]), int(sys.argv[2])
    file, config = source / "model.safetensors", source / "config.json"
    good, said = file.read_bytes(), json.loads(config.read_text())
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    HuggingFaceCheckpoint(source).tensors()  # every import is done
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    odd = [0, 1, -1, 3, 2**31, 2**62, 1e300, "4", None, [], {}, True, [2**40, 2**40], [0], "nan"]
    refused, wrong = 0, []
    for seed in range(count):
        rng = random.Random(seed)
        data, changed = bytearray(good), json.loads(json.dumps(said))
        kind = seed % 5
        if kind == 0:  # a byte of the header
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(8 + length)] = rng.randrange(256)
        elif kind == 1:  # a field of the header, with the lengths right
            fields = json.loads(json.dumps(header))
            name = rng.choice(list(fields))
            fields[name][rng.choice(list(fields[name]))] = rng.choice(odd + ["F16", "I32", "U8", [8, 8]])
            text = json.dumps(fields).encode()
            data = bytearray(len(text).to_bytes(8, "little") + text) + data[8 + length :]
        elif kind == 2:  # a setting
            block = changed["quantization_config" if "quantization_config" in changed else "quantization"]
            block[rng.choice(list(block))] = rng.choice(odd)
            if "quantization" in changed:
                changed["quantization_config"] = block
        elif kind == 3:  # values: order, shape and state tensors are among them
            name = rng.choice([n for n in header if not n.endswith("norm.weight")])
            begin, end = header[name]["data_offsets"]
            for _ in range(rng.randint(1, 8)):
                data[8 + length + rng.randrange(begin, end)] = rng.randrange(256)
        else:  # cut off, or a part is missing
            if rng.random() < 0.5:
                data = data[: rng.randrange(len(data))]
            else:
                fields = json.loads(json.dumps(header))
                name = rng.choice(list(fields))
                fields[name + "_"] = fields.pop(name)
                text = json.dumps(fields).encode()
                data = bytearray(len(text).to_bytes(8, "little") + text) + data[8 + length :]
        file.write_bytes(data)
        config.write_text(json.dumps(changed))
        signal.alarm(30)
        try:
            for tensor in HuggingFaceCheckpoint(source).tensors().values():
                if "float" in tensor.dtype:
                    tensor.read(0, min(2, tensor.rows))
        except (ValueError, OSError) as error:
            refused += 1
            if "\\n" in str(error) or len(str(error)) < 10:
                wrong.append((seed, str(error)))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append((seed, type(error).__name__, str(error), at.filename, at.lineno))
        signal.alarm(0)
    assert not wrong, wrong
    print(refused)
"""


def mlx_model(folder, **options):
    import tiny_models

    source = tiny_models.make_hf_model("llama", folder / "float", dtype="float16")
    convert(source, folder / "src", progress=False, **options)
    return folder / "src"


def compressed(folder, name):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from test_sources_compressed_tensors import block, quantizer

    return quantized_model(folder / "src", block(name), quantizer(name))[0]


SOURCES = {
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
def test_damaged_files_are_refused_in_one_sentence_or_read(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(MUTATE), str(source), "20"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) >= 5  # the mutations do reach what is checked
    assert not (tmp_path / "q").exists()


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
