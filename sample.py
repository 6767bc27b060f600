"""Sampling: the flow schedule, two solvers by hand, guidance, and the command line.

    python sample.py "a red circle left of a blue square"
    python sample.py "make the circle green" --image circle.png
    python sample.py --ask "how many circles?" --image circle.png
    python sample.py "a red circle left of a blue square" --explain              # also out-explain.png: where each block looked

The ordinary differential equation dx/dt = v(x, t) is followed from noise (t = 1) to data (t = 0); see the box in tbac.py.
Sources: DPM-Solver++ (arXiv 2211.01095, algorithm 2), InstructPix2Pix for two-way guidance (arXiv 2211.09800, equation 3).
"""
import argparse
import json
import math
import os
import pathlib
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from engine.data import open_image, sheet, to_images
from tbac import TBAC


@dataclass
class Step:
    """After step i: the time t reached, the latents x_t there, and the estimate x0 of clean latents that the step used."""
    i: int
    t: float
    x_t: torch.Tensor
    x0: torch.Tensor


def shifted(t, s):
    """A shift s > 1 moves times towards the noise, the odds t / (1 - t) by the factor s."""
    return s * t / (1 + (s - 1) * t)


def schedule(steps, shift=3.0):
    """(steps + 1,) times from almost 1 (noise) to 0. A shift above 1 spends more steps near the noise."""
    return shifted(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift)


def euler(x, x0, before, times, i):
    """Straight on along v = (x - x0) / t, from times[i] to times[i + 1]."""
    t, s = times[i], times[i + 1]
    return x + (s - t) * (x - x0) / t


def dpm_2m(x, x0, before, times, i):
    """DPM-Solver++ 2M: exact for a constant x0; `before`, the last step's x0, gives its slope in lambda = log((1 - t) / t).

    First order where there is no last step yet, and on the step that ends at t = 0, where lambda is infinite.
    """
    t, s = times[i], times[i + 1]
    if s == 0:
        return x0
    lam = [math.log((1 - u) / u) for u in times[max(i - 1, 0):i + 2]]
    h = lam[-1] - lam[-2]
    if before is not None:
        x0 = x0 + (x0 - before) * h / (lam[-2] - lam[-3]) / 2                    # x0 in the middle of the step
    return s / t * x - (1 - s) * math.expm1(-h) * x0


SOLVERS = {"dpm++": dpm_2m, "euler": euler}


def guide(v, guidance, image_guidance):
    """v: velocities of (null, both), or of (null, image only, both) -> the guided one. All channels take part."""
    if len(v) == 2:
        return v[0] + guidance * (v[1] - v[0])
    return v[0] + image_guidance * (v[1] - v[0]) + guidance * (v[2] - v[1])


@torch.no_grad()
def conditions(model, prompts, images, image_guidance, negative):
    """-> rungs (L, k B, Q, caption_dim) of the k groups that guidance compares, the null prompts first, and k: 3 if there is an image to be guided
    by, else 2."""
    images = [[] for _ in prompts] if images is None else [list(row) for row in images]
    null = [negative] * len(prompts)
    if not any(images) or image_guidance <= 1:                                   # both rows see the images
        return model.encode([*null, *prompts], images * 2), 2
    black = [[Image.new("RGB", image.size) for image in row] for row in images]
    return model.encode([*null, *null, *prompts], [*black, *images, *images]), 3


