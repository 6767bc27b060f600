"""The figures of this repository, drawn by code into assets/figures/: numbers from the configs,
pictures from the shipped model.

    python -m lab.figures                       # all
    python -m lab.figures ladder                # one of those below

ladder   ladder-light.svg, ladder-dark.svg: the paper's Fig. 2 with the names and shapes of this
         code
samples  samples.png: sixteen prompts, and the first picture that the model draws for each
edits    edits.png: one edit of every kind, source -> instruction -> result
explain  explain.png: what `sample.py "..." --explain --compare "..."` writes as a page, as headless
         Chromium shows it
live     live.png: the page of `sample.py --serve`, after it has been used

What is drawn here is WIDTH pixels wide; the pages show some of it smaller. Dimension key of the
shapes: B batch, S tokens of the prompt; all others are numbers of the released model.
"""
import inspect
import io
import json
import math
import pathlib
import re
import shutil
import subprocess
import tempfile
import textwrap
import threading
from http import HTTPStatus

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

import sample
from engine import command, fast, page
from engine.files import save_png, write_text
from ladder import tap_layers
from tbac import TBAC, TBACConfig
from toy import world
from toy.world import Scene, Thing

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "assets" / "figures"
WIDTH = 800             # pixels
LIMIT = 300_000         # bytes of a file

# Fill, edge, ink of everything that is drawn; the pages are GitHub's. Cool is frozen, warm learns.
THEMES = {
    "light": {
        "plain": ("#ffffff", "#6e7781", "#1f2328"),
        "muted": ("#ffffff", "#8c959f", "#59636e"),
        "panel": ("#f6f8fa", "#f6f8fa", "#1f2328"),
        "frozen": ("#dfeaf6", "#6f95bf", "#244a73"),
        "learns": ("#ffe3c4", "#d9822b", "#7a3d00"),
    },
    "dark": {
        "plain": ("#0d1117", "#8b949e", "#e6edf3"),
        "muted": ("#0d1117", "#6e7681", "#9ea7b1"),
        "panel": ("#151b23", "#151b23", "#e6edf3"),
        "frozen": ("#1b2c42", "#5d89bb", "#b5d3f5"),
        "learns": ("#47300f", "#e0913f", "#ffd09a"),
    },
}


class Page:
    """A page of WIDTH x `height` pixels, y upwards, and the few things that are drawn on it.
    kind: a word of THEMES."""

    def __init__(self, height, theme="light"):
        self.theme = THEMES[theme]
        # 72 points are 72 pixels.
        size = (WIDTH / 72, height / 72)
        self.figure = plt.figure(figsize=size, facecolor=self.theme["plain"][0])
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        self.ax.axis("off")

    def text(self, x, y, words, kind="plain", size=11.5, **style):
        style = dict(ha="center", va="center", zorder=4) | style
        self.ax.text(x, y, words, fontsize=size, color=self.theme[kind][2], **style)

    def box(self, x, y, width, height, kind, words="", **style):
        """A box around (x, y); a panel lies behind everything."""
        fill, edge, _ = self.theme[kind]
        corner = (x - width / 2, y - height / 2)
        self.ax.add_patch(FancyBboxPatch(
            corner, width, height, "round,pad=0,rounding_size=5", facecolor=fill, edgecolor=edge,
            linewidth=1.2, zorder=0 if kind == "panel" else 2))
        self.text(x, y - 0.5, words, kind, **dict(size=12) | style)

    def cell(self, x, y, width, height, kind):
        """A cell with its left edge at x, to stand in a row with others."""
        fill, edge, _ = self.theme[kind]
        self.ax.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=fill,
                                    edgecolor=edge, linewidth=1, zorder=2))

    def line(self, *points, kind="plain", head=True, **style):
        """A line through points, behind the boxes; an arrow head at the last point."""
        colour = self.theme[kind][1]
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        u, v = (x1 - x0) / length, (y1 - y0) / length
        end = (x1 - 5 * u, y1 - 5 * v) if head else (x1, y1)
        style = dict(lw=1.4, zorder=1) | style
        self.ax.plot(*zip(*points[:-1], end), color=colour, solid_capstyle="butt", **style)
        if head:
            left = (x1 - 7 * u - 3.5 * v, y1 - 7 * v + 3.5 * u)
            right = (x1 - 7 * u + 3.5 * v, y1 - 7 * v - 3.5 * u)
            self.ax.add_patch(Polygon([(x1, y1), left, right], facecolor=colour, linewidth=0,
                                      zorder=3))

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
        self.ax.plot([x] * 3, [y - 6, y, y + 6], "o", ms=2.4, color=self.theme["plain"][2],
                     zorder=3)

    def picture(self, image, x, y, side):
        """A PIL picture around (x, y), its pixels to be seen, in a thin frame."""
        half = side / 2
        self.ax.imshow(image, extent=(x - half, x + half, y - half, y + half),
                       interpolation="nearest", aspect="auto", zorder=2)
        self.ax.add_patch(Rectangle((x - half, y - half), side, side, fill=False,
                                    edgecolor="#c0c6cc", linewidth=1, zorder=3))


