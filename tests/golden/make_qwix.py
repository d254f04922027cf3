"""Golden values from qwix 0.1.8: run as  python tests/golden/make_qwix.py  where `pip install 'mlxq[qwix]'`
was done; it writes qwix.npz beside itself.

Every value in the file is what qwix returned for the input that lies beside it. tests/test_qarray.py and
tests/test_ptq_functional.py compare with the file always, and with qwix itself where it can be imported.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("qwix.npz")
RNG_SEED = 6
QTYPES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "float8_e4m3fn", "float8_e5m2", "nf4")
TILED = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def inputs() -> dict[str, np.ndarray]:
    """Arrays that qwix quantizes: ordinary, with outliers, with zeros, tiny, on ties."""
    rng = np.random.default_rng(RNG_SEED)
    normal = rng.standard_normal((6, 64), dtype=np.float32)
    wide = (normal * np.exp(3 * rng.standard_normal((6, 64)))).astype(np.float32)
    holes = normal.copy()
    holes[1], holes[3, :32], holes[4] = 0, 0, 1e-25
    positive = np.abs(normal) + np.float32(0.5)
    ties = ((np.arange(6 * 64) % 31 - 15) / np.float32(2)).reshape(6, 64).astype(np.float32)
    return {"normal": normal, "wide": wide, "holes": holes, "positive": positive, "ties": ties}


def settings() -> list[dict]:
    """Everything that is quantized, as arguments of HowToQuantize beside the name of the input."""
    found = []
    for name in ("normal", "wide", "holes", "ties"):
        for qtype in QTYPES:
            found.append({"input": name, "qtype": qtype, "channelwise_axes": [0], "tiled_axes": {}})
            found.append({"input": name, "qtype": qtype, "channelwise_axes": [0], "tiled_axes": {1: 16}})
        for qtype, tile in TILED.items():
            if not (qtype == "nvfp4" and name in ("holes", "wide")):  # named difference 3
                found.append(
                    {"input": name, "qtype": qtype, "channelwise_axes": [0], "tiled_axes": {1: tile}}
                )
    for method in ("absmax,0.8", "fixed,2", "fixed,-1,3", "minmax", "minmax,0.9", "rms,3"):
        for qtype in ("int4", "int8"):
            for name in ("normal", "holes", "positive"):
                for channelwise in ([0], [1], []):
                    found.append(
                        {
                            "input": name,
                            "qtype": qtype,
                            "channelwise_axes": channelwise,
                            "tiled_axes": {} if 1 in channelwise else {1: 0.25},
                            "calibration_method": method,
                        }
                    )
    for dtype in ("bfloat16", "float64"):
        for qtype in ("int4", "int8", "float8_e4m3fn", "nf4"):
            found.append(
                {"input": "normal", "qtype": qtype, "channelwise_axes": [0], "tiled_axes": {}, "dtype": dtype}
            )
    return found


def products() -> list[dict]:
    """dot_general: subscripts, types and tiles of both operands (None: float)."""
    found = []
    for lhs, rhs, tile in (
        ("int8", "int8", None),
        ("int8", "int4", None),
        (None, "int4", 16),
        ("int8", "int8", 16),
        ("int8", "int8", 128),
        ("int4", "int8", 0.5),
        ("float8_e4m3fn", "float8_e4m3fn", None),
        ("int8", "nf4", 32),
        ("int8 minmax", "int8", None),
        ("int8", "int8 minmax", 128),
        ("int8 minmax", "int4", 128),
    ):
        for subscripts in ("mk,nk->mn", "bmk,kn->bmn", "bhk,bgk->bhg", "mab,nab->nm"):
            found.append({"subscripts": subscripts, "lhs": lhs, "rhs": rhs, "tile": tile})
    return found


SHAPES = {
    "mk,nk->mn": ((5, 256), (7, 256)),
    "bmk,kn->bmn": ((2, 3, 256), (256, 4)),
    "bhk,bgk->bhg": ((3, 2, 256), (3, 4, 256)),
    "mab,nab->nm": ((4, 2, 256), (3, 2, 256)),
}


def operands(case: dict) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(list(SHAPES).index(case["subscripts"]) + 100)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES[case["subscripts"]])


def convolutions() -> list[dict]:
    return [
        {"stride": 1, "padding": 0, "lhs": "int8", "rhs": "int8"},
        {"stride": 2, "padding": 1, "lhs": "int8", "rhs": "int8"},
        {"stride": 1, "padding": 0, "lhs": "int8 minmax", "rhs": "int8"},
    ]


def convolution_operands() -> tuple[np.ndarray, np.ndarray]:
    """Images (2, 6, 7, 8) with channels last, kernels (5, 3, 3, 8): MLX's layout."""
    rng = np.random.default_rng(200)
    return rng.standard_normal((2, 6, 7, 8), dtype=np.float32), rng.standard_normal(
        (5, 3, 3, 8), dtype=np.float32
    )


