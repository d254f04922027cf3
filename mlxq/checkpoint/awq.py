"""AWQ checkpoints as AutoAWQ writes them (version "gemm").

    W[n, k] = scales[j, n] * (q[k, n] - z[j, n])        j = k // group_size

qweight int32 (K, N / 8) and qzeros int32 (groups, N / 8) hold eight columns n to a word, nibble i column
8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i].
"""

from __future__ import annotations

import numpy as np

from mlxq.checkpoint.tensors import FLOATS, CodesTensor, FileTensor, Tensor, expect, setting

_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of column 0 .. 7 in its word


def _columns(words: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """uint8 (len(columns), rows of words)."""
    found = words[:, columns // 8].view(np.uint32) >> (4 * _NIBBLE[columns % 8]).astype(np.uint32)
    return (found & np.uint32(15)).astype(np.uint8).T


class AwqTensor(CodesTensor):
    """The codes of one AWQ layer, (N, K)."""

    bits = 4

    def __init__(self, words: FileTensor, zeros: FileTensor, scales: FileTensor, group: int):
        self.words, self.zeros, self.scales, self.group = words.whole, zeros.whole, scales, group
        self.shape = (scales.shape[1], words.shape[0])

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        return _columns(self.words, np.arange(self.shape[0])[rows])

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        scales = np.ascontiguousarray(self.scales.as_float(self.scales.values[:, rows]).T)
        return scales, -scales * _columns(self.zeros, np.arange(self.shape[0])[rows])


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for each qweight, qzeros and scales. Raises ValueError."""
    setting(settings, "bits", (4,), settings.get("w_bit", 4))
    version = str(settings.get("version", "gemm")).lower()
    if version not in ("gemm", "exllama", "marlin"):  # the last two name kernels that repack when they load
        raise ValueError(f"config.json's quantization says version: {version!r}; built: gemm")
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    setting({"group_size": group_size}, "group_size", (128, 64, 32, -1, 16, 256, 512, 1024))
    joined = dict(tensors)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        words = expect(tensors, name, ("int32",), (None, None))
        K, packed = words.shape
        group = K if group_size == -1 else group_size
        groups = -(-K // group)
        zeros = expect(tensors, f"{base}.qzeros", ("int32",), (groups, packed))
        scales = expect(tensors, f"{base}.scales", FLOATS, (groups, 8 * packed))
        for part in ("qweight", "qzeros", "scales"):
            del joined[f"{base}.{part}"]
        joined[f"{base}.weight"] = AwqTensor(words, zeros, scales, group)
    return joined