# --------------------------------------------------------------------------- the ladder figure

HEIGHT = 608
# What the MLLM reads, and how many cells stand for it.
SEQUENCE = {"system": 3, "image": 4, "prompt": 3, "<|vision_start|>": 1, "queries": 5}
CELL = 14
# y of the rungs that are drawn: the first two, block j in the place of many, the last one
RUNG_ROWS = {"first": 281, "second": 327, "j": 403, "last": 479}
PITCH = 46              # from one layer to the next
LAYERS = 20, 244        # left and right end of the MLLM's layers
CONNECTOR = 330, 382
BLOCK = 496             # x of the DiT's blocks, which are 90 wide
RETURN = 563            # x of the line that takes the velocity back
ZOOM = 580, 790, 198, 506       # left, right, bottom, top
LATENTS, DATA = 140, 76         # y of the noisy latents, and of what training mixes


def shape(*sides):
    return f"({', '.join(map(str, sides))})"


def latents_shape(c):
    return shape("B", *sample.latent_shape(c))


def toy_picture(p, x, y, side, colour):
    """A circle left of a blue square, in vectors."""
    circle, square = (tuple(c / 255 for c in world.COLOURS[name]) for name in (colour, "blue"))
    p.ax.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, facecolor="white",
                             edgecolor=p.theme["plain"][1], linewidth=1))
    p.ax.add_patch(Circle((x - side / 5, y), side / 7, facecolor=circle, linewidth=0))
    p.ax.add_patch(Rectangle((x + side / 14, y - side / 7), side / 3.5, side / 3.5,
                             facecolor=square, linewidth=0))


def draw_cells(p, y, height):
    """The whole sequence as one row of cells, which the queries close."""
    n = sum(SEQUENCE.values())
    for i in range(n):
        kind = "frozen" if i < n - SEQUENCE["queries"] else "learns"
        p.cell(LAYERS[0] + CELL * i, y, CELL, height, kind)


def draw_layer(p, y, name):
    left, right = LAYERS
    p.box((left + right) / 2, y, right - left, 24, "frozen")
    p.text(left + 12, y - 0.5, f"layer {name}", "frozen", 12, ha="left")


def draw_sequence(p, c, y):
    """The row that enters the MLLM, what its cells are, and where they come from."""
    draw_cells(p, y, 20)
    middle, done = {}, 0
    for name, n in SEQUENCE.items():
        middle[name] = LAYERS[0] + CELL * (done + n / 2)
        done += n
    for name in ("system", "image", "prompt", "queries"):
        kind = "learns" if name == "queries" else "frozen"
        p.text(middle[name], y + 0.5, "…", kind, 13, weight="bold")
        p.line((middle[name], y + 10), (middle[name], y + 22), kind=kind)
        if name != "queries":
            p.text(middle[name], y - 20, name, "frozen")
    p.text(middle["queries"] + 6, y - 20, f"{c.n_query} queries", "learns")
    start = "<|vision_start|>"
    p.line((middle[start], y - 32), (middle[start], y - 11), kind="frozen", head=False, lw=1)
    p.text(LAYERS[1] + 2, y - 40, start, "frozen", ha="right")
    p.line((LAYERS[1], y + 2), (LAYERS[1] + 15, y + 2), kind="muted", head=False, lw=1)
    size = shape("B", f"S + {c.n_query}", c.mllm.dim)
    p.text(LAYERS[1] + 18, y + 34, "one sequence,", ha="left")
    p.text(LAYERS[1] + 18, y + 18, "closed by the queries:", ha="left")
    p.text(LAYERS[1] + 18, y + 2, size, ha="left")
    return middle


