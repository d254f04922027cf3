"""The format against MLX: packing at every code and lane, the rule "mlx" to the bit, and what is refused."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxq import format as fm
from mlxq.format import BITS, GROUP_SIZES, STORAGE, Format, Packed, pack, unpack

EVERY = [Format(b, g) for b, g in itertools.product(BITS, GROUP_SIZES)]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_lane_is_where_mlx_reads_it(bits):
    lanes, levels = 32, 2**bits - 1  # 32 codes fill a whole number of words at every width
    codes = np.full((levels + 1, lanes, lanes), levels - 1 if bits > 1 else 1, np.uint8)
    for lane in range(lanes):
        codes[:, lane, lane] = np.arange(levels + 1)
    codes = codes.reshape(-1, lanes)
    words = pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (len(codes), bits)
    np.testing.assert_array_equal(unpack(words, bits, lanes), codes)
    ones, zeros = mx.ones((len(codes), 1)), mx.zeros((len(codes), 1))
    read = mx.dequantize(mx.array(words), ones, zeros, group_size=lanes, bits=bits, stream=mx.cpu)
    np.testing.assert_array_equal(np.array(read), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing_with_leading_axes(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 5, 96), np.uint8)
    words = pack(codes, bits)
    assert words.shape == (2, 3, 5, 96 * bits // 32)
    np.testing.assert_array_equal(unpack(words, bits, 96), codes)
    assert pack(codes[:0], bits).shape == (0, 3, 5, 3 * bits)
    np.testing.assert_array_equal(pack(codes[:, :, :, ::-1], bits), pack(codes[:, :, :, ::-1].copy(), bits))
