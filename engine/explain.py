"""One page that explains a drawing or an answer: `python sample.py "..." --explain`. Plain forward hooks on the model as it stands.

A drawing: its tokens, the way from noise, and for every DiT block where it looked at its rung and how much that added. An answer: where on the
picture the decoder looked at each of its tokens. What is kept are means and some moments: it does not grow with steps.
Dimension key: L rungs = blocks, N places in the latents, Q queries, H, G heads of queries and keys, T tokens read.
"""
import math
import textwrap

import numpy as np
import torch
from PIL import Image

from mllm import ASK
from sample import decode
from vit import apply_rope


class Mean:
    """A running mean, on the CPU: what is kept does not grow with how much was added."""

    def __init__(self):
        self.n, self.value = 0, 0.0

    def add(self, x):
        self.n += 1
        self.value = self.value + (x.detach().float().cpu() - self.value) / self.n


class Drawn:
    """What is kept of a drawing: `moments` of its steps; of every block, as means over all steps, mass (N, Q), the softmax averaged over
    heads, and added (N,), the norm of what cross-attention adds as a share of what it is added to. Of the row that is asked for (the last
    one), not of those that guidance compares with."""

    def __init__(self, steps, moments=8):
        self.at = set(np.linspace(0, steps - 1, moments).round().astype(int).tolist())
        self.steps, self.mass, self.added = [], [], []

    def watch(self, dit, steps):
        """Passes on what `denoise` yields; the hooks are there until it ends."""
        hooks, self.mass, self.added = [], [Mean() for _ in dit.blocks], [Mean() for _ in dit.blocks]
        for block, mass, added in zip(dit.blocks, self.mass, self.added):
            look = lambda _, args, y, to=mass: to.add(y[-1].float().mean(0))                         # (B, H, N, Q) -> (N, Q)
            size = lambda _, args, y, to=added: to.add(y[-1].float().norm(dim=1) / args[0][-1].float().norm(dim=1))      # (N,)
            hooks += [block.cross.softmax.register_forward_hook(look), block.cross.register_forward_hook(size)]
        try:
            for step in steps:
                if step.i in self.at:
                    self.steps.append(step)
                yield step
        finally:
            for hook in hooks:
                hook.remove()


