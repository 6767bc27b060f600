"""Data: the toy world (scenes of coloured shapes, with captions, edits, questions, and a grader that reads pictures), and real data.

Of the toy world everything is drawn from an explicit `random.Random`; nothing is downloaded. A caption says everything that counts
except exact places: what is left unsaid is a medium size and a white background.
Coordinates are fractions of the picture's side, x to the right and y down. Left out: rotation, overlap, textures, free language.
"""
import glob
import io
import itertools
import json
import pathlib
import random
import re
import signal
import tarfile
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220),
           "yellow": (240, 210, 30), "purple": (150, 50, 180), "orange": (245, 130, 30)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (165, 165, 165), "black": (15, 15, 15)}
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.20}                          # half the side of the box a thing fills
HELD_OUT = frozenset({("purple", "triangle"), ("orange", "cross")})             # never drawn with a second thing, until a test asks
MARGIN, GAP = 0.03, 0.06                                                        # to the picture's edge; between two boxes: 4 pixels of 64
STEP = 0.15                                                                     # a thing that is moved goes at least so far
BORDER = 0.04                                                                   # no centre is nearer to a line of the 3x3 grid of places
# the part of its box that a shape fills, and how far its centroid lies below the centre of the box, in radii
FORMS = {"circle": (np.pi / 4, 0), "square": (1, 0), "triangle": (1 / 2, 1 / 3), "cross": (0.64, 0)}
KINDS = ("jpg", "jpeg", "png", "webp")                                          # of pictures in real data
NEAR = 0.12                                                                     # the grader: of the side, still the same place
BLOB, SPECK = 0.25, 0.008                                                       # the grader: worst fit, smallest part of a picture
NUMBERS = ("zero", "one", "two", "three", "four")
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


def spot(thing):
    return next(name for name, where in SPOTS.items() if where == cell(thing))


def at(name):
    return f"in the {name}" if name == "centre" else f"at the {name}"


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


# ---------------------------------------------------------------- words

def a(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words):
    return words + ("es" if words.endswith("s") else "s")


def join(parts):
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def listing(things):
    """'two green triangles and a blue square', in the order of first appearance."""
    return join([a(label) if n == 1 else f"{NUMBERS[n]} {plural(label)}" for label, n in Counter(t.label for t in things).items()])


def side(where):
    return f"to the {where}" if where in ("left of", "right of") else where


def its_side(where):
    return f"to its {where.split()[0]}" if where in ("left of", "right of") else f"{where} it"


def plain(scene):
    """The shortest text that says it all but the background: 'a red circle left of a blue square', 'three red circles'."""
    if where := sides(scene):
        first, second = scene.things
        return f"{a(first.label)} {where} {a(second.label)}"
    return listing(scene.things)


def ordered(scene):
    """The same scene with two things named from left to right, or else from top to bottom."""
    swap = sides(scene) in ("right of", "below")
    return replace(scene, things=scene.things[::-1]) if swap else scene


def varied(scene, rng):
    """The same content in one of many wordings."""
    things = scene.things
    core = listing(things)
    if len(things) == 1 and rng.random() < 0.6:
        core = f"{core} {at(spot(things[0]))}"
    where = sides(Scene(things[:2]))
    if len(things) == 2 and where:
        first, second, back = a(things[0].label), a(things[1].label), OPPOSITE[where]
        core = rng.choice([f"{first} {side(where)} {second}", f"{second} {back} {first}", f"{second} {side(back)} {first}",
                           f"{second} with {first} {its_side(where)}", f"{first} with {second} {its_side(back)}"])
    names = Counter(t.name for t in things)
    if len(things) > 2 and where and names[things[0].name] == names[things[1].name] == 1 and rng.random() < 0.6:
        core = f"{core}, with the {things[0].name} {side(where)} the {things[1].name}"
    verb = "is" if core.startswith(("a ", "an ")) else "are"
    return rng.choice(("", "draw ", "paint ", "show me ", "a picture of ", "an image of ", f"there {verb} ")) + core


