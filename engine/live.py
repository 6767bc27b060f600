"""What the live page can ask for, and what comes of it.

A request is a JSON object whose every key stands in a table; there are no defaults. What comes of
it is a sequence of events: ("step", ...) as they are made, then ("picture", ...), or ("answer",
...) with as much of it as there is so far. What draws is handed in.

Dimension key: L rungs = blocks, S slots of queries.
"""
import argparse
import base64
import contextlib
import io
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from engine import words
from engine.checks import Kind, check_keys, number, one_of, or_null, several, whole
from engine.explain_html import address, content_of, data_address, ladder_of
from engine.int8 import count_parameters
from engine.jobs import Event
from engine.limits import (
    MAX_FACTOR,
    MAX_PAGE_PIXELS,
    MAX_PAGE_REQUEST_BYTES,
    MAX_PAGE_SEED,
    MAX_PAGE_STEPS,
    MAX_PAGE_TEXT_BYTES,
    MAX_SEED,
)
from engine.mixer import slots
from engine.pictures import open_image
from engine.sources import check_shape

# To decode what a step has come to is free for so many seconds of a drawing; from then on it may
# take this share of the time.
FREE_SECONDS = 2.0
SHARE = 0.25
# Of a picture on its way, in bytes: as a PNG where that is enough, else as a JPEG.
PREVIEW_BYTES = 60_000
# Of a drawing, what the command line can set, too.
START = ("seed", "steps", "guidance", "image_guidance", "negative", "solver")


# ------------------------------------------------------------------------------------- requests

def is_text(value) -> bool:
    """Halves of a character (surrogates) are none."""
    if not isinstance(value, str):
        return False
    with contextlib.suppress(UnicodeError):
        return len(value.encode()) <= MAX_PAGE_TEXT_BYTES
    return False


def is_base64(value) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return bool(base64.b64decode(value, validate=True))
    return False


TEXT = Kind(f"a text of at most {MAX_PAGE_TEXT_BYTES} bytes", is_text)
PICTURE = Kind("the bytes of a picture in base64", is_base64)
SWITCH = Kind("true or false", lambda value: type(value) is bool)

ASK = {
    "question": TEXT,
    "image": or_null(PICTURE),
}


def check_start(args) -> None:
    """ValueError for options of sample.py with which the page cannot begin."""
    if any((args.prompt is not None, args.ask is not None, args.image, args.explain, args.n > 1)):
        raise ValueError("--serve takes prompts, questions and pictures from the page: leave them "
                         "out, and --explain and --n")
    if args.compile:
        raise ValueError("--serve stops between the layers that --compile fuses: leave one out")
    if args.steps > MAX_PAGE_STEPS:
        raise ValueError(f"--serve: {MAX_PAGE_STEPS} --steps are the limit")
    if args.seed > MAX_PAGE_SEED:
        raise ValueError(f"--serve: --seed {args.seed} is above {MAX_PAGE_SEED}, up to which a "
                         "browser counts exactly")
    TEXT.check(args.negative, "--negative")


def draw_fields(n_block: int, n_slot: int, solvers) -> dict:
    """choice: of each rung and slot, whether it is taken from the prompt `other`; both or
    neither."""
    return {
        "prompt": TEXT,
        "image": or_null(PICTURE),
        "negative": TEXT,
        "seed": whole(0, MAX_SEED),
        "steps": whole(1, MAX_PAGE_STEPS),
        "guidance": number(0, MAX_FACTOR),
        "image_guidance": number(0, MAX_FACTOR),
        "solver": one_of(*solvers),
        "other": or_null(TEXT),
        "choice": or_null(several(n_block, n_block, several(n_slot, n_slot, SWITCH))),
    }


def picture_in(text: str | None) -> list[Image.Image]:
    """From base64. ValueError for what cannot be read."""
    if text is None:
        return []
    image = open_image(io.BytesIO(base64.b64decode(text)), "the picture", MAX_PAGE_PIXELS)
    check_shape(image.size, "the picture")
    return [image]


