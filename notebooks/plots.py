"""The notebooks' figures, so that a cell shows the method and not how it is drawn: one function for
each kind of figure, notebook by notebook. Every function shows its figure (plt.show()) and returns
nothing; `style()` sets the looks once, in a notebook's first cell.

    from notebooks import plots
"""
import base64
import io
import itertools
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm, to_rgb
from matplotlib.patches import Circle, Rectangle
from PIL import Image
from torch import Tensor

from engine.pictures import contact_sheet
from lab.tables import MORE, THINGS
from vit import smart_size, window_index


def style(grid: bool = False) -> None:
    """The looks of all figures of a notebook."""
    plt.rcParams.update({
        "figure.dpi": 100,
        "font.size": 12,
        "figure.constrained_layout.use": True,
        "axes.grid": grid,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
    })


# ------------------------------------------------------------------------------------------- 1_flow

CLUSTERS = ("tab:blue", "tab:orange", "tab:green")


def clouds(points: dict, cluster: Tensor) -> None:
    """{t: (n, 2)} -> a panel for each time, the points in the colours of their clusters."""
    fig, axes = plt.subplots(1, len(points), figsize=(8, 2.6), sharex=True, sharey=True)
    limits = (-3.6, 3.6)
    for ax, (t, x) in zip(axes, points.items()):
        # In the order of the points: by cluster, the last one would hide the others.
        ax.scatter(*x.T, s=2, color=[CLUSTERS[k] for k in cluster.tolist()])
        for k, colour in enumerate(CLUSTERS):
            ax.scatter([], [], s=2, color=colour, label=f"cluster {k}")
        ax.set(title=f"t = {t}", xlim=limits, ylim=limits, aspect="equal")
    fig.legend(*axes[0].get_legend_handles_labels(), markerscale=5, ncols=3, fontsize=11,
               loc="outside lower center")
    plt.show()


def streams(side: Tensor, fields: dict, means: Tensor) -> None:
    """{title: (t, field (n * n, 2), shares of the clusters (n * n, 3))} on the square side x side,
    the first coordinate first -> streamlines, with the centres of the data and those at time t."""
    n = len(side)
    paint = torch.tensor([to_rgb(colour) for colour in CLUSTERS], dtype=torch.float64)
    fig, axes = plt.subplots(1, len(fields), figsize=(8, 3.3), sharex=True, sharey=True)
    edge = (side[0], side[-1])
    for ax, (title, (t, field, share)) in zip(axes, fields.items()):
        # Pictures count rows, the second coordinate, first.
        painted = (share @ paint).view(n, n, 3).transpose(0, 1)
        ax.imshow(painted, extent=(*edge, *edge), origin="lower", alpha=0.45)
        u, v = field.view(n, n, 2).transpose(0, 1).unbind(2)
        ax.streamplot(side.numpy(), side.numpy(), u.numpy(), v.numpy(), color="0.2",
                      linewidth=0.8, density=0.55, arrowsize=0.9)
        ax.scatter(*means.T, s=130, marker="*", color="gold", edgecolor="black", zorder=3,
                   label="centres of the data")
        ax.scatter(*((1 - t) * means).T, s=50, facecolor="white", edgecolor="black", zorder=3,
                   label="centres at this t")
        ax.set(title=title, xlim=edge, ylim=edge, aspect="equal")
        ax.grid(False)
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, fontsize=11,
               loc="outside lower center")
    plt.show()


def loss_curve(losses: list, every: int, level: float, name: str) -> None:
    """The mean of `every` steps at a time, beside a constant level with a name."""
    smooth = torch.tensor(losses).unfold(0, every, every).mean(1)
    plt.figure(figsize=(8, 2.8))
    plt.plot(range(every, len(losses) + 1, every), smooth, label=f"learned (mean of {every} steps)")
    plt.axhline(level, color="black", ls="--", label=name)
    plt.gca().set(xlabel="training step", ylabel="loss (mean square)", ylim=(0, None))
    plt.legend()
    plt.show()


def journeys(ways: dict) -> None:
    """{title: all stops, (n, 2) each} -> starts, ends, and the way of the first 40 points, all on
    one scale."""
    fig, axes = plt.subplots(1, len(ways), figsize=(8, 3.4), sharex=True, sharey=True)
    for ax, (title, stops) in zip(axes, ways.items()):
        ax.plot(*torch.stack(stops)[:, :40].unbind(2), color="black", lw=0.6, zorder=2)
        ax.scatter(*stops[0].T, s=2, color="tab:red", alpha=0.2, label="start")
        ax.scatter(*stops[-1].T, s=2, color="tab:blue", label="end", zorder=3)
        ax.set(title=title, aspect="equal", xlim=(-6, 6), ylim=(-6, 6))
    fig.legend(*axes[0].get_legend_handles_labels(), markerscale=5, ncols=2, fontsize=11,
               loc="outside lower center")
    plt.show()


def guided(ends: dict, means: Tensor, stds: Tensor, asked: int) -> None:
    """{strengths: ends (n, 2)}, 600 of each; circles: two standard deviations of each cluster, that
    of the asked one in its colour. Below: shares of the points nearest to each cluster; of those at
    the asked one, how far off their mean is, and their deviation."""
    down = math.ceil(len(ends) / 5)
    across = math.ceil(len(ends) / down)
    size = (8, down * (7 / across + 1.3))
    fig, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for ax, (title, x) in zip(axes.flat, ends.items()):
        ax.scatter(*x[:600].T, s=1.5, color="0.35")
        for k, (mean, std) in enumerate(zip(means.tolist(), stds.tolist())):
            colour = CLUSTERS[k] if k == asked else "0.6"
            ax.add_patch(Circle(mean, 2 * std, fill=False, color=colour, lw=2, zorder=3))
        nearest = torch.cdist(x, means).argmin(1)
        shares = ", ".join(f"{(nearest == k).double().mean():.0%}" for k in range(len(means)))
        there = x[nearest == asked]
        dx, dy = there.mean(0) - means[asked]
        ax.set_xlabel(f"{shares}\noff ({dx:+.2f}, {dy:+.2f})\n"
                      f"deviation {there.std(0).mean():.2f}", fontsize=10)
        ax.set_title(title, fontsize=12)
        ax.set(xlim=(-2.2, 3.2), ylim=(-3, 2.4), xticks=(-2, 0, 2), yticks=(-2, 0, 2),
               aspect="equal")
    for ax in axes.flat[len(ends):]:
        ax.set_axis_off()
    plt.show()


