"""Damages a model file again and again; each time one sentence or weights: no crash, no hang, little memory.

    python tests/fuzz_sources.py SOURCE FIRST COUNT

SOURCE is a model folder with one model.safetensors, or a GGUF file; it is left damaged. Mutation number n is
the same in every run. After each, the reader reads rows of every tensor, and `mlxq convert --dry-run` plans.
Prints how many mutations the reader and the planner refused. Exit code 1 lists what went wrong otherwise; one
that takes 30 seconds ends the process, one that takes a GiB of address space is a MemoryError.
"""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from mlxq.checkpoint.gguf import GgufCheckpoint
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint
from mlxq.convert import convert

ROOM = 1 << 30
SECONDS = 30
ODD = [0, 1, -1, 3, 2**31, 2**62, 1e300, "4", None, [], {}, True, [2**40, 2**40], [0], "nan"]
COUNTS = (0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


class Folder:
    """A safetensors folder: its bytes and settings, which change() damages by number."""

    def __init__(self, source: Path):
        self.source = source
        self.file, self.settings = source / "model.safetensors", source / "config.json"
        self.good, self.said = self.file.read_bytes(), json.loads(self.settings.read_text())
        self.length = int.from_bytes(self.good[:8], "little")
        self.header = json.loads(self.good[8 : 8 + self.length])

    def with_header(self, fields: dict) -> bytearray:
        """The file with another header, its length right."""
        text = json.dumps(fields).encode()
        return bytearray(len(text).to_bytes(8, "little") + text) + self.good[8 + self.length :]

    def change(self, number: int) -> None:
        """Write the files with damage number `number`."""
        rng = random.Random(number)
        data, said = bytearray(self.good), json.loads(json.dumps(self.said))
        fields = json.loads(json.dumps(self.header))
        name = rng.choice([n for n in self.header if n != "__metadata__"])
        kind = number % 7
        if kind == 0:  # a byte of the header
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(8 + self.length)] = rng.randrange(256)
        elif kind == 1:  # a field of the header, with the lengths right
            fields[name][rng.choice(list(fields[name]))] = rng.choice([*ODD, "F16", "I32", "U8", [8, 8]])
            data = self.with_header(fields)
        elif kind == 2:  # a setting of the quantization, where there are some
            block = next((said[k] for k in ("quantization", "quantization_config") if k in said), said)
            self._change_setting(block, rng)
            if "quantization" in said:
                said["quantization_config"] = said["quantization"]
        elif kind == 3:  # values: order, shape and state tensors are among them
            begin, end = self.header[name]["data_offsets"]
            for _ in range(rng.randint(1, 8)):
                data[8 + self.length + rng.randrange(begin, end)] = rng.randrange(256)
        elif kind == 4:  # cut off, or a part is missing
            if rng.random() < 0.5:
                data = data[: rng.randrange(len(data))]
            else:
                fields[name + "_"] = fields.pop(name)
                data = self.with_header(fields)
        elif kind == 5:  # a setting of the model
            self._change_setting(said, rng)
        else:  # integers at the end of their range, in a tensor of integers
            integers = [n for n in fields if n != "__metadata__" and fields[n]["dtype"][0] in "IU"] or [name]
            begin, end = self.header[rng.choice(integers)]["data_offsets"]
            at = 8 + self.length + begin + rng.randrange(max(1, (end - begin) // 4)) * 4
            data[at : at + 4] = rng.choice(COUNTS[:7]).to_bytes(4, "little")
        self.file.write_bytes(data)
        self.settings.write_text(json.dumps(said))

    def _change_setting(self, block: dict, rng) -> None:
        key = rng.choice(list(block))
        while isinstance(block[key], dict) and block[key] and rng.random() < 0.8:
            block, key = block[key], rng.choice(list(block[key]))
        block[key] = rng.choice(ODD)

    def read(self) -> None:
        """Rows of every tensor."""
        for tensor in HuggingFaceCheckpoint(self.source).tensors().values():
            if "float" in tensor.dtype:
                tensor.read(0, min(2, tensor.rows))


class File:
    """A GGUF file."""

    def __init__(self, source: Path):
        self.source, self.good = source, source.read_bytes()
        self.length = GgufCheckpoint(source).file._at
        self.keys = [m.start() for m in re.finditer(rb"llama\.", self.good[: self.length - 44])]

    def change(self, number: int) -> None:
        """Write the file with damage number `number`."""
        rng = random.Random(number)
        data = bytearray(self.good)
        kind = number % 4
        if kind == 0:  # bytes of the header
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(self.length)] = rng.randrange(256)
        elif kind == 1:  # counts, lengths and offsets
            at, size = rng.randrange(8, self.length - 8), rng.choice((4, 8))
            data[at : at + size] = (rng.choice(COUNTS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 2:  # a value of the model: what follows one of its keys
            at = rng.choice(self.keys) + rng.randrange(20, 40)
            data[at : at + 4] = rng.choice(COUNTS[:7]).to_bytes(4, "little")
        else:
            data = data[: rng.randrange(len(data))]
        self.source.write_bytes(data)

    def read(self) -> None:
        """Rows of every tensor."""
        from mlxq.checkpoint.gguf import GgufTensor

        for block in GgufCheckpoint(self.source).file.tensors.values():
            GgufTensor(block).read(0, min(2, len(block.rows)))


def main(source: Path, first: int, count: int) -> int:
    subject = Folder(source) if source.is_dir() else File(source)
    refused, wrong = {"read": 0, "plan": 0}, []
    with tempfile.TemporaryDirectory() as work:

        def plan() -> None:
            convert(source, Path(work) / "q", dry_run=True, progress=False)

        subject.read()
        plan()  # every import is done, and every thread has its stack
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM,) * 2)
        for number in range(first, first + count):
            subject.change(number)
            for name, action in (("read", subject.read), ("plan", plan)):
                signal.alarm(SECONDS)
                try:
                    action()
                except (ValueError, OSError) as error:
                    refused[name] += 1
                    if "\n" in str(error).rstrip("\n") or len(str(error)) < 10:
                        wrong.append((number, name, str(error)))
                except Exception as error:
                    frames = traceback.extract_tb(error.__traceback__)
                    at = [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-4:]
                    wrong.append((number, name, type(error).__name__, str(error)[:200], at))
                signal.alarm(0)
    for line in wrong:
        print(*line)
    print(refused["read"], refused["plan"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
