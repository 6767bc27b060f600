"""The figures of this repository, drawn by code into assets/figures/: numbers from the configs, pictures from the shipped model.

    python notebooks/figures.py                                                 # all
    python notebooks/figures.py ladder                                          # one: ladder, samples, edits or curves
    python notebooks/figures.py curves --runs runs                              # the folder of train.py's runs

ladder   ladder-light.svg, ladder-dark.svg: the paper's Fig. 2 with the names and shapes of this code
samples  samples.png: twelve prompts, and the first picture that the model draws for each
edits    edits.png: one edit of every kind, source -> instruction -> result
curves   curves.png: the loss of every run, and for the last ones how it depends on t

Every figure is WIDTH pixels wide when shown. Dimension key of the shapes: B batch; all others are numbers of the released model.
"""
import argparse
import inspect
import io
import math
import pathlib
import re
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
from engine import state  # noqa: E402
from toy import world  # noqa: E402
from ladder import rungs  # noqa: E402
from tbac import TBAC, TBACConfig  # noqa: E402
from toy.world import Scene, Thing  # noqa: E402

OUT = ROOT / "assets" / "figures"
WIDTH = 800                                                                     # pixels
LIMIT = 300_000                                                                 # bytes of a file
THEMES = {                                                                      # fill, edge, ink; pages as GitHub's; cool is frozen, warm learns
    "light": dict(plain=("#ffffff", "#6e7781", "#1f2328"), muted=("#ffffff", "#6e7781", "#59636e"), panel=("#f6f8fa", "#f6f8fa", "#1f2328"),
                  frozen=("#dfeaf6", "#6f95bf", "#244a73"), learns=("#ffe3c4", "#d9822b", "#7a3d00")),
    "dark": dict(plain=("#0d1117", "#8b949e", "#e6edf3"), muted=("#0d1117", "#8b949e", "#9ea7b1"), panel=("#151b23", "#151b23", "#e6edf3"),
                 frozen=("#1b2c42", "#5d89bb", "#b5d3f5"), learns=("#47300f", "#e0913f", "#ffd09a")),
}


class Page:
    """A page of WIDTH x `height` pixels, y upwards, and the few things that are drawn on it. kind: a word of THEMES."""

    def __init__(self, height, theme="light"):
        self.theme = THEMES[theme]
        self.figure = plt.figure(figsize=(WIDTH / 72, height / 72), facecolor=self.theme["plain"][0])     # 72 points are 72 pixels
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        self.ax.axis("off")

    def text(self, x, y, words, kind="plain", size=11.5, **how):
        self.ax.text(x, y, words, fontsize=size, color=self.theme[kind][2], **dict(ha="center", va="center", zorder=4) | how)

    def box(self, x, y, width, height, kind, words="", **how):
        """A box around (x, y); a panel lies behind everything."""
        fill, edge, _ = self.theme[kind]
        self.ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, "round,pad=0,rounding_size=5", facecolor=fill,
                                         edgecolor=edge, linewidth=1.2, zorder=0 if kind == "panel" else 2))
        self.text(x, y - 0.5, words, kind, **dict(size=12) | how)

    def line(self, *points, kind="plain", head=True, **how):
        """A line through points, behind the boxes; an arrow head at the last point."""
        colour, ((x0, y0), (x1, y1)) = self.theme[kind][1], points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        u, v = (x1 - x0) / length, (y1 - y0) / length
        end = (x1 - 5 * u, y1 - 5 * v) if head else (x1, y1)
        self.ax.plot(*zip(*points[:-1], end), color=colour, solid_capstyle="butt", **dict(lw=1.4, zorder=1) | how)
        if head:
            corners = [(x1, y1), (x1 - 7 * u - 3.5 * v, y1 - 7 * v + 3.5 * u), (x1 - 7 * u + 3.5 * v, y1 - 7 * v - 3.5 * u)]
            self.ax.add_patch(Polygon(corners, facecolor=colour, linewidth=0, zorder=3))

    def mark(self, x, y, kind, words):
        """A snowflake for what is frozen, a dot for what learns; then words."""
        star, size = ((6, 2, 0), 8) if kind == "frozen" else ("o", 7)
        self.ax.plot(x, y, marker=star, ms=size, color=self.theme[kind][1], mew=1.5, zorder=3)
        self.text(x + 9, y - 0.5, words, kind, 12, ha="left")

    def caption(self, x, y, words, letters):
        """Lines of at most so many letters, the first one's feet at y."""
        for i, line in enumerate(textwrap.wrap(words, letters)):
            self.text(x, y - 15.5 * i, line, size=12, va="baseline")

    def dots(self, x, y):
        self.ax.plot([x] * 3, [y - 7, y, y + 7], "o", ms=2.6, color=self.theme["plain"][2], zorder=3)

    def picture(self, image, x, y, side):
        """A PIL picture around (x, y), its pixels to be seen, in a thin frame."""
        half = side / 2
        self.ax.imshow(image, extent=(x - half, x + half, y - half, y + half), interpolation="nearest", aspect="auto", zorder=2)
        self.ax.add_patch(Rectangle((x - half, y - half), side, side, fill=False, edgecolor="#c0c6cc", linewidth=1, zorder=3))


