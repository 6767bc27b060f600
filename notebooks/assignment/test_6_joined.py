"""Part 6: your parts, joined into a model that draws with the shipped weights.

What is right is what the repository itself draws with these weights, now: nothing is recorded.
"""
import contextlib
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import sample
from ladder import tap_layers
from notebooks.assignment.given import Given, shipped
from notebooks.assignment.grading import Wrong, close, message, worth

TEXT = "a red circle left of a blue square"
EDIT = "make the circle green"
WHITE = 255, 255, 255
STEPS = 5
SETTINGS = dict(shift=3.0, guidance=4.5, image_guidance=3.0)
# What is asked for once more: steps and settings are arguments. (In three steps without a shift
# 1000 t is whole but for rounding, and whoever rounds otherwise would be told to be wrong.)
OTHER = dict(shift=1.0, guidance=2.0, image_guidance=1.5)
OTHER_STEPS = 4
# Of the largest latent. Rounding is multiplied by guidance, step after step.
TOLERANCE = 2e-3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int = 1) -> torch.Tensor:
    return torch.randn(n, *sample.latent_shape(shipped().config), generator=seeded(0))


# ---------------------------------------------------------------------------------- one velocity

@functools.cache
def some_rungs() -> torch.Tensor:
    c = shipped().config
    shape = c.dit.n_layer, 2, c.n_query, c.dit.caption_dim
    return 2.3 * torch.randn(shape, generator=seeded(1))


def with_table(change: Callable, *request) -> torch.Tensor:
    """The velocity with another table at the end."""
    dit = shipped().dit
    changed = {"scale_shift_table": change(dit.scale_shift_table)}
    return torch.func.functional_call(dit, changed, request)


def hooked(part: str, change: Callable, *request) -> torch.Tensor:
    """The velocity where `change` makes something else of what goes into a part, and comes out."""
    layer = shipped().dit.get_submodule(part)
    hook = layer.register_forward_hook(lambda layer, args, out: change(*args, out))
    try:
        return shipped().dit(*request)
    finally:
        hook.remove()


def without_silu(time: torch.Tensor, made: tuple) -> tuple:
    """The embedding as it stands makes the modulation."""
    modulation, e = made
    linear = shipped().dit.time_embed.modulation
    return linear(e[:, 0]).unflatten(1, (6, -1)), e


def silu_at_the_end(time: torch.Tensor, made: tuple) -> tuple:
    modulation, e = made
    return modulation, F.silu(e)


def split_last(time: torch.Tensor, made: tuple) -> tuple:
    modulation, e = made
    return modulation.flatten(1).unflatten(1, (-1, 6)).transpose(1, 2), e