@torch.no_grad()
def denoise(model, prompts, images=None, *, steps=20, guidance=4.5, image_guidance=None, negative="", shift=3.0, solver="dpm++",
            size=None, eps=None, generator=None, heard=None):
    """Yields a Step after every step; the last x_t is the picture, in the DiT's latent space.

    prompts: list of str; images: None, or per prompt a list (maybe empty) of PIL images, used for editing; size: side in pixels or
    (height, width); image_guidance: if not the model's own; eps: (B, C, h, w) starting noise, else drawn; heard: what `conditions` gave, if
    more than one picture is to be drawn of the same prompts, or if rungs were changed. A prompt without images is guided by its text alone,
    also beside others that have some: for it the first two of the three velocities are the same.
    """
    c, B = model.config, len(prompts)
    if steps < 1 or solver not in SOLVERS:
        raise ValueError(f"steps = {steps} and solver = {solver!r}: expected at least 1 step and one of {list(SOLVERS)}")
    height, width = size if isinstance(size, (tuple, list)) else (c.size if size is None else size,) * 2
    if min(height, width) < 1 or height % c.dcae.factor or width % c.dcae.factor:
        raise ValueError(f"size {width}x{height}: both sides must be positive multiples of {c.dcae.factor}")
    image_guidance = c.image_guidance if image_guidance is None else image_guidance
    dev = model.ladder.queries.device
    if eps is None:
        eps = torch.randn(B, c.dit.channels, height // c.dcae.factor, width // c.dcae.factor, device=dev, generator=generator)
    rungs, k = heard or conditions(model, prompts, images, image_guidance, negative)         # (L, k B, Q, caption_dim)
    keys_values = model.dit.condition(rungs)                                     # of each block, once for all steps
    times, x, before = schedule(steps, shift).tolist(), eps.float().to(dev), None
    for i, t in enumerate(times[:-1]):
        t1000 = torch.full((k * B,), int(1000 * t), device=dev)                  # whole numbers, as in the released sampler
        v = model.dit(torch.cat([x] * k).to(rungs.dtype), t1000, keys_values).float()        # (k B, C, h, w)
        x0 = x - t * guide(v.chunk(k), guidance, image_guidance)
        x, before = SOLVERS[solver](x, x0, before, times, i), x0
        yield Step(i, times[i + 1], x, x0)


@torch.no_grad()
def decode(model, latents):
    return to_images(model.dcae.decode(latents.to(model.dit.proj_out.weight.dtype)))


def generate(model, prompts, images=None, **settings):
    """`denoise` to the end and decode -> list of PIL images."""
    *_, last = denoise(model, prompts, images, **settings)
    return decode(model, last.x_t)


# -------------------------------------------------------------------------------------------------------- command line

def save_png(image, file, settings):
    """Writes the picture with its prompt and settings as text chunks; an interrupted write leaves nothing half done."""
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    new = file.with_name(f".{file.name}.new")
    image.save(new, "png", pnginfo=info)
    os.replace(new, file)


def options(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompt", nargs="?", help="what to draw, or how to change the picture given by --image")
    p.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures to edit or to ask about")
    p.add_argument("--ask", metavar="QUESTION", help="answer a question instead of drawing")
    p.add_argument("--out", default="out.png", help="file to write (default: out.png; several pictures: also out-1.png, out-2.png, ...)")
    p.add_argument("--n", type=int, default=1, help="how many pictures, the first from --seed, the next from --seed + 1, ...")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=20, help="(default: 20)")
    p.add_argument("--guidance", type=float, default=4.5, help="how much to follow the text, 1 = no guidance (default: 4.5)")
    p.add_argument("--image-guidance", type=float, help="how much to keep of the image (default: the model's)")
    p.add_argument("--negative", default="", help="what the picture should not be like")
    p.add_argument("--solver", choices=SOLVERS, default="dpm++")
    p.add_argument("--size", help="side in pixels, or WIDTHxHEIGHT (default: the model's)")
    p.add_argument("--model", default=str(pathlib.Path(__file__).parent / "toy" / "weights"), help="folder (default: the toy)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster; for many pictures")
    p.add_argument("--explain", action="store_true", help="also write OUT-explain.png, one page on the (first) picture: how it became clear, "
                   "where each DiT block looked, the rungs, the tokens; with --ask: where the answer looked")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: the model's)")
    a = p.parse_args(argv)
    if a.prompt is None and a.ask is None:
        if a.image:
            p.error("no prompt: it stands before --image, where it is not taken for one more file")
        p.print_help()
        raise SystemExit(0)
    if a.prompt is not None and a.ask is not None:
        p.error("give a prompt, to draw, or --ask, not both")
    return a


def parse_size(text):
    """"512" -> 512, "640x480" (width x height) -> (480, 640)."""
    try:
        sides = [int(s) for s in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(f"--size {text}: expected a number of pixels or WIDTHxHEIGHT")
    return sides[0] if len(sides) == 1 else (sides[1], sides[0])


def compile_parts(model, once):
    """torch.compile for the DiT step and the decoder (on a GPU with CUDA graphs). `once` draws a picture, so that compiling happens now and
    not in the first real one. Where it fails (no compiler, an old card), a warning, and the model stays as it was."""
    parts, start = (model.dit, model.dcae.decoder), time.perf_counter()
    for part in parts:
        part.compile(mode="reduce-overhead" if model.ladder.queries.is_cuda else "default")
    try:
        once()
        print(f"compiled in {time.perf_counter() - start:.1f} s")
    except RuntimeError as e:                                                    # all that torch.compile raises is one of these
        for part in parts:
            part._compiled_call_impl = None                                      # undoes part.compile
        warnings.warn(f"--compile: goes on without, {type(e).__name__}: {str(e).splitlines()[0]}", stacklevel=2)


def files_of(a, out):
    """-> the files of the pictures, and all files that will be written"""
    pictures = [] if a.ask is not None else [out] if a.n == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(a.n)]
    return pictures, [*pictures, *([out] if len(pictures) > 1 else []), *([beside(out)] if a.explain else [])]


def draw(a, model, images, out):
    """The pictures one by one, each from its own seed, so that a picture does not depend on how many others are asked for."""
    size = parse_size(a.size) if a.size else None
    settings = dict(guidance=a.guidance, image_guidance=a.image_guidance, negative=a.negative, solver=a.solver, size=size, steps=a.steps)
    heard = conditions(model, [a.prompt], [images], a.image_guidance, a.negative)            # once for all pictures
    one, pictures = dict(prompts=[a.prompt], images=[images], heard=heard), []
    said = settings | dict(prompt=a.prompt, model=str(a.model), images=a.image)
    files, every_file = files_of(a, out)
    if a.compile:
        compile_parts(model, lambda: generate(model, **one, **settings | dict(steps=1)))
    if a.explain:
        from engine import explain                                            # only now, since it imports this file
        kept = explain.Drawn(a.steps)
    with tqdm(total=a.n * a.steps, desc="draw", unit="step") as bar:
        for seed in range(a.seed, a.seed + a.n):
            steps = denoise(model, **one, **settings, generator=torch.Generator(a.device).manual_seed(seed))
            if a.explain and seed == a.seed:
                steps = kept.watch(model.dit, steps)
            for step in steps:
                bar.update()
                latents = step.x_t
            pictures += decode(model, latents)
            save_png(pictures[-1], files[seed - a.seed], said | dict(seed=seed))
    if a.n > 1:
        labels = [*a.image, *(f"seed {a.seed + i}" for i in range(a.n))]
        every = [*(image.resize(pictures[0].size) for image in images), *pictures]
        save_png(sheet(every, labels, scale=max(1, 256 // min(pictures[0].size))), out, said)
    if a.explain:
        save_png(explain.drawing(model, a.prompt, images, pictures[0], heard[0][:, -1], kept), beside(out), said | dict(seed=a.seed))
    print("wrote", *every_file)


def beside(out):
    """Where --explain writes."""
    return out.with_name(f"{out.stem}-explain.png")


def ask(a, model, images, out):
    """Prints the answer; with --explain, also the page on it."""
    if not a.explain:
        return print(model.ask(a.ask, images))
    from engine import explain
    ids, seen = explain.watched_answer(model, a.ask, images)
    print(model.mllm.tokenizer.decode(ids).strip())
    save_png(explain.answer(model, a.ask, images, ids, seen), beside(out), dict(question=a.ask, model=str(a.model), images=a.image))
    print("wrote", beside(out), file=sys.stderr)                                 # what is printed to be read on is the answer alone


def main():
    a = options()
    try:
        out = pathlib.Path(a.out)
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"--out {out}: " + ("is a folder" if out.is_dir() else f"there is no folder {out.parent}"))
        if a.ask is None and out.suffix.lower() not in ("", ".png"):
            raise ValueError(f"--out {out}: pictures are written as PNG, call it {out.with_suffix('.png')}")
        if a.n < 1 or not math.isfinite(a.guidance) or not math.isfinite(a.image_guidance or 0):
            raise ValueError(f"--n {a.n} --guidance {a.guidance} --image-guidance {a.image_guidance}: expected at least 1 picture, and numbers")
        if a.explain and (a.compile or a.ask is not None and not a.image):
            raise ValueError("--explain " + ("reads what --compile fuses away: leave one out" if a.compile else "and --ask need an --image"))
        images = [open_image(file) for file in a.image]
        for file in files_of(a, out)[1]:
            if file.exists() and any(file.samefile(image) for image in a.image):
                raise ValueError(f"{file} is one of --image and would be lost: give another --out")
        model = TBAC.load(a.model, a.device, a.dtype and getattr(torch, a.dtype))
        a.image_guidance = model.config.image_guidance if a.image_guidance is None else a.image_guidance
        if a.ask is not None:
            ask(a, model, images, out)
        else:
            draw(a, model, images, out)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
