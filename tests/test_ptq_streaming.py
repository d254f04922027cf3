"""SmolLM2 quantized as a live model and shard by shard: the same bits, and memory that stays flat."""

import json
import sys
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from mlxq.checkpoint.skeleton import Skeleton
from mlxq.ptq import plan, quantize_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import stream_params  # noqa: E402


def test_smollm2_streamed_shard_by_shard_is_the_quantized_model_to_the_bit(tmp_path):
    folder = tmp_path / "smollm2"
    try:
        stream_params.make(folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    out = stream_params.measured(folder)

    from mlx_lm.utils import load_model

    model = quantize_model(load_model(folder)[0], stream_params.RULES)
    want = {name: stream_params.digest(a) for name, a in tree_flatten(model.parameters())}
    skeleton = Skeleton(json.loads((folder / "config.json").read_text()), folder).model
    assert out["digests"] == want and len(plan(skeleton, stream_params.RULES)) == 211
    # One tensor, its codes and scales, a copy of these, slabs of 1 M weights in float32: not the model.
    assert out["peak_bytes"] < 2.5 * out["largest_bytes"] + 64e6 < out["source_bytes"]
