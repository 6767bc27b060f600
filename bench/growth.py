"""How cost grows: time and memory of ours against resolution, batch, steps, queries and prompt
length, with fitted exponents.

    python -m bench.growth DIR --threads 2
    python -m bench.growth                      # draws the stored numbers again

DIR is a model folder, for example /tmp/mid/ours of bench.py; bench/growth.json is written, and
bench/growth.png drawn from it. Time is the median of five runs, memory the tensors alive at once
beside the weights (measure.py). An exponent of 1 is linear: twice as much of this, twice the cost.
It is fitted to the upper half of each curve, where what does not grow weighs least.
"""
import dataclasses
import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn
from tqdm import tqdm

import sample
from bench.measure import Counter, repeated
from dit import linear_attention
from engine import fast
from engine.command import Parser, one_line_errors
from lab import dots
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


# What grows, for each title.
GROWS = {
    "resolution": "side in pixels",
    "self-attention alone": "side in pixels",
    "batch": "rows",
    "steps": "steps",
    "queries": "queries",
    "prompt length": "words of the prompt",
}


def all_curves(g):
    """title -> {label: {x: function}}"""
    sides = (256, 384, 512, 768, 1024)
    more_sides = (*sides, 2048)
    queries = (16, 64, 256, 1024)
    return {
        "resolution": {
            "DiT step, 2 rows": over(sides, lambda side: g.dit_step(2, side)),
            "decode a picture": over(sides, g.decode)},
        "self-attention alone": {
            "linear": over(more_sides, lambda side: g.attention(linear_attention, side)),
            "all pairs": over(more_sides, lambda side: g.attention(quadratic_attention, side))},
        "batch": {"DiT step": over((1, 2, 4, 8, 16), lambda rows: g.dit_step(rows, 512))},
        "steps": {"denoise": over((5, 10, 20, 40), g.denoise)},
        "queries": {
            "encode": over(queries, lambda n: g.encode(n, 20)),
            "DiT step, 2 rows": over(queries, lambda n: g.dit_step(2, 512, n))},
        "prompt length": {
            "encode": over((8, 32, 128, 240), lambda words: g.encode(64, words))},
    }


@torch.no_grad()
def measure(model):
    """-> {title: {label: points [(x, seconds, bytes)], and the exponents of time and memory}}"""
    found = {}
    for title, lines in tqdm(all_curves(Growth(model)).items(), "curves"):
        found[title] = {}
        for label, functions in lines.items():
            points = [(x, *cost(model, f)) for x, f in functions.items()]
            found[title][label] = dict(points=points, time=exponent(points, 1),
                                       memory=exponent(points, 2))
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


# What is drawn of a line: its exponent, the column of its points, their unit and its size.
DRAWN = (("time", 1, "seconds", 1), ("memory", 2, "MB beside the weights", 1e6))


def plot(found, file):
    """A column for each title, three side by side: seconds above, memory below."""
    figure = plt.figure(figsize=(8, 9.6), layout="constrained")
    titles = list(found)
    for half, shown in zip(figure.subfigures(2, 1, hspace=0.04), (titles[:3], titles[3:])):
        axes = half.subplots(2, 3, sharex="col")
        for column, title in zip(axes.T, shown):
            column[0].set_title(title, fontsize=12)
            column[1].set_xlabel(GROWS[title], fontsize=11)
            for ax, (cost, place, _, unit) in zip(column, DRAWN):
                plot_lines(ax, found[title], cost, place, unit)
        for ax, (_, _, name, _) in zip(axes[:, 0], DRAWN):
            ax.set_ylabel(name, fontsize=11)
    dots.save(figure, file)


def plot_lines(ax, lines, cost, place, unit):
    """Each with its exponent, above the curves."""
    for marker, (label, line) in zip("os", lines.items()):
        x = [point[0] for point in line["points"]]
        y = [point[place] / unit for point in line["points"]]
        # no "-0.0"
        power = round(line[cost], 1) + 0.0
        ax.loglog(x, y, f"{marker}-", ms=5, label=f"{label}: $x^{{{power}}}$")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** (0.18 * len(lines)))
    ax.set_xticks(spread(x))
    ax.set_xticklabels(spread(x))
    subs = (1, 2, 5) if high / low < 100 else (1,)
    ax.yaxis.set(major_locator=LogLocator(subs=subs), major_formatter="{x:g}",
                 minor_locator=NullLocator())
    ax.xaxis.set(minor_locator=NullLocator())
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", frameon=False, borderpad=0.1, handlelength=1.2)


def spread(values):
    """Those that are far enough from the one before to be named on a logarithmic axis."""
    shown = values[:1]
    for value in values[1:]:
        if value >= 1.8 * shown[-1]:
            shown.append(value)
    return shown


def main():
    p = Parser(description=__doc__)
    p.add_argument("model", type=pathlib.Path, nargs="?")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--plain", action="store_true", help="without engine/fast.py")
    args = p.parse_args()
    matplotlib.use("Agg")
    stored = HERE / "growth.json"
    if args.model:
        torch.set_num_threads(args.threads)
        model = TBAC.load(args.model)
        if not args.plain:
            fast.enable(model)
        stored.write_text(json.dumps(measure(model), indent=1))
    found = json.loads(stored.read_text())
    for title, lines in found.items():
        for label, line in lines.items():
            print(f"{title:22s} {label:26s} time ~ x^{line['time']:.2f}   "
                  f"memory ~ x^{line['memory']:.2f}")
    plot(found, HERE / "growth.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
