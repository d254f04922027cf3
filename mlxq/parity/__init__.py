"""`mlxq parity`: one checkpoint on every back end at hand, each layer and the logits against float64.

The reference is the model with its packed products in float64 and everything else in float32 of MLX. Each
packed layer of each back end gets the input that the reference recorded, as all rows and as the last one
alone, and each back end computes the logits of the same tokens. bounds.py says what is right.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import mlxq

# Enough to meet the kernels for many rows; names and numbers, so that few continuations are likely.
PROMPT = (
    "The distance from the Earth to the Moon is about 384,400 kilometres. In the Rust language, a vector is "
    "written as"
)
MOST_TOKENS = 256  # of a prompt; the float64 answers of all layers are held at once
TOP = 8  # logits of each position that a certificate keeps
FORMAT = 1
_PACKAGES = ("mlx", "mlx-lm", "numpy", "torch", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `mlxq parity`."""
    parser.add_argument("model", metavar="MODEL", help="quantized model folder, as convert writes it")
    parser.add_argument("--prompt", metavar="FILE", help="text to run; default: two sentences of ours")
    parser.add_argument(
        "--tokens", type=int, default=16, metavar="N", help="tokens to generate greedily (default 16)"
    )
    parser.add_argument(
        "--backends",
        metavar="A,B",
        help="only these: names of CPU kernel families, metal, shaders, torch, cuda; one that is absent is "
        "an error (default: all that run here)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of activations and scales (default float32, in which the smallest faults show)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the certificate: .json, or .html with a plot")
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="run the tokens of this certificate, of another machine, and compare with it",
    )


def run(args: argparse.Namespace) -> int:
    """0 when every back end passed, 1 when one did not."""
    from rich.console import Console

    from mlxq.parity import report

    if args.out is not None and Path(args.out).suffix not in (".json", ".html"):
        raise ValueError(f"parity: --out {args.out} is neither .json nor .html")
    prompt = Path(args.prompt).expanduser().read_text(encoding="utf-8") if args.prompt else PROMPT
    other = read_certificate(args.against) if args.against else None
    names = args.backends.split(",") if args.backends else None
    with Console(stderr=True).status("parity") as status:
        found = certify(args.model, prompt, args.tokens, names, args.dtype, other, status.update)
    console = Console(highlight=False)
    report.show(found, console)
    if args.out is not None:
        path = Path(args.out).expanduser()
        text = report.html(found) if path.suffix == ".html" else json.dumps(found, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        console.print(f"The certificate is in {path}", markup=False)
    return 0 if found["verdict"] == "PASS" else 1


def read_certificate(path: str | Path) -> dict[str, Any]:
    """A certificate that `mlxq parity --out X.json` wrote. Raises ValueError, OSError."""
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"parity: {path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("mlxq parity") != FORMAT:
        raise ValueError(f"parity: {path} is no certificate of this version (mlxq parity {FORMAT})")
    return found


def certify(
    folder: str | Path,
    prompt: str = PROMPT,
    tokens: int = 16,
    names: list[str] | None = None,
    dtype: str = "float32",
    against: dict[str, Any] | None = None,
    say=lambda text: None,
) -> dict[str, Any]:
    """The certificate of a checkpoint on this machine, as plain JSON types; "verdict" is "PASS" or "FAIL".

    names      back ends to run, all of which must be there; None: those that are
    against    another machine's certificate: its tokens and dtype are used

    Raises ValueError for bad input: no packed layer, an unknown or absent back end, a certificate of other
    weights; what mlxq.load raises for the folder.
    """
    import mlx.core as mx

    from mlxq.load import load
    from mlxq.parity import backends as make

    dtype = against["dtype"] if against else dtype
    begin = time.monotonic()
    say("loading")
    model, tokenizer = load(folder)
    folder = Path(folder).expanduser()
    chosen = make.kinds(model)
    if not chosen:
        raise ValueError(f"parity: {folder} has no packed affine layer to compare")
    set_dtype(model, dtype)
    weights = weights_digest(folder)
    if against and against["weights"] != weights:
        raise ValueError(
            f"parity: the certificate is of other weights ({against['weights'][:12]}... there, "
            f"{weights[:12]}... in {folder})"
        )
    wanted = _wanted(names, model, folder, dtype, chosen, make)
    with mx.stream(mx.cpu):
        if against:
            ids, start = against["tokens"]["ids"], against["tokens"]["prompt"]
        else:
            ids, start = _tokens(model, tokenizer, prompt, tokens, say)
        say("float64 reference")
        reference = Reference(model, ids)
        say("noise as the bounds allow")
        noise = reference.noise_differences()
    found: dict[str, Any] = {
        "mlxq parity": FORMAT,
        "verdict": "PASS",
        "model": str(folder),
        "weights": weights,
        "dtype": dtype,
        "tokens": {"ids": ids, "prompt": start, "sha256": _digest(json.dumps(ids).encode())},
        "versions": _versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "layers": len(reference.answers),
        "not_compared": reference.not_compared,
        "bounds": reference.bounds,
        "noise": noise,
        "reference": {"top": _top(reference.logits)},
        "backends": {},
        "absent": {},
    }
    for name, build in wanted.items():
        say(name)
        try:
            backend = build()
            found["backends"][name] = examine(reference, backend, start - 1, say)
        except make.Absent as why:
            if names is not None:
                raise ValueError(f"parity: {name} does not run here: {why}") from why
            found["absent"][name] = str(why)
    if against:
        found["against"] = compare_certificates(against, found, reference)
    faults = [fault for backend in found["backends"].values() for fault in backend["faults"]]
    faults += found["against"]["faults"] if against else []
    found["verdict"] = "FAIL" if faults or not found["backends"] else "PASS"
    found["seconds"] = round(time.monotonic() - begin, 1)
    return found


def _wanted(names, model, folder, dtype, chosen, make) -> dict:
    """Constructors of the back ends that shall run. Raises ValueError for a name that does not exist."""
    import mlx.core as mx

    known = make.cpu_backends(model, dtype) | {
        "metal": lambda: make.metal_backend(model, dtype),
        "shaders": lambda: make.shader_backend(model, chosen),
        "torch": lambda: make.torch_backend("torch", folder, "cpu", dtype),
        "cuda": lambda: make.torch_backend("cuda", folder, "cuda", dtype),
    }
    if mx.metal.is_available():
        del known["shaders"]  # the real thing runs
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"parity: no back end {', '.join(unknown)}; here: {', '.join(known)}")
    return known if names is None else {name: known[name] for name in names}


