"""How people speak of the toy world: captions, edits, questions with their answers.

A caption says everything that counts except exact places: what is left unsaid is a medium size and a white background.
Left out: free language.
"""
import random
import re
from collections import Counter
from dataclasses import replace

from toy.world import (
    BACKGROUNDS, COLOURS, HELD_OUT, MARGIN, OPPOSITE, SHAPES, SIZES, SPOTS, Scene, Thing, columns, relation, sample_name, sample_place,
    sample_scene, sides, spot, valid,
)

NUMBERS = ("zero", "one", "two", "three", "four")
STEP = 0.15                                                                     # a thing that is moved goes at least so far


def at(name):
    return f"in the {name}" if name == "centre" else f"at the {name}"


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
    have it; or only what there is, sides left open. Where no side is said, things are named from left to right, as people do."""
    sort, listed = rng.choices(("caption", "places", "list"), (0.4, 0.25, 0.35))[0], replace(scene, things=columns(scene))
    scene = scene if sort == "caption" and sides(scene) else listed
    if sort == "caption":
        return caption(scene, rng), plain(ordered(scene))
    names = [t.label for t in scene.things]
    things = sorted(scene.things, key=lambda t: names.index(t.label))           # equal ones together
    text = join([f"{a(t.label)} {at(spot(t))}" for t in things]) if sort == "places" else listing(things)
    ground = f", on a {scene.background} background" if scene.background != "white" else ""
    return rng.choice(("", "draw ", "paint ", "a picture of ")) + text + ground, plain(ordered(scene)) if sort == "places" else listing(things)


def describe(scene):
    """The one full description of a scene: things column by column, from left to right, each with its place."""
    return join([f"{a(t.label)} {at(spot(t))}" for t in columns(scene)]) + f", on a {scene.background} background"


# ---------------------------------------------------------------- edits

def references(thing, scene):
    """The ways to point at one thing and no other: its full name, its shape alone, its colour alone."""
    ways = [f"the {thing.name}"] if sum(t.name == thing.name for t in scene.things) == 1 else []
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        ways.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        ways.append(f"the {thing.colour} object")
    return ways


def mentions(text, scene):
    """-> [(where the words end, thing)] for all words of a text that point at one thing of the scene."""
    found = ((re.search(rf"{words}\b", text), t) for t in scene.things for words in references(t, scene))
    return [(match.end(), t) for match, t in found if match]


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
