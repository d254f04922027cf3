"""tools/big_convert.py in small: its checkpoint, its kills, its comparison, and the memory it sees."""

import importlib.util
import os
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "big_convert", Path(__file__).resolve().parent.parent / "tools" / "big_convert.py"
)
big_convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(big_convert)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="RssAnon is read from Linux's /proc")
def test_a_model_larger_than_its_memory_is_killed_twice_and_comes_out_whole(tmp_path):
    # 400 MB in tensors of up to 17 MB, with room for the interpreter and its libraries and not for the model
    result = big_convert.experiment(
        # the second kill as soon as it works: so small a rest is done before its journal can be looked at
        tmp_path,
        400_000_000,
        "420MB",
        (0.3, 0),
        hidden=1024,
        width=8192,
        vocabulary=8192,
        shard=64_000_000,
    )
    assert result["source_bytes"] > 380_000_000
    assert all(run["peak_anonymous_bytes"] < 420e6 for run in result["runs"])
    assert result["written_bytes"] < 0.3 * result["source_bytes"]
    first, second, third, whole = result["runs"]
    assert 0 < first["tensors_in_journal"] <= second["tensors_in_journal"]
