"""compressed-tensors checkpoints (vLLM, llm-compressor): integers, packed integers, FP8, NVFP4 and MXFP4.

    pack-quantized    weight_packed int32 (N, ceil(K * bits / 32)): a row is one bit stream of q + 2^(bits -
                      1)
    int-quantized     weight int8 (N, K)
                      both: W = weight_scale * (q - zero point); packed zero points run along N, offset too
    float-quantized   weight e4m3 (N, K), W = weight_scale * weight; also quant_method "fp8" of DeepSeek and
                      Qwen, which names the scales weight_scale_inv and multiplies with them all the same
    nvfp4, mxfp4      weight_packed uint8 (N, K / 2), e2m1, the lower column in the low nibble; weight_scale
                      e4m3 for 16 columns, divided by weight_global_scale, or uint8 exponents of two for 32
    mxfp8             weight e4m3, weight_scale uint8 exponents of two for 32

Which of these a layer is, its tensors say; config.json adds bits, group and block sizes.
"""

from __future__ import annotations

import math
import re

import numpy as np

from mlxq.checkpoint.tensors import (
    E2M1,
    E4M3,
    E8M0,
    FLOATS,
    CodesTensor,
    FileTensor,
    FloatCodes,
    MxCodes,
    Tensor,
    expect,
    unpack_words,
)  # fmt: skip


class PackedTensor(CodesTensor):
    """Codes of one layer in words along K, (N, K)."""

    def __init__(self, words: FileTensor, scales: FileTensor, zeros: FileTensor | None, bits, group, K):
        self.words, self.scales, self.bits, self.group = words.whole, scales, bits, group
        self.zeros = zeros
        self.shape = (words.shape[0], K)

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        return unpack_words(self.words[rows], self.bits, self.K)

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        scales = self.scales.as_float(self.scales.whole[rows])
        if self.zeros is None:
            return scales, np.float32(-(1 << (self.bits - 1))) * scales
        zeros = unpack_words(self.zeros.whole.T, self.bits, self.shape[0]).T
        return scales, -scales * zeros[rows]


class Int8Tensor(CodesTensor):
    """Signed bytes of one layer, (N, K); scales (N, groups), or (1, 1) for the whole tensor."""

    bits = 8

    def __init__(self, weight: FileTensor, scales: np.ndarray, zeros: np.ndarray | None, group: int):
        self.weight, self.scales, self.group, self.shape = weight, scales, group, weight.shape
        self.biases = -scales * (np.float32(128) + (0 if zeros is None else zeros))

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        return self.weight.values[rows].view(np.uint8) ^ np.uint8(0x80)

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        return self.scales[rows], self.biases[rows]