# --------------------------------------------------------------------------------------- results

class Previews:
    """Pictures of a drawing on its way, as long as they cost a small part of its time."""

    def __init__(self, model):
        self.model = model
        self.start = time.perf_counter()
        self.spent = 0.0

    def of(self, step) -> dict:
        """What there is after this step, and the picture foreseen in it; or nothing."""
        # What a GPU still has to do for the step is not the decoder's time.
        if step.x0.is_cuda:
            torch.cuda.synchronize(step.x0.device)
        now = time.perf_counter()
        if self.spent > max(FREE_SECONDS, SHARE * (now - self.start)):
            return {}
        pictures = self.model.decode(torch.cat([step.x_t, step.x0]))
        x_t, x0 = (address(picture, PREVIEW_BYTES) for picture in pictures)
        self.spent += time.perf_counter() - now
        return dict(x_t=x_t, x0=x0)


@dataclass
class Live:
    """draw: a request as checked here, a list of no or one picture, and a choice (L, S) or None
    -> the sampler's steps, one by one. args: of sample.py; with their settings the page begins."""
    model: nn.Module
    draw: Callable
    solvers: list[str]
    args: argparse.Namespace

    def __post_init__(self):
        ladder = self.model.ladder
        self.n_block = self.model.config.dit.n_layer
        self.n_slot = len(slots(len(ladder.queries)))
        # path -> (what a request holds, what is done for it)
        self.actions = {
            "/draw": (draw_fields(self.n_block, self.n_slot, self.solvers), self.drawing),
            "/ask": (ASK, self.answering),
        }

    def work(self, path: str, found) -> Callable[[], Iterator[Event]]:
        """What is to be done for a request. ValueError for one that is not as it should be."""
        fields, action = self.actions[path]
        request = check_keys(found, fields, "the request")
        if (request.get("other") is None) != (request.get("choice") is None):
            raise ValueError("the request has one of other and choice, expected both or neither")
        return lambda: action(request)

    def drawing(self, request: dict) -> Iterator[Event]:
        start = time.perf_counter()
        words.listen(self.args.model, request["prompt"], request["negative"], request["other"])
        images = picture_in(request["image"])
        choice = request["choice"] and torch.tensor(request["choice"])
        previews, steps = Previews(self.model), request["steps"]
        for step in self.draw(request, images, choice):
            last = step.i + 1 == steps
            yield "step", dict(step=step.i + 1, t=step.t, **({} if last else previews.of(step)))
        picture = self.model.decode(step.x_t)[0]
        content = data_address(content_of(picture, "png"), "png")
        yield "picture", dict(picture=content, seconds=time.perf_counter() - start)

    def answering(self, request: dict) -> Iterator[Event]:
        words.listen(self.args.model, request["question"])
        images = picture_in(request["image"])
        for text in itertools.accumulate(self.model.stream_answer(request["question"], images)):
            yield "answer", dict(text=text)

    def about(self) -> dict:
        """What the page has to know."""
        size = self.args.size or self.model.config.size
        folder = pathlib.Path(self.args.model).resolve()
        return dict(
            start={name: getattr(self.args, name) for name in START},
            solvers=list(self.solvers),
            ladder=ladder_of(self.model),
            blocks=self.n_block,
            parameters=count_parameters(self.model),
            device=str(self.model.ladder.queries.device),
            dtype=str(self.model.dit.proj_out.weight.dtype).removeprefix("torch."),
            name="/".join(folder.parts[-2:]),
            size=size if isinstance(size, tuple) else (size, size),
            limits=dict(bytes=MAX_PAGE_REQUEST_BYTES),
        )


@contextlib.contextmanager
def stoppable(model, check: Callable[[], None]):
    """Within, `check` is called before each layer: what it raises stops the work there, however
    long a step is."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    layers = [layer for layers in lists for layer in layers]
    handles = [layer.register_forward_pre_hook(lambda *_: check()) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