def convergence(counts: list, errors: dict) -> None:
    """{(title, solver): errors} over numbers of steps, beside orders 1 and 2."""
    titles = list(dict.fromkeys(title for title, _ in errors))
    fig, axes = plt.subplots(1, len(titles), figsize=(8, 3.6), sharey=True)
    for ax, title in zip(axes, titles):
        for solver, marker in (("euler", "o"), ("dpm++", "s")):
            ax.loglog(counts, errors[title, solver], marker + "-", label=solver)
        ax.loglog(counts, [0.6 / n for n in counts], "k:", label="1 / steps")
        ax.loglog(counts, [1.4 / n ** 2 for n in counts], "k--", label="1 / steps²")
        ax.set(title=title, xlabel="steps (= network evaluations)")
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
    axes[0].set_ylabel("error (distance)")
    axes[1].legend(fontsize=11)
    plt.show()


def shifts(times: dict, values: list, errors: dict) -> None:
    """{shift: times of the steps} on the left; {copies: error with each shift} on the right."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), width_ratios=(1, 1.4))
    for s, t in times.items():
        left.plot(t, "o-", ms=4, label=f"shift {s:.0f}")
    left.set(xlabel="step", ylabel="time t", title=f"times of {len(t) - 1} steps")
    left.legend(fontsize=11)
    for (n, found), colour in zip(errors.items(), ("tab:blue", "tab:red")):
        right.loglog(values, found, "s-", color=colour, label=f"n = {n}")
        best = min(range(len(found)), key=found.__getitem__)
        right.plot(values[best], found[best], "o", ms=15, mfc="none", mew=2, color=colour)
        right.axvline(math.sqrt(n), color=colour, ls=":")
    right.set(xlabel="shift (dotted: √n; ringed: best)", ylabel="error (distance)")
    right.set_title("DPM-Solver++, 10 steps")
    for ticks, set_ticks in (([0.25, 0.5, 1, 1.5, 3, 6, 12], right.set_xticks),
                             ([0.02, 0.05, 0.1, 0.2, 0.4], right.set_yticks)):
        set_ticks(ticks, ticks)
    right.minorticks_off()
    right.legend(fontsize=11)
    plt.show()


# ---------------------------------------------------------------------------------------- 2_latents

def picture_rows(rows: dict, titles: list = ()) -> None:
    """{name of a row: pictures}, a title above each column."""
    n = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), n, figsize=(8, 7.2 / n * len(rows) + 0.5))
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=11)
        for ax, picture in zip(line, pictures):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=11)
    plt.show()


def channels(untouched: tuple, muted: list, kept: list) -> None:
    """How far pictures are off (mean, two standard errors): as they are, with each channel muted,
    with the first k directions kept."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    means, bars = zip(*muted)
    left.errorbar(range(len(means)), means, bars, fmt="o", capsize=3)
    left.set(xlabel="channel that is muted", ylabel="off by, of 255",
             xticks=range(0, len(means), 3))
    means, bars = zip(*kept)
    right.errorbar(range(len(means)), means, bars, fmt="o-", capsize=3)
    right.set(xlabel="directions that are kept", xticks=range(0, len(means), 4), yscale="log")
    right.set_yticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
    right.set_ylim(0.7 * untouched[0], 1.4 * means[0])
    for ax in (left, right):
        ax.axhline(untouched[0], color="black", ls="--", label="untouched")
        ax.grid(alpha=0.3)
        ax.minorticks_off()
    right.legend()
    plt.show()


def place(picture: Image.Image, effects: dict, row: int, column: int, factor: int) -> None:
    """A picture and {name: effect (H, W)} of one place, from a millionth of the largest on."""
    fig, axes = plt.subplots(1, 1 + len(effects), figsize=(8, 3.1))
    axes[0].imshow(picture, interpolation="nearest")
    axes[0].set_title("the place", fontsize=11)
    for ax, (name, effect) in zip(axes[1:], effects.items()):
        shown = ax.imshow((effect / effect.max()).clamp(min=1e-6).log10(), vmin=-6, vmax=0,
                          cmap="magma", interpolation="nearest")
        ax.set_title(name, fontsize=11)
    for ax, colour in zip(axes, ("black", "white", "white")):
        corner = (column * factor - 0.5, row * factor - 0.5)
        ax.add_patch(Rectangle(corner, factor, factor, fill=False, edgecolor=colour, lw=2))
        ax.set(xticks=[], yticks=[])
    fig.colorbar(shown, ax=axes, label="squared effect,\npower of 10", shrink=0.75)
    plt.show()


def scales(times: Tensor, ratios: dict, floors: dict, told: tuple, measured: dict,
           noisy: dict) -> None:
    """{scale: ...}: ratio of noise to data over time, loss of the exact field of Gaussian data over
    time with the DiT's at some times as dots, and x_t at t = 0.5 as a picture."""
    fig = plt.figure(figsize=(8, 5.6))
    left = [["ratio"]] * 2 + [["loss"]] * 4
    right = [[name] for name in noisy for _ in range(2)]
    axes = fig.subplot_mosaic(np.hstack([left, right]).tolist(), width_ratios=(2.4, 1))
    for name, colour in zip(noisy, ("tab:blue", "tab:green", "tab:red")):
        axes["ratio"].semilogy(times, ratios[name], color=colour, label=name)
        equal = ratios[name].log().abs().argmin()
        axes["ratio"].plot(times[equal], 1, "o", color=colour, ms=8, fillstyle="none", mew=2)
        axes["loss"].semilogy(times, floors[name], color=colour, label=name)
        axes["loss"].semilogy(told, measured[name], "o", color=colour)
        axes[name].imshow(noisy[name], interpolation="nearest")
        axes[name].set_ylabel(name, fontsize=11)
        axes[name].set(xticks=[], yticks=[])
    axes["ratio"].axhline(1, color="black", lw=0.8)
    axes["ratio"].set(ylabel="noise / data", yticks=(0.01, 1, 100), xticklabels=[])
    axes["loss"].set(xlabel="t", ylabel="loss: line: Gaussian data, dots: DiT")
    for name in ("ratio", "loss"):
        axes[name].set(xlim=(0, 1))
        axes[name].grid(alpha=0.3)
        axes[name].minorticks_off()
    axes["loss"].legend(fontsize=11, loc="lower left")
    axes[next(iter(noisy))].set_title("$x_t$ at t = 0.5", fontsize=11)
    plt.show()


# ------------------------------------------------------------------------------------------- 3_mllm

AXES = {"time": "tab:blue", "height": "tab:orange", "width": "tab:green"}          # of M-RoPE


def token_strips(tokenizer, strips: dict) -> None:
    """{title: (token ids, number of queries)} -> one strip of boxes below another. Special tokens
    are orange, a picture's units green, text blue, queries red."""
    lines = {}
    for title, (ids, n_query) in strips.items():
        boxes = token_boxes(tokenizer, ids)
        boxes += [(f"q{i}", "#f2a6a6") for i in range(n_query)]
        lines[title] = in_lines(boxes)
    heights = [len(rows) for rows in lines.values()]
    size = (8, 0.3 * sum(heights) + 0.45 * len(heights))
    fig, axes = plt.subplots(len(heights), 1, figsize=size, height_ratios=heights)
    for ax, (title, rows) in zip(axes, lines.items()):
        draw_strip(ax, rows)
        ax.set_title(title, fontsize=12, loc="left")
    plt.show()