def _grouped(base: str, shape: tuple[int, ...], K: int, said: object) -> int:
    """Columns that share a scale, from the scales' shape (N, groups) and what config.json says."""
    groups = shape[1]
    if groups == 1:
        return K
    group = said if type(said) is int and said > 0 else -(-K // groups)
    if -(-K // group) != groups:
        raise ValueError(f"{base}: {groups} scales a row do not make groups of {group} in rows of {K}")
    return group


class _Settings:
    """What config.json says of each layer's weights."""

    def __init__(self, settings: dict):
        groups = settings.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise ValueError(f"config.json's quantization says config_groups: {groups!r}; wanted an object")
        self.schemes = []
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                self.schemes.append(([str(t) for t in group.get("targets") or ()], weights))

    def of(self, base: str) -> dict:
        """The weight arguments of the first group that names the layer, else of one that names a class."""
        for targets, weights in self.schemes:
            for target in targets:
                try:
                    if target == base or target.startswith("re:") and re.match(target[3:], base):
                        return weights
                except re.error as error:
                    raise ValueError(
                        f"config.json's quantization has the target {target!r}: {error}"
                    ) from None
        by_class = [weights for targets, weights in self.schemes if any("." not in t for t in targets)]
        return by_class[0] if by_class else {}


def _packed(tensors, base: str, said: dict, used: set[str]) -> Tensor:
    words = tensors[f"{base}.weight_packed"]
    scale = tensors.get(f"{base}.weight_scale")
    if words.dtype == "uint8":
        return _fp4(tensors, base, used)
    words = expect(tensors, f"{base}.weight_packed", ("int32",), (None, None))
    N, per_row = words.shape
    if scale is None or len(scale.shape) != 2 or scale.shape[0] != N or scale.dtype not in FLOATS:
        expect(tensors, f"{base}.weight_scale", FLOATS, (N, None))
    shape = expect(tensors, f"{base}.weight_shape", ("int64", "int32"), (2,)).whole.tolist()
    bits = said.get("num_bits", 4)
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"config.json's quantization says num_bits: {bits!r}; built: 1 to 8")
    K = shape[1]
    if shape[0] != N or K <= 0 or -(-K * bits // 32) != per_row:
        raise ValueError(
            f"{base}: weight_shape {tuple(shape)} does not fit {words.shape} words of {bits}-bit codes"
        )
    group = _grouped(base, scale.shape, K, said.get("group_size"))
    zeros = None
    if f"{base}.weight_zero_point" in tensors:
        zeros = expect(tensors, f"{base}.weight_zero_point", ("int32",), (-(-N * bits // 32), scale.shape[1]))
    tensor = PackedTensor(words, scale, zeros, bits, group, K)
    if f"{base}.weight_g_idx" in tensors:
        tensor.group_of = group_order(tensors, f"{base}.weight_g_idx", K, group, scale.shape[1])
    used |= {f"{base}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    used |= {f"{base}.{part}" for part in ("weight_zero_point", "weight_g_idx")} & tensors.keys()
    return tensor


def group_order(tensors, name: str, K: int, group: int, groups: int) -> np.ndarray | None:
    """The group of each column, None when they ascend as they do without act-order. Raises ValueError."""
    order = expect(tensors, name, ("int32", "int64"), (K,)).whole.astype(np.int64)
    if (order == -1).all() or np.array_equal(order, np.arange(K) // group):
        return None
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(
            f"{name} names group {order.max() if order.max() >= groups else order.min()} of {groups}"
        )
    return order


def _fp4(tensors, base: str, used: set[str]) -> Tensor:
    words = expect(tensors, f"{base}.weight_packed", ("uint8",), (None, None))
    N, K = words.shape[0], 2 * words.shape[1]
    used |= {f"{base}.weight_packed", f"{base}.weight_scale"}
    scale = tensors.get(f"{base}.weight_scale")
    if scale is not None and scale.dtype in ("uint8", "float8_e8m0"):
        scale = expect(tensors, f"{base}.weight_scale", (scale.dtype,), (N, -(-K // 32)))
        if K % 32 == 0:
            return MxCodes(words.whole, scale.whole.view(np.uint8))
        return FloatCodes(words.whole, E2M1, E8M0[scale.whole.view(np.uint8)], 1, 32)
    scale = expect(tensors, f"{base}.weight_scale", ("float8_e4m3",), (N, -(-K // 16)))
    whole = tensors.get(f"{base}.weight_global_scale")
    if whole is None or math.prod(whole.shape) != 1:
        whole = expect(tensors, f"{base}.weight_global_scale", FLOATS, (1,))
    used.add(f"{base}.weight_global_scale")
    with np.errstate(divide="ignore", invalid="ignore"):
        return FloatCodes(words.whole, E2M1, scale.floats() / whole.floats().reshape(()), 1, 16)


def _scaled(tensors, base: str, said: dict, block, used: set[str]) -> Tensor | None:
    """A layer of bytes with scales, signed integers or e4m3; None when the weight is a plain float."""
    weight = tensors[f"{base}.weight"]
    suffix = next((s for s in ("weight_scale", "weight_scale_inv") if f"{base}.{s}" in tensors), None)
    if suffix is None or weight.dtype not in ("int8", "float8_e4m3"):
        return None
    weight = expect(tensors, f"{base}.weight", (weight.dtype,), (None, None))
    scale = tensors[f"{base}.{suffix}"]
    used |= {f"{base}.{part}" for part in ("weight", suffix)}
    N, K = weight.shape
    if scale.dtype in ("uint8", "float8_e8m0"):
        scales = E8M0[
            expect(tensors, f"{base}.{suffix}", (scale.dtype,), (N, -(-K // 32))).whole.view(np.uint8)
        ]
    elif scale.dtype in FLOATS:
        scales = scale.floats()
    else:
        raise ValueError(f"{base}.{suffix} is {scale.dtype}; wanted {', '.join(FLOATS)}")
    if scales.size == 1:
        rows_of_scale, group, scales = N, K, scales.reshape(1, 1)
    elif scales.shape[:1] == (N,) and scales.ndim <= 2 and block is None:
        rows_of_scale, scales = 1, scales.reshape(N, -1)
        group = _grouped(base, scales.shape, K, said.get("group_size"))
    elif block and scales.shape == (-(-N // block[0]), -(-K // block[1])):
        rows_of_scale, group = block
    elif scales.shape == (N, 1):
        rows_of_scale, group = 1, K
    else:
        raise ValueError(
            f"{base}.{suffix} has shape {scale.shape}, which does not fit a weight of {weight.shape}"
        )
    if weight.dtype != "int8":
        return FloatCodes(weight.whole, E4M3, scales, rows_of_scale, group)
    zeros = None
    if f"{base}.weight_zero_point" in tensors:
        used.add(f"{base}.weight_zero_point")
        zeros = expect(tensors, f"{base}.weight_zero_point", ("int8",), tensors[f"{base}.{suffix}"].shape)
        zeros = np.repeat(zeros.floats().reshape(scales.shape), rows_of_scale, axis=0)[:N]
    return Int8Tensor(weight, np.repeat(scales, rows_of_scale, axis=0)[:N], zeros, group)


_IGNORED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale")


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for each layer; scales of activations are dropped.

    Raises ValueError for parts that are missing or do not fit each other.
    """
    known = _Settings(settings)
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") not in ("dense", None):
        raise ValueError(
            f"config.json's quantization has sparsity of format {sparsity['format']!r}; built: dense"
        )
    joined, used = {}, set()
    for name in tensors:
        base, _, kind = name.rpartition(".")
        said = known.of(base) if kind in ("weight_packed", "weight") else {}
        if kind == "weight_packed":
            joined[f"{base}.weight"] = _packed(tensors, base, said, used)
        elif kind == "weight":
            block = said.get("block_structure") or settings.get("weight_block_size")
            if block is not None:
                if (
                    not isinstance(block, list)
                    or len(block) != 2
                    or not all(type(b) is int and b > 0 for b in block)
                ):
                    raise ValueError(
                        f"config.json's quantization says blocks of {block!r}; wanted two counts"
                    )
                block = tuple(block)
            if (tensor := _scaled(tensors, base, said, block, used)) is not None:
                joined[name] = tensor
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and name.rpartition(".")[2] not in _IGNORED
    }
    return rest | joined
