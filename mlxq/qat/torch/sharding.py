"""Models cut up over several processes by torch's own fully_shard, and made whole again."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mlxq.qat.torch.fake import FAKE_LAYERS


def shard(model: nn.Module) -> torch.device:
    """Cut every parameter into as many parts as there are processes; returns the device of this process.

    Each layer of a ModuleList is gathered when it computes, and what is outside of them with the model;
    fake-quantized layers that are held in float32 are gathered one by one. Gradients are averaged in float32.
    Buffers, the words of packed layers among them, stay whole in every process: fully_shard cuts parameters,
    which have to be float.

    Raises ValueError without a group of several processes, for parameters of two dtypes that train, and for
    parameters that are one number.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError("distil: a sharded model wants several processes; start them with torchrun")
    held = _held(model)
    alone = {id(p) for layers in held for layer in layers for p in layer.parameters()}
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad and id(p) not in alone}
    if len(dtypes) > 1:
        raise ValueError(
            f"distil: fully_shard trains parameters of one dtype, and these are {', '.join(sorted(dtypes))}; "
            "give the model one dtype, or do not shard it"
        )
    if single := [name for name, p in model.named_parameters() if not p.ndim]:
        raise ValueError(f"distil: fully_shard cannot cut {single[0]}, one number; do not shard the model")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for module in model.modules():
        if hasattr(module, "borrowed"):
            module.borrowed = True
    for layers in held:
        fully_shard(layers if len(layers) > 1 else layers[0], **settings)
    for block in _blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return next(model.parameters()).device


def _held(model: nn.Module) -> list[list[nn.Module]]:
    """Layers that are float32 in a model of another dtype; those that share a weight together."""
    groups: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        if isinstance(layer, FAKE_LAYERS) and layer.weight.dtype != layer.weight_dtype:
            groups.setdefault(id(layer.weight), []).append(layer)
    return list(groups.values())


def _blocks(module: nn.Module):
    """The layers of every outermost ModuleList."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def joined(part: np.ndarray, like: torch.Tensor) -> np.ndarray | None:
    """The whole of an array that is cut as `like` is; in the first process alone. All of them call this."""
    if not isinstance(like, DTensor):
        return part if not dist.is_initialized() or dist.get_rank() == 0 else None
    mine = torch.from_numpy(part).to(like.device)
    cut = DTensor.from_local(mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    whole = cut.full_tensor()
    return whole.cpu().numpy().copy() if dist.get_rank() == 0 else None


def part_of(whole: np.ndarray, like: torch.Tensor) -> np.ndarray:
    """This process's part of an array that all of them have. All of them call this."""
    if not isinstance(like, DTensor):
        return whole
    cut = distribute_tensor(torch.tensor(whole, device=like.device), like.device_mesh, like.placements)
    return cut.to_local().cpu().numpy().copy()


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Whole parameters in a model that was cut, on the CPU of the first process; it computes no more.

    All processes call this. In the others nothing but the module tree is left to be used.
    """
    first = dist.get_rank() == 0
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                if first:
                    if id(parameter) not in made:  # tied ones stay one
                        made[id(parameter)] = nn.Parameter(whole.cpu(), parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
        if first:
            module._buffers.update({n: b.cpu() for n, b in module._buffers.items() if b is not None})