def token_boxes(tokenizer, ids: list) -> list:
    """Words and colours of tokens. Text alternates between two blues; units are numbered."""
    boxes = []
    units = itertools.count()
    for i, token in enumerate(ids):
        word = tokenizer.decode([token], keep_special=True)
        if token == tokenizer.special["image_pad"]:
            boxes.append((f"u{next(units)}", "#a8d8a8"))
        elif token in tokenizer.special.values():
            boxes.append((word.strip("<|>"), "#f4c27a"))
        else:
            word = word.replace("\n", "\\n").replace(" ", "\u00b7")
            boxes.append((word, ("#e2ecf8", "#cfe0f3")[i % 2]))
    return boxes


# Letters that a line of token boxes holds.
LETTERS = 92


def in_lines(boxes: list) -> list:
    """Boxes of words, broken into lines: [[(x, size, word, colour)]]"""
    rows = [[]]
    x = 0
    for word, colour in boxes:
        size = len(word) + 1
        if x + size > LETTERS:
            rows.append([])
            x = 0
        rows[-1].append((x, size, word, colour))
        x += size
    return rows


def draw_strip(ax, rows: list) -> None:
    """Words in coloured boxes, line under line."""
    for y, row in enumerate(rows):
        for x, size, word, colour in row:
            ax.add_patch(Rectangle((x, y + 0.08), size - 0.25, 0.84, facecolor=colour))
            ax.text(x + size / 2 - 0.12, y + 0.5, word, ha="center", va="center",
                    family="monospace", fontsize=9.5)
    ax.set(xlim=(0, LETTERS), ylim=(len(rows), 0))
    ax.axis("off")