def draw_inputs(p, image, prompt, y):
    """Where the tokens of the image and of the prompt come from."""
    p.line((image, y + 12), (image, y + 64))
    p.box(image, y, 46, 24, "frozen", "ViT")
    p.line((image, y - 32), (image, y - 13))
    toy_picture(p, image, y - 54, 42, "red")
    p.text(image - 28, y - 54, "optional", "muted", ha="right")
    p.line((prompt, y + 12), (prompt, y + 64))
    p.box(prompt + 20, y, 76, 24, "frozen", "tokenizer")
    p.line((prompt + 20, y - 33), (prompt + 20, y - 13))
    p.text(prompt + 20, y - 50, "“make the\ncircle green”", linespacing=1.25)


def draw_mllm(p, c, rows):
    """The left column. The sequence rises through the layers; its states stand between them."""
    (left, right), (first, last) = LAYERS, (rows[0], rows[-1])
    bottom, top = first[2] - 103, last[2] + 110
    p.box((left + right) / 2, (top + 66) / 2, right - left + 18, top - 66, "panel")
    p.text(left + 2, top - 19, "Qwen2.5-VL", size=15, ha="left", weight="bold")
    for state, _, y in rows:
        draw_cells(p, y, 9)
        draw_layer(p, y + PITCH / 2, state)
    p.text(right - 12, last[2] + PITCH / 2 - 0.5, "for answers only", "frozen", ha="right")
    draw_layer(p, first[2] - PITCH / 2, first[0] - 1)
    draw_layer(p, first[2] - 1.5 * PITCH, 0)
    p.line((right - 52, last[2] + 35), (right - 52, top - 62))
    p.box(right - 52, top - 50, 104, 24, "frozen", "language head")
    p.line((right - 104, top - 50), (right - 128, top - 50))
    p.text(right - 134, top - 50, "answers", ha="right")
    middle = draw_sequence(p, c, bottom)
    draw_inputs(p, middle["image"], middle["prompt"] - 2, bottom - 94)
    for y in (first[2] - PITCH, rows[1][2] + 53, rows[2][2] + 53):
        p.dots((left + right) / 2, y)


def draw_rungs(p, c, rows, n):
    """The middle: the queries' states go through the one connector and become rungs."""
    left, right = CONNECTOR
    low, high = rows[0][2], rows[-1][2]
    for state, rung, y in rows:
        p.line((LAYERS[1], y), (left, y), kind="learns")
        p.text(290, y + 8, f"state {state}")
        p.line((right, y), (BLOCK - 45, y), kind="learns")
        p.text(415, y + 8, f"rung {rung}")
    for x in (290, 415):
        for y in (rows[1][2] + 42, rows[2][2] + 42):
            p.dots(x, y)
    centre, middle = (left + right) / 2, (low + high) / 2
    p.box(centre, middle, right - left, high - low + 32, "learns")
    p.text(centre - 9, middle, "one shared connector", "learns", 14, rotation=90, weight="bold")
    p.text(centre + 12, middle, "Linear, GELU, Linear, RMSNorm", "learns", 11, rotation=90)
    p.text(262, high + 78, "state $i$ enters layer $i$", ha="left")
    p.text(262, high + 60, "states", ha="left")
    p.text(304, high + 60, f"{n} × {shape('B', c.n_query, c.mllm.dim)}", ha="left")
    p.text(262, high + 42, "rungs", ha="left")
    p.text(304, high + 42, shape(n, "B", c.n_query, c.dit.caption_dim), ha="left")