# -------------------------------------------------------------------------------------------------- the ladder figure

PITCH = 36                                                                      # from one layer to the next
LANE, FLOW = 204, 644                                                           # x of the queries in the MLLM, and of the latents in the DiT


def shape(*sides):
    return f"({', '.join(map(str, sides))})"


def toy_picture(p, x, y, side, colour):
    """A circle left of a blue square, in vectors."""
    circle, square = (tuple(c / 255 for c in world.COLOURS[name]) for name in (colour, "blue"))
    p.ax.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, facecolor="white", edgecolor=p.theme["plain"][1], linewidth=1))
    p.ax.add_patch(Circle((x - side / 5, y), side / 7, facecolor=circle, linewidth=0))
    p.ax.add_patch(Rectangle((x + side / 14, y - side / 7), side / 3.5, side / 3.5, facecolor=square, linewidth=0))


def draw_mllm(p, c, heights):
    """The left column: what is read, in the order of reading, and the layers. The queries' states rise along the lane."""
    last = c.mllm.n_layer - 1
    top = heights[last] + 66
    p.box(134, (top + 128) / 2, 236, top - 128, "panel")
    p.text(28, top - 20, "Qwen2.5-VL", size=15, ha="left", weight="bold")
    p.mark(33, top - 40, "frozen", "frozen")
    for layer, y in heights.items():
        p.box(134, y, 212, 24, "frozen")
        p.text(40, y - 0.5, f"layer {layer}", "frozen", 12, ha="left")
    p.text(192, heights[last] - 0.5, "answers only", "frozen")                  # layers above the last tap do not run in `encode`
    for x, width, kind, words in ((57, 58, "frozen", "image"), (127, 66, "frozen", "prompt"), (LANE, 72, "learns", "queries")):
        p.box(x, 150, width, 24, kind, words)
    for x in (57, 127):
        p.line((x, 162), (x, heights[last] - 12)), p.line((x, 112), (x, 138))
    p.line((LANE, 162), (LANE, heights[last] - PITCH / 2), kind="learns", head=False, lw=2.2, zorder=2.5)
    p.text(LANE + 4, 120, shape("B", c.n_query, c.mllm.dim))
    p.box(57, 100, 58, 24, "frozen", "ViT"), p.line((57, 72), (57, 88))
    toy_picture(p, 57, 48, 46, "red"), p.text(57, 15, "optional", "muted")
    p.text(127, 84, "“make\nthe circle\ngreen”", linespacing=1.25)
    p.line((178, heights[last] + 12), (178, top + 16)), p.box(192, top + 28, 116, 24, "frozen", "language head")
    p.line((134, top + 28), (106, top + 28)), p.text(62, top + 28, "answers to\nquestions", linespacing=1.25)


def draw_rungs(p, c, heights, taps):
    """The middle: every tapped state of the queries goes through the one connector to a block."""
    low, high, state, rung = heights[taps[0]] - PITCH / 2, heights[taps[-1]] - PITCH / 2, 300, 470
    for j, tap in enumerate(taps):
        if tap in heights:
            y = heights[tap] - PITCH / 2                                        # between two layers: states[i] enters layer i
            p.ax.plot(LANE, y, "o", ms=7, color=p.theme["learns"][1], zorder=3)
            p.line((LANE, y), (348, y)), p.text(state, y + 8, f"state {tap}")
            p.line((424, y), (530, y)), p.text(rung, y + 8, f"rung {j}")
    p.box(386, (low + high) / 2, 76, high - low + 36, "learns")
    p.text(386, (low + high) / 2 + 8, "one\nshared\nconnector", "learns", 12, linespacing=1.4)
    p.mark(362, (low + high) / 2 - 34, "learns", "learns")
    p.text(state, low - 11, shape("B", c.n_query, c.mllm.dim)), p.text(rung, low - 11, shape("B", c.n_query, c.dit.caption_dim))
    p.text(state + 12, high + 52, "all states"), p.text(state + 12, high + 34, shape(len(taps), "B", c.n_query, c.mllm.dim))
    p.text(rung - 10, high + 52, "all rungs"), p.text(rung - 10, high + 34, shape(len(taps), "B", c.n_query, c.dit.caption_dim))


