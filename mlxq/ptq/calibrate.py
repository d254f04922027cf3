"""Static ranges of inputs: run data through a float model, and sum what each layer sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from mlxq import bridge
from mlxq.ptq.arrays import namespace
from mlxq.ptq.plan import Plan, Site
from mlxq.ptq.qarray import calibrate as range_of
from mlxq.ptq.statistics import Statistics
from mlxq.ptq.text import LENGTH, WINDOWS, batches


def calibrate(
    model,
    plan: Plan,
    inputs: str | Path | Iterable | None,
    run: Callable | None = None,
    stats: Statistics | None = None,
    *,
    tokenizer=None,
    windows: int = WINDOWS,
    length: int = LENGTH,
) -> Statistics:
    """Statistics of the inputs of every site whose rule has act_static_scale, over all batches.

    model       the float model, of MLX or torch, that the plan was made for; it is the same afterwards
    inputs      batches: arrays, or tuples of arguments; or text (str, a file, strings, None: a text that
                comes with mlxq), in at most `windows` windows of `length` tokens: see mlxq.ptq.text.batches
    run         what to call with a batch; None: the model
    stats       earlier statistics, which go on; None: none
    tokenizer   for text: the model's own, or any function from str to token ids

    A batch's range is that of all of it, for each index of act_batch_axes by itself, averaged over these.
    qwix keeps a range for each index of every other axis too: so for each position of a sequence, unless
    act_batch_axes names that axis; then both give the same numbers.
    Raises ValueError when no rule is static, when there are no batches, and where no input came by.
    """
    sites = {path: site for path, site in plan.items() if site.rule.act_static_scale}
    if not sites:
        raise ValueError("calibrate: no rule has act_static_scale; dynamic scales need no calibration")
    stats = Statistics() if stats is None else stats
    for site in sites.values():
        stats.register(site.input_name)
    run, count, take = run or model, 0, _taker(model)
    with _watching(model, sites, stats):
        for batch in batches(inputs, tokenizer, windows, length):
            y = run(*map(take, batch)) if isinstance(batch, tuple) else run(take(batch))
            _finish(y)
            count += 1
    if not count:
        raise ValueError("calibrate: there are no inputs")
    for site in sites.values():
        stats.average(site.input_name)
    return stats


def calibrate_blocks(
    model, read: Callable, windows, sites: Mapping[str, Site], advance: Callable = id
) -> Statistics:
    """calibrate over windows of tokens, for an mlx-lm model that holds no weights yet: block after block.

    read      read(name) -> array of that parameter, called once for each: see mlxq.ptq.stream.Stream
    windows   token ids, integers (count, length); each is a batch of one
    sites     of linear layers, by path, with act_static_scale
    advance   called with the number of weights whose inputs are measured, block after block

    The model computes in float32. Raises ValueError for models whose blocks cannot run one by one, and for
    layers that no input reaches.
    """
    from mlxq.ptq.host import host_products
    from mlxq.ptq.mlx import watching
    from mlxq.ptq.stream import Stream

    stats, stream = Statistics(), Stream(model, read, windows, drift=False)
    for site in sites.values():
        stats.register(site.input_name)

    def see(x, site: Site) -> None:
        observe(x, site, stats)

    blocks = tuple(f"{path.replace('.', '/')}/" for path in stream.paths)
    states = stream.states
    for number, block in enumerate(blocks):
        stream.enter(number)
        with host_products(), watching(model, _under(sites, block), see):
            states = stream.advance(number, states)
        stream.leave(number)
        advance(sum(math.prod(site.shape) for site in _under(sites, block).values()))
    outside = {path: site for path, site in sites.items() if not path.startswith(blocks)}
    if outside:
        with watching(model, outside, see):
            for window, state in enumerate(states):
                _finish(stream.finish(window, state))
    for site in sites.values():
        stats.average(site.input_name)
    return stats


def _under(sites: Mapping[str, Site], block: str) -> dict[str, Site]:
    return {path: site for path, site in sites.items() if path.startswith(block)}


def observe(x, site: Site, stats: Statistics, name: str | None = None) -> None:
    """Add the range of one input to the statistics, as site.input_name unless told another name."""
    xp = namespace(x)
    ranges = range_of(xp.cast(x, "float32"), site.ranges(x.ndim))
    batch = site.ranges(x.ndim).channelwise_axes
    stats.update(
        name or site.input_name,
        {key: bridge.to_numpy(xp.reduce("mean", value, batch)).reshape(-1) for key, value in ranges.items()},
    )


def _watching(model, sites, stats: Statistics):
    if hasattr(model, "state_dict"):
        from mlxq.ptq.torch import watching
    else:
        from mlxq.ptq.mlx import watching
    return watching(model, sites, lambda x, site: observe(x, site, stats))


def _taker(model) -> Callable:
    """A function that takes numpy arrays to the model's framework and device, and leaves all else."""
    if hasattr(model, "state_dict"):
        some = next(model.parameters())
    else:
        import mlx.core as mx

        some = mx.array(0)
    return lambda a: bridge.like(a, some) if isinstance(a, np.ndarray) else a


def _finish(y) -> None:
    """Evaluate what MLX left lazy, so that memory does not grow over batches."""
    if type(y).__module__.startswith("mlx"):
        import mlx.core as mx

        mx.eval(y)


def quantize_model(model, rules, stats: Statistics | None = None, *, allow_unused_rules: bool = False):
    """The same model, of MLX or torch, its layers replaced as the rules say; norms and all else stay.

    rules   QuantizationRules or their texts, or a Plan
    stats   of calibrate, for rules with act_static_scale

    One layer is quantized after the other, and its float weight is let go. Raises ValueError for rules that
    match nothing (unless allow_unused_rules), for shapes, NaN, infinity, and missing statistics.
    """
    from mlxq.ptq.plan import plan

    made = rules if isinstance(rules, Plan) else plan(model, rules, allow_unused_rules=allow_unused_rules)
    if hasattr(model, "state_dict"):
        from mlxq.ptq.torch import replace_layers
    else:
        from mlxq.ptq.mlx import replace_layers
    return replace_layers(model, made, stats)