def windows(c, square: Image.Image, wide: Image.Image, unit: int, maps: Tensor) -> None:
    """Two pictures as the ViT of config c cuts them; below, how much every unit of the square one
    differs after each block, (blocks, h, w), if this one unit is changed."""
    fig = plt.figure(figsize=(8, 5.6))
    top, bottom = fig.subfigures(2, 1, height_ratios=(1.5, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.75))
    draw_grid(left, square, c, "patches, in their order", of_patches=True)
    draw_grid(right, wide, c, "a wide picture: units, and windows as colours")

    axes = bottom.subplots(1, len(maps))
    for i, (ax, part) in enumerate(zip(axes, maps)):
        shown = ax.imshow(part.where(part > 1e-5, torch.nan), norm=LogNorm(1e-3, 1))
        ax.plot(unit % part.shape[1], unit // part.shape[1], "rx", ms=11, mew=3)
        reach = "whole picture" if i in c.full_attention else "windows"
        ax.set_title(f"after block {i}\n({reach})", fontsize=11)
        ax.set(xticks=[], yticks=[])
    bottom.colorbar(shown, ax=axes, label="relative difference", extend="both")
    plt.show()


def draw_grid(ax, image: Image.Image, c, title: str, of_patches: bool = False) -> None:
    """A picture as the ViT gets it: patches (thin lines), units (thick), windows (colours); numbers
    of units or of patches."""
    side = c.patch * c.merge
    w, h = smart_size(*image.size, side, c.area)
    ax.imshow(image.resize((w, h)), extent=(0, w, h, 0), alpha=0.45)
    for step, width in ((c.patch, 0.6), (side, 2.5)):
        ax.hlines(range(0, h + 1, step), 0, w, color="0.35", lw=width)
        ax.vlines(range(0, w + 1, step), 0, h, color="0.35", lw=width)
    index, valid = window_index((h // c.patch, w // c.patch), c)
    for i, (units, inside) in enumerate(zip(index, valid)):
        for unit in units[inside].tolist():
            x = unit % (w // side) * side
            y = unit // (w // side) * side
            ax.add_patch(Rectangle((x + 1, y + 1), side - 2, side - 2, facecolor="none",
                                   edgecolor=f"C{i}", lw=3))
            if not of_patches:
                ax.text(x + side / 2, y + side / 2, unit, ha="center", va="center", fontsize=13)
                continue
            for k in range(c.merge ** 2):
                row, column = divmod(k, c.merge)
                ax.text(x + c.patch * (column + 0.5), y + c.patch * (row + 0.5),
                        c.merge ** 2 * unit + k, ha="center", va="center", fontsize=9)
    ax.set_title(title, fontsize=12)
    ax.axis("off")


def mrope(positions: Tensor, pads: Tensor, agreement: dict) -> None:
    """Positions (3, S) and where the picture's tokens are; {decoder: {step: agreement (D,)}}, how
    well two tokens agree by their rotation alone, D steps apart."""
    fig, axes = plt.subplots(1, 3, figsize=(8, 3.3), width_ratios=(1.15, 1, 1))
    left, *others = axes
    for (name, colour), line, mark in zip(AXES.items(), positions, ("o-", "s--", "^:")):
        left.plot(line, mark, color=colour, ms=4, label=name)
    left.axvspan(pads[0] - 0.5, pads[-1] + 0.5, color="tab:green", alpha=0.12)
    left.set(xlabel="token (green: the picture)", ylabel="position")
    left.set_title("three positions", fontsize=12)
    left.legend(loc="upper left", fontsize=10)
    colours = ("tab:purple", AXES["height"], AXES["width"])
    for ax, (decoder, by_step) in zip(others, agreement.items()):
        for (step, values), colour, mark in zip(by_step.items(), colours, ("-", "--", ":")):
            ax.plot(values, mark, color=colour, lw=2, label=step)
        ax.set(xlabel="positions apart", ylim=(-0.05, 1.05))
        ax.set_title(f"agreement: {decoder}", fontsize=12)
    others[1].set_yticklabels([])
    others[1].legend(loc="lower left", fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.3)
    plt.show()


def read_by_queries(by_layer: Tensor, by_query: Tensor, labels: list) -> None:
    """(places, layers) and (places, Q), what the queries attend to, per cent: means over queries,
    and over layers; on one scale."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 5.2), sharey=True, width_ratios=(1, 1.5))
    titles = ("layer by layer\n(mean over queries)", "query by query\n(mean over layers)")
    top = max(by_layer.max().item(), by_query.max().item())
    for ax, values, title in zip(axes, (by_layer, by_query), titles):
        shown = ax.imshow(values, vmin=0, vmax=top, cmap="Blues", aspect="auto",
                          interpolation="nearest")
        ax.set_title(title, fontsize=12)
        ax.set_xticks(range(values.shape[1]))
        ax.tick_params(axis="x", labelsize=9)
        for (y, x), value in np.ndenumerate(values.numpy()):
            if value >= 4.5:
                colour = "white" if value > 0.6 * top else "black"
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=11)
    axes[0].set_xlabel("layer")
    axes[1].set_xlabel("query")
    fig.colorbar(shown, ax=axes, label="attention, % (columns add up to 100)", shrink=0.8)
    plt.show()


def probes(right: dict, chance: dict, taps: list, taught: int) -> None:
    """{fact: {model: share right (depths, Q)}}, of probes of each query alone: a panel for each
    fact, with the mean over the queries, and a band from the worst to the best."""
    fig, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey=True)
    for ax, (fact, by_model) in zip(axes.flat, right.items()):
        looks = (("o-", "tab:red"), ("s--", "0.4"))
        for (model, shares), (look, colour) in zip(by_model.items(), looks):
            depths = range(len(shares))
            worst, best = 100 * shares.amin(1), 100 * shares.amax(1)
            ax.fill_between(depths, worst, best, color=colour, alpha=0.15, lw=0)
            ax.plot(depths, 100 * shares.mean(1), look, color=colour, ms=5, label=model)
        ax.axhline(100 * chance[fact], color="black", ls=":", label="most common answer")
        ax.axvline(taught - 0.5, color="tab:blue", lw=1, label="taught from here on")
        ax.plot(taps, [4] * len(taps), "^", color="black", ms=5, label="tapped")
        ax.set_title(fact, fontsize=12)
        ax.set(ylim=(0, 103), xticks=depths)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("depth: state i enters layer i")
    for row in axes:
        row[0].set_ylabel("right, %\n(band: worst to best query)", fontsize=11)
    fig.legend(*ax.get_legend_handles_labels(), ncols=5, fontsize=10, columnspacing=1,
               loc="outside lower center")
    plt.show()


def cache(read: dict, lengths: Tensor, held: dict) -> None:
    """{way: positions read so far, token by token}; {keys: gigabytes that the released cache holds
    at these lengths}."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
    for (way, total), look in zip(read.items(), ("o-", "s--")):
        left.plot(range(1, len(total) + 1), total, look, ms=4, label=way)
    left.set(xlabel="tokens answered", ylabel="positions read so far", ylim=(0, None))
    left.set_title("toy: work", fontsize=12)
    for (keys, gigabytes), look in zip(held.items(), ("-", "--")):
        right.plot(lengths / 1000, gigabytes, look, lw=2, label=keys)
    right.set(xlabel="positions, thousands", ylabel="GB, bfloat16", ylim=(0, None))
    right.set_title("public 3B: memory", fontsize=12)
    for ax in (left, right):
        ax.legend(fontsize=10)
        ax.grid(alpha=0.3)
    plt.show()


# -------------------------------------------------------------------------------------------- 4_dit

def attention_matrices(forms: dict, picture: Image.Image, row: int, column: int) -> None:
    """{form: weights (H, N, N)}: those of head 0 and all heads' singular values; below, over a
    picture, what one place takes from each other in the first form, head by head."""
    fig = plt.figure(figsize=(8, 5))
    upper, lower = fig.subfigures(2, 1, height_ratios=(2, 1))
    *squares, spectrum = upper.subplots(1, len(forms) + 1, width_ratios=(1, 1, 1.15))
    # One scale for both, on which small weights can be told apart.
    scale = PowerNorm(0.4, 0, max(W[0].max().item() for W in forms.values()))
    for ax, (name, W), colour in zip(squares, forms.items(), ("tab:blue", "tab:red")):
        shown = ax.imshow(W[0], norm=scale, cmap="viridis", interpolation="nearest")
        ax.set_title(f"{name}, head 0", fontsize=11)
        ax.set(xlabel="place that gives", xticks=[], yticks=[])
        values = torch.linalg.svdvals(W).T
        lines = spectrum.semilogy(range(1, len(values) + 1), values, color=colour, lw=1)
        lines[0].set_label(name)
    squares[0].set_ylabel("place that takes")
    upper.colorbar(shown, ax=squares, label="weight", shrink=0.75)
    spectrum.set_title("singular values, all heads", fontsize=11)
    spectrum.set(xlabel="number", ylim=(1e-9, 3))
    spectrum.grid(alpha=0.3)
    spectrum.legend(fontsize=10)
    draw_row(lower, next(iter(forms.values())), picture, row, column)
    plt.show()


def draw_row(figure, W: Tensor, picture: Image.Image, row: int, column: int) -> None:
    """A picture with one place marked, and the place's row of W (H, N, N) over it, head by head."""
    h = w = math.isqrt(W.shape[-1])
    rows = W[:, row * w + column].view(-1, h, w)
    first, *axes = figure.subplots(1, len(rows) + 1)
    first.imshow(picture, extent=(-0.5, w - 0.5, h - 0.5, -0.5), interpolation="nearest")
    first.set_title("the place", fontsize=11)
    for head, ax in enumerate(axes):
        shown = ax.imshow(rows[head], vmin=0, vmax=rows.max(), cmap="viridis")
        ax.set_title(f"head {head}", fontsize=11)
    for ax, colour in zip((first, *axes), itertools.chain(["black"], itertools.repeat("white"))):
        ax.plot(column, row, "s", mfc="none", mec=colour, ms=8, mew=1.5)
        ax.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, label="weight", shrink=0.75)


def attention_cost(places: list, measured: dict, width: int) -> None:
    """{form: [(operations, bytes)] for each number of places}."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.3))
    for (name, costs), colour in zip(measured.items(), ("tab:blue", "tab:red")):
        for ax, values in zip(axes, zip(*costs)):
            ax.loglog(places, values, "o-", color=colour, label=name)
    for ax, title in zip(axes, ("operations", "bytes held, float32")):
        ax.axvline(width, color="black", ls=":", label="N = K")
        ax.set(xlabel="places N", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    plt.show()


def block_cost(blocks: dict) -> None:
    """{label: (parts of a block with the linear form, with the explicit one)}, parts as {name:
    operations}: bars in units of the block with the linear form."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    colours = ("tab:red", "tab:pink", "tab:green", "tab:orange")
    for i, pair in enumerate(blocks.values()):
        unit = sum(pair[0].values())
        for k, parts in enumerate(pair):
            x = i + 0.42 * (k - 0.5)
            below = 0
            for (part, n), colour in zip(parts.items(), colours):
                label = part if i == k == 0 else None
                ax.bar(x, n / unit, 0.38, bottom=below, color=colour, label=label)
                below += n / unit
            ax.text(x, below + 0.03, f"{below:.2f}", ha="center", fontsize=11)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set(xlabel="left bars: linear, right bars: explicit", ylabel="operations of the block\n"
           "(with the linear form: 1)", ylim=(0, below + 0.25))
    ax.legend(loc="upper left", fontsize=11)
    plt.show()


def reach(changes: dict, far: list, kinds: list) -> None:
    """Above, where an output changes with one token, {way: (h, w)}, in powers of 10 of the largest
    change; below, after each block, each token's distance (h, w) to one of them, in parts of the
    largest, and how many kinds of tokens there are."""
    fig = plt.figure(figsize=(8, 4.3))
    upper, lower = fig.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = upper.subplots(1, len(changes))
    for ax, (way, change) in zip(axes, changes.items()):
        share = change / change.max()
        reached = share > 1e-6
        shown = ax.imshow(share.where(reached, torch.nan).log10(), vmin=-4, vmax=0, cmap="magma")
        ax.set_facecolor("lightgrey")
        ax.set_title(f"{way}:\n{reached.sum()} of {reached.numel()} places", fontsize=11)
        ax.set(xticks=[], yticks=[])
    upper.colorbar(shown, ax=axes, label="change,\npower of 10", shrink=0.8)
    axes = lower.subplots(1, len(far))
    for i, (ax, distance, n) in enumerate(zip(axes, far, kinds)):
        shown = ax.imshow(distance / distance.max(), vmin=0, vmax=1, cmap="viridis")
        ax.set_title(f"after block {i}:\n{n} kinds", fontsize=10)
        ax.set(xticks=[], yticks=[])
    lower.colorbar(shown, ax=axes, label="distance,\nof the largest", shrink=0.8)
    plt.show()


def modulation(times: Tensor, curves: Tensor, names: tuple, spreads: dict) -> None:
    """One number of each block over time, (L, T); and {over what: standard deviations (6, D)} of
    the six vectors' numbers: means over channels, with 95 % intervals."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    for j, line in enumerate(curves):
        left.plot(times, line, label=f"block {j}")
    left.set_title("scale 1, one channel", fontsize=12)
    left.set(xlabel="t")
    left.legend(fontsize=9, ncols=2)
    rows = np.arange(len(names))
    for k, (over, values) in enumerate(spreads.items()):
        bars = 1.96 * values.std(1) / values.shape[1] ** 0.5
        right.errorbar(values.mean(1), rows + 0.2 * k, xerr=bars, fmt="os"[k], capsize=3,
                       label=over)
    right.set_yticks(rows + 0.1, names)
    right.invert_yaxis()
    right.set(xlabel="standard deviation", xlim=(0, None))
    right.legend(title="how much they differ", ncols=2, fontsize=9, loc="lower center",
                 bbox_to_anchor=(0.4, 1))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    plt.show()


def told_times(told: list, losses: dict) -> None:
    """{true time: losses (told, B)} in units of the loss at the true time, picture by picture:
    geometric means, with 95 % intervals over pictures."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    for (t, rows), mark in zip(losses.items(), "os^"):
        change = (rows / rows[told.index(t)]).log()
        half = 1.96 * change.std(1) / change.shape[1] ** 0.5
        middle = change.mean(1).exp()
        bars = torch.stack([middle * (1 - (-half).exp()), middle * (half.exp() - 1)])
        line, *_ = ax.errorbar(told, middle, bars, fmt=mark + "-", ms=5, capsize=3,
                               label=f"latents of t = {t}")
        ax.axvline(t, color=line.get_color(), ls=":")
    ax.axhline(1, color="grey", ls="--")
    ax.set(xlabel="t that the model is told (dotted: the true one)",
           ylabel="loss / loss if told\nthe true time", yscale="log", xticks=told)
    _, top = ax.get_ylim()
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    ax.set_yticks(ticks, ticks)
    ax.set_ylim(0.8, top)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=11)
    plt.show()


def chosen(times: tuple, among: Tensor, n_query: int) -> None:
    """among (times, L, B): how many queries places choose among, block by block; means over
    pictures with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(8, 3))
    for k, (t, values) in enumerate(zip(times, among)):
        bars = 1.96 * values.std(1) / values.shape[1] ** 0.5
        blocks = np.arange(len(values)) + 0.12 * (k - 1)
        ax.errorbar(blocks, values.mean(1), bars, fmt="os^"[k], capsize=3, label=f"t = {t}")
    ax.axhline(n_query, color="grey", ls="--", label="all alike")
    ax.set(xlabel="block", ylabel="chosen among\n(queries)", ylim=(0, n_query + 1),
           xticks=range(among.shape[1]), yticks=range(0, n_query + 1, 4))
    ax.grid(alpha=0.3)
    ax.legend(ncols=4, fontsize=11, loc="lower center", bbox_to_anchor=(0.5, 1))
    plt.show()


def query_maps(picture: Image.Image, maps: Tensor) -> None:
    """A picture, and how much of its attention each place gives to each query, maps (Q, h, w), on
    one scale, on which small shares can be told apart."""
    fig = plt.figure(figsize=(8, 5.6))
    left, right = fig.subfigures(1, 2, width_ratios=(1, 3))
    ax = left.subplots()
    ax.imshow(picture, interpolation="nearest")
    ax.set_title("the picture", fontsize=11)
    ax.set(xticks=[], yticks=[])
    scale = PowerNorm(0.4, 0, maps.max())
    axes = right.subplots(4, len(maps) // 4)
    for query, (ax, values) in enumerate(zip(axes.flat, maps)):
        shown = ax.imshow(values, norm=scale, cmap="viridis")
        ax.set_title(f"query {query}", fontsize=10)
        ax.set(xticks=[], yticks=[])
    right.colorbar(shown, ax=axes, label="share", shrink=0.8)
    plt.show()


def learned_batch(losses: list, level: float, rows: dict) -> None:
    """The loss of each step and the mean of ten, beside the predicted start; {label: pictures}, a
    row of drawings for each label."""
    n = len(losses)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), width_ratios=(1.1, 1))
    smooth = torch.tensor(losses).unfold(0, 10, 10).mean(1)
    left.semilogy(range(1, n + 1), losses, color="tab:blue", alpha=0.3, label="each step")
    left.semilogy(range(10, n + 1, 10), smooth, color="tab:blue", label="mean of 10 steps")
    left.axhline(level, color="black", ls="--", label="predicted start")
    left.set(xlabel="training step", ylabel="loss")
    left.grid(alpha=0.3)
    left.legend(fontsize=10, loc="lower left")

    pictures = [image for row in rows.values() for image in row]
    sheet = contact_sheet(pictures, columns=len(pictures) // len(rows))
    height = sheet.height / len(rows)
    right.imshow(sheet, interpolation="nearest")
    right.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows, fontsize=10)
    right.set(xticks=[], frame_on=False)
    right.tick_params(length=0)
    plt.show()


# ----------------------------------------------------------------------------------------- 5_ladder

def matrices(A: dict) -> None:
    """{wiring: its matrix (L, T)}, a panel each on one scale."""
    fig, axes = plt.subplots(3, 3, figsize=(8, 5.2), sharex=True, sharey=True)
    for ax, (wiring, values) in zip(axes.flat, A.items()):
        shown = ax.imshow(values, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        ax.set_title(wiring)
        ax.set(xticks=range(values.shape[1]), yticks=range(len(values)))
    fig.supxlabel("state i (the last one: the normed end)")
    fig.supylabel("block j")
    fig.colorbar(shown, ax=axes, label="$A_{ji}$", shrink=0.7)
    plt.show()


def reading(mask: Tensor, begin: int, apart: list) -> None:
    """mask (S, S), who attends to whom, queries from `begin` on; differences of their states."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.7))
    # What queries attend to in a colour of its own.
    shown = mask.int().numpy()
    shown[begin:] *= 2
    colours = ListedColormap(["white", "tab:blue", "tab:orange"])
    left.imshow(shown, cmap=colours, interpolation="nearest")
    left.axvline(begin - 0.5, color="black", ls=":")
    left.axhline(begin - 0.5, color="black", ls=":")
    left.set_title("blue: prompt, orange: queries", fontsize=12)
    left.set(xlabel="position attended to", ylabel="position that attends")
    right.plot(apart, "o-", color="tab:orange")
    right.set_title("one prompt against the other", fontsize=12)
    right.set(xlabel="depth", ylabel="difference of the queries'\nstates, relative",
              ylim=(0, None), xticks=range(len(apart)))
    right.grid(alpha=0.3)
    plt.show()


def depths(lengths: tuple, cosines: Tensor, taps: list) -> None:
    """Mean sizes of the queries' states and of their rungs, (N + 1,) each; and the cosine of the
    states of two depths (N + 1, N + 1)."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 4), width_ratios=(1, 1.35))
    for values, name, mark in zip(lengths, ("state", "behind the connector"), ("o-", "s--")):
        left.semilogy(values, mark, label=name)
    left.axvspan(min(taps) - 0.3, max(taps) + 0.3, color="0.92", label="tapped")
    left.set(xlabel="depth", ylabel="root mean square", xticks=range(len(cosines)))
    left.legend(fontsize=10)
    left.grid(alpha=0.3)
    shown = right.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    for (y, x), value in np.ndenumerate(cosines.numpy()):
        colour = "white" if abs(value) > 0.7 else "black"
        right.text(x, y, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center",
                   fontsize=9, color=colour)
    right.set(xlabel="depth", ylabel="depth", xticks=range(len(cosines)),
              yticks=range(len(cosines)))
    fig.colorbar(shown, ax=right, label="cosine")
    plt.show()


def gradients(norms: dict, taps: dict) -> None:
    """{wiring: norms at the queries' states (N + 1,)}, depth by depth; taps in another colour."""
    fig, axes = plt.subplots(1, len(norms), figsize=(8, 3.2), sharey=True)
    for ax, (wiring, values) in zip(axes, norms.items()):
        colours = ["tab:red" if i in taps[wiring] else "tab:blue" for i in range(len(values))]
        # On this axis 0 has no place, and a bar no foot.
        ax.scatter(range(len(values)), values, 60, colours)
        ax.set(title=f"{wiring} (red: tapped)", xlabel="depth", yscale="log",
               xticks=range(len(values)), xlim=(-0.5, len(values) - 0.5))
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("norm of the gradient\nat the queries' states")
    plt.show()


def study(curves: dict, right: dict) -> None:
    """curves: {wiring: {step: (seeds,) right, %}}, means and bars of two standard errors over the
    seeds; right: {wiring: (seeds,) right, %, at the end}, a row for each seed."""
    fig, (left, rows) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=[1, 1.1])
    for k, (wiring, mark) in enumerate((("ladder", "o-"), ("final", "s--"))):
        values = torch.stack(list(curves[wiring].values()))                    # (steps, seeds)
        steps = np.array(list(curves[wiring]))
        bars = 2 * values.std(1) / values.shape[1] ** 0.5
        # Beside each other, so that both bars can be seen.
        left.errorbar(steps + 0.02 * k * steps[-1], values.mean(1), bars, fmt=mark, ms=4,
                      capsize=2, label=wiring)
        # Where both have the same, both can be seen.
        rows.plot(right[wiring], range(len(right[wiring])), mark[0], color=f"C{k}", ms=9 - 4 * k)
    rows.hlines(range(len(right["ladder"])), right["ladder"], right["final"], color="0.7",
                zorder=0)
    left.set(xlabel="step", ylabel="right, %", xlim=(0, None), ylim=(0, 100))
    rows.set(xlabel="right at the end, %", ylabel="seed", yticks=range(len(right["ladder"])))
    rows.invert_yaxis()
    for ax in (left, rows):
        ax.grid(alpha=0.3)
    left.legend(fontsize=10, loc="lower right")
    plt.show()


def exchanged(moved: Tensor, error: Tensor, taps: list) -> None:
    """(L, N + 1) each: how far the velocity moves, in per cent, if a block is given another depth's
    rung, and the standard error; each block's own depth is framed."""
    fig, ax = plt.subplots(figsize=(8, 4.6))
    top = moved.max().item()
    shown = ax.imshow(moved, vmin=0, vmax=top, cmap="Oranges", aspect="auto",
                      interpolation="nearest")
    for (y, x), value in np.ndenumerate(moved.numpy()):
        text = "0" if x == taps[y] else f"{value:.0f}\n±{2 * error[y, x]:.0f}"
        colour = "white" if value > 0.7 * top else "black"
        ax.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    for y, x in enumerate(taps):
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, lw=2.5))
    ax.set(xlabel="depth of the rung it is given (the last one: the normed end)", ylabel="block",
           xticks=range(moved.shape[1]), yticks=range(len(moved)))
    fig.colorbar(shown, ax=ax, label="velocity moved, % of what the null prompt does")
    plt.show()