def caption(scene, rng):
    """What a person might ask for to get this scene: half of the time the plain form, else varied wording."""
    if rng.random() < 0.5:
        return plain(scene) + (f", on a {scene.background} background" if scene.background != "white" else "")
    text = varied(scene, rng)
    if scene.background != "white" or rng.random() < 0.1:
        text += rng.choice((", on a {} background", " against a {} background", ", on {}")).format(scene.background)
    return text


def request(scene, rng):
    """-> a text to draw from, and the plain form of what it says. A caption; or each thing with its place, as longer captions of real pictures
    have it; or only what there is, sides left open."""
    sort = rng.choices(("caption", "places", "list"), (0.5, 0.35, 0.15))[0]
    if sort == "caption":
        return caption(scene, rng), plain(ordered(scene))
    names = [t.label for t in scene.things]
    things = sorted(scene.things, key=lambda t: names.index(t.label))           # equal ones together
    text = join([f"{a(t.label)} {at(spot(t))}" for t in things]) if sort == "places" else listing(things)
    ground = f", on a {scene.background} background" if scene.background != "white" else ""
    return rng.choice(("", "draw ", "paint ", "a picture of ")) + text + ground, plain(ordered(scene)) if sort == "places" else listing(things)


def describe(scene):
    """The one full description of a scene: things column by column, from left to right, each with its place."""
    things = sorted(scene.things, key=lambda t: (cell(t), t.x, t.y))
    return join([f"{a(t.label)} {at(spot(t))}" for t in things]) + f", on a {scene.background} background"


# ---------------------------------------------------------------- edits

def references(thing, scene):
    """The ways to point at one thing and no other: its full name, its shape alone, its colour alone."""
    ways = [f"the {thing.name}"] if sum(t.name == thing.name for t in scene.things) == 1 else []
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        ways.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        ways.append(f"the {thing.colour} object")
    return ways


def pick(scene, rng, but=None):
    """A thing that words can single out, and these words; (None, None) where there is none."""
    things = [t for t in scene.things if t != but and references(t, scene)]
    thing = rng.choice(things) if things else None
    return thing, thing and rng.choice(references(thing, scene))


def swapped(scene, old, new):
    return replace(scene, things=tuple(new if t == old else t for t in scene.things))


def recolour(scene, rng, thing, words):
    colour = rng.choice(list(COLOURS))
    order = rng.choice((f"make {words} {colour}", f"paint {words} {colour}", f"change the colour of {words} to {colour}"))
    return order, swapped(scene, thing, replace(thing, colour=colour))


def exchange(scene, rng, thing, words):
    colour, shape = sample_name(rng)
    if rng.random() < 0.3:                                                      # only the shape changes
        return f"turn {words} into {a(shape)}", swapped(scene, thing, replace(thing, shape=shape))
    order = rng.choice((f"replace {words} with", f"swap {words} for"))
    return f"{order} {a(f'{colour} {shape}')}", swapped(scene, thing, replace(thing, colour=colour, shape=shape))


def remove(scene, rng, thing, words):
    order = rng.choice(("remove", "delete", "take away"))
    return f"{order} {words}", replace(scene, things=tuple(t for t in scene.things if t != thing))


def centre_of(column, row, radius):
    low = radius + MARGIN
    return tuple(min(max((c + 0.5) / 3, low), 1 - low) for c in (column, row))


def add(scene, rng, thing, words):
    """At a stated spot, at a stated side of another thing, or just anywhere."""
    colour, shape = sample_name(rng)
    size = rng.choice(("small", "medium"))
    new = Thing(shape, colour, size, *sample_place(rng, SIZES[size]))
    order = f"{rng.choice(('add', 'put'))} {a(new.label)}"
    if rng.random() < 0.4:
        where = rng.choice(list(SPOTS))
        x, y = centre_of(*SPOTS[where], new.radius)
        new = replace(new, x=x, y=y)
        order = f"{order} {at(where)}"
    elif thing and rng.random() < 0.7 and relation(new, thing):
        order = f"{order} {side(relation(new, thing))} {words}"
    return order, replace(scene, things=scene.things + (new,))


