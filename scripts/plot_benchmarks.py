"""Draws the files in bench/results as SVG: what each case takes beside what it is compared with."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parents[1] / "bench" / "results"
OURS, OTHER, GREY = "#1f77b4", "#bbbbbb", "#555555"
NAMES = {"compiled": "torch's create_block_mask, compiled"}

# Of each file: the title, and what ours is compared with.
TIMES = {
    "rules": ("Masks of 4 x 2048 x 2048 on two CPU cores, ms, logarithmic", "transformers"),
    "block_mask": ("Block masks on two CPU cores, ms, logarithmic", "compiled"),
}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def to_three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def times(name: str) -> plt.Figure:
    """Two bars a case, on a logarithmic axis since they are orders of magnitude apart."""
    title, other = TIMES[name]
    cases = [
        case
        for case in read(name)["cases"]
        if case["seconds"].get(other) and case.get("memory", "fresh") == "fresh"
    ]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(cases) + 1.2), layout="constrained")
    least = min(case["seconds"]["attn_mask"] for case in cases) * 1e3
    for offset, side, color in ((-0.2, "attn_mask", OURS), (0.2, other, OTHER)):
        places = [place + offset for place in range(len(cases))]
        values = [case["seconds"][side] * 1e3 for case in cases]
        bars = axes.barh(places, values, 0.4, color=color, label=NAMES.get(side, side))
        axes.bar_label(bars, fmt=to_three_digits, padding=3, color=GREY, fontsize=8)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axes.set_xscale("log")
    axes.set_xlim(left=10 ** math.floor(math.log10(least)))
    return finished(figure, axes, title)


def bandwidth() -> plt.Figure:
    found = read("gpu")
    cases = found["cases"]
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(cases) + 1.2), layout="constrained")
    values = [case["of_copy_bandwidth"] for case in cases]
    bars = axes.barh([case["name"] for case in cases], values, color=OURS, label="attn_mask")
    axes.bar_label(bars, fmt="%.2f", padding=-30, color="white", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=1, label="a copy")
    axes.margins(x=0.1)
    return finished(figure, axes, f"Bandwidth as a share of a copy's, {found['device']}")


def finished(figure: plt.Figure, axes: plt.Axes, title: str) -> plt.Figure:
    axes.invert_yaxis()
    axes.set_title(title, fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(folder: Path) -> list[Path]:
    """Writes rules.svg, block_mask.svg and gpu.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in (*TIMES, "gpu"):
        figure = bandwidth() if name == "gpu" else times(name)
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1])
        plt.close(figure)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where they are written")
    for path in draw(parser.parse_args().folder):
        print(path)