def draw_dit(p, c, rows):
    """The right column: latents rise through the blocks, each of which attends to its rung."""
    low, high = rows[0][2] - PITCH, rows[-1][2] + PITCH
    p.box(BLOCK, (low + high) / 2 + 22, 106, high - low + 84, "panel")
    p.text(BLOCK, high + 45, "SANA DiT", size=15, weight="bold")
    p.line((BLOCK, LATENTS + 12), (BLOCK, low - 12))
    p.line((BLOCK, low), (BLOCK, rows[1][2] + 24), head=False)
    for _, _, y in rows[1:3]:
        p.dots(BLOCK, y + 38)
        p.line((BLOCK, y + 52), (BLOCK, y + 100), head=False)
    p.line((BLOCK, rows[-1][2]), (BLOCK, high - 12))
    p.box(BLOCK, low, 90, 24, "learns", "1×1 conv")
    p.box(BLOCK, high, 90, 24, "learns", "norm, linear")
    for _, rung, y in rows:
        p.box(BLOCK, y, 90, 24, "learns", f"block {rung}")
    p.box(405, low + 8, 48, 24, "plain", "$1000\\,t$")
    p.line((429, low + 8), (BLOCK - 53, low + 8))
    p.text(405, low - 14, "to all blocks", "muted")
    p.text(BLOCK - 8, LATENTS + 40, latents_shape(c), ha="right")


def draw_latents(p, c, top):
    """The bottom right: what x_t is when training and when drawing, and where the velocity goes."""
    p.line((BLOCK + 45, top), (RETURN, top), (RETURN, LATENTS + 18))
    p.text(RETURN + 8, top, f"velocity $\\hat v$ {latents_shape(c)}", ha="left")
    p.box(BLOCK, LATENTS, 40, 24, "plain", "$x_t$")
    steps = inspect.signature(sample.denoise).parameters["steps"].default
    p.box(614, LATENTS, 132, 36, "plain",
          f"drawing: {steps} steps\n$x_s = x_t + (s - t)\\,\\hat v$", size=11.5, linespacing=1.3)
    p.line((548, LATENTS), (BLOCK + 20, LATENTS))
    p.line((RETURN, 174), (742, 174), (742, LATENTS + 18))
    p.box(742, LATENTS, 88, 36, "plain", "training: loss\n$|\\hat v - v|^2$", size=11.5,
          linespacing=1.3)
    p.line((BLOCK - 20, LATENTS), (382, LATENTS))
    p.text(429, LATENTS + 9, "at $t = 0$")
    p.box(350, LATENTS, 64, 36, "frozen", "DC-AE\ndecoder", linespacing=1.2)
    p.line((318, LATENTS), (307, LATENTS))
    toy_picture(p, 285, LATENTS, 42, "green")


def draw_data(p, c):
    """The last row: what training mixes."""
    toy_picture(p, 285, DATA, 42, "green")
    p.text(262, DATA - 32, shape("B", 3, c.size, c.size), ha="left")
    p.line((306, DATA), (318, DATA))
    p.box(350, DATA, 64, 36, "frozen", "DC-AE\nencoder", linespacing=1.2)
    p.line((382, DATA), (428, DATA))
    p.text(404, DATA + 9, "$x_0$")
    p.box(BLOCK, DATA, 136, 54, "plain", "training:\n$x_t = (1 - t)\\,x_0 + t\\,\\epsilon$\n"
          "$v = \\epsilon - x_0$", size=11.5, linespacing=1.3)
    p.line((BLOCK, DATA + 27), (BLOCK, LATENTS - 12))
    p.line((564, DATA), (742, DATA), (742, LATENTS - 18))
    p.text(650, DATA + 9, "target $v$")
    p.line((BLOCK, 30), (BLOCK, DATA - 27))
    p.box(BLOCK, 20, 76, 24, "plain", "noise $\\epsilon$")
    p.text(BLOCK + 46, 20, "drawing starts here: $t = 1,\\ x_1 = \\epsilon$", "muted", ha="left")


