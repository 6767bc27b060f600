"""One page that explains a drawing or an answer: `python sample.py "..." --explain`.

A drawing: its tokens, the way from noise, and for every DiT block where cross-attention looked and
how much it added. An answer: for each of its tokens, where on the pictures the decoder looked. All
of it is read by plain forward hooks, which change no number and are removed afterwards. What is
kept are means and a few moments, so that memory does not grow with the number of steps.

The page here is one picture. The one to touch is made in engine/explain_html.py, of what is watched
here.

Dimension key: L rungs = blocks, N = h * w latent positions, Q queries, S slots of queries
(mixer.py), D width, H, G heads of queries and keys, K head dim, T tokens read.
"""
import contextlib
import math
import textwrap
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from engine.mixer import slots
from mllm import ASK, DRAW
from vit import apply_rope

# ------------------------------------------------------------------------------------ watching


class Mean:
    """A running mean, on the CPU, and what was added last."""

    def __init__(self):
        self.n = 0
        self.value = 0.0
        self.last = None

    def add(self, x):
        self.n += 1
        self.last = x.detach().float().cpu()
        self.value = self.value + (self.last - self.value) / self.n


@contextlib.contextmanager
def hooked(modules, hooks):
    """Each module has its forward hook while the block runs."""
    handles = [m.register_forward_hook(hook) for m, hook in zip(modules, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Drawn:
    """What is kept of a drawing, of the row that is asked for (the last one), not of those that
    guidance compares with:

    steps: `moments` of its steps
    attention: of every block (N, Q), the softmax, a mean over heads and steps
    added: of every block (N,), the norm of what cross-attention adds, as a share of the norm of
        what it is added to, a mean over steps
    maps: for each of `steps`, of that step alone: attention to each slot (L, S, h, w) and what is
        added (L, h, w), on a grid of at most MAP_SIDE x MAP_SIDE
    """

    def __init__(self, steps, moments=8):
        self.at = set(np.linspace(0, steps - 1, moments).round().astype(int).tolist())
        self.steps = []
        self.attention = []
        self.added = []
        self.maps = []
        self.pictures = []

    def watch(self, dit, steps):
        """Passes on what `denoise` yields; the hooks are there until it ends."""
        self.attention = [Mean() for _ in dit.blocks]
        self.added = [Mean() for _ in dit.blocks]
        modules, hooks = [], []
        for block, attention, added in zip(dit.blocks, self.attention, self.added):
            modules += [block.cross.softmax, block.cross]
            hooks += [softmax_hook(attention), added_hook(added)]
        with hooked(modules, hooks):
            for step in steps:
                if step.i in self.at:
                    self.steps.append(step)
                    self.maps.append(self.maps_of(step.x_t.shape[2:]))
                yield step

    def maps_of(self, grid):
        """Of the step just done, on this grid (h, w) of latents."""
        attention = torch.stack([per_slot(mean.last) for mean in self.attention])  # (L, N, S)
        added = torch.stack([mean.last for mean in self.added])                    # (L, N)
        attention = attention.transpose(1, 2).unflatten(2, grid)                   # (L, S, h, w)
        return pooled(attention), pooled(added.unflatten(1, grid))

    def decoded(self, model):
        """The pictures (x_t, x0) of each of `steps`; decoded once, whoever asks."""
        if not self.pictures:
            for step in self.steps:
                self.pictures.append((model.decode(step.x_t)[0], model.decode(step.x0)[0]))
        return self.pictures


# Side of the largest map that is kept of a moment, in places.
MAP_SIDE = 16


def per_slot(weights):
    """Attention over queries (..., Q) -> over slots (..., S): what all queries of a slot get."""
    sums = [weights[..., slot.start:slot.stop].sum(-1) for slot in slots(weights.shape[-1])]
    return torch.stack(sums, -1)


def pooled(maps):
    """(..., h, w) -> the same with at most MAP_SIDE rows and columns, means of what lies there."""
    factor = min(1, MAP_SIDE / max(maps.shape[-2:]))
    sides = [max(1, round(side * factor)) for side in maps.shape[-2:]]
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.adaptive_avg_pool2d(flat, sides).reshape(*maps.shape[:-2], *sides)


def softmax_hook(mean):
    def hook(module, args, weights):                                   # (B, H, N, Q)
        mean.add(weights[-1].float().mean(0))
    return hook


def added_hook(mean):
    def hook(module, args, y):                                         # (B, N, D)
        x = args[0]
        mean.add(y[-1].float().norm(dim=1) / x[-1].float().norm(dim=1))
    return hook


def watched_encoding(model, prompt, images):
    """-> the prompt as a Batch of one row; and for every rung and slot, (L, S, T), how much its
    queries read of each of the T tokens before them: attention, a mean over heads and over the
    slot's queries. It is that of the layer below the tap, which wrote the state; 0 for a rung that
    taps the embeddings; a mixture for a wiring that mixes states. What is left to 1 went to
    queries."""
    below = max(model.ladder.taps)
    attention = [layer.attn for layer in model.mllm.layers[:below]]
    read = []
    hooks = [reading_hook(read, model.config.n_query) for _ in attention]
    with hooked(attention, hooks), torch.no_grad(), warnings.catch_warnings():
        # That the prompt is cut was said when it was drawn.
        warnings.simplefilter("ignore")
        batch = model.mllm.tokenize([prompt], [images], DRAW, "<|vision_start|>",
                                    model.config.max_prompt)
        model.query_states([prompt], [images], below)
    nothing = torch.zeros(len(slots(model.config.n_query)), batch.ids.shape[1])
    below_each = torch.stack([nothing, *read])                             # (T', S, T)
    routes = model.ladder.matrix()[:, :below + 1].detach().cpu()           # (L, T')
    return batch, torch.einsum("li,ist->lst", routes, below_each)


def reading_hook(read, n_query):
    """Adds to `read` what the last n_query positions attend to before them, (S, T); computed once
    more, as by `last_position_hook`."""
    def hook(attn, args, y):
        x, angle = args[:2]
        q = apply_rope(attn.heads(attn.q(x[:, -n_query:])), angle[:, :, -n_query:])
        k = apply_rope(attn.heads(attn.k(x)), angle)                       # (1, G, T + Q, K)
        q = q.unflatten(1, (k.shape[1], -1)).float()                       # (1, G, H/G, Q, K)
        scores = q @ k[:, :, None].transpose(3, 4).float() / math.sqrt(attn.head_dim)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
        # Query i sees the T tokens and the queries up to itself.
        scores = scores.masked_fill(later.triu(1 + x.shape[1] - n_query), -torch.inf)
        weights = scores.softmax(-1).mean((0, 1, 2))[:, :-n_query].cpu()   # (Q, T)
        read.append(torch.stack([weights[slot].mean(0) for slot in map(list, slots(n_query))]))
    return hook


def watched_answer(model, question, images):
    """-> the answer's token ids, those of `model.ask`; and for each of them, and for the end, where
    the position that predicts it looks: [(T,)], a mean over heads and the decoder's last third of
    layers."""
    n = max(1, len(model.mllm.layers) // 3)
    layers = model.mllm.layers[-n:]
    seen = [[] for _ in layers]
    with hooked([layer.attn for layer in layers], [last_position_hook(rows) for rows in seen]):
        batch = model.mllm.tokenize([question], [images], ASK)
        ids = model.mllm.generate(batch)[0]
    return ids, [torch.stack(of_layers).mean(0) for of_layers in zip(*seen)]


def last_position_hook(rows):
    """Adds to `rows` the attention weights of the sequence's last position, (T,). They are computed
    once more from the layer's input and keys, as the layer does not return its softmax."""
    def hook(attn, args, y):
        x, angle, mask, cache, layer = args
        q = apply_rope(attn.heads(attn.q(x[:, -1:])), angle[:, :, -1:])    # (1, H, 1, K)
        k = cache.layers[layer][0].float()                                 # (1, G, T, K)
        q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3).float()         # (1, G, H/G, K)
        scores = q @ k.transpose(2, 3) / math.sqrt(attn.head_dim)          # (1, G, H/G, T)
        rows.append(scores.softmax(-1).mean((0, 1, 2)).cpu())
    return hook


# ------------------------------------------------------------------------------------ the page

STEPS_TITLE = (
    "Denoising from noise (t = 1) to the picture (t = 0): x_t after a step, "
    "and x0, the estimate of the clean picture used in it"
)
BLOCKS_LEGEND = (
    "added: norm of the cross-attention output relative to its input, at each position.  "
    "query: its attention weight there\n"
    "(summed over queries: 1), for those that vary most.  "
    "Bars: each query's mean weight (up), norm of its rung (down, grey)"
)
ANSWER_LEGEND = (
    "Red: attention to each of the {} image tokens from the position that predicts the answer's "
    "token, averaged over all heads\n"
    "of the decoder's last third of layers. Percentage: its sum over all image tokens; the rest "
    "goes to the text."
)


class Page:
    """A figure 1000 units wide whose axes are placed by hand, (x, y, width, height) from the upper
    left corner."""

    def __init__(self, height):
        # Slow to import, and needed for --explain only.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        self.height = height
        self.figure = Figure((10, height / 100), dpi=150)
        self.canvas = FigureCanvasAgg(self.figure)

    def axes(self, x, y, w, h):
        bottom = 1 - (y + h) / self.height
        return self.figure.add_axes((x / 1000, bottom, w / 1000, h / self.height))

    def text(self, x, y, text, size=8, **how):
        top = 1 - y / self.height
        self.figure.text(x / 1000, top, text, size=size, va="top", parse_math=False, **how)

    def show(self, x, y, side, picture, title="", **how):
        """A picture (PIL, or a map of numbers) in a square, under its title."""
        axes = self.axes(x, y, side, side)
        axes.set_title(title, size=7, pad=2, parse_math=False)
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.spines[:].set(color="0.8")
        return axes.imshow(picture, interpolation="nearest", **how)

    def tokens(self, x, y, width, words, lines=6):
        """Words in light boxes, as many as fit in so many lines; "... +n" for n left out."""
        letter, dots = 6.7, 60                      # width of a letter, and of the "... +n"
        left, line = x, 0
        for i, word in enumerate(words):
            word = word.replace("\n", "\\n")[:40]
            if left + letter * len(word) > x + width - dots:
                if line == lines - 1:
                    self.text(left, y + 20 * line, f"... +{len(words) - i}")
                    break
                left, line = x, line + 1
            color = ("#e3edf7", "#f7eedd")[i % 2]
            box = dict(facecolor=color, edgecolor="none", pad=2)
            visible = word.replace(" ", "\u00b7")
            self.text(left, y + 20 * line, visible, family="monospace", bbox=box)
            left += letter * len(word) + 6

    def colorbar(self, x, y, shown, title):
        """The colours of a map and the numbers that they stand for."""
        axes = self.axes(x, y, 90, 8)
        self.figure.colorbar(shown, cax=axes, orientation="horizontal", ticks=shown.get_clim(),
                             format="%.2g")
        axes.tick_params(labelsize=6, length=2, pad=1)
        axes.set_title(title, size=7, pad=2)

    def bars(self, x, y, up, down, marked):
        """A bar for each query, up (0 to 1, the marked ones in another colour) and down (0 to 0.5,
        grey)."""
        n = len(up)
        colors = ["C1" if i in marked else "C0" for i in range(n)]
        axes = self.axes(x, y, 70, 78)
        axes.bar(range(n), up, color=colors)
        axes.bar(range(n), -down, color="0.75")
        axes.set(xlim=(-1, n), ylim=(-0.5, 1), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(f"queries 0 to {n - 1}", size=7, pad=2)

    def image(self):
        with warnings.catch_warnings():
            # A letter that the font lacks is a box here; the page to touch has it.
            warnings.filterwarnings("ignore", "Glyph")
            self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


# -------------------------------------------------------------------------------- of a drawing

@torch.no_grad()
def drawing(model, prompt, images, picture, rungs, drawn):
    """One page on a drawing: its prompt, the way from noise, and what each block read of its rung.
    rungs (L, Q, caption_dim), drawn: what `Drawn` kept -> PIL image"""
    shown = [picture, *images[:3]]
    side = min(220, 600 // len(shown))
    steps_y = 100 + side
    blocks_y = 440 + side
    n_row = math.ceil(len(drawn.attention) / 2)
    page = Page(blocks_y + 98 * n_row + 10)
    page.text(20, 12, "How this picture came about: prompt, denoising, cross-attention", 12)
    for i, image in enumerate(shown):
        title = "input" if i else f"the picture, {picture.width} x {picture.height}"
        page.show(20 + (side + 10) * i, 60, side, image, title)
    show_prompt(page, 30 + (side + 10) * len(shown), side, model, prompt, images, rungs)
    show_steps(page, steps_y, model, drawn)
    norms = rungs.float().norm(dim=2).cpu().numpy()                        # (L, Q)
    show_blocks(page, blocks_y, drawn, norms)
    return page.image()


def show_prompt(page, x, side, model, prompt, images, rungs):
    """From x to the right margin, `side` high: the prompt's tokens, and what becomes of them."""
    tokenizer = model.mllm.tokenizer
    ids = tokenizer.encode(prompt)[:model.config.max_prompt]
    n_rung, n_query, _ = rungs.shape
    after = " after the input" if images else ""
    text = (f"The prompt as {len(ids)} tokens. The MLLM reads them{after}, then {n_query} queries, "
            f"whose hidden states become the rungs, one for each of the {n_rung} DiT blocks.")
    page.text(x, 56, textwrap.fill(text, int((980 - x) / 6)))
    words = [tokenizer.decode([id]) for id in ids]
    page.tokens(x, 112, 980 - x, words, max(1, side // 20 - 3))


def show_steps(page, y, model, drawn):
    """Two rows of pictures: x_t after each of these steps, and the estimate x0 that it used."""
    page.text(20, y - 10, STEPS_TITLE, 9)
    for i, (step, (x_t, x0)) in enumerate(zip(drawn.steps, drawn.decoded(model))):
        x = 62 + 116 * i
        page.show(x, y + 28, 108, x_t, f"t = {step.t:.2f}")
        page.show(x, y + 150, 108, x0)
    page.text(20, y + 76, "x_t", 9)
    page.text(20, y + 198, "x0", 9)


def show_blocks(page, y, drawn, norms, each=3):
    """For every block: how much it adds where, the attention to `each` of its queries, and bars for
    all queries. norms (L, Q): of the rungs."""
    title = "Cross-attention of every block over the picture, averaged over steps and heads"
    page.text(20, y - 62, title, 9)
    page.text(20, y - 44, BLOCKS_LEGEND, 7)
    weights = np.stack([mean.value.numpy() for mean in drawn.attention])   # (L, N, Q)
    added = np.stack([mean.value.numpy() for mean in drawn.added])         # (L, N)
    per_query = weights.mean(1)                                            # (L, Q)
    grid = drawn.steps[-1].x_t.shape[2:]
    # The queries whose weight varies most over the picture.
    chosen = (-weights.std(1)).argsort(1)[:, :each]                        # (L, each)
    # A single bright position would dim all others.
    brightest = np.quantile(np.take_along_axis(weights, chosen[:, None], 2), 0.99)

    n_row = math.ceil(len(weights) / 2)
    for j, queries in enumerate(chosen):
        x = 20 + 496 * (j // n_row)
        top = y + 98 * (j % n_row)
        page.text(x, top + 16, f"block {j}\nrung {j}\nnorm {norms[j].mean():.3g}", 7)
        magma = page.show(x + 62, top, 78, added[j].reshape(grid), "added",
                          vmin=0, vmax=added.max(), cmap="magma")
        for i, q in enumerate(queries):
            viridis = page.show(x + 152 + 82 * i, top, 78, weights[j, :, q].reshape(grid),
                                f"query {q}", vmin=0, vmax=brightest, cmap="viridis")
        up = per_query[j] / per_query.max()
        down = norms[j] / norms.max() / 2
        page.bars(x + 400, top, up, down, marked=queries)
    page.colorbar(690, y - 44, magma, "added: output / input norm")
    page.colorbar(870, y - 44, viridis, "attention weight")


# -------------------------------------------------------------------------------- of an answer

def answer(model, question, images, ids, seen):
    """One page on an answer: for each of its tokens where on the pictures the decoder looked. ids,
    seen: what `watched_answer` gave -> PIL image"""
    tokenizer = model.mllm.tokenizer
    batch = model.mllm.tokenize([question], [images], ASK)
    is_image = batch.ids[0] == tokenizer.special["image_pad"]              # (T,)
    positions = is_image.nonzero()[:, 0].cpu()
    # Of a long answer the first tokens.
    n_shown = max(5, 24 // len(images) - 1)
    heat = [weights[positions] for weights in seen[:n_shown]]              # (U of all pictures,)

    top, n_column = 196, 6
    n_row = math.ceil((len(heat) + 1) / n_column) * len(images)
    page = Page(top + 190 * n_row + 20)
    page.text(20, 12, "How this answer came about: where the decoder looked at the picture", 12)
    question_ids = tokenizer.encode(question)
    for y, title, row in ((46, "Question", question_ids), (92, "Answer", ids)):
        page.text(20, y, title, 9)
        page.tokens(100, y, 880, [tokenizer.decode([id]) for id in row], 2)
    page.text(20, 138, ANSWER_LEGEND.format(len(positions)), 7)
    words = [tokenizer.decode([id]).strip()[:16] for id in ids]
    titles = [f"{word} ({h.sum():.0%})" for word, h in zip([*words, "(end)"], heat)]
    merge = model.config.mllm.vision.merge
    grids = [(h // merge, w // merge) for _, (h, w) in batch.pictures]
    show_heat(page, top, images, grids, titles, heat, n_column)
    return page.image()


def show_heat(page, top, images, grids, titles, heat, n_column):
    """The pictures, and again for each token of the answer, in grey under a red map of attention.
    grids: (h, w) of each picture's units."""
    brightest = max(h.max() for h in heat)
    for k, image in enumerate(images):
        page.show(20, top + 190 * k, 150, image, "input")
    for i, (title, h) in enumerate(zip(titles, heat), 1):
        x = 20 + 162 * (i % n_column)
        parts = h.split([rows * columns for rows, columns in grids])
        for k, (image, part, grid) in enumerate(zip(images, parts, grids)):
            y = top + 190 * (i // n_column * len(images) + k)
            whole = dict(extent=(0, image.width, image.height, 0))
            grey = page.show(x, y, 150, image.convert("L"), title,
                             cmap="gray", vmin=0, vmax=255, **whole)
            red = grey.axes.imshow(part.view(grid).numpy(), cmap="Reds", alpha=0.6, vmin=0,
                                   vmax=brightest, interpolation="nearest", **whole)
    page.colorbar(870, 152, red, "attention to one token")