# --------------------------------------------------------------------------------------- 6_training

def wrapped(texts: list, width: int) -> list:
    """Texts broken into lines, as titles of small pictures."""
    return [textwrap.fill(text, width) for text in texts]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, of which right of n were seen; it holds at 0 and n, too."""
    z = 1.96
    middle = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return middle - half, middle + half


def stages(losses: dict, right: dict) -> None:
    """{task: {stage: losses (n,)}}: means; and {task: {stage: which pictures are right}}: shares,
    with intervals."""
    fig, (loss, share) = plt.subplots(1, 2, figsize=(8, 3.4))
    for k, (task, by_stage) in enumerate(losses.items()):
        places = np.arange(len(by_stage)) + 0.12 * k
        loss.plot(places, [row.mean().item() for row in by_stage.values()], "o-")
        counts = [(sum(found), len(found)) for found in right[task].values()]
        shares = np.array([100 * r / n for r, n in counts])
        low, high = 100 * np.array([wilson(*count) for count in counts]).T
        share.errorbar(places, shares, [shares - low, high - shares], fmt="o-", capsize=3,
                       label=task)
    for ax in (loss, share):
        ax.set_xticks(range(len(by_stage)), list(by_stage))
        ax.set_xlabel("after stage")
    loss.set(title="held-out loss", ylim=(0, None))
    share.set(title="pictures right, %\n(bar: 95 % interval)", ylim=(-2, 102))
    share.legend()
    plt.show()


def plane(ended: dict) -> None:
    """{title: where points end, (n, 2)}, beside the two clusters."""
    fig, axes = plt.subplots(1, len(ended), figsize=(8, 2.1), sharex=True, sharey=True)
    for ax, (title, x) in zip(axes, ended.items()):
        for centre in (-2, 2):
            ax.add_patch(Circle((centre, 0), 0.9, facecolor="none", edgecolor="tab:red"))
        ax.scatter(*x.T, s=4, color="tab:blue", alpha=0.5)
        ax.set_title(title.replace(", ", "\n"), fontsize=11)
        ax.set(xlim=(-4, 8), ylim=(-3, 3), xticks=(-2, 2), yticks=[], aspect="equal")
    fig.supxlabel("red: where 99 % of a cluster lie", fontsize=11)
    plt.show()


def loss_by_time(times: Tensor, by_time: dict) -> None:
    """{prompt: losses (times, n)}: means; and what a prompt costs above the first one, with bars of
    two standard errors."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    first = next(iter(by_time.values()))
    for name, rows in by_time.items():
        left.semilogy(times, rows.mean(1), "o-", ms=4)
        more = rows - first
        bars = 2 * more.std(1) / more.shape[1] ** 0.5
        right.errorbar(times, more.mean(1), bars, fmt="o-", ms=4, capsize=2, label=name)
    left.set(xlabel="t (1: noise)", ylabel="loss")
    # Where no line can be: near t = 0 no prompt costs anything.
    right.legend(loc="upper left", fontsize=10)
    right.set(xlabel="t (1: noise)", ylabel="loss above the right prompt's")
    plt.show()