def move(scene, rng, thing, words):
    """To a spot ('to the left' keeps the height, 'to the top' keeps the column) or to another side of another thing."""
    other, other_words = pick(scene, rng, but=thing)
    if other and rng.random() < 0.5:
        x, y = sample_place(rng, thing.radius)
        new = replace(thing, x=x, y=y)
        where = relation(new, other)
        if where in (None, relation(thing, other, ratio=1.2)) or max(abs(x - thing.x), abs(y - thing.y)) < STEP:
            return None, scene
        return f"move {words} {side(where)} {other_words}", swapped(scene, thing, new)
    where = rng.choice(list(SPOTS))
    x, y = centre_of(*SPOTS[where], thing.radius)
    new = replace(thing, x=thing.x if where in ("top", "bottom") else x, y=thing.y if where in ("left", "right") else y)
    if max(abs(new.x - thing.x), abs(new.y - thing.y)) < STEP:
        return None, scene
    return f"move {words} to the {where}", swapped(scene, thing, new)


def repaint(scene, rng, thing, words):
    background = rng.choice(list(BACKGROUNDS))
    order = rng.choice(("make the background {}", "change the background to {}", "put it on a {} background"))
    return order.format(background), replace(scene, background=background)


EDITORS = {"recolour": recolour, "replace": exchange, "remove": remove, "add": add, "move": move, "background": repaint}
EDITS = tuple(EDITORS)


def edit(scene, rng, action=None, held_out=False):
    """-> (instruction, target scene, action). Raises ValueError where the asked action is impossible in this scene."""
    actions = [action] if action else rng.sample(EDITS, len(EDITS))
    for name in actions:
        for _ in range(100):                                                    # propose blindly, keep what is valid
            thing, words = pick(scene, rng)
            if thing is None and name not in ("add", "background"):             # three red circles: no words for one of them
                break
            order, target = EDITORS[name](scene, rng, thing, words)
            if target != scene and valid(target, held_out):
                return order, target, name
    raise ValueError(f"cannot {action or 'edit'}: {describe(scene)}")


# ---------------------------------------------------------------- questions

def ask_colour(scene, rng, seen):
    asked = [("what colour is the background?", scene.background)] if seen else []
    for shape in SHAPES:
        colours = [t.colour for t in scene.things if t.shape == shape]
        if len(colours) == 1:
            asked += [(f"what colour is the {shape}?", colours[0])] * 2
        elif len(set(colours)) == 1:
            asked += [(f"what colour are the {plural(shape)}?", colours[0])] * 2
    return asked


def ask_shape(scene, rng, seen):
    counts = Counter(t.colour for t in scene.things)
    return [(q, t.shape) for t in scene.things if counts[t.colour] == 1
            for q in (f"what shape is the {t.colour} object?", f"what is the shape of the {t.colour} object?")]


def ask_count(scene, rng, seen):
    thing, (colour, shape) = rng.choice(scene.things), sample_name(rng)
    asked = {"objects": len(scene.things)}
    for c, s in ((thing.colour, thing.shape), (colour, shape)):
        asked[plural(s)] = sum(t.shape == s for t in scene.things)
        asked[f"{c} objects"] = sum(t.colour == c for t in scene.things)
    asked[plural(thing.name)] = sum(t.name == thing.name for t in scene.things)
    return [(q.format(what), NUMBERS[n]) for what, n in asked.items() for q in ("how many {} are there?", "how many {}?")]