def errors() -> list[dict]:
    """The cases of qwix's own test of relative errors, and the figures that are written there (but one)."""
    wide, tall = (10, 256, 16), (10, 128, 64)
    found = []
    for shape, qtype, channelwise, tiled, method, error in (
        (wide, "int8", [0], {}, "absmax", 0.00765991),
        (wide, "int4", [0], {}, "absmax", 0.122559),
        (wide, "int4", [0], {1: 32}, "absmax", 0.122559),
        (wide, "int8", [0], {}, "minmax", 0.00521851),
        (wide, "int8", [0], {1: 32}, "minmax", 0.00521851),
        (wide, "nf4", [0], {1: 32}, "absmax", 0.0986328),
        (wide, "int8", [0], {1: 1 / 8}, "rms,7", 0.017334),
        (wide, "int8", [0], {}, "fixed,3", 0.00765991),
        (tall, "mxfp8", [0, 1], {2: 32}, "absmax", 0.0223389),
        (tall, "mxfp4", [0, 1], {2: 32}, "absmax", 0.10791),  # 0.1.8 here; a later test of qwix's: 0.106445
        (tall, "nvfp4", [0, 1], {2: 16}, "absmax", 0.0893555),
    ):
        how = {"channelwise_axes": channelwise, "tiled_axes": tiled, "calibration_method": method}
        found.append({"shape": shape, "qtype": qtype, "error": error, **how})
    return found