# ---------------------------------------------------------------------------------------- 7_inspect

def label_row(ax, label: str) -> None:
    """Words to the left of a row's first panel."""
    ax.set_ylabel(label, rotation=0, ha="right", va="center")


def picture_grid(rows: list, down: list, across: list, size: float = 1.35) -> None:
    """A grid of pictures: rows, a list of lists; words `down` the left side, `across` the top."""
    n_row, n_column = len(rows), len(rows[0])
    figsize = (size * n_column + 1, size * n_row + 0.3)
    fig, axes = plt.subplots(n_row, n_column, figsize=figsize, squeeze=False)
    for row, pictures, label in zip(axes, rows, down):
        label_row(row[0], label)
        for ax, picture in zip(row, pictures):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[0], across):
        ax.set_title(label, fontsize=11)
    plt.show()


def added_maps(maps: Tensor, picture: Image.Image) -> None:
    """maps (steps, L, h, w), what each block adds: means over the first, middle and last steps, on
    one scale, beside the picture."""
    parts = maps.tensor_split(3)
    L = maps.shape[1]
    fig, axes = plt.subplots(len(parts), L + 1, figsize=(8, 3.5))
    top = max(part.mean(0).max().item() for part in parts)
    for row, part, when in zip(axes, parts, ("first", "middle", "last")):
        for j, (ax, values) in enumerate(zip(row, part.mean(0))):
            shown = ax.imshow(values, vmin=0, vmax=top, cmap="magma", interpolation="nearest")
            ax.set_title(f"block {j}" if when == "first" else "", fontsize=11)
        label_row(row[0], f"{when}\nsteps")
        row[-1].axis("off")
        for ax in row:
            ax.set(xticks=[], yticks=[])
    axes[0, -1].axis("on")
    axes[0, -1].imshow(picture, interpolation="nearest")
    fig.colorbar(shown, ax=axes, label="added, as a share of\nwhat it is added to", shrink=0.8)
    plt.show()