def ask_where(scene, rng, seen):
    things = scene.things
    if sides(scene):
        pairs = [(t, other, relation(t, other)) for t, other in (things, things[::-1])]
        return [pair for t, other, where in pairs for pair in
                ((f"where is {rng.choice(references(t, scene))}?", f"{where} the {other.name}"),
                 (f"what is {side(where)} {rng.choice(references(other, scene))}?", a(t.name)))]
    return [(f"where is {words}?", at(spot(t))) for t in things for words in references(t, scene)] if seen else []


def ask_exists(scene, rng, seen):
    """Half yes, half no; every second no differs from something there in one word only."""
    names = {(t.colour, t.shape) for t in scene.things}
    colour, shape = rng.choice(sorted(names))
    if rng.random() < 0.5:
        return [(f"is there {a(f'{colour} {shape}')}?", "yes")]
    while (colour, shape) in names | HELD_OUT:                                  # held-out pairs must not become a sure no
        other = sample_name(rng)
        colour, shape = rng.choice((other, other, (colour, other[1]), (other[0], shape)))
    return [(f"is there {a(f'{colour} {shape}')}?", "no")]


def ask_describe(scene, rng, seen):
    return [(q, describe(scene)) for q in ("describe the picture", "what is in the picture?")] if seen else []


ASKERS = {"colour": ask_colour, "shape": ask_shape, "count": ask_count, "where": ask_where, "exists": ask_exists,
          "describe": ask_describe}
QUESTIONS = tuple(ASKERS)


def question(scene, rng, kind=None, seen=True):
    """-> (question, answer, kind). seen=False asks only what the plain caption answers. ValueError where there is no such question.
    Asked most is what takes longest to learn: which colour, shape and place belong together."""
    kinds = rng.sample(QUESTIONS, len(QUESTIONS))
    for name in [kind] if kind else [*rng.choices(QUESTIONS, (2, 2, 1, 3, 1, 1)), *kinds]:      # the one drawn, or if there is none, any other
        if asked := ASKERS[name](scene, rng, seen):
            return *rng.choice(asked), name
    raise ValueError(f"no {kind} question (seen={seen}) about: {describe(scene)}")


def corpus(n, seed):
    """n strings of every sort, the text a tokenizer is trained on."""
    rng = random.Random(seed)
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        asked, answer, _ = question(scene, rng)
        texts += [caption(scene, rng), edit(scene, rng)[0], asked, answer]
    return texts[:n]


# ---------------------------------------------------------------- the grader

def nearest(colours, palette):
    """The name of the palette colour nearest to each of (N, 3) colours."""
    names, table = list(palette), np.array(list(palette.values()))
    return [names[i] for i in ((colours[:, None] - table) ** 2).sum(-1).argmin(1)]


