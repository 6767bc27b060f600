"""Sampling: the flow schedule, two solvers, guidance, and the command line.

    python sample.py "a red circle left of a blue square"
    python sample.py "make the circle green" --image circle.png
    python sample.py --ask "how many circles?" --image circle.png
    python sample.py "a red circle left of a blue square" --explain    # also out-explain.html, .png
    python sample.py --serve                                           # a page to draw on

The ordinary differential equation dx/dt = v(x, t) is followed from noise (t = 1) to data (t = 0);
see the box in tbac.py. The method ends with `generate`; what follows it is the command line.
Sources: DPM-Solver++ (arXiv 2211.01095, algorithm 2), InstructPix2Pix for two-way guidance (arXiv
2211.09800, equation 3).

Dimension key: B pictures, k rows that guidance compares for each, L, Q, C, h, w as in tbac.py.
"""
import argparse
import math
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine import command, explain, explain_html, fast, limits, mixer, page, words
from engine.device import set_threads
from engine.files import write_text
from engine.live import Live, check_start
from engine.outputs import check_outputs, outputs, save_png
from engine.pictures import contact_sheet, open_image
from engine.sources import check_shape, check_text
from mllm import matching_images
from tbac import TBAC, TBACConfig

TOY_FOLDER = pathlib.Path(__file__).parent / "toy" / "weights"


# ------------------------------------------------------------------------- schedule and solvers

def shifted(t: Tensor, shift: float) -> Tensor:
    """Multiplies the odds t / (1 - t) by `shift`: above 1, times move towards the noise."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float = 3.0) -> Tensor:
    """(steps + 1,) times from almost 1 (noise) to 0. A shift above 1 spends more steps near the
    noise. At t = 1 itself x_t says nothing of the data, and lambda (below) is infinite; 0.999 is
    the released scheduler's."""
    return shifted(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64), shift)


def euler(x: Tensor, x0: Tensor, x0_prev: Tensor | None, times: list[float], i: int) -> Tensor:
    """From times[i] to times[i + 1], straight on along v = (x - x0) / t. x (B, C, h, w) at
    times[i]; x0: the estimate of clean latents there; x0_prev: that of the step before (dpm_2m)."""
    t, t_next = times[i], times[i + 1]
    return x + (t_next - t) * (x - x0) / t


def lam(t: float) -> float:
    """lambda, the scale on which DPM-Solver measures a step: half the log signal-to-noise ratio."""
    return math.log((1 - t) / t)


def dpm_2m(x: Tensor, x0: Tensor, x0_prev: Tensor | None, times: list[float], i: int) -> Tensor:
    """DPM-Solver++ 2M. With signal 1 - t, noise t and lambda = log((1 - t) / t), the equation has
    an exact solution where x0 is constant in lambda:

        x_next = (t_next / t) x + (1 - t_next) (1 - exp(-h)) x0,   h = lambda_next - lambda

    The previous step's x0_prev gives the slope of x0 in lambda, and so x0 in the middle of the
    step (second order). First order where there is no previous step, and on the final step to
    t = 0, where lambda is infinite and x0 is the answer.
    """
    t, t_next = times[i], times[i + 1]
    if t_next == 0:
        return x0
    h = lam(t_next) - lam(t)
    if x0_prev is not None:
        h_prev = lam(t) - lam(times[i - 1])
        x0 = x0 + (x0 - x0_prev) * h / h_prev / 2
    # -expm1(-h) is 1 - exp(-h), without its rounding error.
    return t_next / t * x - (1 - t_next) * math.expm1(-h) * x0


SOLVERS = {"dpm++": dpm_2m, "euler": euler}


# ------------------------------------------------------------------------------------- guidance

def guide(v: list[Tensor], guidance: float, image_guidance: float) -> Tensor:
    """Velocities of (null, cond), or of (null, image only, both) -> the guided one. All channels
    take part (the public code of arXiv 2212.09748, the first DiT, guides three of its four)."""
    if len(v) == 2:
        null, cond = v
        return null + guidance * (cond - null)
    null, image, both = v
    return null + image_guidance * (image - null) + guidance * (both - image)


