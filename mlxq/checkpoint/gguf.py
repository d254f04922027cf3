"""GGUF files: a checked reader, repacking of quantized blocks without loss, and the model that they describe.

The gguf package gives the constants, the tensor names and the dequantizers. Its GGUFReader is not used:
it believes every length in the file (an array of 2^60 items hangs it) and takes seconds for a vocabulary.

Repacked are the blocks with one scale d (and one minimum m), float16, for 32 weights or more:

    Q4_0   d, 16 bytes                W = d * (q - 8)       scale d, bias   -8 d, code q
    Q4_1   d, m, 16 bytes             W = d * q + m         scale d, bias      m, code q
    Q5_0   d, 4 + 16 bytes            W = d * (q - 16)      scale d, bias  -16 d, code q
    Q5_1   d, m, 4 + 16 bytes         W = d * q + m         scale d, bias      m, code q
    Q8_0   d, 32 signed bytes         W = d * q             scale d, bias -128 d, code q + 128
    TQ1_0  52 bytes of trits, d       W = d * (q - 1)       scale d, bias     -d, code q, 256 weights
    TQ2_0  64 bytes, d                W = d * (q - 1)       the same
    Q1_0   d, 16 bytes                W = d * (2 q - 1)     scale 2 d, bias   -d, code q, 128 weights

In the blocks of 32 element i is the low nibble of byte i and element i + 16 its high nibble; a fifth bit is
bit i of the four bytes before them. Q4_K and Q5_K are repacked too: 256 weights in eight groups of 32, scales
d * s and biases -dmin * m with 6-bit s and m: float16 rounds them. Their bytes hold element i of one group in
the low and of the next group in the high nibble; the fifth bit of group j is bit j of 32 bytes before them.

Not repacked are blocks with scales for 16 weights (Q2_K, Q3_K, Q6_K: MLX has no groups below 32) and those
whose values are not evenly spaced (IQ*, MXFP4, NVFP4).
"""

from __future__ import annotations

import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq.checkpoint.tensors import CodesTensor
from mlxq.format import Format

GROUP = 32
# bits, weights of a block, weights of a group
_CODES = {
    "Q4_0": (4, 32, 32), "Q4_1": (4, 32, 32), "Q5_0": (5, 32, 32), "Q5_1": (5, 32, 32), "Q8_0": (8, 32, 32),
    "Q4_K": (4, 256, 32), "Q5_K": (5, 256, 32), "TQ1_0": (2, 256, 256), "TQ2_0": (2, 256, 256),
    "Q1_0": (1, 128, 128),
}  # fmt: skip
REPACKED = {kind: Format(bits, min(group, 128)) for kind, (bits, _, group) in _CODES.items()}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_SCALARS = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
    10: np.uint64, 11: np.int64, 12: np.float64,
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Block:
    """One tensor of a GGUF file, mapped and not read: `rows` is uint8 (rows, bytes of a row)."""

    name: str
    type: str
    shape: tuple[int, ...]
    rows: np.ndarray