def draw_dit(p, c, heights, taps):
    """The right column: latents rise through the blocks, each of which hears a rung; all hear the time."""
    low, high, side = heights[taps[0]] - PITCH / 2, heights[taps[-1]] - PITCH / 2, c.size // c.dcae.factor
    p.box(603, (low + high) / 2 + 14, 170, high - low + 176, "panel")
    p.text(530, high + 84, "SANA DiT", size=15, ha="left", weight="bold")
    p.mark(535, high + 64, "learns", "learns")
    p.line((FLOW, low - 44), (FLOW, low - 12)), p.line((FLOW, low), (FLOW, high + 26))
    p.line((712, low - 44), (712, high + 38), (676, high + 38))
    for j, tap in enumerate(taps):
        if tap in heights:
            y = heights[tap] - PITCH / 2
            p.box(603, y, 146, 24, "learns", f"block {j}"), p.line((712, y), (676, y))
    p.box(603, low - 56, 146, 24, "learns", "1 × 1 convolution"), p.text(586, low - 28, shape("B", side * side, c.dit.dim))
    p.box(603, high + 38, 146, 24, "learns", "norm, linear")
    p.box(712, low - 56, 46, 24, "plain", "$1000\\,t$"), p.text(712, low - 78, "(B,)")


def draw_latents(p, c, low, high):
    """Below and above the DiT: what goes in and comes out, and the autoencoder between pixels and latents."""
    side, steps = c.size // c.dcae.factor, inspect.signature(sample.denoise).parameters["steps"].default
    latents, pixels = shape("B", c.dit.channels, side, side), shape("B", 3, c.size, c.size)

    def rise(y, to, words):
        p.line((FLOW, y), (FLOW, to)), p.text(FLOW - 7, to - 14, words, ha="right")
    toy_picture(p, FLOW, 44, 46, "green")
    rise(68, 94, pixels)
    p.box(603, 106, 146, 24, "frozen", "DC-AE encoder"), p.text(742, 106, "to train", "muted")
    rise(118, 146, f"$x_0$ {latents}")
    p.box(603, 158, 146, 24, "plain", "$(1-t)\\,x_0 + t\\,\\epsilon$")
    p.line((712, 158), (676, 158)), p.text(742, 158, "noise $\\epsilon$")
    rise(170, low - 68, f"$x_t$ {latents}")
    rise(high + 50, high + 130, f"$v$ {latents}")
    p.box(603, high + 142, 146, 24, "plain", "step towards $t = 0$")
    p.line((676, high + 142), (778, high + 142), (778, 204), (FLOW, 204))
    p.text(758, (low + high) / 2, f"to draw: {steps} steps, from noise", "muted", rotation=90)
    rise(high + 154, high + 182, f"$x_0$ {latents}")
    p.box(603, high + 194, 146, 24, "frozen", "DC-AE decoder")
    p.line((530, high + 194), (418, high + 194)), p.text(474, high + 203, pixels)
    toy_picture(p, 394, high + 194, 46, "green")