def components(mask):
    """The connected parts of a mask, each as a set of (row, column)."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    while left:
        part, todo = set(), [left.pop()]
        while todo:
            y, x = todo.pop()
            part.add((y, x))
            near = left & {(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)}
            left -= near
            todo += near
        yield part


def soften(picture):
    """A blur by about one pixel."""
    for _ in range(2):                                                          # along the rows, then along the columns
        padded = np.pad(picture, ((1, 1), (0, 0)))
        picture = ((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).T
    return picture


def read_shape(alpha, left, top):
    """-> (misfit, shape, x, y, radius): each shape drawn with the area and centroid seen, sharp or blurred; the one that fits best."""
    bottom, right = top + alpha.shape[0], left + alpha.shape[1]
    area = alpha.sum() + 1e-6
    x = alpha.sum(0) @ (np.arange(left, right) + 0.5) / area
    y = alpha.sum(1) @ (np.arange(top, bottom) + 0.5) / area
    fits = []
    for shape, (fill, drop) in FORMS.items():
        radius = (area / fill) ** 0.5 / 2
        drawn = coverage(shape, x, y - drop * radius, radius, left, top, right, bottom)
        for _ in range(3):                                                      # an autoencoder rounds a cross nearly to a circle
            fits.append((abs(drawn - alpha).sum() / area, shape, x, y - drop * radius, radius))
            drawn = soften(drawn)
    return min(fits)


def read_thing(pixels, ground, part):
    """Colour by a vote of the pixels away from the edge, then shape and place by how much of each pixel has that colour."""
    core = [(y, x) for y, x in part if {(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)} <= part] or list(part)
    colours = pixels[tuple(zip(*core))]                                         # (N, 3)
    depth = ((colours - ground) ** 2).sum(1)
    colours = colours[depth > 0.5 * np.quantile(depth, 0.95)]                   # a half-covered pixel of red on white looks orange
    votes = nearest(colours, COLOURS)
    colour, n = Counter(votes).most_common(1)[0]
    ink = np.median(colours[[vote == colour for vote in votes]], 0) - ground
    mine = np.zeros(pixels.shape[:2])
    mine[tuple(zip(*part))] = 1
    near = soften(soften(mine)) > 0                                             # the blurred edge too, but nothing of another thing
    rows, columns = near.any(1).nonzero()[0], near.any(0).nonzero()[0]
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    alpha = near[window] * ((pixels[window] - ground) @ ink / max(ink @ ink, 1)).clip(0, 1)
    misfit, shape, x, y, radius = read_shape(alpha, columns[0], rows[0])
    if misfit > BLOB or n < 0.6 * len(votes):
        shape = "blob"                                                          # like no shape, or two-coloured: matches no target
    x, y, radius = (float(value) / len(pixels) for value in (x, y, radius))
    return Thing(shape, colour, min(SIZES, key=lambda name: abs(SIZES[name] - radius)), x, y)


def grade(image):
    """The scene that a square picture shows, from its pixels alone, top first; what looks like no shape is a 'blob'."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)                      # (height, width, 3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    names = nearest(border, BACKGROUNDS)
    background = Counter(names).most_common(1)[0][0]
    ground = np.median(border[[name == background for name in names]], 0)
    parts = components(((pixels - ground) ** 2).sum(-1) > 75 ** 2)              # a purple thing on grey is 117 away
    things = [read_thing(pixels, ground, part) for part in parts if len(part) > SPECK * pixels[..., 0].size]
    return Scene(tuple(sorted(things, key=lambda t: (t.y, t.x))), background)


def near(a, b):
    """The same thing in the same place, to within NEAR."""
    return a.name == b.name and max(abs(a.x - b.x), abs(a.y - b.y)) < NEAR


def check(found, target, places=False):
    """What of the target a found scene gets right, by name. Sizes never count; places only where asked."""
    names = [sorted(t.name for t in scene.things) for scene in (found, target)]
    where = sides(target)
    first, second = ([f for f in found.things if f.name == t.name] for t in (target.things[0], target.things[-1]))
    right = {"colours_shapes": names[0] == names[1], "count": len(names[0]) == len(names[1]),
             "background": found.background == target.background,
             # 1.2, not 1.5: a scene at the limit of being clear may be read as just beyond it
             "relation": where is None or any(relation(f, s, ratio=1.2) == where for f in first for s in second)}
    if places:
        right["places"] = all(any(near(f, t) for f in found.things) for t in target.things)
    return right


def matches(found, target, places=False):
    return all(check(found, target, places).values())

# ---------------------------------------------------------------- examples: from the toy world, from tars, from a folder

@dataclass(frozen=True)
class Example:
    """A prompt, the pictures it speaks of (none: text to image), the picture to draw (or its latents), the record's name for logs and caches."""
    prompt: str
    images: tuple
    target: Image.Image
    name: str = ""


def draw_example(rng, size):
    scene = sample_scene(rng)
    return Example(request(scene, rng)[0], (), render(scene, size))


def edit_example(rng, size):
    scene = sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))
    order, target, _ = edit(scene, rng)
    return Example(order, (render(scene, size),), render(target, size))


