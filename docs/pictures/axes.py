"""Draws which axes of a weight are fan-in and which are features: `python axes.py OUT.svg`."""

import sys

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

FAN_IN, FEATURE = "#d9e6f2", "#f2b56b"
# name: (the weight's axes, with their sizes, which of them are features, the shape of g)
LAYERS = {
    "Dense": ([("inputs", 3), ("outputs", 4)], [1]),
    "Conv": ([("height", 3), ("width", 3), ("inputs", 2), ("outputs", 4)], [3]),
    "attention: query, key, value": ([("inputs", 4), ("heads", 2), ("head size", 3)], [1, 2]),
    "attention: out": ([("heads", 2), ("head size", 3), ("outputs", 4)], [2]),
    "Dense layers under nn.scan": ([("layers", 5), ("inputs", 3), ("outputs", 4)], [0, 2]),
}


def draw(axis, name, sizes, features):
    """One row: a box for every axis of the weight, and below it one for the axis of g."""
    for place, (label, size) in enumerate(sizes):
        is_feature = place in features
        for row, text in enumerate((size, size if is_feature else 1)):
            color = FEATURE if is_feature else (FAN_IN if row == 0 else "white")
            box = Rectangle((place, -row * 0.6), 0.94, 0.5, facecolor=color, edgecolor="#555555")
            axis.add_patch(box)
            words = f"{label}\n{text}" if row == 0 else str(text)
            axis.text(place + 0.47, 0.25 - row * 0.6, words, ha="center", va="center", fontsize=9)
    axis.text(-0.12, 0.25, "v", ha="right", va="center", style="italic")
    axis.text(-0.12, -0.35, "g", ha="right", va="center", style="italic")
    axis.text(0, 0.6, name, fontsize=10, weight="bold")
    axis.set(xlim=(-0.4, 4.1), ylim=(-0.7, 0.95))
    axis.axis("off")


def main(out):
    """Draws all layers in two columns, with the meaning of the colours in the last place."""
    plt.rcParams["svg.hashsalt"] = "wnjax"  # the same file on every build
    figure, axes = plt.subplots(3, 2, figsize=(9, 5), layout="constrained")
    for axis, (name, (sizes, features)) in zip(axes.flat, LAYERS.items(), strict=False):
        draw(axis, name, sizes, features)
    legend = axes.flat[-1]
    legend.axis("off")
    meanings = {"fan-in axis: the layer sums over it": FAN_IN, "feature axis: kept by g": FEATURE}
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="#555555") for c in meanings.values()]
    legend.legend(handles, meanings, loc="center left", frameon=False, fontsize=10)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