def black(images: list[Image.Image]) -> list[Image.Image]:
    """What stands for no images: black ones of the same sizes, in training as in guidance."""
    return [Image.new("RGB", image.size) for image in images]


@torch.no_grad()
def encode_for_guidance(model: TBAC, prompts: list[str], images: list | None,
                        image_guidance: float, negative: str) -> tuple[Tensor, int]:
    """-> rungs (L, k B, Q, caption_dim) of the k rows that guidance compares, null prompts first;
    and k: 3 if there is an image to be guided by, else 2."""
    images = matching_images(prompts, images)
    null = [negative] * len(prompts)
    if not any(images) or image_guidance <= 1:
        # Both rows are given the images.
        return model.encode([*null, *prompts], images * 2), 2
    no_images = [black(row) for row in images]
    return model.encode([*null, *null, *prompts], [*no_images, *images, *images]), 3


# ------------------------------------------------------------------------------------- sampling

@dataclass
class Step:
    """After step i: the time t reached, the latents x_t there, and the estimate x0 of clean latents
    that the step used."""
    i: int
    t: float
    x_t: Tensor
    x0: Tensor


@torch.no_grad()
def denoise(model: TBAC, prompts: list[str], images: list | None = None, *, steps: int = 20,
            guidance: float | None = None, image_guidance: float | None = None,
            negative: str = "", shift: float = 3.0, solver: str = "dpm++",
            size: int | tuple[int, int] | None = None, eps: Tensor | None = None,
            generator: torch.Generator | None = None,
            conditioning: tuple[Tensor, int] | None = None) -> Iterator[Step]:
    """Yields a Step after every step; the last x_t is the picture, in the DiT's latent space.

    prompts, images: as for TBAC.encode. With images it is an edit; in a mixed batch the image term
        is zero for prompts without images.
    guidance, image_guidance: default the model's own.
    size: side in pixels, or (height, width).
    eps: starting noise (B, C, h, w), whose size the picture then has. Else a generator of the CPU
        draws it, on every device: so a seed gives the same noise everywhere.
    conditioning: what `encode_for_guidance` gave, where several pictures are drawn of the same
        prompts, or rungs were changed.
    """
    if steps < 1 or solver not in SOLVERS:
        expected = f"at least 1 step and one of {list(SOLVERS)}"
        raise ValueError(f"steps = {steps} and solver = {solver!r}: expected {expected}")
    c, device = model.config, model.ladder.queries.device
    guidance = c.guidance if guidance is None else guidance
    image_guidance = c.image_guidance if image_guidance is None else image_guidance
    shape = latent_shape(c, size)
    if eps is None:
        eps = torch.randn(len(prompts), *shape, generator=generator)
    if conditioning is None:
        conditioning = encode_for_guidance(model, prompts, images, image_guidance, negative)
    rungs, k = conditioning                                          # (L, k B, Q, caption_dim)
    # The keys and values of every block, once for all steps.
    keys_values = model.dit.project_kv(rungs)

    times = schedule(steps, shift).tolist()
    x = eps.float().to(device)
    x0_prev = None
    for i, t in enumerate(times[:-1]):
        # The network is fed 1000 t without its fraction, as in the released sampler: it was trained
        # on t = 1/1000, 2/1000, ..., 1 only. (float64, so that times 1000 it is a whole number
        # again.) The solver goes on with t itself.
        t_net = torch.full((k * len(x),), int(1000 * t) / 1000, dtype=torch.float64)
        v = model.velocity(torch.cat([x] * k), t_net, rungs, keys_values).float()  # (k B, C, h, w)
        x0 = x - t * guide(v.chunk(k), guidance, image_guidance)
        x = SOLVERS[solver](x, x0, x0_prev, times, i)
        x0_prev = x0
        yield Step(i, times[i + 1], x, x0)


