"""bitsandbytes checkpoints: NF4 and FP4, double-quantized or not, and LLM.int8.

4 bits   weight uint8 (N * K / 2, 1), the first weight in the high nibble, W = quant_map[code] *
         absmax[block], blocks of `blocksize` weights of the flattened matrix; absmax may be codes itself:
         absmax = nested_quant_map[code] * nested_absmax[block of nested_blocksize] + nested_offset
8 bits   weight int8 (N, K), W = weight * SCB / 127 with one SCB a row
"""

from __future__ import annotations

import json
import math

import numpy as np

from mlxq.checkpoint.compressed_tensors import Int8Tensor
from mlxq.checkpoint.tensors import FLOATS, FileTensor, Tensor, expect


class FourBitTensor(Tensor):
    """Weights of one layer of 4-bit codes of a table, (N, K)."""

    dtype = "float32"
    is_quantized = True
    source_bits = 4

    def __init__(
        self, data: FileTensor, table: np.ndarray, absmax: np.ndarray, blocksize: int, shape, kind: str
    ):
        self.data, self.table, self.absmax, self.blocksize, self.shape = (
            data.whole.reshape(-1), table, absmax, blocksize, shape,
        )  # fmt: skip
        self.requantized = f"its codes are {kind}, and MLX's format has evenly spaced values"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        first, last = start * self.K, stop * self.K
        data = np.asarray(self.data[first // 2 : -(-last // 2)])
        codes = np.stack([data >> 4, data & np.uint8(15)], axis=-1).reshape(-1)[first % 2 :][: last - first]
        values = self.table[codes]
        values *= self.absmax[np.arange(first, last) // self.blocksize]
        return values.reshape(stop - start, self.K)


def _count(state: dict, name: str, base: str) -> int:
    value = state.get(name)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{base}: the quant_state says {name}: {value!r}; wanted a count")
    return value


def _four_bit(tensors: dict[str, Tensor], name: str, kind: str, used: set[str]) -> FourBitTensor:
    state_name = f"{name}.quant_state.bitsandbytes__{kind}"
    raw = expect(tensors, state_name, ("uint8",), (None,)).whole
    try:
        state = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{state_name} is not JSON: {error}") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{state_name} says shape: {shape!r}; wanted two counts")
    blocksize, count = _count(state, "blocksize", name), math.prod(shape)
    data = tensors[name]
    if data.dtype != "uint8" or math.prod(data.shape) != -(-count // 2):
        raise ValueError(f"{name} is {data.dtype} {data.shape}; wanted uint8 with {-(-count // 2)} bytes")
    blocks = -(-count // blocksize)
    table = expect(tensors, f"{name}.quant_map", FLOATS, (16,)).floats()
    used |= {f"{name}.{part}" for part in ("absmax", "quant_map")} | {state_name}
    absmax = tensors.get(f"{name}.absmax")
    if absmax is not None and absmax.dtype == "uint8":
        nested = _count(state, "nested_blocksize", name)
        codes = expect(tensors, f"{name}.absmax", ("uint8",), (blocks,)).whole
        scales = expect(tensors, f"{name}.nested_absmax", FLOATS, (-(-blocks // nested),)).floats()
        levels = expect(tensors, f"{name}.nested_quant_map", FLOATS, (256,)).floats()
        offset = state.get("nested_offset", 0.0)
        if type(offset) not in (int, float):
            raise ValueError(f"{state_name} says nested_offset: {offset!r}; wanted a number")
        values = levels[codes] * scales[np.arange(blocks) // nested] + np.float32(offset)
        used |= {f"{name}.nested_absmax", f"{name}.nested_quant_map"}
    else:
        values = expect(tensors, f"{name}.absmax", FLOATS, (blocks,)).floats()
    return FourBitTensor(data, table, values, blocksize, tuple(shape), kind.upper())


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for each layer. Raises ValueError."""
    joined, used = {}, set()
    for name, tensor in tensors.items():
        base = name.removesuffix(".weight")
        if base == name:
            continue
        for kind in ("nf4", "fp4"):
            if f"{name}.quant_state.bitsandbytes__{kind}" in tensors:
                joined[name] = _four_bit(tensors, name, kind, used)
        if f"{base}.SCB" in tensors:
            weight = expect(tensors, name, ("int8",), (None, None))
            scale = expect(tensors, f"{base}.SCB", FLOATS, (weight.shape[0],)).floats() / np.float32(127)
            joined[name] = Int8Tensor(weight, scale[:, None], None, weight.shape[1])
            used |= {f"{base}.SCB", f"{base}.weight_format"}
        elif name not in joined and tensor.dtype in ("uint8", "int8"):
            raise ValueError(f"tensors are missing: {name}.quant_state.bitsandbytes__nf4 or {base}.SCB")
    return {name: tensor for name, tensor in tensors.items() if name not in used} | joined
