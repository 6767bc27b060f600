"""The toy world: scenes of coloured shapes on a plain background, and pictures of them.

Every random choice is made by an explicit `random.Random`; nothing is downloaded.
Coordinates are fractions of the picture's side, x to the right and y down.
Left out: rotation, overlap, textures.
"""
import random
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 30),
    "purple": (150, 50, 180),
    "orange": (245, 130, 30),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (165, 165, 165), "black": (15, 15, 15)}

# half the side of the square box that a thing fills
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.20}

# Training draws a thing of these colours and shapes only alone, never beside another thing.
HELD_OUT = frozenset({("purple", "triangle"), ("orange", "cross")})

# Smallest distances: from a box to the edge of the picture, between two boxes (4 pixels of 64),
# and from a thing's centre to the lines of the 3x3 grid that names its place.
MARGIN = 0.03
GAP = 0.06
BORDER = 0.04

# the fraction of its box that a shape covers, and how far its centroid lies below
# the centre of the box, in units of half the box's side
FORMS = {"circle": (np.pi / 4, 0), "square": (1, 0), "triangle": (1 / 2, 1 / 3), "cross": (0.64, 0)}

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# the names of the nine cells of the 3x3 grid: (column, row)
SPOTS = {
    "top left": (0, 0), "top": (1, 0), "top right": (2, 0),
    "left": (0, 1), "centre": (1, 1), "right": (2, 1),
    "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2),
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape; (x, y) is the centre of its box."""
    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """Colour and shape: 'red circle'."""
        return f"{self.colour} {self.shape}"

    @property
    def label(self) -> str:
        """The name, with the size unless that is medium: 'small red circle'."""
        return self.name if self.size == "medium" else f"{self.size} {self.name}"

    @property
    def radius(self) -> float:
        """Half the side of its box."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str = "white"


# ---------------------------------------------------------------- geometry

# How many times farther along one axis than along the other a thing has to be from another, to be
# clearly at its side. As read in a picture less is enough: what is just within the limit may be
# read as just beyond it.
CLEARLY, READ = 1.5, 1.2


def relation(a: Thing, b: Thing, ratio: float = CLEARLY) -> str | None:
    """Where a is, seen from b, or None where neither axis dominates by this ratio."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > ratio * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > ratio * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sides(scene: Scene) -> str | None:
    """Where the first of exactly two things is, seen from the second.

    None for another number of things, for two of the same name, and where it is not clear.
    """
    if len(scene.things) != 2:
        return None
    first, second = scene.things
    return relation(first, second) if first.name != second.name else None


def cell(thing: Thing) -> tuple[int, int]:
    """Column and row of its centre in a 3x3 grid."""
    return min(2, int(3 * thing.x)), min(2, int(3 * thing.y))


def columns(scene: Scene) -> tuple[Thing, ...]:
    """The things column by column, from left to right."""
    return tuple(sorted(scene.things, key=lambda t: (cell(t), t.x, t.y)))


def spot(thing: Thing) -> str:
    """The name of its cell: 'top left'."""
    return next(name for name, position in SPOTS.items() if position == cell(thing))


def inside(thing: Thing) -> bool:
    """Does its box lie in the picture, off the edges by MARGIN?"""
    low = thing.radius + MARGIN
    high = 1 - thing.radius - MARGIN
    return all(low <= c <= high for c in (thing.x, thing.y))


def apart(a: Thing, b: Thing) -> bool:
    """Are the two boxes apart by GAP?"""
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def placed(thing: Thing) -> bool:
    """Is it easy to see which cell of the 3x3 grid it is in?"""
    return all(abs(c - line) >= BORDER for c in (thing.x, thing.y) for line in (1 / 3, 2 / 3))


def pairs_beside(scene: Scene) -> set[tuple[str, str]]:
    """The pairs of colour and shape that stand beside another thing."""
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    return pairs if len(scene.things) > 1 else set()


def valid(scene: Scene, held_out: bool = False) -> bool:
    """May this scene be drawn? held_out=True allows held-out pairs beside other things."""
    things = scene.things
    if not 1 <= len(things) <= 4:
        return False

    if not held_out and pairs_beside(scene) & HELD_OUT:
        return False

    # two things are clearly in a relation, or clearly in none
    if len(things) == 2 and relation(*things) != relation(*things, READ):
        return False

    if not all(inside(t) and placed(t) for t in things):
        return False
    return all(apart(a, b) for a, b in combinations(things, 2))


# ---------------------------------------------------------------- scenes

def sample_name(rng: random.Random) -> tuple[str, str]:
    """A random colour and shape."""
    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    return colour, shape


def sample_place(rng: random.Random, radius: float) -> tuple[float, float]:
    """A random centre: inside the picture, and clearly in one cell of the grid."""
    low = radius + MARGIN
    while True:
        x = rng.uniform(low, 1 - low)
        y = rng.uniform(low, 1 - low)
        if placed(Thing("", "", "", x, y)):
            return x, y


def sample_kinds(rng: random.Random, n: int, held_out: bool) -> list[tuple[str, str, str]]:
    """(colour, shape, size) of n things.

    Names repeat, so that there is something to count. Things of one name have one size,
    so that they can be named together.
    """
    n_name = rng.choice((1, 2, n)) if n > 2 else rng.choices((1, n), (0.15, 0.85))[0]
    names = [sample_name(rng) for _ in range(n_name)]
    if held_out:
        pair = rng.choice(sorted(HELD_OUT))
        names[rng.randrange(n_name)] = pair

    # three or four large things would not fit
    weights = (1, 2, 1) if n < 3 else (2, 2, 0)
    sizes = {name: rng.choices(list(SIZES), weights)[0] for name in names}
    names += rng.choices(names, k=n - n_name)
    return [(*name, sizes[name]) for name in names]


def sample_thing(rng: random.Random, colour: str, shape: str, size: str) -> Thing:
    """A thing of this kind at a random place."""
    return Thing(shape, colour, size, *sample_place(rng, SIZES[size]))


def sample_scene(rng: random.Random, n: int | None = None, held_out: bool = False) -> Scene:
    """A random scene of n things.

    held_out=True puts a held-out pair into it: beside another thing, or alone if n=1.
    """
    if n is None:
        n = rng.choices((1, 2, 3, 4), (0 if held_out else 0.3, 0.45, 0.15, 0.1))[0]
    if n not in (1, 2, 3, 4):
        raise ValueError(f"a scene has 1 to 4 things, not {n}")
    background = rng.choices(list(BACKGROUNDS), (0.6, 0.2, 0.2))[0]
    while True:
        kinds = sample_kinds(rng, n, held_out)
        # most pairs of things are in a clear relation
        clear = n == 2 and rng.random() < 0.75
        # propose places until they fit; after 100 failures start over with other kinds
        for _ in range(100):
            scene = Scene(tuple(sample_thing(rng, *kind) for kind in kinds), background)
            if not valid(scene, held_out):
                continue
            if not clear or relation(*scene.things) is not None:
                return scene


# ---------------------------------------------------------------- pictures

def covers(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u, v) of the box [-1, 1]^2 lie in the shape? Used to draw and to grade."""
    box = (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "triangle":
        return box & (abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return box & ((abs(u) <= 0.4) | (abs(v) <= 0.4))
    return box


def coverage(
    shape: str, x: float, y: float, radius: float,
    left: int, top: int, right: int, bottom: int, samples: int = 4,
) -> np.ndarray:
    """How much of each pixel of a window the shape covers, (bottom - top, right - left) in [0, 1].

    Everything is in pixels; each pixel is tested at samples x samples points.
    """
    step = (np.arange(samples) + 0.5) / samples
    u = ((np.arange(left, right)[:, None] + step).ravel() - x) / radius
    v = ((np.arange(top, bottom)[:, None] + step).ravel() - y) / radius
    hit = covers(shape, u[None], v[:, None])
    return hit.reshape(bottom - top, samples, right - left, samples).mean((1, 3))


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an antialiased RGB picture of size x size pixels."""
    picture = np.empty((size, size, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        x, y, radius = thing.x * size, thing.y * size, thing.radius * size
        # only the pixels that the thing's box touches
        left, top = int(x - radius), int(y - radius)
        right = min(size, int(x + radius) + 1)
        bottom = min(size, int(y + radius) + 1)
        alpha = coverage(thing.shape, x, y, radius, left, top, right, bottom)[..., None]
        window = picture[top:bottom, left:right]
        window += alpha * (np.array(COLOURS[thing.colour]) - window)
    return Image.fromarray(picture.round().astype(np.uint8))