def watched_answer(model, question, images):
    """-> the answer's token ids, those of `model.ask`, and for each of them, and the end, where the position that gave it looked: [(T,)], the
    mean over heads and the decoder's last third of layers. Computed beside the model, whose attention may stay as fused as it likes."""
    layers, seen, left = model.mllm.layers[-max(1, len(model.mllm.layers) // 3):], [], []

    def look(attn, args, _):
        x, angle, _, cache, layer = args
        q, k = attn.q(x[:, -1:]).unflatten(2, (-1, attn.head_dim)).transpose(1, 2), cache.layers[layer][0]       # (1, H, 1, K), (1, G, T, K)
        q = apply_rope(q, angle[:, :, -1:]).unflatten(1, (k.shape[1], -1)).flatten(2, 3)             # (1, G, H/G, K)
        left.append((q.float() @ k.float().transpose(2, 3) / math.sqrt(attn.head_dim)).softmax(-1).mean((0, 1, 2)).cpu())
        if len(left) == len(layers):
            seen.append(torch.stack(left).mean(0)), left.clear()
    hooks = [layer.attn.register_forward_hook(look) for layer in layers]
    try:
        ids, = model.mllm.generate(model.mllm.prepare([question], [images], ASK))
    finally:
        for hook in hooks:
            hook.remove()
    return ids, seen


class Page:
    """A figure 1000 units wide whose axes are placed by hand, (x, y, width, height) from the upper left corner."""

    def __init__(self, tall):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        self.tall, self.figure = tall, Figure((10, tall / 100), dpi=150)
        self.canvas = FigureCanvasAgg(self.figure)

    def axes(self, x, y, w, h):
        return self.figure.add_axes((x / 1000, 1 - (y + h) / self.tall, w / 1000, h / self.tall))

    def text(self, x, y, text, size=8, **how):
        return self.figure.text(x / 1000, 1 - y / self.tall, text, size=size, va="top", parse_math=False, **how)

    def show(self, x, y, side, picture, title="", **how):
        """A picture (PIL, or a map of numbers) in a square, under its title."""
        axis = self.axes(x, y, side, side)
        axis.set_title(title, size=7, pad=2, parse_math=False)
        axis.set(xticks=[], yticks=[], anchor="N"), axis.spines[:].set(color="0.8")
        return axis.imshow(picture, interpolation="nearest", **how)

    def tokens(self, x, y, width, words, lines=6):
        """Words in light boxes, as many as fit in so many lines, and ... where some are left out."""
        letter, left, line = 6.7, x, 0
        for i, word in enumerate(words):
            word = word.replace("\n", "\\n")[:40]
            if left + letter * len(word) > x + width - 60:                                           # 60: room for the dots
                if line == lines - 1:
                    self.text(left, y + 20 * line, f"... +{len(words) - i}")
                    break
                line, left = line + 1, x
            box = dict(facecolor=("#e3edf7", "#f7eedd")[i % 2], edgecolor="none", pad=2)
            self.text(left, y + 20 * line, word.replace(" ", "\u00b7"), family="monospace", bbox=box)
            left += letter * len(word) + 6

    def scale(self, x, y, shown, title):
        """The colours of a map and the numbers they stand for."""
        axis = self.axes(x, y, 90, 8)
        self.figure.colorbar(shown, cax=axis, orientation="horizontal", ticks=shown.get_clim(), format="%.2g")
        axis.tick_params(labelsize=6, length=2, pad=1)
        axis.set_title(title, size=7, pad=2)

    def image(self):
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def blocks(page, y, mass, added, norms, grid, each=3):
    """For every block: how much it adds where, where the `each` queries with the most uneven mass are listened to, and bars for all queries.
    Arrays: mass (L, N, Q), added (L, N), norms (L, Q) of the rungs; grid (h, w)."""
    share, rows = mass.mean(1), -(-len(mass) // 2)                                                   # (L, Q)
    chosen = (-mass.std(1)).argsort(1)[:, :each]                                                     # (L, each)
    most = np.quantile(np.take_along_axis(mass, chosen[:, None], 2), 0.99)                           # one that shouts would dim all others
    for j, (weight, add, norm) in enumerate(zip(mass, added, norms)):
        x, top = 20 + 496 * (j // rows), y + 98 * (j % rows)
        page.text(x, top + 16, f"block {j}\nrung {j}\nnorm {norm.mean():.3g}", 7)
        how = page.show(x + 62, top, 78, add.reshape(grid), "adds", vmin=0, vmax=added.max(), cmap="magma")
        for i, q in enumerate(chosen[j]):
            much = page.show(x + 152 + 82 * i, top, 78, weight[:, q].reshape(grid), f"query {q}", vmin=0, vmax=most, cmap="viridis")
        axis = page.axes(x + 400, top, 70, 78)
        axis.bar(range(len(norm)), share[j] / share.max(), color=["C1" if q in chosen[j] else "C0" for q in range(len(norm))])
        axis.bar(range(len(norm)), -norm / norms.max() / 2, color="0.75")
        axis.set(xlim=(-1, len(norm)), ylim=(-0.5, 1), xticks=[], yticks=[]), axis.spines[:].set_visible(False)
        axis.set_title(f"all, 0 to {len(norm) - 1}", size=7, pad=2)
    page.scale(690, y - 44, how, "adds: share of what was there"), page.scale(870, y - 44, much, "share of a query")


@torch.no_grad()
def drawing(model, prompt, images, picture, rungs, kept):
    """One page on a drawing: its prompt, the way from noise, and what each block heard of its rung (L, Q, caption_dim). -> PIL image"""
    tokenizer, n, shown = model.mllm.tokenizer, len(kept.mass), [picture, *images[:3]]
    side = min(220, 600 // len(shown))
    strip, low = 100 + side, 440 + side
    page = Page(low + 98 * -(-n // 2) + 10)
    page.text(20, 12, "How this picture came about: prompt, denoising, cross-attention", 12)
    for i, image in enumerate(shown):
        page.show(20 + (side + 10) * i, 60, side, image, "input" if i else f"the picture, {picture.width} x {picture.height}")
    ids, x = tokenizer.encode(prompt)[:model.config.max_prompt], 30 + (side + 10) * len(shown)
    said = f"The prompt in its {len(ids)} tokens; the MLLM reads them{' after the input' if images else ''}, then {rungs.shape[1]} queries, "
    page.text(x, 56, textwrap.fill(said + f"whose states at {n} depths are the rungs, one for each block of the DiT", int((980 - x) / 6)))
    page.tokens(x, 112, 980 - x, [tokenizer.decode([i]) for i in ids], max(1, side // 20 - 3))
    page.text(20, strip - 10, "Denoising from noise (t = 1) to the picture (t = 0): the path, and the clean picture foreseen a step earlier", 9)
    for i, step in enumerate(kept.steps):
        for row, latents in enumerate((step.x_t, step.x0)):
            page.show(62 + 116 * i, strip + 28 + 122 * row, 108, decode(model, latents)[0], "" if row else f"t = {step.t:.2f}")
    page.text(20, strip + 76, "x_t", 9), page.text(20, strip + 198, "x0", 9)
    page.text(20, low - 62, "Cross-attention of every block over the picture, mean of all steps and heads", 9)
    page.text(20, low - 44, "adds: how much the rung changes at each place.  query: its share of the attention there (all shares add up to 1),\n"
              "of the queries whose share depends most on the place.  Bars, all queries: mean share up, norm of the rung down (grey)", 7)
    mass, added = (np.stack([mean.value.numpy() for mean in means]) for means in (kept.mass, kept.added))
    blocks(page, low, mass, added, rungs.float().norm(dim=2).cpu().numpy(), kept.steps[-1].x_t.shape[2:])
    return page.image()


def answer(model, question, images, ids, seen):
    """One page on an answer: for each of its tokens where on the pictures the decoder looked when it gave it. -> PIL image"""
    tokenizer, batch = model.mllm.tokenizer, model.mllm.prepare([question], [images], ASK)
    merge, words = model.config.mllm.vision.merge, [*(tokenizer.decode([i]).strip()[:16] for i in ids), "(end)"]
    place = (batch.ids[0] == tokenizer.special["image_pad"]).nonzero()[:, 0].cpu()
    heat = [attention[place] for attention in seen[:max(5, 24 // len(images) - 1)]]                  # a long answer's first tokens
    start, top, grids = 196, max(h.max() for h in heat), [(h // merge, w // merge) for _, (h, w) in batch.pictures]
    rows = -(-(len(heat) + 1) // 6) * len(images)
    page = Page(start + 190 * rows + 20)
    page.text(20, 12, "How this answer came about: where the decoder looked at the picture", 12)
    page.text(20, 46, "Question", 9), page.tokens(100, 46, 880, [tokenizer.decode([i]) for i in tokenizer.encode(question)], 2)
    page.text(20, 92, "Answer", 9), page.tokens(100, 92, 880, [tokenizer.decode([i]) for i in ids], 2)
    page.text(20, 138, f"Red: attention to each of the {len(place)} image tokens by the position that gave the answer's token, mean over the\n"
              "decoder's last third of layers and all heads; in %: their sum, the rest went to the text", 7)
    for k, image in enumerate(images):
        page.show(20, start + 190 * k, 150, image, "what was asked about")
    for i, (word, h) in enumerate(zip(words, heat), 1):
        for k, (image, part) in enumerate(zip(images, h.split([h * w for h, w in grids]))):
            x, y = 20 + 162 * (i % 6), start + 190 * (i // 6 * len(images) + k)
            whole = dict(extent=(0, image.width, image.height, 0))
            under = page.show(x, y, 150, image.convert("L"), f"{word} ({h.sum():.0%})", cmap="gray", vmin=0, vmax=255, **whole)
            shown = under.axes.imshow(part.view(grids[k]).numpy(), vmin=0, vmax=top, cmap="Reds", alpha=0.6, interpolation="nearest", **whole)
    page.scale(870, 152, shown, "attention to one token")
    return page.image()
