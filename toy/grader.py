"""The grader: from the pixels of a picture of the toy world back to the scene that it shows, and what of a target a scene gets right.

Each part that stands out from the background is compared with every shape, drawn with the area and centroid that it has.
"""
from collections import Counter

import numpy as np

from toy.world import BACKGROUNDS, COLOURS, FORMS, SIZES, Scene, Thing, coverage, relation, sides

NEAR = 0.12                                                                     # of the side, still the same place
BLOB, SPECK = 0.25, 0.008                                                       # worst fit, smallest part of a picture


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
