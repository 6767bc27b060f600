"""Figures of dots with intervals: no lines to follow, one row for each thing."""
import math

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from engine.files import new_file

DPI = 120
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def save(figure, file) -> None:
    """A PNG that is there is whole. The figure is closed."""
    with new_file(file) as f:
        figure.savefig(f, format="png", dpi=DPI)
    plt.close(figure)


def dot(ax, y: float, row: dict, colour: str, label: str | None = None, below=0.0) -> None:
    """row: mean and interval in 0..1, and perhaps points: the single values behind them, that far
    below."""
    low, high = row["interval"]
    ax.plot([100 * low, 100 * high], [y, y], color=colour, lw=2, solid_capstyle="round")
    points = 100 * np.array(row.get("points", []))
    ax.plot(points, np.full(len(points), y + below), ".", color=colour, ms=4, alpha=0.6)
    ax.plot(100 * row["mean"], y, "o", color=colour, ms=7, label=label)


def label_rows(ax, names, x_label: str) -> None:
    """The first row on top."""
    ax.set_yticks(range(len(names)), names, fontsize=11)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel(x_label, fontsize=11)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def plot_arms(scores: dict, panels: list[dict], smallest: float, file) -> None:
    """Above each arm's score, with a small dot for each seed; below panels of the differences that
    are asked for, each on a scale of its own, with a band within which nobody would care.
    {name: dict(mean, interval)} each"""
    n = list(map(len, [scores, *panels]))
    figure, axes = plt.subplots(len(n), 1, figsize=(8, 0.8 + 0.7 * len(n) + 0.34 * sum(n)),
                                layout="constrained", height_ratios=[rows + 0.6 for rows in n])
    for y, row in enumerate(scores.values()):
        dot(axes[0], y, row, COLOURS[0], below=0.25)
    label_rows(axes[0], list(scores), "right, %: mean of GenEval's categories")
    for ax, differences in zip(axes[1:], panels):
        plot_differences(ax, differences, smallest)
    save(figure, file)


def plot_differences(ax, differences: dict, smallest: float) -> None:
    ax.axvspan(-smallest, smallest, color="0.92")
    ax.axvline(0, color="0.5", lw=1)
    for y, row in enumerate(differences.values()):
        dot(ax, y, row, COLOURS[1])
    label_rows(ax, list(differences), "difference, points (grey: too small to matter)")
    widest = max(abs(100 * x) for row in differences.values() for x in row["interval"])
    reach = 1.15 * max(widest, 2 * smallest)
    ax.set_xlim(-reach, reach)


def plot_series(rows: dict, file, x_label: str) -> None:
    """{row: {series: dict(mean, interval)}}: in each row a dot for each series, one below the
    other."""
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, ax = plt.subplots(figsize=(8, 1.4 + (0.16 + 0.15 * len(series)) * len(rows)),
                              layout="constrained")
    named = set()
    for y, row in enumerate(rows.values()):
        for i, (name, found) in enumerate(row.items()):
            offset = min(0.18, 0.7 / len(row)) * (i - (len(row) - 1) / 2)
            label = None if name in named else name
            dot(ax, y + offset, found, COLOURS[series.index(name)], label)
            named.add(name)
    label_rows(ax, list(rows), x_label)
    ax.set_xlim(-3, 103)
    # Four names fit beside each other.
    lines = math.ceil(len(series) / 4)
    ax.legend(loc="lower left", fontsize=10, ncols=math.ceil(len(series) / lines),
              bbox_to_anchor=(0, 1), frameon=False)
    save(figure, file)