class Toy:
    """An endless source: example i is make(rng, i), with an rng from (seed, i) alone, so there is nothing to shuffle."""
    pool = 0

    def __init__(self, make, seed):
        self.make, self.seed = make, seed

    def locations(self, rng):
        return itertools.count()

    def read(self, i):
        return self.make(random.Random(f"{self.seed} {i}"), i)


def open_image(file, name=None):
    """An upright RGB picture from a path or an open file. ValueError if it cannot be read, or is so large that it may be an attack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return ImageOps.exif_transpose(Image.open(file)).convert("RGB")     # upright, as a viewer shows it
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{name or file}: picture has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as e:                                                      # decoders raise all sorts of things on damaged bytes
        raise ValueError(f"{name or file} is not a readable picture: {e}") from None


class Pictures:
    """What the two real sources share: records hold files, and every picture becomes a square, shorter side first, cut at the centre."""
    pool = 10_000                                                               # records among which the next one is drawn

    def __init__(self, size, latents=None):
        self.size, self.latents = size, latents                                 # latents(name) -> what to use instead of the target

    def square(self, file, name):
        return ImageOps.fit(open_image(file, name), (self.size, self.size), Image.Resampling.BICUBIC)

    def example(self, name, text, sources, target):
        """text: str or UTF-8; sources: list of files; target: a file. ValueError where one of them is missing or broken."""
        if not isinstance(text, str | bytes) or target is None:
            raise ValueError(f"{name}: the record has no {'picture to draw' if isinstance(text, str | bytes) else 'text'}")
        try:
            text = (text.encode() if isinstance(text, str) else text).decode()  # JSON can hold what UTF-8 cannot: "\ud800"
        except UnicodeError:
            raise ValueError(f"{name}: the text is not UTF-8") from None
        known = self.latents(name) if self.latents else None
        sources = tuple(self.square(f, f"{name}, source") for f in sources)
        return Example(text, sources, self.square(target, f"{name}, target") if known is None else known, name)


def key_suffix(name):
    """'train/0001.source.jpg' -> ('train/0001', 'source.jpg'): a record's key, and which part of it this is."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


class Tars(Pictures):
    """webdataset tars: the members of a record share their name up to the first dot. `txt` and `jpg` (jpeg, png, webp); for editing `txt`,
    `source.jpg` (or source0.jpg, source1.jpg, ...) and `target.jpg`. Read where they lie, nothing is ever extracted."""

    def __init__(self, files, *how):
        super().__init__(*how)
        self.files = files

    def locations(self, rng):
        """(file, key, {suffix: (offset, bytes)}) of every record, tar by tar in random order; only headers are read."""
        for file in rng.sample(self.files, len(self.files)):
            try:
                with tarfile.open(file, "r:") as tar:
                    for key, members in itertools.groupby(self.members(tar), lambda m: key_suffix(m.name)[0]):
                        parts = {key_suffix(m.name)[1]: (m.offset_data, m.size) for m in members}
                        yield file, f"{key}, byte {next(iter(parts.values()))[0]}", parts       # a key may come again
            except tarfile.TarError as e:
                yield file, f"damaged tar, the rest of it is lost: {e}", {}

    @staticmethod
    def members(tar):
        while member := tar.next():
            tar.members.clear()                                                 # tarfile remembers all of them, in a stream too many
            if member.isfile():
                yield member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):     # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"at byte {tar.offset} is neither a header nor the mark of the end")

    def read(self, location):
        file, key, parts = location
        name, found = f"{file}: {key}", {}
        with open(file, "rb") as f:
            for part, (offset, size) in parts.items():
                f.seek(offset)
                role, _, kind = part.rpartition(".")
                found[role if kind in KINDS else part] = f.read(size)
        pictures = {role: io.BytesIO(content) for role, content in found.items() if role != "txt"}
        sources = [pictures[role] for role in sorted(pictures, key=lambda r: (len(r), r)) if role.startswith("source")]      # source10 after source9
        return self.example(name, found.get("txt"), sources, pictures.get("target", pictures.get("")))


