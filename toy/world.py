"""The toy world: scenes of coloured shapes, with pictures, captions, edits and questions.

Everything is drawn from an explicit `random.Random`; nothing is downloaded. A caption says everything that counts except exact places: what
is left unsaid is a medium size and a white background.
Coordinates are fractions of the picture's side, x to the right and y down. Left out: rotation, overlap, textures, free language.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220),
           "yellow": (240, 210, 30), "purple": (150, 50, 180), "orange": (245, 130, 30)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (165, 165, 165), "black": (15, 15, 15)}
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.20}                          # half the side of the box a thing fills
HELD_OUT = frozenset({("purple", "triangle"), ("orange", "cross")})             # never drawn with a second thing, until a test asks
MARGIN, GAP = 0.03, 0.06                                                        # to the picture's edge; between two boxes: 4 pixels of 64
BORDER = 0.04                                                                   # no centre is nearer to a line of the 3x3 grid of places
# the part of its box that a shape fills, and how far its centroid lies below the centre of the box, in radii
FORMS = {"circle": (np.pi / 4, 0), "square": (1, 0), "triangle": (1 / 2, 1 / 3), "cross": (0.64, 0)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPOTS = {"top left": (0, 0), "top": (1, 0), "top right": (2, 0), "left": (0, 1), "centre": (1, 1),
         "right": (2, 1), "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2)}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def label(self):
        return self.name if self.size == "medium" else f"{self.size} {self.name}"

    @property
    def radius(self):
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str = "white"


# ---------------------------------------------------------------- geometry

def relation(a, b, ratio=1.5):
    """Where a is, seen from b, or None where neither axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > ratio * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > ratio * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sides(scene):
    """Where the first of just two things is, seen from the other, or None where that is not clear or both have one name."""
    one, other = scene.things if len(scene.things) == 2 else (None, None)
    return relation(one, other) if one and one.name != other.name else None


def cell(thing):
    """Column and row in a 3x3 grid."""
    return min(2, int(3 * thing.x)), min(2, int(3 * thing.y))


def columns(scene):
    """The things column by column, from left to right."""
    return tuple(sorted(scene.things, key=lambda t: (cell(t), t.x, t.y)))


def spot(thing):
    return next(name for name, where in SPOTS.items() if where == cell(thing))


def inside(thing):
    return all(thing.radius + MARGIN <= c <= 1 - thing.radius - MARGIN for c in (thing.x, thing.y))


def apart(a, b):
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def placed(thing):
    """Is it plain to see in which cell of the 3x3 grid it is?"""
    return all(abs(c - line) >= BORDER for c in (thing.x, thing.y) for line in (1 / 3, 2 / 3))


def valid(scene, held_out=False):
    """Inside, placed, apart, one to four things, two things in a clear relation or clearly in none, and no held-out pair beside another thing."""
    things = scene.things
    pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
    kept = held_out or len(things) < 2 or not any((t.colour, t.shape) in HELD_OUT for t in things)
    plain = len(things) != 2 or relation(*things) == relation(*things, ratio=1.2)
    fits = all(inside(t) and placed(t) for t in things)
    return 1 <= len(things) <= 4 and kept and plain and fits and all(apart(a, b) for a, b in pairs)


# ---------------------------------------------------------------- scenes

def sample_name(rng):
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def sample_place(rng, radius):
    low = radius + MARGIN
    while True:
        thing = Thing("", "", "", rng.uniform(low, 1 - low), rng.uniform(low, 1 - low))
        if placed(thing):
            return thing.x, thing.y


def sample_scene(rng, n=None, held_out=False):
    """A random scene of n things. held_out=True puts a held-out pair in it (beside another thing, unless n=1 asks for it alone)."""
    if n is None:
        n = rng.choices((1, 2, 3, 4), (0 if held_out else 0.3, 0.45, 0.15, 0.1))[0]
    if n not in (1, 2, 3, 4):
        raise ValueError(f"a scene has 1 to 4 things, not {n}")
    background = rng.choices(list(BACKGROUNDS), (0.6, 0.2, 0.2))[0]
    while True:
        # things repeat names, so that there is something to count; equal names get equal sizes, to be named together
        kinds = rng.choice((1, 2, n)) if n > 2 else rng.choices((1, n), (0.15, 0.85))[0]
        names = [sample_name(rng) for _ in range(kinds)]
        if held_out:
            names[rng.randrange(kinds)] = rng.choice(sorted(HELD_OUT))
        sizes = {name: rng.choices(list(SIZES), (1, 2, 1) if n < 3 else (2, 2, 0))[0] for name in names}
        names += rng.choices(names, k=n - kinds)
        clear = n == 2 and rng.random() < 0.75                                  # two things mostly stand in a clear relation
        for _ in range(100):
            things = tuple(Thing(shape, colour, sizes[colour, shape], *sample_place(rng, SIZES[sizes[colour, shape]]))
                           for colour, shape in names)
            scene = Scene(things, background)
            if valid(scene, held_out) and not (clear and relation(*things) is None):
                return scene


# ---------------------------------------------------------------- pictures

def covers(shape, u, v):
    """Is the point (u, v) of the box [-1, 1]^2 inside the shape? Drawing and grading both ask this."""
    box = (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "triangle":
        return box & (abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return box & ((abs(u) <= 0.4) | (abs(v) <= 0.4))
    return box


def coverage(shape, x, y, radius, left, top, right, bottom, fine=4):
    """The part of each pixel of a window that the shape covers, counted on fine x fine points (all in pixels)."""
    step = (np.arange(fine) + 0.5) / fine
    u = ((np.arange(left, right)[:, None] + step).ravel() - x) / radius
    v = ((np.arange(top, bottom)[:, None] + step).ravel() - y) / radius
    hit = covers(shape, u[None], v[:, None])
    return hit.reshape(bottom - top, fine, right - left, fine).mean((1, 3))


def render(scene, size=64):
    """The scene as an antialiased RGB picture."""
    picture = np.empty((size, size, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        x, y, radius = thing.x * size, thing.y * size, thing.radius * size
        left, top, right, bottom = int(x - radius), int(y - radius), min(size, int(x + radius) + 1), min(size, int(y + radius) + 1)
        alpha = coverage(thing.shape, x, y, radius, left, top, right, bottom)[..., None]
        window = picture[top:bottom, left:right]
        window += alpha * (np.array(COLOURS[thing.colour]) - window)
    return Image.fromarray(picture.round().astype(np.uint8))
