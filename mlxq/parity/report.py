"""A certificate for people: a table in the terminal, a page with a plot."""

from __future__ import annotations

import html as markup
import json
import math

from rich.console import Console
from rich.table import Table

_COLOURS = ("#1b6ca8", "#c8553d", "#3c8d5a", "#8e5aa8", "#b8860b", "#555555", "#d6437f")


def show(found: dict, console: Console) -> None:
    """The table, the faults and the verdict."""
    bounds = found["bounds"]
    table = Table(
        title=f"{found['model']}: {found['layers']} packed layers, {len(found['tokens']['ids'])} tokens, "
        f"activations {found['dtype']}",
        caption="error / bound: 1 is the limit (mlxq/parity/bounds.py); layers: the worst one",
    )
    for name in ("back end", "layers", "logits", "mean", "KL", "top-1", "greedy", ""):
        table.add_column(name, justify="left" if name in ("back end", "") else "right", no_wrap=True)
    for name, backend in found["backends"].items():
        logits = backend.get("logits")
        limits = backend.get("bounds", bounds)
        cells = [_share(logits[k], limits[k]) for k in ("max", "mean", "kl")] if logits else ["-"] * 3
        if logits:
            left = backend["divergence"]
            cells += [f"{100 * backend['agreement']:.1f} %", "same" if left is None else f"leaves at {left}"]
        else:
            cells += ["-", "-"]
        verdict = "[red]FAIL[/]" if backend["faults"] else "PASS"
        table.add_row(name, f"{worst(backend):.2g}", *cells, verdict)
    console.print(table)
    for name, why in found["absent"].items():
        console.print(f"{name}: absent: {why}", markup=False)
    if found["not_compared"]:
        console.print(f"not compared by layer: {', '.join(found['not_compared'])}", markup=False)
    for name, backend in found["backends"].items():
        if "shaders" in name:
            console.print(f"{name}: {backend['note']}", markup=False)
    for line in _against(found):
        console.print(line, markup=False)
    for fault in faults(found):
        console.print(f"FAIL {fault}", markup=False)
    console.print(f"{found['verdict']} in {found['seconds']} s", markup=False)


def worst(backend: dict) -> float:
    """The largest error / bound of a back end's layers."""
    return max(
        (max(layer["share"], layer["share_one_row"]) for layer in backend["layers"].values()), default=0.0
    )


def faults(found: dict) -> list[str]:
    """Every sentence that says what is wrong."""
    said = [fault for backend in found["backends"].values() for fault in backend["faults"]]
    return said + found.get("against", {}).get("faults", [])


def _share(value: float, bound: float) -> str:
    return f"{value / bound:.2g}" if bound else ("0" if value == 0 else "inf")


def _against(found: dict) -> list[str]:
    if "against" not in found:
        return []
    other = found["against"]
    lines = [f"against {other['machine']}, mlxq {other['versions']['mlxq']}:"]
    for name, backend in other["backends"].items():
        same = ", the same bits as here" if backend["same_bits"] else ""
        lines.append(f"  {name}: largest difference {backend['max']:.3g} of {other['limit']:.3g}{same}")
    return lines


def html(found: dict) -> str:
    """One page: verdict, table, a plot of error / bound of every layer, and the certificate itself."""
    console = Console(record=True, width=110, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    show(found, console)
    text = markup.escape(console.export_text())
    data = markup.escape(json.dumps(found, indent=1))
    return (
        "<!doctype html><meta charset='utf-8'>"
        f"<title>mlxq parity: {found['verdict']}</title>"
        "<style>body{font:14px sans-serif;margin:2em;max-width:70em}pre{overflow:auto}</style>"
        f"<h1>{found['verdict']}</h1><pre>{text}</pre>"
        f"<h2>error / bound of every layer</h2>{plot(found)}"
        f"<details><summary>certificate</summary><pre>{data}</pre></details>"
    )


def plot(found: dict, width: int = 960, height: int = 360) -> str:
    """An SVG: a dot for every layer of every back end, error / bound on a logarithmic axis, the limit as a
    line."""
    labels = list(dict.fromkeys(label for b in found["backends"].values() for label in b["layers"]))
    low, high, left, right = -4, 1, 60, 150
    shares = [_shown(layer) for b in found["backends"].values() for layer in b["layers"].values()]
    high = max(high, math.ceil(math.log10(max(shares, default=1))))

    def y(share: float) -> float:
        place = min(max(math.log10(max(share, 1e-30)), low), high)
        return 20 + (height - 50) * (high - place) / (high - low)

    def x(number: int) -> float:
        return left + (width - left - right) * (number + 0.5) / max(len(labels), 1)

    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'>"]
    for power in range(low, high + 1):
        at, colour = y(10.0**power), "#c00" if power == 0 else "#ddd"
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{at}' y2='{at}' stroke='{colour}'/>")
        parts.append(f"<text x='{left - 8}' y='{at + 4}' font-size='11' text-anchor='end'>1e{power}</text>")
    for i, (name, backend) in enumerate(found["backends"].items()):
        colour = _COLOURS[i % len(_COLOURS)]
        place = f"x='{width - right + 12}' y='{30 + 18 * i}'"
        parts.append(f"<text {place} fill='{colour}'>{markup.escape(name)}</text>")
        for label, layer in backend["layers"].items():
            share = _shown(layer)
            parts.append(
                f"<circle cx='{x(labels.index(label)):.1f}' cy='{y(share):.1f}' r='2.5' fill='{colour}' "
                f"fill-opacity='0.7'><title>{markup.escape(f'{name} {label}: {share:.3g}')}</title></circle>"
            )
    parts.append(f"<text x='{left}' y='{height - 8}' font-size='11'>layers, first to last</text></svg>")
    return "".join(parts)


def _shown(layer: dict) -> float:
    return min(max(layer["share"], layer["share_one_row"]), 1e6)