def models() -> list[dict]:
    """Rules for the whole model down(relu(up(x))), as arguments of QuantizationRule."""
    int8 = {"weight_qtype": "int8", "act_qtype": "int8", "act_calibration_method": "absmax"}
    return [
        int8,
        int8 | {"weight_qtype": "int4", "tile_size": 32},
        int8 | {"act_calibration_method": "minmax"},
        {"weight_qtype": "int4", "tile_size": 32, "weight_calibration_method": "rms,3"},
        {"weight_qtype": "nf4", "tile_size": 16},
        {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
        {"weight_qtype": "mxfp4", "tile_size": 32},
        {"weight_qtype": "int8", "weight_calibration_method": "absmax,0.8", "module_path": "up"},
    ]


def model_operands() -> dict[str, np.ndarray]:
    """Weights as torch and MLX keep them, (outputs, inputs), biases, and the input x."""
    rng = np.random.default_rng(300)
    shapes = {"up.weight": (96, 64), "up.bias": (96,), "down.weight": (16, 96), "down.bias": (16,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) / 8 for name, shape in shapes.items()} | {
        "x": rng.standard_normal((2, 8, 64), dtype=np.float32)
    }


def run_models() -> dict[str, np.ndarray]:
    """The outputs of the models by qwix's PtqProvider."""
    import jax
    import qwix
    from flax import linen
    from jax import numpy as jnp

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(16, name="down")(linen.relu(linen.Dense(96, name="up")(x)))

    made = {name: jnp.asarray(a) for name, a in model_operands().items()}
    x = made.pop("x")
    params = {
        path: {"kernel": made[f"{path}.weight"].T, "bias": made[f"{path}.bias"]} for path in ("up", "down")
    }
    found = {}
    for number, settings in enumerate(models()):
        native = ("int4", "int8", "float8_e4m3fn", "float8_e5m2")
        rule = {
            name: getattr(jnp, value) if name.endswith("qtype") and value in native else value
            for name, value in settings.items()
        }
        model = qwix.quantize_model(Net(), qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
        template = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        quantized = qwix.quantize_params(params, template)
        found[f"model.{number}"] = np.asarray(model.apply({"params": quantized}, x))
    return found


def compute() -> dict[str, np.ndarray]:
    """All of it, by qwix."""
    import jax
    from jax import numpy as jnp
    from qwix._src.core import conv_general, einsum, qarray

    arrays = run_models()
    jax.config.update("jax_enable_x64", True)
    arrays |= {f"input.{name}": value for name, value in inputs().items()}

    def qtype_of(name):
        native = ("int4", "int8", "float8_e4m3fn", "float8_e5m2")
        return getattr(jnp, name) if name in native else name

    def put(key, q):
        value = np.asarray(q.qvalue)
        if value.dtype.name.startswith(("int", "uint")):
            value = value.astype(np.int8)
        elif value.dtype.itemsize == 1 and "float4" not in value.dtype.name:
            value = value.view(np.uint8)
        else:
            value = value.astype(np.float32)  # numbers of float4, not their bits
        arrays[f"{key}.qvalue"] = value
        arrays[f"{key}.scale"] = np.asarray(q.scale).astype(np.float64)
        if q.zero_point is not None:
            arrays[f"{key}.zero_point"] = np.asarray(q.zero_point).astype(np.int8)
        arrays[f"{key}.values"] = np.asarray(qarray.dequantize(q)).astype(np.float64)

    for number, case in enumerate(settings()):
        case = dict(case)
        array = jnp.asarray(arrays[f"input.{case.pop('input')}"]).astype(case.pop("dtype", "float32"))
        case["qtype"] = qtype_of(case["qtype"])
        put(f"quantize.{number}", qarray.quantize(array, qarray.HowToQuantize(**case)))

    jax.config.update("jax_threefry_partitionable", False)  # as qwix's test draws its numbers
    for number, case in enumerate(errors()):
        array = jax.random.normal(jax.random.key(42), case["shape"], jnp.bfloat16)
        key = "drawn." + "x".join(map(str, case["shape"]))
        arrays[key] = np.asarray(array).view(np.uint16)
        array = array + (1 if case["calibration_method"] == "minmax" else 0)
        how = {k: v for k, v in case.items() if k not in ("shape", "error", "qtype")}
        how = qarray.HowToQuantize(qtype=qtype_of(case["qtype"]), **how)
        values = qarray.dequantize(qarray.quantize(array, how))
        error = jnp.abs(array - values).mean() / jnp.abs(array).mean()
        arrays[f"error.{number}"] = np.asarray(error).astype(np.float64)

    for number, case in enumerate(products()):
        lhs, rhs = (jnp.asarray(a) for a in operands(case))
        subscripts = case["subscripts"]
        made = []
        for array, side in ((lhs, "lhs"), (rhs, "rhs")):
            if case[side] is None:
                made.append(array)
                continue
            name, _, method = case[side].partition(" ")
            how = einsum.get_how_to_quantize(
                einsum_str=subscripts,
                ndims=(lhs.ndim, rhs.ndim),
                for_lhs=side == "lhs",
                tile_size=case["tile"],
                qtype=qtype_of(name),
                calibration_method=method or "absmax",
            )
            made.append(qarray.quantize(array, how))
        arrays[f"product.{number}"] = np.asarray(einsum.einsum(subscripts, *made))

    x, w = (jnp.asarray(a) for a in convolution_operands())
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "OHWI", "NHWC"))
    for number, case in enumerate(convolutions()):
        made = []
        for array, side in ((x, "lhs"), (w, "rhs")):
            name, _, method = case[side].partition(" ")
            how = conv_general.get_how_to_quantize(
                dimension_numbers=numbers,
                for_lhs=side == "lhs",
                qtype=qtype_of(name),
                calibration_method=method or "absmax",
            )
            made.append(qarray.quantize(array, how))
        pad = [(case["padding"],) * 2] * 2
        arrays[f"conv.{number}"] = np.asarray(
            conv_general.conv_general_dilated(*made, (case["stride"],) * 2, pad, dimension_numbers=numbers)
        )
    return arrays


def stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


if __name__ == "__main__":
    found = compute()
    np.savez_compressed(FILE, **found)
    print(json.dumps({"arrays": len(found), "bytes": FILE.stat().st_size}))
