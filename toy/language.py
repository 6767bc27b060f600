"""How people speak of the toy world: captions, edit instructions, questions and their answers.

A caption says everything but exact places; a medium size and a white background go without saying.
Every random choice is made by an explicit `random.Random`. Left out: free language.
"""
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from toy.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MARGIN,
    OPPOSITE,
    SHAPES,
    SIZES,
    SPOTS,
    Scene,
    Thing,
    columns,
    relation,
    sample_name,
    sample_place,
    sample_scene,
    sides,
    spot,
    valid,
)

NUMBERS = ("zero", "one", "two", "three", "four")

# a thing that is moved goes at least this far, in one direction
STEP = 0.15


# ---------------------------------------------------------------- words

def at(name: str) -> str:
    """'top left' -> 'at the top left'; 'centre' -> 'in the centre'."""
    return f"in the {name}" if name == "centre" else f"at the {name}"


def a(words: str) -> str:
    """With the indefinite article: 'an orange cross'."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words: str) -> str:
    return words + ("es" if words.endswith("s") else "s")


def join(parts: list[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    if len(parts) < 2:
        return " and ".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def listing(things: Sequence[Thing]) -> str:
    """'two green triangles and a blue square', in the order of first appearance."""
    parts = []
    for label, n in Counter(t.label for t in things).items():
        parts.append(a(label) if n == 1 else f"{NUMBERS[n]} {plural(label)}")
    return join(parts)


def with_spots(things: Sequence[Thing]) -> str:
    """'a red circle at the left and a blue square at the top'."""
    return join([f"{a(t.label)} {at(spot(t))}" for t in things])


def side(where: str) -> str:
    """'left of' -> 'to the left of'; 'above' stays."""
    return f"to the {where}" if where in ("left of", "right of") else where


def its_side(where: str) -> str:
    """'left of' -> 'to its left'; 'above' -> 'above it'."""
    return f"to its {where.split()[0]}" if where in ("left of", "right of") else f"{where} it"


def background_phrase(scene: Scene) -> str:
    """', on a grey background', or nothing for white."""
    return "" if scene.background == "white" else f", on a {scene.background} background"


# ---------------------------------------------------------------- captions

def plain(scene: Scene) -> str:
    """The shortest text that says everything but the background.

    'a red circle left of a blue square', 'three red circles'
    """
    if where := sides(scene):
        first, second = scene.things
        return f"{a(first.label)} {where} {a(second.label)}"
    return listing(scene.things)


def ordered(scene: Scene) -> Scene:
    """The same scene, with two things in order from left to right, or else from top to bottom."""
    swap = sides(scene) in ("right of", "below")
    return replace(scene, things=scene.things[::-1]) if swap else scene


def varied(scene: Scene, rng: random.Random) -> str:
    """The content of `plain` in one of many wordings."""
    things = scene.things
    where = sides(Scene(things[:2]))
    core = listing(things)
    if len(things) == 1 and rng.random() < 0.6:
        core = f"{core} {at(spot(things[0]))}"

    if len(things) == 2 and where:
        first, second = a(things[0].label), a(things[1].label)
        back = OPPOSITE[where]
        core = rng.choice([
            f"{first} {side(where)} {second}",
            f"{second} {back} {first}",
            f"{second} {side(back)} {first}",
            f"{second} with {first} {its_side(where)}",
            f"{first} with {second} {its_side(back)}",
        ])

    # three or more: perhaps also how the first two are placed, if their names are unique
    if len(things) > 2 and where:
        names = Counter(t.name for t in things)
        first, second = things[0].name, things[1].name
        if names[first] == names[second] == 1 and rng.random() < 0.6:
            core = f"{core}, with the {first} {side(where)} the {second}"

    verb = "is" if core.startswith(("a ", "an ")) else "are"
    openings = (
        "", "draw ", "paint ", "show me ", "a picture of ", "an image of ", f"there {verb} ",
    )
    return rng.choice(openings) + core


def caption(scene: Scene, rng: random.Random) -> str:
    """What a person might say to get this scene: the plain form or, half of the time, varied."""
    if rng.random() < 0.5:
        return plain(scene) + background_phrase(scene)
    text = varied(scene, rng)
    # a white background is mentioned now and then
    if scene.background != "white" or rng.random() < 0.1:
        wordings = (", on a {} background", " against a {} background", ", on {}")
        text += rng.choice(wordings).format(scene.background)
    return text


def request(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """-> a text to draw from, and the plain form of what it says.

    One of three kinds: a caption; a text that names the spot of each thing, like the longer
    captions of real pictures; or a list of what there is, with nothing about relations.
    Where no relation is stated, things are named from left to right, as people do.
    """
    kind = rng.choices(("caption", "places", "list"), (0.4, 0.25, 0.35))[0]
    left_to_right = replace(scene, things=columns(scene))
    if kind == "caption":
        scene = scene if sides(scene) else left_to_right
        return caption(scene, rng), plain(ordered(scene))

    if kind == "places":
        # equal things are named together
        labels = [t.label for t in left_to_right.things]
        things = sorted(left_to_right.things, key=lambda t: labels.index(t.label))
        text = with_spots(things)
        meaning = plain(ordered(left_to_right))
    else:
        text = listing(left_to_right.things)
        meaning = text
    opening = rng.choice(("", "draw ", "paint ", "a picture of "))
    return opening + text + background_phrase(scene), meaning


def describe(scene: Scene) -> str:
    """The one full description of a scene: its things from left to right, each with its spot."""
    return with_spots(columns(scene)) + f", on a {scene.background} background"


# ---------------------------------------------------------------- edits

def references(thing: Thing, scene: Scene) -> list[str]:
    """The ways to refer to this thing and no other: its name, its shape alone, its colour alone."""
    ways = []
    if sum(t.name == thing.name for t in scene.things) == 1:
        ways.append(f"the {thing.name}")
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        ways.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        ways.append(f"the {thing.colour} object")
    return ways


def mentions(text: str, scene: Scene) -> list[tuple[int, Thing]]:
    """-> [(where the words end, thing)] for all words in a text that refer to one thing."""
    found = []
    for thing in scene.things:
        for words in references(thing, scene):
            if match := re.search(rf"{words}\b", text):
                found.append((match.end(), thing))
    return found


def pick(
    scene: Scene, rng: random.Random, exclude: Thing | None = None
) -> tuple[Thing, str] | tuple[None, None]:
    """A random thing that words can single out, and such words; (None, None) if there is none."""
    things = [t for t in scene.things if t != exclude and references(t, scene)]
    if not things:
        return None, None
    thing = rng.choice(things)
    return thing, rng.choice(references(thing, scene))


def swapped(scene: Scene, old: Thing, new: Thing) -> Scene:
    """The scene with a new thing instead of an old one."""
    return replace(scene, things=tuple(new if t == old else t for t in scene.things))


# An editor takes a scene, a thing in it and words that refer to the thing, and proposes
# (instruction, target scene). The target may be invalid or unchanged: `edit` then asks again.

def recolour(scene, rng, thing, words):
    colour = rng.choice(list(COLOURS))
    wordings = (
        f"make {words} {colour}",
        f"paint {words} {colour}",
        f"change the colour of {words} to {colour}",
    )
    return rng.choice(wordings), swapped(scene, thing, replace(thing, colour=colour))


def exchange(scene, rng, thing, words):
    colour, shape = sample_name(rng)
    # sometimes only the shape changes
    if rng.random() < 0.3:
        target = swapped(scene, thing, replace(thing, shape=shape))
        return f"turn {words} into {a(shape)}", target
    start = rng.choice((f"replace {words} with", f"swap {words} for"))
    target = swapped(scene, thing, replace(thing, colour=colour, shape=shape))
    return f"{start} {a(f'{colour} {shape}')}", target


def remove(scene, rng, thing, words):
    verb = rng.choice(("remove", "delete", "take away"))
    return f"{verb} {words}", replace(scene, things=tuple(t for t in scene.things if t != thing))


def centre_of(column: int, row: int, radius: float) -> tuple[float, float]:
    """The centre of a cell of the 3x3 grid, or as near to it as a thing of this radius can be."""
    low = radius + MARGIN
    x, y = ((c + 0.5) / 3 for c in (column, row))
    return min(max(x, low), 1 - low), min(max(y, low), 1 - low)


def add(scene, rng, thing, words):
    """At a stated spot, at a stated side of another thing, or just anywhere."""
    colour, shape = sample_name(rng)
    size = rng.choice(("small", "medium"))
    new = Thing(shape, colour, size, *sample_place(rng, SIZES[size]))
    instruction = f"{rng.choice(('add', 'put'))} {a(new.label)}"
    if rng.random() < 0.4:
        name = rng.choice(list(SPOTS))
        x, y = centre_of(*SPOTS[name], new.radius)
        new = replace(new, x=x, y=y)
        instruction = f"{instruction} {at(name)}"
    elif thing and rng.random() < 0.7 and relation(new, thing):
        instruction = f"{instruction} {side(relation(new, thing))} {words}"
    return instruction, replace(scene, things=scene.things + (new,))


def move(scene, rng, thing, words):
    """To another side of another thing, or to a spot."""
    other, other_words = pick(scene, rng, exclude=thing)
    if other and rng.random() < 0.5:
        return move_beside(scene, rng, thing, words, other, other_words)
    return move_to_spot(scene, rng, thing, words)


def move_beside(scene, rng, thing, words, other, other_words):
    x, y = sample_place(rng, thing.radius)
    new = replace(thing, x=x, y=y)
    where = relation(new, other)
    # there must be a side to name, and the thing must not be there already
    if where in (None, relation(thing, other, ratio=1.2)) or distance(new, thing) < STEP:
        return None, scene
    return f"move {words} {side(where)} {other_words}", swapped(scene, thing, new)


def move_to_spot(scene, rng, thing, words):
    """'to the left' keeps the height, 'to the top' keeps the column."""
    name = rng.choice(list(SPOTS))
    x, y = centre_of(*SPOTS[name], thing.radius)
    if name in ("top", "bottom"):
        x = thing.x
    if name in ("left", "right"):
        y = thing.y
    new = replace(thing, x=x, y=y)
    if distance(new, thing) < STEP:
        return None, scene
    return f"move {words} to the {name}", swapped(scene, thing, new)


def distance(one: Thing, other: Thing) -> float:
    """Along the axis on which they are farther apart."""
    return max(abs(one.x - other.x), abs(one.y - other.y))


def repaint(scene, rng, thing, words):
    background = rng.choice(list(BACKGROUNDS))
    wordings = (
        f"make the background {background}",
        f"change the background to {background}",
        f"put it on a {background} background",
    )
    return rng.choice(wordings), replace(scene, background=background)


EDITORS = {
    "recolour": recolour,
    "replace": exchange,
    "remove": remove,
    "add": add,
    "move": move,
    "background": repaint,
}
EDITS = tuple(EDITORS)


def edit(
    scene: Scene, rng: random.Random, action: str | None = None, held_out: bool = False
) -> tuple[str, Scene, str]:
    """-> (instruction, target scene, action), of a random action or of the given one.

    Raises ValueError where the given action is impossible in this scene.
    """
    actions = [action] if action else rng.sample(EDITS, len(EDITS))
    for name in actions:
        # propose blindly until the result is valid
        for _ in range(100):
            thing, words = pick(scene, rng)
            # in a scene of three red circles no words refer to one of them
            if thing is None and name not in ("add", "background"):
                break
            instruction, target = EDITORS[name](scene, rng, thing, words)
            if target != scene and valid(target, held_out):
                return instruction, target, name
    raise ValueError(f"cannot {action or 'edit'}: {describe(scene)}")


# ---------------------------------------------------------------- questions

# An asker returns all its questions about a scene as [(question, answer)]. seen says whether
# the picture is seen, or only its plain caption is known (no spots, no background).

def ask_colour(scene, rng, seen):
    pairs = [("what colour is the background?", scene.background)] if seen else []
    for shape in SHAPES:
        colours = [t.colour for t in scene.things if t.shape == shape]
        # twice in the list: asked twice as often as the background
        if len(colours) == 1:
            pairs += [(f"what colour is the {shape}?", colours[0])] * 2
        elif len(set(colours)) == 1:
            pairs += [(f"what colour are the {plural(shape)}?", colours[0])] * 2
    return pairs


def ask_shape(scene, rng, seen):
    counts = Counter(t.colour for t in scene.things)
    pairs = []
    for t in scene.things:
        if counts[t.colour] == 1:
            pairs.append((f"what shape is the {t.colour} object?", t.shape))
            pairs.append((f"what is the shape of the {t.colour} object?", t.shape))
    return pairs


def ask_count(scene, rng, seen):
    thing = rng.choice(scene.things)
    colour, shape = sample_name(rng)
    # what is counted: something in the picture, and something that may not be there
    counts = {"objects": len(scene.things)}
    for c, s in ((thing.colour, thing.shape), (colour, shape)):
        counts[plural(s)] = sum(t.shape == s for t in scene.things)
        counts[f"{c} objects"] = sum(t.colour == c for t in scene.things)
    counts[plural(thing.name)] = sum(t.name == thing.name for t in scene.things)
    pairs = []
    for what, n in counts.items():
        pairs.append((f"how many {what} are there?", NUMBERS[n]))
        pairs.append((f"how many {what}?", NUMBERS[n]))
    return pairs


def ask_where(scene, rng, seen):
    things = scene.things
    pairs = []
    if sides(scene):
        for t, other in (things, things[::-1]):
            where = relation(t, other)
            words = rng.choice(references(t, scene))
            other_words = rng.choice(references(other, scene))
            pairs.append((f"where is {words}?", f"{where} the {other.name}"))
            pairs.append((f"what is {side(where)} {other_words}?", a(t.name)))
    elif seen:
        for t in things:
            pairs += [(f"where is {words}?", at(spot(t))) for words in references(t, scene)]
    return pairs


def ask_exists(scene, rng, seen):
    """Half yes, half no; every second no differs from something there in one word only."""
    names = {(t.colour, t.shape) for t in scene.things}
    colour, shape = rng.choice(sorted(names))
    if rng.random() < 0.5:
        return [(f"is there {a(f'{colour} {shape}')}?", "yes")]
    # not a held-out pair either: the model must not learn that the answer to those is no
    while (colour, shape) in names | HELD_OUT:
        other = sample_name(rng)
        colour, shape = rng.choice((other, other, (colour, other[1]), (other[0], shape)))
    return [(f"is there {a(f'{colour} {shape}')}?", "no")]


def ask_describe(scene, rng, seen):
    if not seen:
        return []
    return [(q, describe(scene)) for q in ("describe the picture", "what is in the picture?")]


ASKERS = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "where": ask_where,
    "exists": ask_exists,
    "describe": ask_describe,
}
QUESTIONS = tuple(ASKERS)

# The kinds that take longest to learn are asked most: which colour, shape and place go together.
QUESTION_WEIGHTS = (2, 2, 1, 3, 1, 1)


def question(
    scene: Scene, rng: random.Random, kind: str | None = None, seen: bool = True
) -> tuple[str, str, str]:
    """-> (question, answer, kind), of a random kind or of the given one.

    seen=False asks only what the plain caption answers. Raises ValueError where there is no
    such question about this scene.
    """
    others = rng.sample(QUESTIONS, len(QUESTIONS))
    # the kind that is drawn; the others in case there is no question of that kind
    kinds = [kind] if kind else [*rng.choices(QUESTIONS, QUESTION_WEIGHTS), *others]
    for name in kinds:
        if pairs := ASKERS[name](scene, rng, seen):
            text, answer = rng.choice(pairs)
            return text, answer, name
    raise ValueError(f"no {kind} question (seen={seen}) about: {describe(scene)}")


def corpus(n: int, seed: int) -> list[str]:
    """n strings of every kind, the text that a tokenizer is trained on."""
    rng = random.Random(seed)
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        asked, answer, _ = question(scene, rng)
        texts += [caption(scene, rng), edit(scene, rng)[0], asked, answer]
    return texts[:n]
