"""The curves of the toy's stages, from the logs of their runs: logs.json and curves.png beside its
weights."""
import json
import math
import pathlib

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from engine.files import new_file, write_text
from engine.log import read_log

# Points of a curve.
POINTS = 200
# The stages that show their loss by time as well.
BY_TIME = ("t2i", "edit")


def write(runs: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """runs: {stage: the folder of its run}"""
    logs = {stage: thinned(read_log(run)) for stage, run in runs.items()}
    write_text(folder / "logs.json", json.dumps(logs))
    draw(logs, folder / "curves.png")


def thinned(rows: list[dict], n: int = POINTS) -> dict:
    """A log -> {step, loss, norm, lr: n means over equal parts; by_t: in ten bins of time}"""
    found = dict(step=last_steps(rows, n))
    for name in ("loss", "norm", "lr"):
        found[name] = means([row[name] for row in rows], n)
    if rows[-1].get("by_t"):
        found["by_t"] = means([row["by_t"] for row in rows], n // 4)
    return found


def last_steps(rows: list[dict], n: int) -> list[int]:
    """Of each part."""
    parts = np.array_split([row["step"] for row in rows], min(n, len(rows)))
    return [int(part[-1]) for part in parts]


def means(values: list, n: int) -> list:
    """Numbers or rows of numbers, None in places -> n means over equal parts of what is there."""
    # None becomes nan.
    known = np.ma.masked_invalid(np.array(values, float))
    parts = np.array_split(known, min(n, len(known)))
    # And what is unknown None again.
    return [np.ma.round(part.mean(0), 6).tolist() for part in parts]


def draw(logs: dict, file: pathlib.Path) -> None:
    """A panel for the loss of each stage, and for the last ones their loss by time."""
    timed = [stage for stage in BY_TIME if logs.get(stage, {}).get("by_t")]
    n_row = math.ceil((len(logs) + len(timed)) / 2)
    figure = Figure((800 / 72, 2.6 * n_row), layout="constrained")
    axes = figure.subplots(n_row, 2, squeeze=False).ravel()
    for axis, (stage, log) in zip(axes, logs.items()):
        draw_loss(axis, stage, log)
    for axis, stage in zip(axes[len(logs):], timed):
        draw_by_time(axis, stage, logs[stage])
    for axis in axes:
        axis.set(xlabel="step", yscale="log")
        axis.set_visible(axis.has_data())
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        marks = (1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        axis.yaxis.set(major_locator=LogLocator(subs=marks), major_formatter="{x:g}",
                       minor_locator=NullLocator())
    with new_file(file) as opened:
        figure.savefig(opened, format="png", dpi=144)


def draw_loss(axis, stage: str, log: dict) -> None:
    axis.plot(log["step"], np.array(log["loss"], float), color="#d9822b")
    axis.set_title(f"{stage}: loss", loc="left", weight="bold")


def draw_by_time(axis, stage: str, log: dict) -> None:
    """A line for each of the ten bins of t."""
    colours = ListedColormap(colormaps["plasma"](np.linspace(0, 0.85, 10)))
    lines = np.array(log["by_t"], float).T
    steps = np.linspace(0, log["step"][-1], lines.shape[1] + 1)[1:]
    for i, line in enumerate(lines):
        axis.plot(steps, line, color=colours(i), lw=1.6)
    bar = axis.inset_axes((0.68, 1.05, 0.2, 0.05), xticks=[], yticks=[])
    bar.imshow([range(10)], cmap=colours, aspect="auto")
    axis.set_title(f"{stage}: loss by time", loc="left", weight="bold", y=1)
    axis.text(0.66, 1.04, "t: data", transform=axis.transAxes, ha="right")
    axis.text(0.9, 1.04, "noise", transform=axis.transAxes)