class Folder(Pictures):
    """A folder with metadata.jsonl, as Hugging Face's imagefolder has it: `text` and `file_name`; for editing `text`, `source` (one or a list)
    and `target`."""

    def __init__(self, folder, *how):
        super().__init__(*how)
        self.folder = folder

    def locations(self, rng):
        """The offset of every line."""
        offset = 0
        with open(self.folder / "metadata.jsonl", "rb") as f:
            for line in f:
                if line.strip():
                    yield offset
                offset += len(line)

    def read(self, offset):
        file = self.folder / "metadata.jsonl"
        with open(file, "rb") as f:
            f.seek(offset)
            try:
                row = dict(json.loads(f.readline()))
                target, sources = row.get("target", row.get("file_name")), row.get("source", [])
                sources = [sources] if isinstance(sources, str) else sources
                if not all(isinstance(x, str) for x in (target, *sources)):
                    raise ValueError("source, and target or file_name, must be names of files")
            except (ValueError, TypeError) as e:
                raise ValueError(f"{file}, byte {offset}: {e}") from None
        return self.example(str(self.folder / target), row.get("text"), [self.folder / s for s in sources], self.folder / target)


def source(spec, toys, seed, *how):
    """What --data names: one of `toys`, a folder with metadata.jsonl, a folder of tars, a tar, 'shards-{000..123}.tar' or 'a*.tar'.
    ValueError if it holds nothing that can be read."""
    if spec in toys:
        return Toy(toys[spec], seed)
    path = pathlib.Path(spec)
    if (path / "metadata.jsonl").is_file():
        found = Folder(path, *how)
    else:
        files = [str(path / "*.tar")] if path.is_dir() else [spec]
        if span := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
            first, last = span.groups()
            files = [spec[:span.start()] + f"{i:0{len(first)}d}" + spec[span.end():] for i in range(int(first), int(last) + 1)]
        every = {f: sorted(glob.glob(f)) for f in files}
        if missing := [f for f, there in every.items() if not there]:
            raise ValueError(f"--data {spec}: no such files: {missing[:3]}; expected tars, a folder with metadata.jsonl, or one of {list(toys)}")
        found = Tars(sum(every.values(), []), *how)
    wrong = []
    for location in found.locations(random.Random(0)):
        try:
            found.read(location)
            return found
        except ValueError as e:
            wrong.append(str(e))
    raise ValueError("\n".join([f"--data {spec}: there is not one record in it that can be read", *wrong[:10]]))


# ---------------------------------------------------------------- one order of examples for all processes, and each one's share of it

def shuffled(source, seed):
    """A source's locations without end, epoch after epoch, each through a pool that gives out one at random for one that enters. The pool
    holds places, not pictures, so it can be deep, and to pass over a million examples only headers are read."""
    for epoch in itertools.count():
        rng, pool = random.Random(f"{seed} epoch {epoch}"), []
        for location in source.locations(rng):
            pool.append(location)
            if len(pool) > source.pool:
                i = rng.randrange(len(pool))
                pool[i], pool[-1] = pool[-1], pool[i]
                yield pool.pop()
        rng.shuffle(pool)
        yield from pool


def mixed(sources, weights, seed):
    """(source, location) without end: each time one of the sources, as often as its weight says."""
    rng, streams = random.Random(f"{seed} mixture"), [shuffled(s, f"{seed} {i}") for i, s in enumerate(sources)]
    while True:
        i, = rng.choices(range(len(sources)), weights)
        yield sources[i], next(streams[i])


def unread(stream, world, reached):
    """What `world` processes left of a stream when each had come as far as `reached` says."""
    return (x for i, x in enumerate(stream) if i >= reached[i % world])