class Film:
    """Pictures with a slider, for a notebook to show."""

    def __init__(self, html: str, n: int):
        self.html = html
        self.n = n

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"a film of {self.n} steps"


def film(times: list, pictures: list, maps: Tensor) -> Film:
    """After each step: (x_t, x0) as pictures, and what each block adds, maps (steps, L, h, w)."""
    L = maps.shape[1]
    fig, axes = plt.subplots(1, L + 2, figsize=(8, 1.35))
    axes[0].set_title("$x_t$", fontsize=10)
    axes[1].set_title("foreseen $x_0$", fontsize=10)
    frames = [ax.imshow(picture, animated=True) for ax, picture in zip(axes, pictures[0])]
    for j, ax in enumerate(axes[2:]):
        frames.append(ax.imshow(maps[0, j], vmin=0, vmax=maps.max(), cmap="magma"))
        ax.set_title(f"block {j}", fontsize=10)
    for ax in axes:
        ax.set(xticks=[], yticks=[])

    def show(i: int) -> list:
        for frame, values in zip(frames, [*pictures[i], *maps[i]]):
            frame.set_data(values)
        axes[0].set_xlabel(f"t = {times[i]:.2f}", fontsize=10)
        return frames

    moving = FuncAnimation(fig, show, frames=len(times), interval=700)
    head, *frames = moving.to_jshtml(default_mode="once").split(PNG)
    plt.close(fig)
    return Film(PNG.join([head, *map(smaller, frames)]), len(times))


# How a page holds a picture.
PNG = "data:image/png;base64,"


def smaller(part: str) -> str:
    """What follows PNG in a page, up to the next one: the picture in 128 colours."""
    data, end = part.split('"', 1)
    image = Image.open(io.BytesIO(base64.b64decode(data.replace("\\\n", ""))))
    out = io.BytesIO()
    # A median cut alone blends what is small, such as a red circle, with the colours beside it.
    image.convert("RGB").quantize(128, kmeans=2).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + '"' + end


def attention_and_change(shares: Tensor, changes: Tensor) -> None:
    """(prompts, Q) each: per cent of attention, and change of the picture without the query. A mark
    for each prompt, a bar for their mean."""
    fig, axes = plt.subplots(2, 1, figsize=(8, 4.2), sharex=True)
    names = ("attention, %", "change of picture\nwithout it, of 255")
    for ax, values, name, colour in zip(axes, (shares, changes), names, ("tab:blue", "tab:red")):
        queries = range(values.shape[1])
        ax.bar(queries, values.mean(0), color=colour, alpha=0.5)
        for row, mark in zip(values, "o^s"):
            ax.plot(queries, row, f"k{mark}", ms=5, alpha=0.7)
        ax.set_ylabel(name, fontsize=11)
        ax.grid(axis="y", alpha=0.3)
    axes[0].axhline(100 / shares.shape[1], color="grey", ls="--")
    axes[0].set_title("bars: means; circle, triangle, square: the three prompts; "
                      "dashed: an equal share", fontsize=11)
    axes[1].set(xlabel="query", xticks=queries)
    plt.show()


