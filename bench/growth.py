"""How cost grows: time and memory of ours against resolution, batch, steps, queries and prompt length, with fitted exponents.

    python bench/growth.py DIR --threads 2          DIR: a model folder, for example /tmp/mid/ours of bench.py; writes bench/growth.png, growth.json

Time is the median of five runs, memory the tensors alive at once beside the weights (bench/memory.py). An exponent of 1 is linear: twice as much
of this, twice the cost. It is fitted to the upper half of each curve, where what does not grow weighs least.
"""
import argparse
import json
import pathlib
import statistics
import sys

import matplotlib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import sample
from bench import timed
from memory import Counter
from dit import linear_attention
from tbac import TBAC

HERE = pathlib.Path(__file__).parent


def quadratic_attention(q, k, v):
    """The same numbers as dit.linear_attention by way of all N x N pairs."""
    weights = torch.relu(q.float()) @ torch.relu(k.float()).transpose(-1, -2)
    return weights @ v.float() / (weights.sum(-1, keepdim=True) + 1e-15)


class Growth:
    """One method per curve; each takes a number and returns the function to measure."""

    def __init__(self, model):
        self.model, self.c = model, model.config

    def step(self, batch, side, queries=None):
        """One DiT step of `batch` rows at `side` pixels."""
        c, n = self.c, side // self.c.dcae.factor
        conditions = self.model.dit.condition(torch.randn(c.dit.n_layer, batch, queries or c.n_query, c.dit.caption_dim))
        x, t = torch.randn(batch, c.dit.channels, n, n), torch.full((batch,), 500.0)
        return lambda: self.model.dit(x, t, conditions)

    def decoder(self, side):
        n = side // self.c.dcae.factor
        return lambda: self.model.dcae.decode(torch.randn(1, self.c.dit.channels, n, n))

    def steps(self, n):
        heard = sample.conditions(self.model, ["a dog"], None, 1.5, "")
        return lambda: [None for _ in sample.denoise(self.model, ["a dog"], steps=n, heard=heard)]           # keeps no step

    def encode(self, queries, words):
        self.model.ladder.queries = nn.Parameter(torch.randn(queries, self.c.mllm.dim))
        return lambda: self.model.encode(["dog " * words])

    def attention(self, f, side):
        n = (side // self.c.dcae.factor) ** 2
        q, k, v = torch.randn(3, 2, self.c.dit.n_head, n, self.c.dit.head_dim)
        return lambda: f(q, k, v)


def curves(g):
    """title -> (x axis, {label: {x: function}})"""
    sides, at = (256, 384, 512, 768, 1024), lambda xs, f: {x: f(x) for x in xs}
    return {
        "resolution": ("side in pixels", {"DiT step, 2 rows": at(sides, lambda s: g.step(2, s)), "decode 1 picture": at(sides, g.decoder)}),
        "self-attention alone": ("side in pixels", {"linear (used)": at((*sides, 2048), lambda s: g.attention(linear_attention, s)),
                                                    "all pairs, same numbers": at((*sides, 2048), lambda s: g.attention(quadratic_attention, s))}),
        "batch": ("rows", {"DiT step, 512 px": at((1, 2, 4, 8, 16), lambda b: g.step(b, 512))}),
        "steps": ("steps", {"denoise, 512 px": at((5, 10, 20, 40), g.steps)}),
        "queries": ("queries", {"encode": at((16, 64, 256, 1024), lambda q: lambda: g.encode(q, 20)()),
                                "DiT step, 2 rows": at((16, 64, 256, 1024), lambda q: g.step(2, 512, q))}),
        "prompt length": ("words", {"encode": at((8, 32, 128, 240), lambda w: lambda: g.encode(64, w)())}),
    }


@torch.no_grad()
def measure(model):
    """-> {title: {label: [(x, seconds, bytes)]}}"""
    out, all_curves = {}, curves(Growth(model))
    for title, (_, lines) in tqdm(all_curves.items(), "curves"):
        for label, points in lines.items():
            for x, f in points.items():
                f()
                seconds = statistics.median(timed(f, "cpu")[0] for _ in range(5))
                with Counter(*model.parameters()) as counter:
                    held = counter.now
                    f()
                out.setdefault(title, {}).setdefault(label, []).append((x, seconds, counter.most - held))
    return out


def exponent(points, which):
    """The slope of log(cost) over log(x), of the upper half."""
    x, y = np.log([p[0] for p in points]), np.log([p[which] for p in points])
    half = len(points) // 2 if len(points) > 3 else 0
    return float(np.polyfit(x[half:], y[half:], 1)[0])


def plot(found, axes_of):
    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 7), constrained_layout=True)
    for column, (title, lines) in enumerate(found.items()):
        for row, (which, unit, scale) in enumerate(((1, "seconds", 1), (2, "MB beside the weights", 1e-6))):
            ax = axes[row, column]
            for i, (label, points) in enumerate(lines.items()):
                x, y = [p[0] for p in points], [p[which] * scale for p in points]
                ax.loglog(x, y, "os"[i] + "-", label=f"{label}: {exponent(points, which):.2f}")
            ax.set(title=title if row == 0 else None, xlabel=axes_of[title], ylabel=unit if column == 0 else None, xticks=x, xticklabels=x)
            ax.minorticks_off(), ax.grid(alpha=0.3), ax.legend(fontsize=8, title="exponent", title_fontsize=8)
    figure.savefig(HERE / "growth.png", dpi=60), plt.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=pathlib.Path), p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    model = TBAC.load(a.model)
    found = measure(model)
    plot(found, {title: axis for title, (axis, _) in curves(Growth(model)).items()})
    fits = {t: {n: dict(points=p, time=exponent(p, 1), memory=exponent(p, 2)) for n, p in lines.items()} for t, lines in found.items()}
    (HERE / "growth.json").write_text(json.dumps(fits, indent=1))
    for title, lines in fits.items():
        for label, fit in lines.items():
            print(f"{title:22s} {label:26s} time ~ x^{fit['time']:.2f}   memory ~ x^{fit['memory']:.2f}")


if __name__ == "__main__":
    main()