def without_patch_bias(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    return made - shipped().dit.patch_embed.bias[:, None, None]


@worth(4)
@torch.no_grad()
def test_6a_velocity(adapters):
    model = shipped()
    given, c = Given(model), model.config.dit
    x_t, time = noise(2), torch.tensor([900.0, 250.0])
    keys_values = model.dit.project_kv(some_rungs())
    right = model.dit(x_t, time, keys_values)
    mine = adapters.velocity(x_t, time, keys_values, given.dit, c.head_dim, c.cross_n_head)
    mistakes = {
        "You fed t; the DiT knows 1000 t.": lambda: model.dit(x_t, time / 1000, keys_values),
        "Block j takes keys_values[j]. Yours takes them in reverse.":
            lambda: model.dit(x_t, time, keys_values[::-1]),
        "All blocks have the same keys and values in yours.":
            lambda: model.dit(x_t, time, keys_values[-1:] * len(keys_values)),
        "Each row has a time of its own. Yours uses the first row's for all.":
            lambda: model.dit(x_t, time[:1].expand(2), keys_values),
        "Shift first, then scale, in the last scale_shift_table.":
            lambda: with_table(lambda table: table.flip(0), x_t, time, keys_values),
        "At the end, too, it is x (1 + scale) + shift.":
            lambda: with_table(lambda table: torch.stack([table[0], table[1] - 1]), x_t, time,
                               keys_values),
        "There is a SiLU between e and time_embed.modulation.":
            lambda: hooked("time_embed", without_silu, x_t, time, keys_values),
        "At the end the table is added to e itself. Yours is added to SiLU(e).":
            lambda: hooked("time_embed", silu_at_the_end, x_t, time, keys_values),
        "The modulation (B, 6 D) is split into (6, D): first all of the first shift. Yours is "
        "split into (D, 6).":
            lambda: hooked("time_embed", split_last, x_t, time, keys_values),
        "patch_embed has a bias, too.":
            lambda: hooked("patch_embed", without_patch_bias, x_t, time, keys_values),
        "At the end, too, a LayerNorm stands before (1 + scale) and shift.":
            lambda: hooked("norm_out", lambda x, made: x, x_t, time, keys_values),
    }
    check("6a velocity", mine, right, mistakes)


def check(what: str, mine: torch.Tensor, right: torch.Tensor, mistakes: dict,
          otherwise: Callable = list) -> None:
    """mistakes: what to say, and a function that makes the mistake with the repository's own
    parts. None of them is made where the answer is right. otherwise: gives a list of what to say
    where it is none of them."""
    __tracebackhide__ = True
    if not isinstance(mine, torch.Tensor):
        raise Wrong(f"{what}: expected a tensor, got {type(mine).__name__}. Is there a `return`?")
    if close(mine, right, TOLERANCE):
        return
    said = [text for text, make in mistakes.items() if close(mine, make(), TOLERANCE)]
    raise Wrong(message(what, mine, right, said or otherwise()))


# ------------------------------------------------------------------------------------- pictures

def request(edit: bool) -> tuple[str, Image.Image | None]:
    """Text and picture; something to edit is a red circle on white. The picture is wider than
    high, so that rows and columns are told apart."""
    if not edit:
        return TEXT, None
    side = shipped().config.size
    image = Image.new("RGB", (side, side * 3 // 4), WHITE)
    corner = side // 5, side // 4
    ImageDraw.Draw(image).ellipse([*corner, *(x + side // 3 for x in corner)], fill=(220, 30, 30))
    return EDIT, image


@contextlib.contextmanager
def wired(taps: tuple | None):
    """The ladder with other taps, for a mistake."""
    ladder = shipped().ladder
    before = ladder.taps
    ladder.taps = taps or before
    try:
        yield
    finally:
        ladder.taps = before


@functools.cache
def latents(edit: bool, taps: tuple | None = None, blind: bool = False, **changed) -> torch.Tensor:
    """The repository's own drawing. Other taps, and `changed` settings, make it a mistaken one;
    blind: the picture is not read."""
    text, image = request(edit)
    images = [[image]] if edit and not blind else None
    with wired(taps):
        *_, last = sample.denoise(shipped(), [text], images, eps=noise(),
                                  **dict(steps=STEPS) | SETTINGS | changed)
    return last.x_t


def mistaken(edit: bool) -> dict:
    """What goes wrong in drawing, with and without a picture."""
    c = shipped().config
    taps = tuple(tap_layers(c.mllm.n_layer, c.dit.n_layer))

    def drawn(**changed):
        return functools.partial(latents, edit, **changed)

    return {
        "The schedule has no shift.": drawn(shift=1.0),
        "That is what Euler draws: dpm++ is asked for (or its x0_prev stays None).":
            drawn(solver="euler"),
        "There is no guidance: as if g were 1.": drawn(guidance=1.0),
        "The prompt and the null prompt are swapped in guidance.":
            drawn(guidance=1 - SETTINGS["guidance"]),
        "Block j is fed state n_mllm - n_dit + j. Yours is fed the next one.":
            drawn(taps=tuple(i + 1 for i in taps)),
        "The rungs go to the blocks in reverse.": drawn(taps=taps[::-1]),
        "Every block is fed the normed end.": drawn(taps=(c.mllm.n_layer,) * len(taps)),
        "Every block is fed the state that enters the last layer.":
            drawn(taps=taps[-1:] * len(taps)),
    }


# ---------------------------------------------------------------------------------- what was read

@contextlib.contextmanager
def reading():
    """-> a list that fills with what the MLLM reads: (x (S + Q, M), positions (3, S + Q))."""
    seen = []
    hook = shipped().mllm.register_forward_pre_hook(
        lambda mllm, args: seen.append((args[0][0], args[1][:, 0])))
    try:
        yield seen
    finally:
        hook.remove()


Reading = tuple[torch.Tensor, torch.Tensor]


def read_rightly(text: str, image: Image.Image | None) -> Reading:
    """What the repository reads for a row."""
    with reading() as seen:
        shipped().encode([text], image and [[image]])
    return seen[0]


def alike(a: Reading, b: Reading) -> bool:
    return close(a[1], b[1], 0) and close(a[0], b[0], TOLERANCE)


def rows_to_read(edit: bool) -> dict:
    """What is said of a row -> its text and picture."""
    text, image = request(edit)
    if not edit:
        return {f'"{text}"': (text, None), 'the null prompt ""': ("", None)}
    return {f'"{text}" with the picture': (text, image), '"" with the picture': ("", image),
            'the null prompt "" with a black picture': ("", Image.new("RGB", image.size))}


def first_difference(edit: bool, seen: list[Reading]) -> str:
    """Where what was read departs from what the repository reads, row by row."""
    right = {row: read_rightly(*asked) for row, asked in rows_to_read(edit).items()}
    others = [read for read in seen if not any(alike(read, r) for r in right.values())]
    for row, expected in right.items():
        if not any(alike(read, expected) for read in seen):
            return taken_for(edit, others) or departure(row, expected, others, edit)
    return ("What given.read was handed is right. Look behind it: rungs, condition, guidance, the "
            "loop.")


def taken_for(edit: bool, others: list[Reading]) -> str:
    """What to say of a row that is another than the three of an edit; "" of none."""
    text, image = request(edit)
    if not edit:
        return ""
    black, square = Image.new("RGB", image.size), (image.width, image.width)
    known = {
        "The null prompt is read with a black picture: yours has none.": ("", None),
        "The null prompt is read with a black picture: yours is white.":
            ("", Image.new("RGB", image.size, WHITE)),
        "The black picture is as large as the picture. Yours is of another size.":
            ("", Image.new("RGB", square)),
        'The picture\'s own row has no text: "" with the picture. Yours has the text, and a black '
        "picture.": (text, black),
    }
    for said, asked in known.items():
        if any(alike(read, read_rightly(*asked)) for read in others):
            return said
    return ""


def departure(row: str, expected: Reading, others: list[Reading], edit: bool) -> str:
    """others: what was read and is not right for any row."""
    x, positions = expected
    if not others:
        return f"For {row}, given.read was not called."
    same = [read for read in others if len(read[0]) == len(x)]
    if not same:
        lengths = [len(read[0]) for read in others]
        return (f"For {row}, given.read should be handed {len(x)} tokens, prompt and queries; "
                f"it was handed {lengths}.")
    if not any(close(read[1], positions, 0) for read in same):
        return f"For {row}, the positions that given.read was handed are not the right ones."
    seen = ", and at what the ViT made of the picture by your windows" if edit else ""
    return (f"For {row}, the tokens that given.read was handed are not the right ones: look at the "
            f"queries{seen}.")


# -------------------------------------------------------------------------------------- problems

def check_drawing(what: str, adapters, edit: bool, mistakes: dict) -> None:
    __tracebackhide__ = True
    with reading() as seen:
        mine = draw(adapters, edit)
    check(what, mine, latents(edit), mistakes, lambda: [first_difference(edit, seen)])
    ignored = {"It still draws with the steps of before.": lambda: latents(edit, **OTHER)}
    for name, before in SETTINGS.items():
        settings = dict(steps=OTHER_STEPS) | OTHER | {name: before}
        still = functools.partial(latents, edit, **settings)
        ignored[f"It still draws with the {name} of before."] = still
    check(f"{what}, with other steps and settings", draw(adapters, edit, OTHER_STEPS, OTHER),
          latents(edit, steps=OTHER_STEPS, **OTHER), ignored)


def draw(adapters, edit: bool, steps: int = STEPS, settings: dict = SETTINGS) -> torch.Tensor:
    __tracebackhide__ = True
    return adapters.draw(Given(shipped()), *request(edit), noise(), steps, **settings)


@worth(5)
@torch.no_grad()
def test_6b_draw(adapters):
    check_drawing("6b draw, latents", adapters, False, mistaken(False))


@worth(4)
@torch.no_grad()
def test_6c_edit(adapters):
    swapped = dict(guidance=SETTINGS["image_guidance"], image_guidance=SETTINGS["guidance"])
    mistakes = mistaken(True) | {
        "The picture is not read.": lambda: latents(True, blind=True),
        "That is two-way guidance, the picture in both rows. There are three rows: null with a "
        "black picture, null with the picture, the prompt with the picture.":
            lambda: latents(True, image_guidance=1.0),
        "The two scales of guidance are swapped.": lambda: latents(True, **swapped),
    }
    check_drawing("6c edit, latents", adapters, True, mistakes)


def operations(work) -> int:
    """Multiplications and additions in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@worth(2)
@torch.no_grad()
def test_6d_keys_and_values_once(adapters):
    """A step costs as much as its velocities, and no more. First the drawing must be right."""
    test_6b_draw(adapters)
    model = shipped()
    given, c = Given(model), model.config.dit
    rungs = some_rungs()
    keys_values = model.dit.project_kv(rungs)
    time = torch.tensor([900.0, 900.0])
    one = operations(lambda: adapters.velocity(noise(2), time, keys_values, given.dit, c.head_dim,
                                               c.cross_n_head))
    short, long = (operations(lambda n=n: draw(adapters, False, n)) for n in (2, 4))
    step = (long - short) / 2
    again = operations(lambda: model.dit.project_kv(rungs))
    if step < 0.9 * one:
        raise Wrong("6d: a further step costs less than the velocities of its two rows. Does it "
                    "take as many steps as it is asked for?")
    if step > one + again / 2:
        raise Wrong(
            f"6d: each further step costs {step / 1e6:.0f} million operations, the velocities of "
            f"its two rows only {one / 1e6:.0f}.\n  Keys and values of both rows cost "
            f"{again / 1e6:.0f} million. They do not depend on the time: make them once, before "
            "the loop.")
