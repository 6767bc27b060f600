"""The pieces of work that are measured, one for each row of the tables, and how ours does them; and
what the command lines of bench/ have in common."""
import json
import pathlib
from dataclasses import dataclass

import torch
from PIL import Image

import sample
from engine import distributed, fast
from engine.command import Parser
from engine.device import machine
from engine.pictures import to_pixels
from mllm import ASK
from tbac import TBAC

CAPTION = ("A red circle left of a blue square, drawn with chalk on a dark wall, in the light of a "
           "late summer evening, with some dust in the air.")
ORDER = "make the circle green"


# ------------------------------------------------------------------------------- pieces of work

@dataclass
class Task:
    """One row of the table. kind: the method of Ours and of Theirs that does it."""
    kind: str
    prompts: list
    images: list | None = None
    size: int | None = None             # side in pixels, where it is not the model's
    steps: int = 20                     # of a picture
    cached: bool = False                # the latents of the target are known
    grad_checkpoint: bool = False


def picture(size, seed=0):
    """A picture of noise over a colour ramp; the pixels do not matter."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 200, size)[None, :, None]
    x = ramp + 55 * torch.rand(size, size, 3, generator=generator)
    return Image.fromarray(x.byte().numpy())


def all_tasks(size):
    """{name: Task}, with pictures of this side in pixels."""
    image = picture(size)
    black = Image.new("RGB", image.size)
    captions = [f"{CAPTION} Number {i}." for i in range(4)]
    orders = [ORDER, "remove the square"]
    sources = [[picture(size, 1)], [picture(size, 2)]]
    again = dict(grad_checkpoint=True)
    return {
        "encode a prompt with its null prompt": Task("encode", ["", CAPTION]),
        "encode an edit (three rows)":
            Task("encode", ["", "", ORDER], [[black], [image], [image]]),
        "20-step picture, encode to latents": Task("draw", [CAPTION]),
        "20-step edit": Task("draw", [ORDER], [[image]]),
        "four pictures of one prompt": Task("draw", [CAPTION] * 4),
        "training step t2i": Task("train", captions),
        "training step t2i, latents cached": Task("train", captions, cached=True),
        "training step edit": Task("train", orders, sources),
        "training step t2i, --grad-checkpoint": Task("train", captions, **again),
        "training step edit, --grad-checkpoint": Task("train", orders, sources, **again),
        "answer of 64 tokens about a picture": Task("answer", ["what is in the image?"], [[image]]),
    }


@dataclass
class Inputs:
    """What both sides are given, equal for both: starting noise, targets, times."""
    config: object                      # TBACConfig
    device: str
    dtype: torch.dtype

    def noise(self, n, size=None):
        generator = torch.Generator().manual_seed(n)
        shape = sample.latent_shape(self.config, size)
        return torch.randn(n, *shape, generator=generator).to(self.device)

    def training(self, n, size=None):
        """-> pixels (n, 3, H, W), times (n,), noise (n, C, h, w)"""
        pictures = [picture(size or self.config.size, seed) for seed in range(n)]
        pixels = to_pixels(pictures, self.device, self.dtype)
        times = torch.linspace(0.1, 0.9, n, device=self.device)
        return pixels, times, self.noise(n, size).to(self.dtype)


class Ours:
    """One method for each kind of work: Task -> a function that does it once and returns a tensor
    to compare."""

    def __init__(self, model, plain=False):
        self.model = model if plain else fast.enable(model)
        queries = model.ladder.queries
        self.inputs = Inputs(model.config, queries.device.type, queries.dtype)

    def prepare(self, task):
        return getattr(self, task.kind)(task)

    def encode(self, task):
        return torch.no_grad()(lambda: self.model.encode(task.prompts, task.images))

    def draw(self, task):
        eps = self.inputs.noise(len(task.prompts), task.size)

        def run():
            *_, last = sample.denoise(self.model, task.prompts, task.images, steps=task.steps,
                                      eps=eps, size=task.size)
            return last.x_t
        return run

    def train(self, task):
        model = self.model
        pixels, t, eps = self.inputs.training(len(task.prompts))
        cached = model.dcae.encode(pixels) if task.cached else None

        def run():
            if task.grad_checkpoint:
                distributed.checkpoint_blocks(model)
            x0 = cached if task.cached else model.dcae.encode(pixels)
            loss = model.loss(x0, task.prompts, task.images, t, eps).mean()
            loss.backward()
            model.zero_grad()
            if task.grad_checkpoint:
                undo_checkpoints(model)
            return loss
        return run

    def answer(self, task):
        @torch.no_grad()
        def run():
            batch = self.model.mllm.tokenize(task.prompts, task.images, ASK)
            return torch.tensor(self.model.mllm.generate(batch, 64)[0])
        return run


def undo_checkpoints(model):
    for module in model.modules():
        vars(module).pop("forward", None)


def distance(a, b):
    """|a - b| / |b|; 0 where they are equal, also where both are 0"""
    a, b = a.detach().float(), b.detach().float()
    difference = (a - b).norm()
    return (difference / b.norm()).item() if difference else 0.0


# ------------------------------------------------------------------------ of the command lines

def parser(doc, folder):
    """With the options that bench.bench and bench.parts share. folder: what it must hold."""
    p = Parser(description=doc)
    p.add_argument("folder", type=pathlib.Path, help=f"made by bench.make_random: {folder}")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--only", default="", help="rows whose name contains this")
    p.add_argument("--out", type=pathlib.Path, help="results as JSON")
    return p


def load(args, plain=False):
    """-> Ours, the tasks that are asked for"""
    torch.set_num_threads(args.threads)
    model = TBAC.load(args.folder / "ours", args.device, getattr(torch, args.dtype))
    tasks = {name: task for name, task in all_tasks(model.config.size).items()
             if args.only in name}
    if not tasks:
        raise SystemExit(f"error: --only {args.only}: no row has this in its name")
    return Ours(model, plain), tasks


def write(args, rows, **run):
    """To --out, if it is given: the rows and what they were measured with."""
    if args.out:
        run |= machine(args.device) | dict(dtype=args.dtype, pairs=args.pairs)
        args.out.write_text(json.dumps(dict(run=run, rows=rows), indent=1) + "\n")