def draw_block(p, c, top):
    """One block from inside, between the columns."""
    lane, low, heads = 446, 82, c.dit.cross_n_head
    parts = (("linear\nself-attention", "shift, scale, gate", "from $t$"),
             ("cross-attention", "rung j: keys, values", shape("B", heads, c.n_query, c.dit.dim // heads)),
             ("Mix-FFN", "shift, scale, gate", "from $t$"))
    p.box(383, (top + 14) / 2, 246, top - 14, "panel")
    p.text(270, top - 18, "inside block j", size=12, ha="left", weight="bold"), p.text(270, top - 36, "each part adds to x", "muted", ha="left")
    p.line((lane, 24), (lane, top - 12)), p.text(lane - 7, 40, f"x {shape('B', (c.size // c.dcae.factor) ** 2, c.dit.dim)}", ha="right")
    for i, (name, above, below) in enumerate(parts):
        y = low + 64 * i
        p.box(lane, y, 104, 34, "learns", name, size=11.5, linespacing=1.15)
        p.line((270, y), (394, y)), p.text(328, y + 9, above), p.text(328, y - 10, below)


def ladder(theme):
    """-> a matplotlib figure. Of the layers only the first, those around the first tap and the last are drawn, dots for the others."""
    c, p = TBACConfig(), Page(740, theme)
    taps = rungs(c.mllm.n_layer, c.dit.n_layer, c.wiring)
    first, last = taps[0], taps[-1]
    rows = [0, 1, None, first - 1, first, first + 1, first + 2, None, last - 1, last]
    heights = {layer: 206 + PITCH * i for i, layer in enumerate(rows) if layer is not None}
    low, high = heights[first] - PITCH / 2, heights[last] - PITCH / 2
    p.mark(22, 712, "frozen", "frozen: MLLM and autoencoder"), p.mark(22, 692, "learns", "learns: queries, connector, DiT")
    draw_mllm(p, c, heights)
    draw_rungs(p, c, heights, taps)
    draw_dit(p, c, heights, taps)
    draw_latents(p, c, low, high)
    draw_block(p, c, low - 46)
    gap = heights[first + 2] + PITCH
    p.dots(92, heights[1] + PITCH), p.dots(92, gap)
    for x in (300, 470, 603):
        p.dots(x, gap - PITCH / 2)
    return p.figure


def draw_ladder(a):
    for theme in THEMES:
        save(ladder(theme), f"ladder-{theme}.svg")


# ------------------------------------------------------------------------------------------------ pictures of the model

PROMPTS = {
    "one thing": (
        "a red circle", "a large blue square at the top left", "a small yellow cross at the bottom", "a green triangle, on a black background"),
    "two things": (
        "a red circle left of a blue square", "a yellow triangle above a green cross", "a small purple circle right of a large red square",
        "a blue cross below an orange circle"),
    "three things; two combinations that training never showed": (
        "three green triangles", "two yellow circles and a purple square", "a purple triangle left of a green circle",
        "an orange cross above a blue square"),
}
EDITS = {                                                                       # action -> what there is, what is asked for
    "recolour": (Scene((Thing("circle", "red", "medium", 0.24, 0.5), Thing("square", "blue", "medium", 0.76, 0.5))), "make the circle green"),
    "replace": (Scene((Thing("triangle", "yellow", "large", 0.5, 0.5),), "black"), "replace the triangle with a red square"),
    "remove": (Scene((Thing("cross", "green", "medium", 0.5, 0.22), Thing("circle", "purple", "medium", 0.5, 0.78))), "remove the green cross"),
    "add": (Scene((Thing("square", "orange", "medium", 0.24, 0.76),)), "add a blue circle at the top right"),
    "move": (Scene((Thing("circle", "blue", "medium", 0.24, 0.5),), "grey"), "move the circle to the right"),
    "background": (Scene((Thing("square", "red", "large", 0.5, 0.76), Thing("circle", "yellow", "small", 0.5, 0.2))), "make the background black"),
}


def first_picture(model, prompt, images=()):
    """What `python sample.py` draws: seed 0, all settings as they are."""
    return sample.generate(model, [prompt], [list(images)], generator=torch.Generator().manual_seed(0))[0]


def draw_samples(a):
    """Three rows of four prompts."""
    model, side, gap, tall = TBAC.load(a.model), 183, 12, 250
    p = Page(tall * len(PROMPTS) + 12)
    for row, (title, prompts) in enumerate(PROMPTS.items()):
        top = tall * (len(PROMPTS) - row) + 8
        p.text(16, top - 15, title, size=13, weight="bold", ha="left")
        for column, prompt in enumerate(prompts):
            x = 16 + side / 2 + column * (side + gap)
            p.picture(first_picture(model, prompt), x, top - 30 - side / 2, side)
            p.caption(x, top - 30 - side - 16, prompt, 27)
    save(p.figure, "samples.png")


def draw_edits(a):
    """Two strips a row: the source, the action and the instruction over an arrow, the result."""
    model, side, tall, strip = TBAC.load(a.model), 120, 140, 398
    p = Page(tall * math.ceil(len(EDITS) / 2) + 4)
    for i, (action, (scene, words)) in enumerate(EDITS.items()):
        assert world.valid(scene), action
        x, y = 16 + i % 2 * strip, tall * (math.ceil(len(EDITS) / 2) - i // 2 - 0.5) + 2
        source, result = x + side / 2, x + 370 - side / 2
        picture = world.render(scene, model.config.size)
        p.picture(picture, source, y, side), p.picture(first_picture(model, words, [picture]), result, y, side)
        p.line((x + side + 8, y), (result - side / 2 - 8, y))
        p.text(x + 185, y + 8, action, size=12.5, weight="bold", va="bottom")
        p.caption(x + 185, y - 20, words, 17)
    save(p.figure, "edits.png")


# ------------------------------------------------------------------------------------------------------ training curves

STAGES = ("vit", "mllm", "dcae", "dit", "t2i", "edit", "mix")                   # in the order of training


def stage_of(log):
    """For sorting: the place of the run's stage, then its name."""
    name = log.parent.name
    return next((i for i, stage in enumerate(STAGES) if name.startswith(stage)), len(STAGES)), name


def read_runs(folder):
    """A folder of runs -> {name: rows of its log.jsonl}, in the order of training. ValueError where there is none."""
    runs = {}
    for log in sorted(folder.glob("*/log.jsonl"), key=stage_of):
        if rows := state.logged(log.parent):
            runs[log.parent.name] = rows
    if not runs:
        raise ValueError(f"no runs to draw curves of: there is no {folder}/*/log.jsonl. train.py writes one into its --out (README.md, \"The toy, "
                         "from nothing\"); --runs names the folder around these. The other figures need none: python notebooks/figures.py ladder")
    return runs


def means(values, parts):
    """(S,) or (S, 10) -> (about parts,) or (about parts, 10): the means of neighbours, over what is there of them."""
    values = np.ma.masked_invalid(np.array(values, float))                      # None becomes nan
    n = math.ceil(len(values) / parts)
    return np.ma.stack([values[i:i + n].mean(0) for i in range(0, len(values), n)])


def draw_curves(a):
    """A panel for the loss of each run, and for the last two that tell it, loss by time."""
    runs = read_runs(a.runs)
    timed = [name for name, rows in runs.items() if rows[-1].get("by_t")][-2:]
    count = len(runs) + len(timed)
    figure, axes = plt.subplots(math.ceil(count / 2), 2, figsize=(WIDTH / 72, 3 * math.ceil(count / 2)), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes.flat, runs.items()):
        step, loss = [row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(step, loss, color="0.85", lw=0.6)
        axis.plot(means(step, 100), means(loss, 100), color=THEMES["light"]["learns"][1], lw=2)
        axis.set_title(f"{name}: loss", loc="left")
    colours = ListedColormap(plt.cm.plasma(np.linspace(0, 0.85, 10)))           # of the ten bins of t
    for axis, name in zip(axes.flat[len(runs):], timed):
        rows = runs[name]
        for i, line in enumerate(means([row["by_t"] for row in rows], 50).T):
            axis.plot(means([row["step"] for row in rows], 50), line, color=colours(i), lw=1.6)
        bar = axis.inset_axes((0.64, 1.05, 0.2, 0.05), xticks=[], yticks=[])
        bar.imshow([range(10)], cmap=colours, aspect="auto"), axis.set_title(f"{name}: loss by time", loc="left", y=1)
        axis.text(0.62, 1.04, "t: data", transform=axis.transAxes, ha="right"), axis.text(0.86, 1.04, "noise", transform=axis.transAxes)
    for i, axis in enumerate(axes.flat):
        axis.set(xlabel="step", yscale="log", visible=i < count), axis.grid(alpha=0.3)
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    save(figure, "curves.png")


# --------------------------------------------------------------------------------------------------------- command line

FIGURES = {"ladder": draw_ladder, "samples": draw_samples, "edits": draw_edits, "curves": draw_curves}


def save(figure, name):
    """The same bytes every time: no date, no random ids, letters as outlines. A PNG has twice the pixels and 256 colours."""
    file = OUT / name
    OUT.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".svg":
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        file.write_text(re.sub(r'="(\d+)pt"', r'="\1"', svg.getvalue(), count=2))      # width and height in pixels
    else:
        png = io.BytesIO()
        figure.savefig(png, dpi=144)
        Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    plt.close(figure)
    size = file.stat().st_size
    assert size < LIMIT, f"{file}: {size} bytes, more than {LIMIT}"
    print(f"wrote {file.relative_to(ROOT)}, {size // 1000} kB")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)} (default: all)")
    p.add_argument("--model", default=ROOT / "toy" / "weights", help="folder of the model that draws (default: the toy)")
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs", help="folder of the runs for the curves (default: runs)")
    a = p.parse_args()
    if unknown := set(a.figures) - set(FIGURES):
        p.error(f"no figure {', '.join(sorted(unknown))}, expected one of {', '.join(FIGURES)}")
    matplotlib.use("Agg"), matplotlib.rcdefaults()
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "tbac", "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold"})
    try:
        for name in a.figures or FIGURES:
            FIGURES[name](a)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
