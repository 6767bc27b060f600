"""How cost grows: time and memory of ours against resolution, batch, steps, queries and prompt
length, with fitted exponents.

    python -m bench.growth DIR --threads 2

DIR is a model folder, for example /tmp/mid/ours of bench.py; bench/growth.png and bench/growth.json
are written. Time is the median of five runs, memory the tensors alive at once beside the weights
(memory.py). An exponent of 1 is linear: twice as much of this, twice the cost. It is fitted to the
upper half of each curve, where what does not grow weighs least.
"""
import argparse
import dataclasses
import json
import pathlib

import matplotlib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import sample
from bench.measure import Counter, repeated
from dit import linear_attention
from engine import fast
from tbac import TBAC

HERE = pathlib.Path(__file__).parent


def quadratic_attention(q, k, v):
    """The same numbers as dit.linear_attention by way of all N x N pairs."""
    weights = torch.relu(q.float()) @ torch.relu(k.float()).transpose(-1, -2)
    return weights @ v.float() / (weights.sum(-1, keepdim=True) + 1e-15)


class Growth:
    """One method for each kind of work; each takes numbers and returns the function to measure."""

    def __init__(self, model):
        self.model = model
        self.c = model.config

    def dit_step(self, batch, side, queries=None):
        """One DiT step of `batch` rows at `side` pixels."""
        c = self.c
        rungs = torch.randn(c.dit.n_layer, batch, queries or c.n_query, c.dit.caption_dim)
        keys_values = self.model.dit.project_kv(rungs)
        x = torch.randn(batch, *sample.latent_shape(c, side))
        time = torch.full((batch,), 500.0)
        return lambda: self.model.dit(x, time, keys_values)

    def decode(self, side):
        latents = torch.randn(1, *sample.latent_shape(self.c, side))
        return lambda: self.model.dcae.decode(latents)

    def denoise(self, steps):
        conditioning = sample.encode_for_guidance(self.model, ["a dog"], None, 1.5, "")

        def run():
            for _ in sample.denoise(self.model, ["a dog"], steps=steps, conditioning=conditioning):
                pass
        return run

    def encode(self, queries, words):
        """The queries are set when it runs: all curves share the model."""
        new = nn.Parameter(torch.randn(queries, self.c.mllm.dim))
        prompt = "dog " * words

        def run():
            self.model.ladder.queries = new
            self.model.config = dataclasses.replace(self.c, n_query=queries)
            self.model.encode([prompt])
        return run

    def attention(self, f, side):
        _, h, w = sample.latent_shape(self.c, side)
        c = self.c.dit
        q, k, v = torch.randn(3, 2, c.n_head, h * w, c.head_dim)
        return lambda: f(q, k, v)


def over(xs, make):
    return {x: make(x) for x in xs}


def all_curves(g):
    """title -> (x axis, {label: {x: function}})"""
    sides = (256, 384, 512, 768, 1024)
    more_sides = (*sides, 2048)
    queries = (16, 64, 256, 1024)
    return {
        "resolution": ("side in pixels", {
            "DiT step, 2 rows": over(sides, lambda side: g.dit_step(2, side)),
            "decode 1 picture": over(sides, g.decode)}),
        "self-attention alone": ("side in pixels", {
            "linear (used)": over(more_sides, lambda side: g.attention(linear_attention, side)),
            "all pairs, same numbers":
                over(more_sides, lambda side: g.attention(quadratic_attention, side))}),
        "batch": ("rows", {
            "DiT step, 512 px": over((1, 2, 4, 8, 16), lambda rows: g.dit_step(rows, 512))}),
        "steps": ("steps", {"denoise, 512 px": over((5, 10, 20, 40), g.denoise)}),
        "queries": ("queries", {
            "encode": over(queries, lambda n: g.encode(n, 20)),
            "DiT step, 2 rows": over(queries, lambda n: g.dit_step(2, 512, n))}),
        "prompt length": ("words", {
            "encode": over((8, 32, 128, 240), lambda words: g.encode(64, words))}),
    }


@torch.no_grad()
def measure(model, curves):
    """-> {title: {label: [(x, seconds, bytes)]}}"""
    found = {}
    for title, (_, lines) in tqdm(curves.items(), "curves"):
        found[title] = {}
        for label, points in lines.items():
            found[title][label] = [(x, *cost(model, f)) for x, f in points.items()]
    return found


def cost(model, f):
    """-> seconds, bytes beside the weights"""
    f()
    seconds = repeated(f, 5, "cpu")["seconds"]
    with Counter(*model.parameters()) as counter:
        held = counter.now
        f()
    return seconds, counter.most - held


def exponent(points, column):
    """The slope of log(cost) over log(x), of the upper half."""
    x = np.log([point[0] for point in points])
    y = np.log([point[column] for point in points])
    half = len(points) // 2 if len(points) > 3 else 0
    return float(np.polyfit(x[half:], y[half:], 1)[0])


def plot(found, curves):
    """A column for each title: seconds above, memory below."""
    rows = ((1, "seconds", 1), (2, "MB beside the weights", 1e-6))
    size = (4 * len(found), 7)
    figure, axes = plt.subplots(2, len(found), figsize=size, constrained_layout=True)
    for ax, (title, lines) in zip(axes.T, found.items()):
        ax[0].set_title(title)
        for row, (column, unit, scale) in enumerate(rows):
            plot_lines(ax[row], lines, column, scale)
            ax[row].set_xlabel(curves[title][0])
            if title == next(iter(found)):
                ax[row].set_ylabel(unit)
    figure.savefig(HERE / "growth.png", dpi=60)
    plt.close(figure)


def plot_lines(ax, lines, column, scale):
    for marker, (label, points) in zip("os", lines.items()):
        x = [point[0] for point in points]
        y = [point[column] * scale for point in points]
        ax.loglog(x, y, f"{marker}-", label=f"{label}: {exponent(points, column):.2f}")
    ax.set(xticks=x, xticklabels=x)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, title="exponent", title_fontsize=8)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=pathlib.Path)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--plain", action="store_true", help="without engine/fast.py")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = TBAC.load(args.model)
    if not args.plain:
        fast.enable(model)
    curves = all_curves(Growth(model))
    found = measure(model, curves)
    plot(found, curves)
    fits = {}
    for title, lines in found.items():
        fits[title] = {label: dict(points=points, time=exponent(points, 1),
                                   memory=exponent(points, 2)) for label, points in lines.items()}
        for label, fit in fits[title].items():
            print(f"{title:22s} {label:26s} time ~ x^{fit['time']:.2f}   "
                  f"memory ~ x^{fit['memory']:.2f}")
    (HERE / "growth.json").write_text(json.dumps(fits, indent=1))


if __name__ == "__main__":
    main()
