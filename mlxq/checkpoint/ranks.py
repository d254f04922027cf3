"""The processes of one conversion, started by mlx.launch or by torchrun, and what they tell each other.

They need one folder that all of them see: each writes its own tensors into the same files when they run on
one machine, and whole files of its own when they run on several.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxq.checkpoint.partial import partial_folder

_FAILED = "\0"
_STOPPED = "stopped"


class OtherRankError(ValueError):
    """What stops a rank when another one has failed."""


class Ranks:
    """One process that is alone: rank 0 of 1."""

    rank, size = 0, 1

    def gather(self, text: str) -> list[str]:
        """The text of every rank, in order; all must call. Raises OtherRankError when one fails."""
        texts = self._gather(text)
        failed = [text[len(_FAILED) :] for text in texts if text.startswith(_FAILED)]
        if failed:
            raise OtherRankError(f"another process of this conversion stopped: {failed[0]}")
        return texts

    def fail(self, reason: str) -> None:
        """Let the others stop where they wait for this rank."""
        self._gather(_FAILED + reason)

    def _gather(self, text: str) -> list[str]:
        return [text]

    def close(self) -> None:
        """Leave the group."""


class MlxRanks(Ranks):
    """Processes that mlx.launch started; they talk over TCP in a ring, or as MLX_... variables say."""

    def __init__(self):
        import mlx.core as mx

        self._mx = mx
        self._group = mx.distributed.init(strict=True, backend=os.environ.get("MLX_BACKEND", "ring"))
        self.rank, self.size = self._group.rank(), self._group.size()

    def _all(self, numbers: Sequence[int]) -> list[list[int]]:
        mx = self._mx
        array = mx.array([numbers], mx.int32)
        return mx.distributed.all_gather(array, group=self._group, stream=mx.cpu).tolist()

    def _gather(self, text: str) -> list[str]:
        data = text.encode()
        lengths = [row[0] for row in self._all([len(data)])]
        rows = self._all([*data, *[0] * (max(1, *lengths) - len(data))])
        return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


class TorchRanks(Ranks):
    """Processes that torchrun started; they talk through torch.distributed (gloo)."""

    def __init__(self):
        import torch.distributed as dist

        self._dist = dist
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def _gather(self, text: str) -> list[str]:
        texts = [None] * self.size
        self._dist.all_gather_object(texts, text)
        return texts

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()


def from_environment() -> Ranks:
    """The group that MLX_RANK (mlx.launch) or RANK and WORLD_SIZE (torchrun) name, or this process alone."""
    if "MLX_RANK" in os.environ:
        return MlxRanks()
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return TorchRanks()
    return Ranks()


def share(ranks: Ranks, sizes: dict[str, int], files: dict[str, str]) -> set[str]:
    """The tensors that this rank writes: the largest ones first, each to the rank that has least.

    sizes, files   work and file of each tensor, by name; on several machines a file has one rank
    """
    if ranks.size == 1:
        return set(sizes)
    one_machine = len(set(ranks.gather(socket.gethostname()))) == 1
    units: dict[str, list[str]] = {}
    for name in sizes:
        units.setdefault(name if one_machine else files[name], []).append(name)
    work = {unit: sum(sizes[name] for name in names) for unit, names in units.items()}
    loads, mine = [0] * ranks.size, set()
    for unit in sorted(work, key=lambda unit: (-work[unit], unit)):
        least = loads.index(min(loads))
        loads[least] += work[unit]
        if least == ranks.rank:
            mine.update(units[unit])
    return mine


@contextlib.contextmanager
def shared_folder(ranks: Ranks, dst: Path, overwrite: bool, digest: str | None) -> Iterator[Path]:
    """The partial folder of rank 0, for every rank; published when all have left the block.

    What one rank raises stops all of them, at the latest when they leave, and nothing is published.
    """
    written = False
    try:
        with (
            partial_folder(dst, overwrite, digest) if ranks.rank == 0 else contextlib.nullcontext() as folder
        ):
            try:
                if folder is not None:
                    (folder / _STOPPED).unlink(missing_ok=True)
                folder = Path(ranks.gather(str(folder))[0])
                yield folder
                ranks.gather("written")
                written = True
            except OtherRankError:
                raise
            except Exception as error:
                if ranks.size > 1 and folder is not None and folder.is_dir():
                    (folder / _STOPPED).write_text(str(error), encoding="utf-8")
                ranks.fail(str(error))
                raise
    except Exception as error:
        if written:  # and not published: the others wait for that
            ranks.fail(str(error))
        raise
    ranks.gather("published")
    ranks.close()


def check_others(folder: Path) -> None:
    """Raises ValueError when another process that writes to the folder has stopped."""
    with contextlib.suppress(FileNotFoundError):
        reason = (folder / _STOPPED).read_text(encoding="utf-8")
        raise ValueError(f"another process of this conversion stopped: {reason}")
