"""The grader: from the pixels of a toy picture to the scene it shows, compared with a target.

Every connected region that stands out from the background is compared with each shape, drawn
with the area and the centroid of the region. No network is involved.
"""
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from toy.world import (
    BACKGROUNDS,
    COLOURS,
    FORMS,
    READ,
    SIZES,
    Scene,
    Thing,
    coverage,
    relation,
    sides,
)

# a pixel stands out if its RGB distance to the background is larger (purple on grey is 117)
CONTRAST = 75

# a region smaller than this fraction of the picture is ignored
MIN_AREA = 0.008

# A region is a "blob" if the best shape differs from it by more than this fraction of its area,
# or if fewer of its pixels agree on its colour.
MAX_MISFIT = 0.25
MIN_VOTES = 0.6

# two places are the same if they differ by less than this fraction of the side
NEAR = 0.12


# ---------------------------------------------------------------- regions

def nearest(colours: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> list[str]:
    """The name of the palette colour nearest to each of (N, 3) colours."""
    names = list(palette)
    table = np.array(list(palette.values()))
    distances = ((colours[:, None] - table) ** 2).sum(-1)  # (N, len(palette))
    return [names[i] for i in distances.argmin(1)]


def neighbours(y: int, x: int) -> set[tuple[int, int]]:
    return {(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)}


def components(mask: np.ndarray) -> Iterator[set[tuple[int, int]]]:
    """The connected regions of a mask, each as a set of (row, column)."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    while left:
        region = set()
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            new = left & neighbours(y, x)
            left -= new
            todo += new
        yield region


def soften(picture: np.ndarray) -> np.ndarray:
    """A blur by about one pixel."""
    # along the rows, then along the columns
    for _ in range(2):
        padded = np.pad(picture, ((1, 1), (0, 0)))
        picture = ((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).T
    return picture


# ---------------------------------------------------------------- from a region to a thing

def read_colour(
    pixels: np.ndarray, background: np.ndarray, region: set[tuple[int, int]]
) -> tuple[str, np.ndarray, bool]:
    """-> the name of a region's colour, its RGB difference to the background, and whether the
    region has only this colour. Its pixels vote, without those at the edge."""
    core = [(y, x) for y, x in region if neighbours(y, x) <= region] or list(region)
    colours = pixels[tuple(zip(*core))]  # (N, 3)

    # without half-covered pixels: of red on white these look orange
    distance = ((colours - background) ** 2).sum(1)
    colours = colours[distance > 0.5 * np.quantile(distance, 0.95)]

    votes = nearest(colours, COLOURS)
    colour, n = Counter(votes).most_common(1)[0]
    agreeing = colours[[vote == colour for vote in votes]]
    return colour, np.median(agreeing, 0) - background, n >= MIN_VOTES * len(votes)


def read_shape(alpha: np.ndarray, left: int, top: int) -> tuple[float, str, float, float, float]:
    """-> (misfit, shape, x, y, radius) of the shape that fits best, in pixels.

    alpha: how much of each pixel is covered, in a window whose corner is at (left, top).
    Each shape is drawn with the area and centroid of alpha, sharp or blurred.
    """
    bottom, right = top + alpha.shape[0], left + alpha.shape[1]
    area = alpha.sum() + 1e-6
    x = alpha.sum(0) @ (np.arange(left, right) + 0.5) / area
    y = alpha.sum(1) @ (np.arange(top, bottom) + 0.5) / area
    fits = []
    for shape, (fill, drop) in FORMS.items():
        radius = (area / fill) ** 0.5 / 2
        centre = y - drop * radius
        drawn = coverage(shape, x, centre, radius, left, top, right, bottom)
        # blurred too, since an autoencoder makes a cross nearly round
        for _ in range(3):
            misfit = abs(drawn - alpha).sum() / area
            fits.append((misfit, shape, x, centre, radius))
            drawn = soften(drawn)
    return min(fits)


def read_thing(
    pixels: np.ndarray, background: np.ndarray, region: set[tuple[int, int]]
) -> Thing:
    """The thing that a region shows; its shape is 'blob' if it looks like none of the shapes."""
    colour, ink, one_colour = read_colour(pixels, background, region)

    # the region and its blurred edge, but nothing of another thing
    mask = np.zeros(pixels.shape[:2])
    mask[tuple(zip(*region))] = 1
    mask = soften(soften(mask)) > 0
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

    # how much of each pixel has the thing's colour
    alpha = ((pixels[window] - background) @ ink / max(ink @ ink, 1)).clip(0, 1)
    misfit, shape, x, y, radius = read_shape(mask[window] * alpha, columns[0], rows[0])
    if misfit > MAX_MISFIT or not one_colour:
        shape = "blob"

    # from pixels to fractions of the side
    x, y, radius = (float(value) / len(pixels) for value in (x, y, radius))
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return Thing(shape, colour, size, x, y)


def grade(image: Image.Image) -> Scene:
    """The scene that a square picture shows, from its pixels alone; things from top to bottom."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)  # (height, width, 3)

    # the background, by a vote of the pixels along the four edges
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    names = nearest(border, BACKGROUNDS)
    name = Counter(names).most_common(1)[0][0]
    background = np.median(border[[n == name for n in names]], 0)

    things = []
    for region in components(((pixels - background) ** 2).sum(-1) > CONTRAST ** 2):
        if len(region) > MIN_AREA * pixels[..., 0].size:
            things.append(read_thing(pixels, background, region))
    return Scene(tuple(sorted(things, key=lambda t: (t.y, t.x))), name)


# ---------------------------------------------------------------- comparing with a target

def near(a: Thing, b: Thing) -> bool:
    """The same colour and shape in the same place, to within NEAR?"""
    return a.name == b.name and max(abs(a.x - b.x), abs(a.y - b.y)) < NEAR


def check(found: Scene, target: Scene, places: bool = False) -> dict[str, bool]:
    """What a found scene gets right of the target, by name.

    Sizes do not count, and exact places only with places=True.
    """
    names = sorted(t.name for t in found.things)
    target_names = sorted(t.name for t in target.things)
    right = {
        "colours_shapes": names == target_names,
        "count": len(names) == len(target_names),
        "background": found.background == target.background,
        "relation": same_relation(found, target),
    }
    if places:
        right["places"] = all(any(near(f, t) for f in found.things) for t in target.things)
    return right


def same_relation(found: Scene, target: Scene) -> bool:
    """If the target's two things are in a clear relation: are the found ones in the same?"""
    where = sides(target)
    if where is None:
        return True
    first, second = target.things
    firsts = [t for t in found.things if t.name == first.name]
    seconds = [t for t in found.things if t.name == second.name]
    return any(relation(f, s, READ) == where for f in firsts for s in seconds)


def matches(found: Scene, target: Scene, places: bool = False) -> bool:
    """Is everything that `check` looks at right?"""
    return all(check(found, target, places).values())