def surgery(there: dict) -> None:
    """{what is done: {which object: is it in each picture}}: left what muting leaves of the
    prompt's own two objects, right what splicing brings in of the other's, and where there are more
    than two; 95 % intervals."""
    panels = {"mute": (*THINGS[:2], MORE), "splice": (*THINGS[2:], MORE)}
    fig, axes = plt.subplots(1, 2, figsize=(8, 4.6), sharey=True)
    for ax, (what, names) in zip(axes, panels.items()):
        rows = {"as it is": there["as it is"]}
        rows |= {done.split(" ", 1)[1]: found for done, found in there.items() if what in done}
        for (y, found), (k, name) in itertools.product(enumerate(rows.values()), enumerate(names)):
            low, high = wilson(sum(found[name]), len(found[name]))
            y += 0.22 * (k - 1)
            ax.plot([100 * low, 100 * high], [y, y], color=f"C{k}", lw=2, alpha=0.5)
            label = name if y < 0.5 else None
            ax.plot(100 * np.mean(found[name]), y, "o", color=f"C{k}", label=label)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(title=what, xlabel="% of the pictures", xlim=(-3, 103))
        ax.grid(alpha=0.3)
        # Below the axes: beside the dots, no place is free in every model.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=9,
                  columnspacing=1, handletextpad=0.2)
    axes[0].invert_yaxis()
    plt.show()


def probe_maps(accuracy: dict, chance: dict) -> None:
    """{fact: accuracy (depths, Q)}, {fact: chance}: a map each, from chance to 1 on one scale."""
    fig, axes = plt.subplots(1, len(accuracy), figsize=(8, 3.4), sharey=True)
    for ax, (fact, values) in zip(axes, accuracy.items()):
        above = (values - chance[fact]) / (1 - chance[fact])
        shown = ax.imshow(above, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower",
                          interpolation="nearest")
        ax.set_title(f"{fact}\n(0: {chance[fact]:.0%} right)", fontsize=11)
        ax.set(xlabel="query", xticks=range(0, values.shape[1], 4), yticks=range(len(values)))
    axes[0].set_ylabel("depth: state i enters layer i")
    fig.colorbar(shown, ax=axes, label="right, from chance (0) to all (1)")
    plt.show()


def traced(back: np.ndarray, labels: list, ends: list) -> None:
    """back (places, depths): what comes back of the red if this state alone is put right; the
    corrupted and the clean picture beside it."""
    fig = plt.figure(figsize=(8, 5.6))
    axes = fig.subplot_mosaic([["map", "corrupted"], ["map", "clean"]], width_ratios=(3.4, 1))
    shown = axes["map"].imshow(back, vmin=0, vmax=1, cmap="Reds", aspect="auto",
                               interpolation="nearest")
    for (y, x), value in np.ndenumerate(back):
        if abs(value) >= 0.05:
            colour = "white" if value > 0.6 else "black"
            axes["map"].text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=10,
                             color=colour)
    words = [label.replace("\n", "\\n") for label in labels]
    axes["map"].set_yticks(range(len(words)), words, fontsize=10)
    axes["map"].set_xticks(range(back.shape[1]), range(1, back.shape[1] + 1))
    axes["map"].set(xlabel="put right on entering layer", ylabel="the one state put right")
    fig.colorbar(shown, ax=axes["map"], extend="max", label="red that comes back")
    for name, picture in zip(("corrupted", "clean"), ends):
        axes[name].imshow(picture, interpolation="nearest")
        axes[name].set(title=name, xticks=[], yticks=[])
    plt.show()


# ---------------------------------------------------------------------------------------- 8_weights

def checkpoint_shares(shares: dict) -> None:
    """{part: its share of all tensors and of all numbers}, as two bars."""
    fig, ax = plt.subplots(figsize=(8, 2.2))
    left = np.zeros(2)
    for (part, widths), colour in zip(shares.items(), ("tab:blue", "tab:red", "tab:orange",
                                                       "tab:green")):
        ax.barh(["tensors", "numbers"], widths, left=left, color=colour, label=part)
        left += widths
    ax.set(xlabel="share of the checkpoint", xlim=(0, 1))
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=11)
    plt.show()


def parity(table: dict, bars: dict, mistakes: dict) -> None:
    """{what: differences to the released code} beside the bars, and {mistake: its difference}."""
    fig, ax = plt.subplots(figsize=(8, 5.4))
    rows = [*table, *mistakes]
    for row, what in enumerate(rows):
        if what in table:
            values = [max(value, 1e-9) for value in table[what]]
            ax.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.7, ms=7)
        else:
            ax.plot(mistakes[what], row, "X", color="tab:orange", ms=7)
        ax.plot(bars.get(what, 1e-5), row, "|", color="tab:red", ms=14, mew=2)
    ax.axvline(2 ** -24, color="grey", ls="--")
    ax.text(2 ** -24 * 0.85, len(rows) - 0.7, "float32", rotation=90, ha="right", va="bottom",
            color="grey")
    ax.set(xscale="log", xlim=(6e-10, 3))
    ax.set_xlabel("relative difference to the released code (red: the bar; 0 is drawn at 1e-9)")
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    plt.show()


def memory(rows: dict) -> None:
    """{what: {part: bytes}} as stacked bars, beside the sizes of some GPUs."""
    fig, ax = plt.subplots(figsize=(8, 3.2))
    colours = {"mllm": "tab:blue", "dcae": "tab:green", "dit": "tab:orange", "ladder": "tab:red",
               "while it works": "grey"}
    named = set()
    for row, held in enumerate(rows.values()):
        start = 0
        for part, n in held.items():
            label = None if part in named else part
            ax.barh(row, n / 1e9, left=start, color=colours[part], label=label)
            named.add(part)
            start += n / 1e9
    for gpu in (8, 16, 24, 40):
        ax.axvline(gpu, color="black", ls=":")
        ax.text(gpu, -0.85, f"{gpu} GB", ha="center", fontsize=10)
    ax.set(xlabel="GB ($10^9$ bytes); dotted: GPUs", xlim=(0, 44))
    ax.set_ylim(len(rows) - 0.4, -0.8)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.legend(loc="upper right", fontsize=10)
    plt.show()


def portraits(models: dict) -> None:
    """{model: size of the queries' states at every depth, how far two prompts are apart, cosine of
    each state and the next}, over depth as a share of the layers."""
    fig, axes = plt.subplots(1, 3, figsize=(8, 3.4))
    titles = ("size of the states\n(of the last but one: 1)", "two prompts apart,\nrelative",
              "cosine of a state\nand the next")
    for (name, (size, apart, alike)), mark in zip(models.items(), ("s:", "o-", "^--")):
        depth = np.linspace(0, 1, len(size))
        axes[0].semilogy(depth, size / size[-2], mark, ms=4)
        axes[1].plot(depth, apart, mark, ms=4, label=name)
        axes[2].plot(depth[:-1], alike, mark, ms=4)
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("depth / layers", fontsize=11)
    axes[0].legend([*models], loc="lower right", fontsize=9)
    plt.show()
