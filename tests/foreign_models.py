"""Tiny models in the formats of other quantizers, and what their published formulas make of the codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny_models

from mlxq.checkpoint.safetensors import BYTES

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = [[1, 17, 200, 3, 44, 90, 2, 150]]


def write_parts(path: Path, parts: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file; each array lies as it is under the dtype that the header shall name."""
    header, offset = {}, 0
    for name, (dtype, values) in parts.items():
        assert values.itemsize == BYTES[dtype], name
        span = [offset, offset + values.nbytes]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in parts.values():
            file.write(np.ascontiguousarray(values).tobytes())


def quantized_model(folder, settings: dict, quantize, arch: str = "llama", dtype: str = "float16", **options):
    """(folder, weights): a tiny model whose linear layers are stored by quantize(name, weight, rng).

    quantize gives (parts, values): parts by suffix of the layer's name, and the float64 weight they stand
    for. weights has those values, and every other tensor as it is stored, by the checkpoint's own names.
    """
    folder = tiny_models.make_hf_model(arch, Path(folder), **options)
    tensors = {k: np.array(v) for k, v in mx.load(str(folder / "model.safetensors")).items()}
    rng = np.random.default_rng(5)
    parts, weights = {}, {}
    stored = {"float16": "F16", "float32": "F32"}[dtype]
    for name, values in tensors.items():
        base = name.removesuffix(".weight")
        if base.rpartition(".")[2] in LINEAR and values.ndim == 2:
            made, weights[name] = quantize(base, values, rng)
            parts |= {f"{base}.{suffix}": part for suffix, part in made.items()}
        else:
            parts[name] = (stored, values.astype(dtype))
            weights[name] = values.astype(dtype)
    write_parts(folder / "model.safetensors", parts)
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": dtype, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def uniform_codes(values: np.ndarray, bits: int, group: int, symmetric: bool = False):
    """(codes, scales, zeros) of round-to-nearest per group of a row: float16 scales, integer zeros."""
    N, K = values.shape
    groups = -(-K // group)
    padded = np.pad(values, ((0, 0), (0, groups * group - K)), mode="edge").reshape(N, groups, group)
    top = (1 << bits) - 1
    if symmetric:
        scales = np.abs(padded).max(-1) / (top // 2 or 0.5)
        zeros = np.full((N, groups), (top + 1) // 2)
    else:
        low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
        scales = (high - low) / top
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(int)
    scales = np.maximum(scales, 1e-4).astype(np.float16)
    codes = np.rint(padded / scales.astype(np.float64)[..., None]) + zeros[..., None]
    return np.clip(codes, 0, top).astype(np.uint8).reshape(N, -1)[:, :K], scales, zeros.astype(np.uint8)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of a row: one stream, lowest bits first, padded to whole words; bit by bit."""
    rows, K = codes.shape
    stream = ((codes[..., None] >> np.arange(bits)) & 1).reshape(rows, K * bits).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -K * bits % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def read_mlx(folder) -> dict[str, np.ndarray]:
    """Weights of a converted folder by name, dequantized here in float64."""
    config = json.loads((Path(folder) / "config.json").read_text())
    block = config.get("quantization", {})
    arrays = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        arrays |= mx.load(str(file))
    found = {}
    for name, array in arrays.items():
        base, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if kind != "weight" or f"{base}.scales" not in arrays:
            found[name] = np.array(array.astype(mx.float32), np.float64)
            continue
        said = block.get(base) or block
        bits, group = said["bits"], said["group_size"]
        scales, biases = (
            np.array(arrays[f"{base}.{p}"].astype(mx.float32), np.float64) for p in ("scales", "biases")
        )
        raw = np.array(array).view(np.uint8)
        stream = np.unpackbits(raw, axis=-1, bitorder="little").reshape(*raw.shape[:-1], -1, bits)
        codes = (stream * (1 << np.arange(bits))).sum(-1)
        of = np.arange(codes.shape[-1]) // group
        found[name] = scales[..., of] * codes + biases[..., of]
    return found


def close_to_half(found: np.ndarray, wanted: np.ndarray, levels: int) -> None:
    """Equal but for the rounding of a scale and of a bias of `levels` scales to float16."""
    # scale * code and bias are each at most levels * scale, and float16 rounds either by at most 2^-11 of it
    step = np.abs(wanted).max() / max(levels // 2, 1)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2 * 2.0**-11 * levels * step


def logits(folder, weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits of stock mlx-lm in float32: of a folder, or of it with other float weights."""
    import mlx_lm

    model = mlx_lm.load(str(folder))[0]
    if weights is not None:
        model.load_weights([(k, mx.array(v.astype(np.float32))) for k, v in weights.items()], strict=True)
    model.apply(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
    return np.array(model(mx.array(IDS)))


def relative_error(found, wanted) -> float:
    return float(
        np.linalg.norm(np.float64(found) - wanted) / max(np.linalg.norm(np.float64(wanted)), math.ulp(1))
    )