class Share(torch.utils.data.IterableDataset):
    """One process's part of the one order of all examples: every `world`-th. Yields (place, number, example or what is wrong with it).

    past: [(world, [how far each process came]), ...], one entry for each number of processes so far, the last one for now: what was read
    is left out, so nobody sees an example twice in an epoch, even if a run goes on with more or fewer processes. `number` is the
    example's in the whole order, whoever reads it; `place` is its place in what was left when this number of processes began.
    """

    def __init__(self, sources, weights, seed, rank, past):
        self.sources, self.weights, self.seed, self.rank, self.past = sources, weights, seed, rank, past

    def __iter__(self):
        stream = enumerate(mixed(self.sources, self.weights, self.seed))
        for world, reached in self.past[:-1]:
            stream = unread(stream, world, reached)
        world, reached = self.past[-1]
        mine = itertools.islice(enumerate(stream), self.rank, None, world)
        mine = itertools.dropwhile(lambda x: x[0] < reached[self.rank], mine)
        worker = torch.utils.data.get_worker_info()                             # helpers of a process take turns
        for place, (number, (source, location)) in itertools.islice(mine, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            try:
                yield place, number, source.read(location)
            except (ValueError, OSError) as e:
                yield place, number, str(e).encode(errors="backslashreplace").decode()          # names of files may be no text


def deaf(worker):
    """A signal to all processes at once is for the first one to answer: it needs its helpers until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Reader:
    """Yields (number, example), good ones only. A broken record is counted and named in `bad`. ValueError with the list after a thousand in a row,
    or more than would come by chance if the part `max_bad` of all records were broken: three standard deviations above the mean, and two to
    begin with. `reached` is the place to go on from."""

    def __init__(self, share, workers=0, max_bad=0.01):
        self.share, self.workers, self.max_bad, self.bad, self.seen = share, workers, max_bad, [], 0
        self.reached = share.past[-1][1][share.rank]

    def __iter__(self):
        loader, in_a_row = torch.utils.data.DataLoader(self.share, batch_size=None, num_workers=self.workers, worker_init_fn=deaf), 0
        for place, number, example in loader:
            self.seen, self.reached = self.seen + 1, place + 1
            if not isinstance(example, str):
                in_a_row = 0
                yield number, example
                continue
            self.bad.append(example)
            in_a_row, mean = in_a_row + 1, self.max_bad * self.seen
            if len(self.bad) > mean + 3 * mean ** 0.5 + 2 or in_a_row == 1000:
                raise ValueError("\n".join([f"{len(self.bad)} of {self.seen} records are broken, more than --max-bad allows:", *self.bad]))


def noise(rngs, shape, device):
    """Times (B,), uniform in (0, 1], and standard normal noise (B, *shape), each row from its own random.Random."""
    t = torch.tensor([1 - r.random() for r in rngs])
    eps = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(63))) for r in rngs])
    return t.to(device), eps.to(device)


# ---------------------------------------------------------------- for the eye

def sheet(images, labels=None, scale=1, columns=None):
    """Pictures of one size in a grid, a small text under each; scale enlarges them without smoothing."""
    width, height = (scale * s for s in images[0].size)
    columns = columns or min(len(images), max(1, 1024 // (width + 8)))
    font = ImageFont.load_default(10)
    letters = max(1, int(width / font.getlength("n")))
    texts = [textwrap.wrap(str(label), letters, max_lines=6, placeholder="...") for label in labels or [""] * len(images)]
    tall = height + 8 + 12 * max(map(len, texts))
    page = Image.new("RGB", (columns * (width + 8) + 8, -(-len(images) // columns) * tall + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = 8 + i % columns * (width + 8), 8 + i // columns * tall
        page.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgrey")  # many of the pictures are white, as the page is
        draw.multiline_text((x, y + height), "\n".join(text), "black", font, spacing=1)
    return page
