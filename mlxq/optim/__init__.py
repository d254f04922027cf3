"""Optimisers whose parameters are packed words: mlxq.optim.torch and mlxq.optim.mlx, one set of formulas.

Per weight w = s * code + b, with a residual r that the code cannot hold, in units of a step (u = code + r):

    w'  = s * u + b - a * step - lr * weight_decay * (s * u + b)
    u'  = (w' - b') / s, kept in [-1/2, levels + 1/2];  code' = rint(u') in [0, levels];  r' = u' - code'

    MPQAdamW   m = b1 m + (1 - b1) P;  v = b2 v + (1 - b2) P^2;  step = m / (sqrt(v) + eps)
               a = lr * sqrt(1 - b2^t) / (1 - b1^t)
    MPQSign    m = b1 m + (1 - b1) P;  step = sign(b3 m + (1 - b3) P);  a = lr       one moment instead of two

P is the gradient with respect to the dequantized weight. Updates far below half a step add up in r until the
code moves: r is kept in 8 bits, 254 units to a step, and rounded up or down at random so that its mean is
exact. rounding="stochastic" keeps no r and rounds u' itself at random. b' are the biases that will decode:
trained zeros follow the mean step of their group, and codes are packed against them in the same update, so
moving a zero moves no weight. Integer zeros are rounded to nearest first, float zeros to their storage.

state_bits=8 keeps m and v as a sign and seven bits of sqrt(|m| / max), and eight bits of (v / max)^(1/4), per
64 weights, rounded at random to the right mean. rank projects P onto its leading singular vectors (GaLore):
m and v then have that many rows or columns. One layer at a time is decoded.

Random numbers come from (seed, step, parameter), so that a run which was saved continues bit for bit.
Sources: DiodeMix of bitorch-engine (formulas; its faults are not kept), Loshchilov and Hutter 2019 (decay),
Seide et al. 2014 (error feedback), Zhao et al. 2024 (GaLore), Chen et al. 2023 (Lion: MPQSign).
"""

from __future__ import annotations

from dataclasses import dataclass

RESIDUAL_UNITS = 254  # of one step: int8 holds -127 .. 127, half a step on either side
STATE_BLOCK = 64  # weights that share the largest value of an 8-bit moment
BLOCK_ELEMENTS = 1 << 22  # weights decoded at a time
ROUNDINGS = ("error feedback", "stochastic")
# (levels, power) of an 8-bit moment: value = largest of the block * (code / levels) ** power
MOMENTS = {"momentum": (127, 2), "variance": (255, 4)}


def __getattr__(name: str):
    """Raises ImportError that says where the optimisers are: each framework has its own."""
    if name in ("MPQAdamW", "MPQSign"):
        raise ImportError(
            f"mlxq.optim: from mlxq.optim.torch import {name}, or from mlxq.optim.mlx import {name}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Options:
    """What the packed optimisers of both frameworks share. Raises ValueError, one sentence for each fault.

    betas         of m and v, or of m and the sign (b1, b3)
    rounding      "error feedback", or "stochastic": no residual
    zeros_every   steps between two changes of the zeros; 0: zeros stay
    rank          of the projected gradient; None: not projected
    projection_every   steps between two choices of the singular vectors
    state_bits    32 or 8
    in_steps      lr of packed weights counts steps of the code: groups of every scale move alike
    dithered      residuals begin anywhere within half a step, at random, not at 0: else no code moves before
                  its weight has come half a step, which a short run at a small lr never does
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rounding: str = "error feedback"
    zeros_every: int = 0
    rank: int | None = None
    projection_every: int = 200
    state_bits: int = 32
    in_steps: bool = False
    dithered: bool = False

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr is {self.lr}; wanted 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be in [0, 1)")
        if self.eps < 0 or self.weight_decay < 0:
            raise ValueError(f"eps is {self.eps} and weight_decay {self.weight_decay}; wanted 0 or more")
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding is {self.rounding!r}; wanted one of {', '.join(map(repr, ROUNDINGS))}"
            )
        if self.zeros_every < 0 or self.projection_every < 1:
            raise ValueError(
                f"zeros_every is {self.zeros_every} and projection_every {self.projection_every}; wanted "
                "0 or more and 1 or more"
            )
        if self.dithered and self.rounding != "error feedback":
            raise ValueError(f"dithered residuals need rounding 'error feedback', not {self.rounding!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; wanted 1 or more, or None")
        if self.state_bits not in (8, 32):
            raise ValueError(f"state_bits is {self.state_bits}; wanted 32 or 8")


def seed_of(seed: int, parameter: int, step: int) -> int:
    """The seed of one parameter's random numbers in one step: 63 bits, other for every triple in practice."""
    x = (seed * 0x9E3779B97F4A7C15 + parameter * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) % 2**64
    x = (x ^ (x >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (x ^ (x >> 32)) % 2**63
