"""A checkpoint in transformers on torch, for `mlxq parity`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mlxq.torch_model import load_torch


def has_cuda() -> bool:
    """Whether torch can use an NVIDIA GPU here."""
    return torch.cuda.is_available()


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