class Gguf:
    """Metadata and tensors of a GGUF file.

    metadata   plain Python values; arrays of numbers are numpy arrays, arrays of strings lists
    tensors    Block by name

    Raises ValueError, naming the file, when it is cut off or says what cannot be.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < 24:
            raise ValueError(f"{path}: {size} bytes are too few for a GGUF file")
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, Block] = {}
        try:
            self._parse()
        except _CutOffError:
            raise ValueError(
                f"{path}: the file ends at byte {size}, inside its own header: truncated"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a name or a string is not UTF-8 ({error})") from None

    def _parse(self) -> None:
        magic, version = self._take(4), self._scalar(np.uint32)
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it starts with {magic!r}")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read"
            )
        tensor_count, key_count = self._scalar(np.uint64), self._scalar(np.uint64)
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar(np.uint32))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}, not a power of two")
        begin = -(-self._at // alignment) * alignment
        for name, type_name, shape, row_bytes, offset in infos:
            if name in self.tensors:
                raise ValueError(f"{self.path}: two tensors are named {name}")
            rows = math.prod(shape[:-1])
            end = begin + offset + rows * row_bytes
            if end > len(self._map):
                raise ValueError(
                    f"{self.path}: tensor {name} ends at byte {end} of a file of {len(self._map)}: truncated"
                )
            data = np.frombuffer(self._map, np.uint8, rows * row_bytes, begin + offset)
            self.tensors[name] = Block(name, type_name, shape, data.reshape(rows, row_bytes))

    def _take(self, count: int) -> bytes:
        if count > len(self._map) - self._at:
            raise _CutOffError
        self._at += count
        return self._map[self._at - count : self._at]

    def _scalar(self, dtype):
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0].item()

    def _string(self) -> str:
        return self._take(self._scalar(np.uint64)).decode("utf-8")

    def _value(self, kind: int):
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: metadata of unknown type {kind}")
        item, count = self._scalar(np.uint32), self._scalar(np.uint64)
        if item in _SCALARS:
            return np.frombuffer(self._take(count * np.dtype(_SCALARS[item]).itemsize), _SCALARS[item])
        if item == _STRING:
            return [self._string() for _ in range(count)]
        raise ValueError(f"{self.path}: metadata holds an array of type {item}")

    def _tensor_info(self) -> tuple[str, str, tuple[int, ...], int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, axes = self._string(), self._scalar(np.uint32)
        if not 1 <= axes <= 4:
            raise ValueError(f"{self.path}: tensor {name} has {axes} axes; wanted 1 to 4")
        shape = tuple(self._scalar(np.uint64) for _ in range(axes))[::-1]  # GGUF lists the fastest axis first
        number, offset = self._scalar(np.uint32), self._scalar(np.uint64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{self.path}: tensor {name} has the unknown type {number}") from None
        block_weights, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape:
            raise ValueError(f"{self.path}: zero-size tensors: {name}")
        if shape[-1] % block_weights:
            raise ValueError(
                f"{self.path}: tensor {name}, {shape}, is not made of blocks of {block_weights} weights"
            )
        return name, kind.name, shape, shape[-1] // block_weights * block_bytes, offset


class _CutOffError(Exception):
    pass


class GgufTensor(CodesTensor):
    """A GGUF tensor in the model's own row order, read a few rows at a time.

    shape    as the model has it; rows are all leading axes flattened
    order    row of the file for each row of the model (element, of a vector), None when they are the same
    offset   added to the values (GGUF stores Gemma's norms plus one)
    """

    def __init__(self, block: Block, order: np.ndarray | None = None, offset: float = 0.0):
        self.block, self.order, self.offset = block, order, offset
        self.shape = block.shape
        self.bits, self.block_weights, self.group = _CODES.get(block.type, (0, 0, GROUP))

    @property
    def source_bits(self) -> float:
        return 8 * self.block.rows.shape[1] / self.block.shape[-1]

    @property
    def dtype(self) -> str:
        return FLOATS.get(self.block.type, "float32")

    @property
    def is_quantized(self) -> bool:
        return self.block.type not in FLOATS

    @property
    def repacks_to(self) -> Format | None:
        """The format that holds these codes exactly, None when there is none."""
        return REPACKED.get(self.block.type)

    @property
    def requantized(self) -> str | None:
        """Why the codes are not repacked, None for floats and for codes that are."""
        return None if self.repacks_to or not self.is_quantized else f"no MLX format holds {self.block.type}"

    def packs_into(self, fmt: Format) -> bool:
        """Whether the format holds the codes as they are."""
        return self.block.type in _CODES and super().packs_into(fmt)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32 (stop - start, K). Raises ValueError for a type that the gguf package lacks."""
        from gguf import GGMLQuantizationType, dequantize

        if self.block.type == "Q1_0":
            return super().read(start, stop)
        rows = slice(start, stop) if len(self.shape) == 1 else self._rows(start, stop)
        try:
            values = dequantize(
                np.ascontiguousarray(self.block.rows[rows]), GGMLQuantizationType[self.block.type]
            )
        except NotImplementedError:
            raise ValueError(
                f"{self.block.name} is {self.block.type}, which the gguf package cannot dequantize"
            ) from None
        if self.order is not None and len(self.shape) == 1:
            values = values[:, self.order]
        return values + np.float32(self.offset) if self.offset else values

    def _blocks(self, rows) -> np.ndarray:
        return np.ascontiguousarray(self.block.rows[rows]).reshape(
            -1, self.block.rows.shape[1] // (self.K // self.block_weights)
        )

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        return _block_codes(self.block.type, self._blocks(rows)).reshape(-1, self.K)

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each; exact."""
        pair = _scales_and_biases(self.block.type, self._blocks(rows))
        return tuple(part.reshape(-1, self.K // self.group) for part in pair)


def _block_codes(kind: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 (blocks, weights of a block)."""
    if kind == "Q8_0":
        return blocks[:, 2:] ^ np.uint8(0x80)  # int8 + 128 as uint8
    if kind == "Q1_0":
        return np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little")
    if kind == "TQ2_0":
        parts = blocks[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
        return (parts & np.uint8(3)).reshape(len(blocks), 256)
    if kind == "TQ1_0":
        # A byte is the fraction in 256ths of a number in base 3: times 3^i, its next trit is the whole part.
        powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
        parts = [
            (blocks[:, begin:end].reshape(-1, 1, 1, end - begin) * powers[:count]).reshape(len(blocks), -1)
            for begin, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
        ]
        return (np.concatenate(parts, axis=-1).astype(np.uint16) * np.uint16(3) >> 8).astype(np.uint8)
    wide = kind.endswith("_K")
    halves = blocks[:, -128 if wide else -16 :].reshape(len(blocks), -1, 32 if wide else 16)
    codes = np.stack([halves & np.uint8(15), halves >> 4], axis=2).reshape(len(blocks), -1)
    if kind in ("Q5_0", "Q5_1"):
        high = np.unpackbits(blocks[:, -20:-16], axis=-1, bitorder="little")
    elif kind == "Q5_K":
        high = np.unpackbits(blocks[:, 16:48, None], axis=-1, bitorder="little")  # (blocks, element, group)
        high = high.swapaxes(1, 2).reshape(len(blocks), 256)
    else:
        return codes
    return codes | high << 4


def _scales_and_biases(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (blocks, groups of a block) each."""
    at = -2 if kind.startswith("TQ") else 0
    halves = blocks[:, at:] if at else blocks[:, :4]
    halves = np.ascontiguousarray(halves).view(np.float16).astype(np.float32)
    if kind in ("Q4_K", "Q5_K"):
        from gguf.quants import Q4_K

        scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        return halves[:, :1] * scales, -halves[:, 1:] * minima
    scales = halves[:, :1]
    if kind == "Q1_0":
        return 2 * scales, -scales
    if kind in ("Q4_1", "Q5_1"):
        return scales, halves[:, 1:]
    middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "TQ1_0": 1, "TQ2_0": 1}[kind]
    return scales, np.float32(-middle) * scales


def undo_rope_permutation(rows: int, heads: int) -> np.ndarray:
    """Row of the file for each row of llama's Q or K: GGUF interleaves the two halves of each head."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture becomes a model of mlx-lm."""

    model_type: str
    class_name: str
    permuted_rope: bool = False
    norm_offset: float = 0.0  # added to norm weights


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted_rope=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", norm_offset=-1.0),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
}
_MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", permuted_rope=True)


class GgufCheckpoint:
    """A GGUF file as a model of mlx-lm: configuration, tensors under mlx-lm's names, tokenizer.

    Raises ValueError when the architecture is not one of ARCHITECTURES or its metadata is incomplete.
    """

    is_quantized = True

    def __init__(self, path: Path):
        self.file = Gguf(path)
        self.path = self.file.path
        name = self.file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{path}: GGUF architecture {name!r} is not built; built: {', '.join(ARCHITECTURES)}. "
                "Convert the model's Hugging Face folder instead"
            )
        self.gguf_name = name
        experts = self.file.metadata.get("llama.expert_count", 0)
        self.architecture = _MIXTRAL if name == "llama" and experts else ARCHITECTURES[name]
        self.config = self._config()

    def _get(self, key: str, default=None, required: bool = False):
        key = f"{self.gguf_name}.{key}"
        value = self.file.metadata.get(key, default)
        if value is None and required:
            raise ValueError(f"{self.path}: the metadata lacks {key}")
        if isinstance(value, np.ndarray):
            values = set(value.tolist())
            if len(values) != 1:
                raise ValueError(
                    f"{self.path}: {key} differs between layers, which mlx-lm's model cannot express"
                )
            value = values.pop()
        return value

    def _config(self) -> dict:
        tensors, model_type = self.file.tensors, self.architecture.model_type
        if "token_embd.weight" not in tensors:
            raise ValueError(f"{self.path}: tensors are missing: token_embd.weight")
        heads, hidden = (
            self._get("attention.head_count", required=True),
            self._get("embedding_length", required=True),
        )
        if not heads or not hidden:
            raise ValueError(f"{self.path}: {heads} heads and an embedding of {hidden} do not make a model")
        head_dim = self._get("attention.key_length", hidden // heads)
        token_ids = self.special_ids()
        config = {
            "architectures": [self.architecture.class_name],
            "model_type": model_type,
            "hidden_size": hidden,
            "num_hidden_layers": self._get("block_count", required=True),
            "intermediate_size": self._get("feed_forward_length", required=True),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon", required=True),
            "rope_theta": self._get("rope.freq_base", 10000.0),
            "max_position_embeddings": self._get("context_length", required=True),
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in tensors,
            "hidden_act": "silu",
            "torch_dtype": "float16",
        }
        config |= {f"{key}_token_id": value for key, value in token_ids.items() if key != "eos"}
        config["eos_token_id"] = self.eos_ids()
        if model_type in ("llama", "olmo2"):
            config["attention_bias"] = "blk.0.attn_q.bias" in tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        if model_type == "mixtral":
            config["num_local_experts"] = self._get("expert_count", required=True)
            config["num_experts_per_tok"] = self._get("expert_used_count", required=True)
        if model_type == "qwen3_moe":
            config |= {
                "num_experts": self._get("expert_count", required=True),
                "num_experts_per_tok": self._get("expert_used_count", required=True),
                "moe_intermediate_size": self._get("expert_feed_forward_length", required=True),
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
            }
        if model_type == "gemma3_text":
            large = (
                config["num_hidden_layers"] == 62
            )  # 27B alone scales by hidden / heads, as llama.cpp knows too
            config |= {
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": hidden // heads if large else head_dim,
                "rope_local_base_freq": 10000.0,
                "rope_theta": self._get("rope.freq_base", 1000000.0),
                "sliding_window": self._get("attention.sliding_window", required=True),
                "sliding_window_pattern": 6,
            }
        if model_type == "phi3":
            config["partial_rotary_factor"] = self._get("rope.dimension_count", head_dim) / head_dim
            config["original_max_position_embeddings"] = self._get(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            )
        if scaling := self._rope_scaling(config):
            config["rope_scaling"] = scaling
        return config

    def _rope_scaling(self, config: dict) -> dict | None:
        kind = self._get("rope.scaling.type", "none")
        tensors = self.file.tensors
        if "rope_factors_long.weight" in tensors:
            long, short = (self._values(f"rope_factors_{name}.weight") for name in ("long", "short"))
            return {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        if "rope_freqs.weight" in tensors:
            return self._llama3_scaling(config)
        if kind == "none":
            return None
        if kind == "linear":
            return {
                "type": "linear",
                "rope_type": "linear",
                "factor": self._get("rope.scaling.factor", required=True),
            }
        if kind == "yarn":
            return {
                "type": "yarn",
                "rope_type": "yarn",
                "factor": self._get("rope.scaling.factor", required=True),
                "original_max_position_embeddings": self._get(
                    "rope.scaling.original_context_length", required=True
                ),
            }
        raise ValueError(
            f"{self.path}: rope scaling of type {kind!r} is not built; built: none, linear, yarn"
        )

    def _values(self, name: str) -> np.ndarray:
        block = self.file.tensors.get(name)
        if block is None:
            raise ValueError(f"{self.path}: tensors are missing: {name}")
        return GgufTensor(block).read(0, len(block.rows)).reshape(-1)

    def _llama3_scaling(self, config: dict) -> dict:
        # GGUF keeps only the divisors of the frequencies. Llama 3.1 and 3.2 share every parameter but the
        # factor, which is the largest divisor; the formula must give back the rest.
        divisors = self._values("rope_freqs.weight")
        scaling = {
            "type": "llama3",
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(len(divisors)) / len(divisors))
        smooth = (8192 / wavelengths - 1) / (4 - 1)
        blended = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        expected = np.where(
            wavelengths < 8192 / 4, 1.0, np.where(wavelengths > 8192, scaling["factor"], blended)
        )
        if not np.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(f"{self.path}: rope_freqs.weight is not the scaling of Llama 3")
        return scaling

    def prepare(self, workspace: Path, values: bool = True) -> None:
        """Nothing to prepare: blocks are read from the mapped file."""

    @property
    def tensor_count(self) -> int:
        """How many tensors the file holds."""
        return len(self.file.tensors)

    def float_dtype(self) -> str:
        """float16, in which GGUF keeps its scales."""
        return "float16"

    def weights(self, skeleton) -> dict[str, GgufTensor]:
        """Tensors under mlx-lm's names. Raises ValueError for tensors too many or too few."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.gguf_name)
        names = get_tensor_name_map(arch, self.config["num_hidden_layers"])
        # sanitize takes the head off some tied models; it looks at names alone here
        skeleton.sanitize({} if self.config["tie_word_embeddings"] else {"lm_head.weight": None})
        left = dict(self.file.tensors)
        for rope in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            left.pop(rope, None)  # they became rope_scaling
        found, missing = {}, []
        for name in skeleton.shapes():
            base, _, suffix = name.rpartition(".")
            base = re.sub(r"\.(mlp|block_sparse_moe)\.switch_mlp\.", ".mlp.experts.", base)
            gguf_name = f"{names.get_name(base)}.{suffix}"
            block = left.pop(gguf_name, None)
            if block is None:
                missing.append(f"{gguf_name} ({name})")
                continue
            found[name] = GgufTensor(block, self._row_order(gguf_name, block), self._offset(name))
        if missing:
            raise ValueError(f"{self.path}: tensors are missing: {', '.join(missing[:5])}")
        if left:
            raise ValueError(
                f"{self.path}: tensors that the model does not have: {', '.join(list(left)[:5])}"
            )
        return found

    def _offset(self, name: str) -> float:
        return self.architecture.norm_offset if name.endswith("norm.weight") else 0.0

    def _row_order(self, gguf_name: str, block: Block) -> np.ndarray | None:
        if not self.architecture.permuted_rope or ".attn_q." not in gguf_name and ".attn_k." not in gguf_name:
            return None
        heads = self.config["num_attention_heads" if ".attn_q." in gguf_name else "num_key_value_heads"]
        rows = block.shape[-1] if len(block.shape) == 1 else len(block.rows)
        if rows % (2 * heads):
            raise ValueError(
                f"{self.path}: {gguf_name} has {rows} rows, which do not split into {heads} heads"
            )
        return undo_rope_permutation(rows, heads)

    def special_ids(self) -> dict[str, int]:
        """Token ids of bos, eos, unk and pad, as far as the file names them."""
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self.file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return {name: value for name, value in ids.items() if value is not None}

    def eos_ids(self) -> list[int]:
        """Tokens that end an answer: eos, eot and eom, and the control tokens at which llama.cpp stops."""
        metadata = self.file.metadata
        ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        kinds = metadata.get("tokenizer.ggml.token_type", ())
        names = (
            "<|im_end|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
        )
        control = 3
        for number, token in enumerate(metadata.get("tokenizer.ggml.tokens", ())):
            if token in names and number < len(kinds) and kinds[number] == control:
                ids.append(number)
        return list(dict.fromkeys(i for i in ids if i is not None))

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json; notices for the user.

        Raises ValueError when the file holds no vocabulary or one that transformers cannot build.
        """
        import json

        metadata = self.file.metadata
        if "tokenizer.ggml.tokens" not in metadata:
            raise ValueError(f"{self.path}: the file holds no vocabulary (tokenizer.ggml.tokens)")
        tokens, ids = metadata["tokenizer.ggml.tokens"], self.special_ids()
        bad = [name for name, i in ids.items() if not 0 <= i < len(tokens)]
        if bad:
            raise ValueError(
                f"{self.path}: the {bad[0]} token {ids[bad[0]]} is outside the vocabulary of {len(tokens)}"
            )
        backend = self._backend_tokenizer()
        add_bos = bool(
            metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
        )
        if add_bos and "bos" in ids:
            from tokenizers.processors import TemplateProcessing

            bos = tokens[ids["bos"]]
            backend.post_processor = TemplateProcessing(
                single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, ids["bos"])]
            )
        backend.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        settings |= {f"{name}_token": tokens[i] for name, i in ids.items()}
        template = metadata.get("tokenizer.chat_template")
        if template:
            settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
        generation = {f"{name}_token_id": i for name, i in ids.items() if name in ("bos", "pad")}
        generation["eos_token_id"] = self.eos_ids()
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
        return [] if template else ["the GGUF holds no chat template"]

    def _backend_tokenizer(self):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
        except ImportError:  # transformers 5.17 has it there
            from transformers.integrations.ggml import convert_gguf_tokenizer

        metadata = self.file.metadata
        keys = {
            "tokenizer_type": "model", "pre_tokenizer_type": "pre", "tokens": "tokens", "scores": "scores",
            "token_type": "token_type", "merges": "merges", "add_prefix_space": "add_space_prefix",
        }  # fmt: skip
        fields = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in fields.items()
            if value is not None
        }
        try:
            backend, _ = convert_gguf_tokenizer(self.gguf_name, fields)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self.path}: transformers cannot build the tokenizer: {type(error).__name__}: {error}"
            ) from None
        if fields.get("pre_tokenizer_type") == "smollm":
            from tokenizers import pre_tokenizers

            # transformers splits as gpt2 does; this family was trained with digits apart
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        return backend