def set_dtype(model, dtype: str) -> None:
    """Cast a model's floats; activation scales stay float32."""
    import mlx.core as mx

    from mlxq.nn.q8.mlx import layers

    kept = {path: layer["scale_a"] for path, layer in layers(model).items() if "scale_a" in layer}
    model.set_dtype(getattr(mx, dtype))
    for path, layer in layers(model).items():
        if path in kept:
            layer["scale_a"] = kept[path]


def _tokens(model, tokenizer, prompt: str, count: int, say) -> tuple[list[int], int]:
    """The prompt's tokens and `count` more that the model chooses; how many are the prompt's."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    ids = [int(i) for i in tokenizer.encode(prompt)][:MOST_TOKENS]
    if not ids:
        raise ValueError("parity: the prompt is empty")
    if count < 0:
        raise ValueError(f"parity: --tokens {count}; wanted 0 or more")
    start, cache, new = len(ids), make_prompt_cache(model), list(ids)
    for i in range(count):
        say(f"greedy token {i + 1} of {count}")
        new = [int(model(mx.array([new]), cache=cache)[0, -1].argmax().item())]
        ids += new
    return ids, start


class Reference:
    """The model with its packed products in float64: the answer of every layer, and the logits.

    answers        {(path, kind): Answer}        inputs   {(path, kind): x (T, K) or ids (T,)}
    not_compared   packed layers that are of another kind, or that no token reached
    """

    def __init__(self, model, ids: list[int]):
        import mlx.core as mx
        import numpy as np

        from mlxq.parity import backends as make
        from mlxq.parity import bounds

        self.model, self.ids = model, ids
        self.answers, self.inputs = {}, {}
        modules = dict(model.named_modules())

        def hook(path, kind, x, call):
            dtype = make.name_of(x) if kind != make.EMBEDDING else make.name_of(modules[path].scales)
            rows = make.rows_of(x, kind)
            answer = make.answer(modules[path], kind, rows, dtype)
            if (path, kind) not in self.answers:
                self.answers[path, kind], self.inputs[path, kind] = answer, rows
            leading = x.shape if kind == make.EMBEDDING else x.shape[:-1]
            return mx.array(answer.y.astype(np.float32)).reshape(*leading, -1).astype(getattr(mx, dtype))

        with make.tapped(model, hook):
            self.logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
        packed = {p for p, layer in model.named_modules() if "scales" in layer and "biases" in layer}
        self.not_compared = sorted(packed - {path for path, _ in self.answers})
        self._bounds = bounds

    def noise_differences(self) -> dict[str, float]:
        """What noise of the layers' bounds does to the logits; sets `bounds`."""
        noise = self._noisy(split=False)
        self.bounds = self._bounds.logit_bounds(noise)
        return noise

    @functools.cached_property
    def split_bounds(self) -> dict[str, float]:
        """As `bounds`, where products are of pairs of bfloat16."""
        return self._bounds.logit_bounds(self._noisy(split=True))

    def _noisy(self, split: bool) -> dict[str, float]:
        import mlx.core as mx
        import numpy as np

        from mlxq.parity import backends as make

        rng = np.random.default_rng(0)

        def hook(path, kind, x, call):
            y = call(x)
            noise = self.answers[path, kind].noise(rng, split)
            if noise.size != y.size:  # a layer that is called twice in a pass, with other inputs
                return y
            return (y.astype(mx.float32) + mx.array(noise).reshape(y.shape)).astype(y.dtype)

        with make.tapped(self.model, hook):
            noisy = np.array(self.model(mx.array([self.ids]))[0].astype(mx.float32))
        return self._bounds.differences(noisy, self.logits)