def draw_zoom(p, c, y):
    """Block j from inside; y: of the block. Each part adds to x."""
    left, right, bottom, top = ZOOM
    lane, skip, n = 724, 782, (c.size // c.dcae.factor) ** 2
    heads = shape("B", c.dit.cross_n_head, c.n_query, c.dit.dim // c.dit.cross_n_head)
    p.box((left + right) / 2, (top + bottom) / 2, right - left, top - bottom, "panel")
    for corner, end in ((y + 12, top), (y - 12, bottom)):
        p.line((BLOCK + 45, corner), (left, end), kind="muted", head=False, lw=1.1, ls=(0, (4, 2)))
    p.text(left + 10, top - 16, "inside block $j$", size=12, ha="left", weight="bold")
    p.text(lane - 8, bottom + 14, f"$x$ {shape('B', n, c.dit.dim)}", ha="right")
    p.line((lane, bottom + 6), (lane, top - 6))
    parts = (("linear\nself-attention", "adaLN($1000\\,t$)", "scale, shift, gate"),
             ("cross-attention", "rung $j$: K, V", heads),
             ("Mix-FFN", "adaLN($1000\\,t$)", "scale, shift, gate"))
    for i, (name, above, below) in enumerate(parts):
        at = bottom + 70 + 84 * i
        p.box(lane, at, 100, 34, "learns", name, size=11.5, linespacing=1.15)
        p.line((left + 6, at), (lane - 50, at))
        p.text((left + lane - 50) / 2, at + 9, above)
        p.text(left + 8, at - 27, below, ha="left")
        p.line((lane, at - 27), (skip, at - 27), (skip, at + 30), (lane + 7, at + 30))
        p.ax.plot(lane, at + 30, "o", ms=13, mfc=p.theme["plain"][0], mec=p.theme["plain"][1],
                  mew=1.2, zorder=3)
        p.text(lane, at + 30, "+", size=12)
    p.text(lane - 7, bottom + 127, "Q", ha="right")


def ladder(theme):
    """-> a matplotlib figure. Of the layers and blocks some are drawn, dots for the others."""
    c, p = TBACConfig(), Page(HEIGHT, theme)
    taps = tap_layers(c.mllm.n_layer, c.dit.n_layer, c.wiring)
    names = {"first": (taps[0], 0), "second": (taps[1], 1),
             "j": (f"${taps[0]} + j$", "$j$"), "last": (taps[-1], len(taps) - 1)}
    # (state, rung, y)
    rows = [(*names[row], y) for row, y in RUNG_ROWS.items()]
    p.mark(268, HEIGHT - 24, "frozen", "frozen")
    p.mark(354, HEIGHT - 24, "learns", "learns")
    draw_mllm(p, c, rows)
    draw_rungs(p, c, rows, len(taps))
    draw_dit(p, c, rows)
    draw_zoom(p, c, RUNG_ROWS["j"])
    draw_latents(p, c, rows[-1][2] + PITCH)
    draw_data(p, c)
    return p.figure


def draw_ladder(args):
    for theme in THEMES:
        save(ladder(theme), f"ladder-{theme}.svg")


# ----------------------------------------------------------------------- pictures of the model

PROMPTS = {
    "one thing": (
        "a red circle",
        "a large blue square at the top left",
        "a small yellow cross at the bottom",
        "a green triangle, on a black background"),
    "two things": (
        "a red circle left of a blue square",
        "a yellow triangle above a green cross",
        "a small purple circle right of a large red square",
        "a blue cross below an orange circle"),
    "three things; two combinations that training never showed": (
        "three green triangles",
        "two yellow circles and a purple square",
        "a purple triangle left of a green circle",
        "an orange cross above a blue square"),
    "as people speak": (
        "RED CIRCLE LEFT OF BLUE SQUARE",
        "green triangle, yellow box",
        "a red ball next to a huge blue block",
        "can you draw two tiny orange plus signs please?"),
}
# action -> what there is, what is asked for
EDITS = {
    "recolour": (
        Scene((Thing("circle", "red", "medium", 0.24, 0.5),
               Thing("square", "blue", "medium", 0.76, 0.5))),
        "make the circle green"),
    "replace": (
        Scene((Thing("triangle", "yellow", "large", 0.5, 0.5),), "black"),
        "replace the triangle with a red square"),
    "remove": (
        Scene((Thing("cross", "green", "medium", 0.5, 0.22),
               Thing("circle", "purple", "medium", 0.5, 0.78))),
        "remove the green cross"),
    "add": (
        Scene((Thing("square", "orange", "medium", 0.24, 0.76),)),
        "add a blue circle at the top right"),
    "move": (
        Scene((Thing("circle", "blue", "medium", 0.24, 0.5),), "grey"),
        "move the circle to the right"),
    "background": (
        Scene((Thing("square", "red", "large", 0.5, 0.76),
               Thing("circle", "yellow", "small", 0.5, 0.2))),
        "make the background black"),
    "resize": (
        Scene((Thing("triangle", "orange", "small", 0.24, 0.5),
               Thing("cross", "purple", "medium", 0.74, 0.5))),
        "make the triangle bigger"),
    "swap": (
        Scene((Thing("circle", "red", "medium", 0.24, 0.5),
               Thing("square", "green", "medium", 0.76, 0.5))),
        "swap the circle and the square"),
    "recolour all": (
        Scene((Thing("triangle", "yellow", "medium", 0.24, 0.24),
               Thing("cross", "red", "medium", 0.76, 0.76)), "grey"),
        "make everything blue"),
}


def first_picture(model, prompt, images=()):
    """What `python sample.py` draws: seed 0, all settings as they are."""
    generator = torch.Generator().manual_seed(0)
    return sample.generate(model, [prompt], [list(images)], generator=generator)[0]


def draw_samples(args):
    """Rows of four prompts."""
    model = fast.enable(TBAC.load(args.model))
    side, gap, row_height = 183, 12, 250
    p = Page(row_height * len(PROMPTS) + 12)
    for row, (title, prompts) in enumerate(PROMPTS.items()):
        top = row_height * (len(PROMPTS) - row) + 8
        p.text(16, top - 15, title, size=13, weight="bold", ha="left")
        for column, prompt in enumerate(prompts):
            x = 16 + side / 2 + column * (side + gap)
            p.picture(first_picture(model, prompt), x, top - 30 - side / 2, side)
            p.caption(x, top - 30 - side - 16, prompt, 27)
    save(p.figure, "samples.png")


def draw_edits(args):
    """Two strips a row: the source, the action and the instruction over an arrow, the result."""
    model = fast.enable(TBAC.load(args.model))
    side, row_height, strip = 120, 140, 398
    n_row = math.ceil(len(EDITS) / 2)
    p = Page(row_height * n_row + 4)
    for i, (action, (scene, instruction)) in enumerate(EDITS.items()):
        x, y = 16 + i % 2 * strip, row_height * (n_row - i // 2 - 0.5) + 2
        source, result = x + side / 2, x + 370 - side / 2
        picture = world.render(scene, model.config.size)
        p.picture(picture, source, y, side)
        p.picture(first_picture(model, instruction, [picture]), result, y, side)
        p.line((x + side + 8, y), (result - side / 2 - 8, y))
        p.text(x + 185, y + 8, action, size=12.5, weight="bold", va="bottom")
        p.caption(x + 185, y - 20, instruction, 17)
    save(p.figure, "edits.png")


# -------------------------------------------------------------------------- the page that explains

EXPLAINED = ("a red circle left of a blue square", "a green triangle right of a yellow cross")


def shoot(address, width, height, name):
    """A page as Chromium shows it when all of it is there. ValueError where there is no
    Chromium."""
    program = shutil.which("chromium")
    if program is None:
        raise ValueError(f"the figure {name} needs a browser: install chromium")
    with tempfile.TemporaryDirectory() as folder:
        shot = pathlib.Path(folder, "shot.png")
        words = [program, "--headless", "--no-sandbox", "--hide-scrollbars",
                 f"--window-size={width},{height}", f"--screenshot={shot}", address]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode or not shot.exists():
            raise ValueError(f"{program} took no picture of {name}:\n{done.stderr[-2000:]}")
        with Image.open(shot) as image:
            save_picture(image, OUT / f"{name}.png")


def draw_explain(args):
    model = fast.enable(TBAC.load(args.model))
    prompt, other = EXPLAINED
    html = sample.explained(model, prompt, compare=other).html()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "page.html")
        write_text(file, html)
        shoot(file.as_uri(), 1120, 1730, "explain")


# Uses the live page as a person would with these two prompts, and says when it is done.
USE = """
const settled = async () => {
  do await new Promise(go => setTimeout(go, 50)); while (running);
};
const write = async (id, field, text) => {
  $(field).value = text;
  $(id).requestSubmit();
  await settled();
};
(async () => {
  await write("draw", "prompt", prompts[0]);
  await write("ask", "question", "how many circles?");
  await write("mix", "other", prompts[1]);
  mixAs((j, s) => s < 4);
  await settled();
  document.activeElement.blur();
  await fetch("/used");
})();
"""


def draw_live(args):
    options = sample.options(["--serve", "--model", str(args.model)])
    model = fast.enable(TBAC.load(args.model))
    sample.default_guidance(options, model)
    with page.serving(sample.live(options, model), "127.0.0.1", 0) as (server, line):
        add_use(server)
        working = threading.Thread(target=line.run)
        working.start()
        try:
            shoot(server.address, 1120, 1380, "live")
        finally:
            line.close()
            working.join()


def add_use(server):
    """The page is there when its last picture is, and that one waits until USE is done."""
    used = threading.Event()
    html, _ = server.page
    script = f"const prompts = {json.dumps(EXPLAINED)};{USE}"
    html += f"<img hidden src=/picture><script>{script}</script>".encode()
    server.page = html, "default-src 'self' data: 'unsafe-inline'"

    def send_nothing(connection):
        connection.send_head(HTTPStatus.NO_CONTENT, "text/plain", 0)

    def send_when_used(connection):
        used.wait(60)
        send_nothing(connection)

    def note_use(connection):
        used.set()
        send_nothing(connection)

    server.routes |= {"/picture": {"GET": send_when_used}, "/used": {"GET": note_use}}


# -------------------------------------------------------------------------------- command line

FIGURES = {"ladder": draw_ladder, "samples": draw_samples, "edits": draw_edits,
           "explain": draw_explain, "live": draw_live}


def save(figure, name):
    """The same bytes every time: no date, no random ids, letters as outlines. A PNG has twice the
    pixels."""
    file = OUT / name
    if file.suffix == ".svg":
        OUT.mkdir(parents=True, exist_ok=True)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        # width and height in pixels
        write_text(file, re.sub(r'="(\d+)pt"', r'="\1"', svg.getvalue(), count=2))
        check_size(file)
    else:
        png = io.BytesIO()
        figure.savefig(png, dpi=144)
        save_picture(Image.open(png), file)
    plt.close(figure)


def save_picture(image, file):
    """A PIL picture as a PNG of 256 colours."""
    OUT.mkdir(parents=True, exist_ok=True)
    image = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    save_png(image, file, optimize=True)
    check_size(file)


def check_size(file):
    size = file.stat().st_size
    if size >= LIMIT:
        raise ValueError(f"{file}: {size} bytes, more than {LIMIT}")
    print(f"wrote {file.relative_to(ROOT)}, {size // 1000} kB")


def options(argv=None):
    p = command.Parser(prog="python -m lab.figures", description=__doc__)
    p.add_argument("figures", nargs="*", metavar="FIGURE",
                   help=f"of {', '.join(FIGURES)} (default: all)")
    p.add_argument("--model", type=command.path, default=sample.TOY_FOLDER,
                   help="folder of the model that draws (default: the toy)")
    args = p.parse_args(argv)
    if unknown := set(args.figures) - set(FIGURES):
        names = ", ".join(sorted(unknown))
        p.error(f"no figure {names}, expected one of {', '.join(FIGURES)}")
    return args


def main():
    args = options()
    matplotlib.use("Agg")
    matplotlib.rcdefaults()
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "tbac", "font.size": 12,
                         "axes.titlesize": 13, "axes.titleweight": "bold"})
    with command.one_line_errors():
        for name in args.figures or FIGURES:
            FIGURES[name](args)


if __name__ == "__main__":
    main()