def latent_shape(c: TBACConfig,
                 size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(C, h, w) of a picture with this side, or (height, width), in pixels. ValueError names a size
    that the autoencoder does not have."""
    size = c.size if size is None else size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    factor = c.dcae.factor
    if min(height, width) < 1 or height % factor or width % factor:
        message = f"both sides must be positive multiples of {factor}"
        raise ValueError(f"size {width}x{height}: {message}")
    return c.dit.channels, height // factor, width // factor


def generate(model: TBAC, prompts: list[str], images: list | None = None,
             **settings) -> list[Image.Image]:
    """`denoise` to the end and decode."""
    *_, last = denoise(model, prompts, images, **settings)
    return model.decode(last.x_t)


# ---------------------------------------------------------------------------------- command line

def options(argv=None) -> argparse.Namespace:
    p = command.Parser(description=__doc__)
    add_request(p)
    add_sampling(p)
    add_machine(p)
    args = p.parse_args(argv)
    if args.prompt is None and args.ask is None and not args.serve:
        if args.image:
            p.error("no prompt: it stands before --image, which takes what follows it for files")
        p.print_help()
        raise SystemExit(0)
    if args.prompt is not None and args.ask is not None:
        p.error("give a prompt, to draw, or --ask, not both")
    return args


def add_request(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", type=command.text, nargs="?",
                   help="what to draw, or how to change the picture given by --image")
    p.add_argument("--image", type=command.path_text, nargs="+", default=[], metavar="FILE",
                   help="pictures to edit or to ask about")
    p.add_argument("--ask", type=command.text, metavar="QUESTION",
                   help="answer a question instead of drawing (64 tokens at most)")
    p.add_argument("--out", type=command.path, default="out.png", help="file to write (default: "
                   "out.png; several pictures: also out-1.png, out-2.png, ...)")
    p.add_argument("--n", type=command.count(1, limits.MAX_PICTURES), default=1,
                   help="how many pictures, the first from --seed, the next from --seed + 1, ...")
    p.add_argument("--explain", action="store_true", help="also write OUT-explain.html, a page to "
                   "touch on the (first) picture: how it became clear, where each DiT block "
                   "looked, the rungs, the tokens; with --ask: where the answer looked; and "
                   "OUT-explain.png, the same as one picture")
    p.add_argument("--compare", type=command.text, metavar="PROMPT", help="with --explain: another "
                   "prompt; the page then shows the picture with single rungs taken from it")
    p.add_argument("--serve", action="store_true", help="a page in the browser to draw, edit, ask "
                   "and mix rungs; it begins with the settings given here")
    p.add_argument("--host", type=command.text, default="127.0.0.1", help="with --serve: another "
                   "address lets other machines use the page, 0.0.0.0 all that reach this one")
    p.add_argument("--port", type=command.count(0, 65535), default=8000,
                   help="with --serve (default: 8000; 0: any that is free)")


def add_sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=command.SEED, default=0, help="of the noise")
    p.add_argument("--steps", type=command.count(1, limits.MAX_STEPS), default=20,
                   help="(default: 20)")
    p.add_argument("--guidance", type=command.FACTOR,
                   help="how closely to follow the text, 1 = no guidance (default: the model's)")
    p.add_argument("--image-guidance", type=command.FACTOR,
                   help="how closely to keep to the image (default: the model's)")
    p.add_argument("--negative", type=command.text, default="",
                   help="what the picture should not be like")
    p.add_argument("--solver", choices=SOLVERS, default="dpm++")
    p.add_argument("--size", type=command.size,
                   help="side in pixels, or WIDTHxHEIGHT (default: the model's)")


def add_machine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=command.path_text, default=str(TOY_FOLDER),
                   help="folder (default: the toy)")
    p.add_argument("--device", type=command.device,
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the "
                   "model's; half precision is the one that the GPU has)")
    p.add_argument("--int8", action="store_true", help="most weights in 8 bits: half the memory")
    p.add_argument("--low-memory", action="store_true", help="the parts take turns in memory, "
                   "which then has to hold the largest one only")
    p.add_argument("--plain", action="store_true",
                   help="the plain path only: leave engine/fast.py out")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile: slow to start, then faster; for many pictures")


def check(args) -> None:
    """ValueError for options that make no sense together, before any work."""
    if args.serve:
        check_start(args)
    if args.explain and args.compile:
        raise ValueError("--explain reads what --compile fuses away: leave one out")
    if args.low_memory and args.compile:
        raise ValueError("--compile needs weights that stay where they are, and with --low-memory "
                         "they do not: leave one out")
    if args.ask is not None and (args.n > 1 or args.compile):
        raise ValueError("--n and --compile are for pictures, and --ask draws none: leave them out")
    if args.explain and args.ask is not None and not args.image:
        raise ValueError("--explain and --ask need an --image")
    if args.compare is not None and (args.prompt is None or not args.explain):
        raise ValueError("--compare needs a prompt and --explain, whose page it adds to")
    check_text(args.compare or "", "--compare")
    if len(args.image) > limits.MAX_SOURCES:
        limit = f"{limits.MAX_SOURCES} are the limit"
        raise ValueError(f"--image: {len(args.image)} pictures, {limit}")
    if not args.serve:
        check_outputs(args)


def default_guidance(args, model: TBAC) -> None:
    """Guidance that was not chosen is the model's own."""
    for name in ("guidance", "image_guidance"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(model.config, name))


# The settings of a request; its prompt and images stand beside them.
SETTINGS = ("guidance", "image_guidance", "negative", "solver", "steps", "size")


def as_request(model: TBAC, prompt: str, images: list[Image.Image], settings: dict) -> dict:
    """What `denoise` is given for pictures of one prompt, which is read once for all of them."""
    conditioning = encode_for_guidance(model, [prompt], [images], settings["image_guidance"],
                                       settings["negative"])
    return settings | dict(prompts=[prompt], images=[images], conditioning=conditioning)


def draw(args, model: TBAC, images: list[Image.Image]) -> None:
    """The pictures one by one, each from its own seed, so that a picture does not depend on how
    many others are asked for."""
    files = outputs(args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    record = settings | dict(prompt=args.prompt, model=str(args.model), images=args.image)
    request = as_request(model, args.prompt, images, settings)
    if args.compile:
        one_step = request | dict(steps=1)
        fast.compile_parts(model, lambda: generate(model, **one_step))

    watch = explain.Drawn(args.steps) if args.explain else None
    pictures = []
    with tqdm(total=args.n * args.steps, desc="draw", unit="step") as bar:
        for i, file in enumerate(files.pictures):
            request["generator"] = torch.Generator().manual_seed(args.seed + i)
            picture = draw_one(model, request, bar, watch if i == 0 else None)
            save_png(picture, file, record | dict(seed=args.seed + i))
            pictures.append(picture)
    if files.sheet:
        save_png(sheet(args, images, pictures), files.sheet, record)
    if files.poster:
        rungs, _ = request["conditioning"]                           # (L, k, Q, caption_dim)
        # The prompt's own, behind those of the null prompt.
        rungs = rungs[:, -1]
        poster = explain.drawing(model, args.prompt, images, pictures[0], rungs, watch)
        save_png(poster, files.poster, record | dict(seed=args.seed))
        write_text(files.html, explanation(model, request, args.seed, pictures[0], watch,
                                           args.compare).html())
    print("wrote", *files.every())


def draw_one(model: TBAC, request: dict, bar: tqdm, watch: explain.Drawn | None) -> Image.Image:
    steps = denoise(model, **request)
    if watch:
        steps = watch.watch(model.dit, steps)
    for step in steps:
        bar.update()
        latents = step.x_t
    bar.set_description("decode")
    picture = model.decode(latents)[0]
    bar.set_description("draw")
    return picture


def explained(model: TBAC, prompt: str, images: list[Image.Image] = (), compare: str | None = None,
              seed: int = 0, **settings) -> explain_html.Explanation:
    """What --explain writes as a page, of a picture drawn now; in a notebook it displays itself.
    settings: those that differ from the command line's defaults."""
    args = options(["a prompt"])
    default_guidance(args, model)
    usual = {name: getattr(args, name) for name in SETTINGS}
    request = as_request(model, prompt, list(images), usual | settings)
    request["generator"] = torch.Generator().manual_seed(seed)
    watch = explain.Drawn(request["steps"])
    with tqdm(total=request["steps"], desc="draw", unit="step") as bar:
        picture = draw_one(model, request, bar, watch)
    return explanation(model, request, seed, picture, watch, compare)


def explanation(model: TBAC, request: dict, seed: int, picture: Image.Image,
                watch: explain.Drawn, compare: str | None) -> explain_html.Explanation:
    """The page on a picture that was drawn for this request while `watch` looked on."""
    exchanges = None
    if compare is not None:
        exchanges = compare, draw_exchanges(model, request, seed, compare)
    return explain_html.drawing(model, request, seed, picture, watch, exchanges)


def draw_exchanges(model: TBAC, request: dict, seed: int,
                   compare: str) -> Iterator[tuple[str, Image.Image]]:
    """Yields (name, picture) of every single exchange of rungs with another prompt
    (engine/mixer.py), from the same noise, drawn as they are asked for."""
    a, k = request["conditioning"]
    b, _ = encode_for_guidance(model, [compare], request["images"], request["image_guidance"],
                               request["negative"])
    noise = torch.randn(1, *latent_shape(model.config, request["size"]),
                        generator=torch.Generator().manual_seed(seed))
    for name, choice in tqdm(mixer.single_exchanges(a).items(), "exchange", unit="picture"):
        mixed = mixer.mixed_rows(a, b, choice)
        picture, = generate(model, **request | dict(conditioning=(mixed, k), eps=noise))
        yield name, picture


def sheet(args, images: list[Image.Image], pictures: list[Image.Image]) -> Image.Image:
    """The pictures of all seeds side by side, after those that were given."""
    size = pictures[0].size
    labels = [*args.image, *(f"seed {args.seed + i}" for i in range(args.n))]
    return contact_sheet([*images, *pictures], labels, scale=max(1, 256 // min(size)), size=size)


def ask(args, model: TBAC, images: list[Image.Image]) -> None:
    """Prints the answer; with --explain it also writes the pages on it."""
    files = outputs(args)
    if not files.poster:
        for piece in model.stream_answer(args.ask, images):
            print(piece, end="", flush=True)
        print()
        return
    ids, seen = explain.watched_answer(model, args.ask, images)
    print(model.mllm.tokenizer.decode(ids).strip())
    record = dict(question=args.ask, model=str(args.model), images=args.image)
    save_png(explain.answer(model, args.ask, images, ids, seen), files.poster, record)
    write_text(files.html, explain_html.answer(model, args.ask, images, ids, seen).html())
    # Not among what is printed to be read on: the answer alone.
    print("wrote", *files.every(), file=sys.stderr)


def live(args, model: TBAC) -> Live:
    """What --serve shows, and how it draws."""
    # An impossible --size is refused now, not at the first request.
    latent_shape(model.config, args.size)

    def draw(request: dict, images: list[Image.Image], choice: Tensor | None) -> Iterator[Step]:
        guided = request["image_guidance"], request["negative"]
        rungs, k = encode_for_guidance(model, [request["prompt"]], [images], *guided)
        if choice is not None:
            other, _ = encode_for_guidance(model, [request["other"]], [images], *guided)
            rungs = mixer.mixed_rows(rungs, other, choice)
        settings = {name: request[name] for name in ("steps", "guidance", "image_guidance",
                                                     "solver")}
        generator = torch.Generator().manual_seed(request["seed"])
        return denoise(model, [request["prompt"]], [images], size=args.size, generator=generator,
                       conditioning=(rungs, k), **settings)

    return Live(model, draw, list(SOLVERS), args)


def main() -> None:
    args = options()
    with command.one_line_errors():
        check(args)
        images = [open_image(file) for file in args.image]
        for file, image in zip(args.image, images):
            check_shape(image.size, file)
        dtype = args.dtype and getattr(torch, args.dtype)
        model = TBAC.load(args.model, args.device, dtype, int8=args.int8,
                          low_memory=args.low_memory)
        set_threads(model)
        if not args.plain:
            fast.enable(model)
        default_guidance(args, model)
        words.listen(args.model, args.prompt, args.ask, args.negative, args.compare)
        if args.serve:
            page.serve(live(args, model), args.host, args.port)
        elif args.ask is not None:
            ask(args, model, images)
        else:
            draw(args, model, images)


if __name__ == "__main__":
    main()