def examine(reference: Reference, backend, start: int, say=lambda text: None) -> dict[str, Any]:
    """What one back end gave, and "faults": sentences that name what is beyond its bound."""
    from mlxq.parity import bounds

    found: dict[str, Any] = {"note": backend.note, "faults": []}
    begin = time.monotonic()
    if backend.forward is not None:
        limits = reference.bounds
        if backend.split:
            limits = found["bounds"] = reference.split_bounds
        logits = backend.forward(reference.ids)
        found["logits"] = bounds.differences(logits, reference.logits)
        found |= bounds.choices(logits, reference.logits, limits["max"], start)
        found["sha256"], found["top"] = _digest(logits.tobytes()), _top(logits)
        for name, value in found["logits"].items():
            if not value <= limits[name]:
                found["faults"].append(
                    f"{backend.name}: logits: {name} {value:.3g} is beyond {limits[name]:.3g}"
                )
        if found["unexplained"]:
            found["faults"].append(
                f"{backend.name}: other tokens at positions {found['unexplained'][:5]}, where the reference "
                "is not near a tie"
            )
    layers, digest = {}, hashlib.sha256()
    for path, kind in backend.only or reference.answers:
        say(f"{backend.name}: {path}")
        answer, x = reference.answers[path, kind], reference.inputs[path, kind][-(backend.rows or 0) :]
        y = backend.layer(path, kind, x)
        one = backend.layer(path, kind, x[-1:])
        digest.update(y.tobytes())
        result = answer.compare(y, backend.split and len(y) > 1)
        alone = answer.compare(one)
        result["share_one_row"] = alone["share"]
        label = f"{path} (head)" if kind == "head" else path
        layers[label] = {k: v for k, v in result.items() if k != "ok"}
        if not (result["ok"] and alone["ok"]):
            share = max(result["share"], alone["share"])
            found["faults"].append(f"{backend.name}: layer {label}: {share:.3g} times its bound")
    found["layers"], found["layers_sha256"] = layers, digest.hexdigest()
    found["seconds"] = round(time.monotonic() - begin, 1)
    return found


def compare_certificates(theirs: dict[str, Any], ours: dict[str, Any], reference: Reference) -> dict:
    """How another machine's logits compare with this one's reference: {"backends": ..., "faults": [...]}.

    Their largest logits may differ from ours by both machines' bounds together.
    """
    import numpy as np

    widest = [
        max(b.get("bounds", found["bounds"])["max"] for b in (found, *found["backends"].values()))
        for found in (theirs, ours)
    ]
    limit = sum(widest)
    found: dict[str, Any] = {"limit": limit, "machine": theirs["machine"], "versions": theirs["versions"]}
    found |= {"backends": {}, "faults": []}
    if theirs["verdict"] != "PASS":
        found["faults"].append("the other certificate is itself a FAIL")
    runs = {"reference": theirs["reference"]} | theirs["backends"]
    for name, there in runs.items():
        if "top" not in there:
            continue
        at = np.array(there["top"]["ids"])
        error = float(np.abs(np.take_along_axis(reference.logits, at, -1) - there["top"]["logits"]).max())
        twin = ours["backends"].get(name, {}).get("sha256")
        same = twin is not None and twin == there.get("sha256")
        found["backends"][name] = {"max": error, "same_bits": same}
        if not error <= limit:
            found["faults"].append(f"their {name}: a logit differs by {error:.3g}, beyond {limit:.3g}")
    return found


def _top(logits) -> dict[str, list]:
    import numpy as np

    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :TOP]
    values = np.take_along_axis(logits, ids, -1)
    return {"ids": ids.tolist(), "logits": [[float(v) for v in row] for row in values]}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all tensors, however they are spread over files, and what config.json
    says of activations."""
    from mlxq.checkpoint.q8 import KEY
    from mlxq.checkpoint.safetensors import read_header

    digest, where = hashlib.sha256(), {}
    for file in sorted(folder.glob("*.safetensors")):
        where |= {name: (file, entry) for name, entry in read_header(file)[0].items()}
    for name in sorted(where):
        file, entry = where[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}".encode())
        with open(file, "rb") as stream:
            stream.seek(entry.begin)
            digest.update(stream.read(entry.nbytes))
    activations = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(KEY)
    digest.update(json.dumps(activations, sort_keys=True).encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"mlxq": mlxq.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        if package in sys.modules or package.replace("-", "_") in sys.modules:
            found[package] = importlib.metadata.version(package)
    return found
