"""A checkpoint in transformers on torch, for `mlxq parity`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mlxq import ops
from mlxq.format import GROUP_SIZES, Format, Packed
from mlxq.torch_model import load_torch


def has_cuda() -> bool:
    """Whether torch can use an NVIDIA GPU here."""
    return torch.cuda.is_available()


def q8_refusal(activation: str) -> str | None:
    """What ops says when an NVIDIA GPU does not serve 8-bit activations of this kind; None: it does."""
    fmt = Format(8, GROUP_SIZES[0])
    words = torch.zeros(8, fmt.words_per_row(fmt.group_size), dtype=torch.int32, device="cuda")
    scales = torch.ones(8, 1, device="cuda")
    weight = Packed(words.view(torch.uint32), scales, -128 * scales, fmt)
    x = torch.ones(1, fmt.group_size, device="cuda")
    try:
        ops.q8mm(*ops.q8_rows(x, fmt.group_size if activation == "tile" else None), weight)
    except TypeError as error:
        return str(error)
    return None


class TorchModel:
    """Logits and single layers of a checkpoint, by the names that MLX has for the layers."""

    def __init__(self, folder: Path, device: str, dtype: str):
        self.device, self.dtype = device, getattr(torch, dtype)
        self.model, _ = load_torch(folder, device, self.dtype)
        self.modules = dict(self.model.named_modules())
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.note = f"torch {torch.__version__}, {where}"

    @torch.no_grad()
    def forward(self, ids) -> np.ndarray:
        logits = self.model(torch.tensor([ids], device=self.device)).logits[0]
        return logits.float().cpu().numpy()

    @torch.no_grad()
    def layer(self, path: str, kind: str, x: np.ndarray) -> np.ndarray:
        module = self.model.get_output_embeddings() if kind == "head" else self.modules[path]
        given = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        given = given.to(self.dtype) if given.is_floating_point() else given.long()
        return module(given).float().cpu().numpy()
