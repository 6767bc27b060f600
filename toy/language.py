"""How people speak of the toy world: captions, edit instructions, questions and their answers, with
the words and sentences of toy/grammar.py.

A caption says everything but exact places; a medium size and a white background go without saying.
Every random choice is made by an explicit `random.Random`. With `other=True` a text is in wordings
that are never trained on. Left out: free language.
"""
import random
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from toy.grammar import (
    APART,
    BLOCKS,
    DIRECTIONS,
    ITS_SIDES,
    LITTLE_WORDS,
    MAX_WORDS,
    NEVER_THERE,
    NUMBERS,
    PLACES,
    SIDES,
    SYNONYMS,
)
from toy.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MARGIN,
    OPPOSITE,
    READ,
    SHAPES,
    SIZES,
    SPOTS,
    Scene,
    Thing,
    cell,
    columns,
    pairs_beside,
    relation,
    sample_name,
    sample_place,
    sample_scene,
    sides,
    spot,
    valid,
)

# a thing that is moved goes at least this far, in one direction
STEP = 0.15


# ---------------------------------------------------------------- from tables to texts

@dataclass(frozen=True)
class Line:
    """A line of BLOCKS, and the sentences that it stands for."""
    sentences: tuple[str, ...]
    plain: bool
    other: bool
    alone: bool


def every(template: str) -> tuple[str, ...]:
    """'draw [a|the] dot' -> ('draw a dot', 'draw the dot')"""
    parts = re.split(r"\[([^]]*)\]", template)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple("".join(chosen) for chosen in product(*choices))


def parse(block: str) -> list[Line]:
    lines = []
    for line in block.strip().splitlines():
        marks, template = re.fullmatch(r"\s*([=*~]*) *(.*?)\s*", line).groups()
        lines.append(Line(every(template), "=" in marks, "*" in marks, "~" in marks))
    return lines


LINES = {name: parse(block) for name, block in BLOCKS.items()}
PLAIN = {name: [x for x in lines if x.plain] for name, lines in LINES.items()}
TRAINED = {name: [x for x in lines if not x.other] for name, lines in LINES.items()}
OTHER = {name: [x for x in lines if x.other] for name, lines in LINES.items()}

PLACE_WORDS = {name: every(words) for name, words in PLACES.items()}


def plural(words: str) -> str:
    if words == "person":
        return "people"
    # "Boxes", but "xs".
    return words + ("es" if words.endswith(("s", "ox")) else "s")


def a(words: str) -> str:
    """With the indefinite article: 'an orange cross'."""
    return f"an {words}" if words[0] in "aeiou" or words == "x" else f"a {words}"


def any_of(words) -> str:
    """A regular expression for any of these words, the longest first."""
    return "|".join(sorted(words, key=len, reverse=True))


def forms(word: str) -> tuple[str, ...]:
    """A word and its synonyms."""
    return (word, *SYNONYMS.get(word, ()))


COUNTED = (*SHAPES, "object")
PLURALS = {plural(word): tuple(map(plural, SYNONYMS[word])) for word in COUNTED
           if word in SYNONYMS}
REPLACEABLE = SYNONYMS | PLURALS
WORD = re.compile(rf"\b({any_of(REPLACEABLE)})\b")

# a form -> what it means
NOUNS = {form: shape for shape in COUNTED for form in forms(shape)} | {"one": "object"}
COLOUR_NAMES = {form: colour for colour in COLOURS for form in forms(colour)}
SIZE_NAMES = {form: size for size in SIZES for form in forms(size)}

# 'the tiny red ball', 'blue boxes'
PHRASE = re.compile(
    rf"\b(?P<the>the )?(?:(?P<size>{any_of(SIZE_NAMES)}) )?"
    rf"(?:(?P<colour>{any_of(COLOUR_NAMES)}) )?(?P<noun>{any_of(NOUNS)})(?P<several>e?s)?\b"
)
# not the second one of 'a red and a blue circle', which are two
NOT_AFTER_A_COLOUR = "".join(rf"(?<!\b{colour} and )" for colour in COLOUR_NAMES)
# 'red circle' and 'small red circle'
NAMED = re.compile(rf"\b(?P<size>(?:{any_of(SIZES)}) )?(?P<colour>{any_of(COLOURS)}) "
                   rf"(?P<shape>{any_of(SHAPES)})\b")
# 'a circle in red', as its name
LATE = re.compile(rf"\b(?P<shape>{any_of(NOUNS)}) (?:in|that is|that's|which is|of the colou?r) "
                  rf"(?P<colour>{any_of(COLOUR_NAMES)})\b")
ARTICLE = re.compile(
    rf"{NOT_AFTER_A_COLOUR}\b(?:an?|the) "
    rf"(?=(?:(?:{any_of((*SIZE_NAMES, *COLOUR_NAMES))}) )*(?:{any_of(NOUNS)})\b)"
)


class Speaker:
    """Chooses the words of one text.

    plain: in few and simple words. other: in wordings that training never uses, some of them.
    """
    def __init__(self, rng: random.Random, other: bool = False, plain: bool | None = None):
        self.rng = rng
        self.other = other
        self.plain = not other and rng.random() < 0.5 if plain is None else plain
        # what it has said so far: a line that training never uses; a sentence by itself
        self.said_other = False
        self.alone = False
        # may colours stand behind what they are of?
        self.late = False

    def line(self, block: str) -> Line:
        lines = TRAINED[block]
        if self.plain and PLAIN[block]:
            lines = PLAIN[block]
        elif self.other and OTHER[block] and self.rng.random() < 0.5:
            lines = OTHER[block]
        line = self.rng.choice(lines)
        self.said_other |= line.other
        self.alone |= line.alone
        return line

    def one_of(self, words: Sequence[str]) -> str:
        return self.rng.choice(words) if len(words) > 1 else words[0]

    def say(self, block: str, **slots: str) -> str:
        """One of the block's sentences, its slots filled."""
        return self.one_of(self.line(block).sentences).format(**slots)

    def side(self, where: str) -> str:
        return side(where) if self.plain else self.one_of(SIDES[where])

    def its_side(self, where: str) -> str:
        return its_side(where) if self.plain else self.one_of(ITS_SIDES[where])

    def at(self, name: str) -> str:
        return at(name) if self.plain else self.one_of(PLACE_WORDS[name])

    def to(self, name: str) -> str:
        """'to the left'"""
        if self.plain or self.rng.random() < 0.5:
            return f"to the {name}"
        words = self.at(name)
        return words if self.rng.random() < 0.5 else f"to {words.split(' ', 1)[1]}"

    def reword(self, text: str) -> str:
        """Every second word that has synonyms becomes one of them; sometimes no articles."""
        if self.plain:
            return text
        chosen = {}

        def replaced(match):
            word = match[0]
            if word not in chosen:
                keep = self.rng.random() < 0.5
                chosen[word] = word if keep else self.one_of(REPLACEABLE[word])
            return chosen[word]
        text = WORD.sub(replaced, text)
        if self.rng.random() < 0.25:
            text = ARTICLE.sub("", text)
        return re.sub(r"\ban? (?=(.))", lambda m: "an " if m[1] in "aeiou" else "a ", text)

    def colours_behind(self, text: str) -> str:
        """'a circle in red' for most red circles; not in 'a green and a red circle'."""
        if re.search(rf"\b({any_of(COLOURS)}) and\b", text):
            return text

        def behind(match):
            if self.rng.random() < 0.3:
                return match[0]
            words = self.say("late colour", shape=match["shape"], colour=match["colour"])
            return (match["size"] or "") + words
        return NAMED.sub(behind, text)

    def finish(self, text: str) -> str:
        """Reworded; perhaps with a full stop, without a question mark, or in capitals."""
        if self.plain:
            return text
        text = self.reword(text)
        if text.endswith("?"):
            text = text[:-1] if self.rng.random() < 0.25 else text
        elif self.rng.random() < 0.25:
            text += self.rng.choice("...!")
        case = self.rng.random()
        if case < 0.04:
            return text.upper()
        return text[0].upper() + text[1:] if case < 0.14 else text

    def is_fit(self, text: str) -> bool:
        """Is it not too long, and of the wordings that are wanted: trained on, or others?"""
        if self.plain:
            return True
        text = text.lower()
        is_other = self.said_other or any(x in text and y in text for x, y in APART)
        return self.other == is_other and len(text.split()) <= MAX_WORDS


# ---------------------------------------------------------------- plain words

def at(name: str) -> str:
    """'top left' -> 'at the top left'; 'centre' -> 'in the centre'."""
    return f"in the {name}" if name == "centre" else f"at the {name}"


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


def plain(scene: Scene) -> str:
    """The shortest text that says everything but the background.

    'a red circle left of a blue square', 'three red circles'
    """
    if where := sides(scene):
        first, second = scene.things
        return f"{a(first.label)} {where} {a(second.label)}"
    return listing(scene.things)


def describe(scene: Scene) -> str:
    """The one full description of a scene: its things from left to right, each with its spot."""
    return with_spots(columns(scene)) + f", on a {scene.background} background"


def ordered(scene: Scene) -> Scene:
    """The same scene, with two things in order from left to right, or else from top to bottom."""
    swap = sides(scene) in ("right of", "below")
    return replace(scene, things=scene.things[::-1]) if swap else scene


# ---------------------------------------------------------------- captions

def say_list(things: Sequence[Thing], speaker: Speaker) -> str:
    """What there is; nothing about places."""
    if speaker.plain:
        return listing(things)
    colours = {t.colour for t in things}
    if speaker.late and len(things) > 1 and len(colours) == 1 and speaker.rng.random() < 0.25:
        colour, = colours
        text = listing(things).replace(f"{colour} ", "")
        every = "both" if len(things) == 2 else "all"
        return speaker.say("one colour", text=text, colour=colour, all=every)

    groups = Counter(t.label for t in things)
    if len(groups) == 1:
        return say_group(*groups.popitem(), speaker)

    # 'a red and a blue circle'
    first, second = things[0], things[-1]
    alike = len(things) == 2 and first.shape == second.shape and first.size == second.size
    if alike and first.size == "medium" and speaker.rng.random() < 0.2:
        return f"{a(first.colour)} and {a(second.name)}"

    one = speaker.rng.choice(("one", "1")) if speaker.rng.random() < 0.2 else None
    couple = speaker.rng.choice(("pair of", "couple of")) if speaker.rng.random() < 0.1 else None
    parts = []
    for label, n in groups.items():
        single = f"{one} {label}" if one else a(label)
        number = f"a {couple}" if n == 2 and couple else NUMBERS[n]
        parts.append(single if n == 1 else f"{number} {plural(label)}")
    return speaker.say("list", head=", ".join(parts[:-1]), last=parts[-1])


def say_group(label: str, n: int, speaker: Speaker) -> str:
    """One thing, or several that are alike."""
    if n == 1:
        article = speaker.rng.choices(("a", "one", "1"), (8, 1, 1))[0]
        return speaker.say("one", a=f"{article} {label}")
    if n == 2 and speaker.rng.random() < 0.2:
        return speaker.say("two", things=plural(label))
    return speaker.say("several", n=NUMBERS[n], things=plural(label))


def say_relation(scene: Scene, speaker: Speaker) -> str:
    """Two things, and where each is, seen from the other."""
    where = sides(scene)
    if not speaker.plain and speaker.rng.random() < 0.4:
        first, second = ordered(scene).things
        block = "left and right" if where in ("left of", "right of") else "top and bottom"
        return speaker.say(block, a=a(first.label), b=a(second.label))
    return speaker.say("relation", **relation_slots(*scene.things, where, speaker))


def relation_slots(first: Thing, second: Thing, where: str, speaker: Speaker) -> dict[str, str]:
    back = OPPOSITE[where]
    return dict(
        a=a(first.label), b=a(second.label), side=speaker.side(where), back=speaker.side(back),
        short_back=back, its_side=speaker.its_side(where), its_back=speaker.its_side(back),
    )


def say_first_two(scene: Scene, text: str, speaker: Speaker) -> str:
    """Perhaps how the first two of three or more are placed, if their names are unique."""
    where = sides(Scene(scene.things[:2]))
    if where is None:
        return text
    first, second = scene.things[:2]
    names = Counter(t.name for t in scene.things)
    if names[first.name] > 1 or names[second.name] > 1 or speaker.rng.random() > 0.6:
        return text
    slots = relation_slots(first, second, where, speaker)
    return speaker.say("first two", text=text, **slots | dict(
        a=f"the {first.name}", b=f"the {second.name}",
    ))


def is_between(thing: Thing, first: Thing, second: Thing) -> bool:
    """Is it near to the line from the one to the other, and off the ends?"""
    dx, dy = second.x - first.x, second.y - first.y
    along = ((thing.x - first.x) * dx + (thing.y - first.y) * dy) / (dx * dx + dy * dy)
    off = max(abs(first.x + along * dx - thing.x), abs(first.y + along * dy - thing.y))
    return 0.2 < along < 0.8 and off < 0.15


def between(scene: Scene) -> tuple[Thing, Thing, Thing] | None:
    """Of three things: one, another one, and a third between them."""
    things = columns(scene)
    for i, c in enumerate(things if len(things) == 3 else ()):
        first, second = things[:i] + things[i + 1:]
        if c.name not in (first.name, second.name) and is_between(c, first, second):
            return first, second, c
    return None


def say_between(scene: Scene, speaker: Speaker) -> str:
    if speaker.late and speaker.rng.random() < 0.5:
        return say_row(*between(scene), speaker)
    first, second, c = (t.label for t in between(scene))
    if first == second:
        return speaker.say("between two", things=f"two {plural(first)}", c=a(c))
    return speaker.say("between", a=a(first), b=a(second), c=a(c))


def say_row(first: Thing, second: Thing, c: Thing, speaker: Speaker) -> str:
    """Three things from left to right, or from top to bottom."""
    across = abs(first.x - second.x) > abs(first.y - second.y)
    start, end = ("left", "right") if across else ("top", "bottom")
    at_start, at_end = (f"{'on' if across else 'at'} the {name}" for name in (start, end))
    its_start, its_end = map(speaker.its_side, ("left of", "right of") if across else
                             ("above", "below"))
    first, second = sorted((first, second), key=lambda t: t.x if across else t.y)
    return speaker.say("row", a=a(first.label), b=a(second.label), c=a(c.label), start=start,
                       end=end, at_start=at_start, at_end=at_end, its_start=its_start,
                       its_end=its_end)


def in_a_row(scene: Scene, rng: random.Random) -> Scene:
    """Three things from left to right, or from top to bottom; perhaps not valid."""
    upright = rng.random() < 0.5
    across = rng.uniform(0.15, 0.85)
    things = []
    for thing, along in zip(scene.things, (0.19, 0.5, 0.81)):
        place = along + rng.uniform(-0.05, 0.05), across + rng.uniform(-0.1, 0.1)
        x, y = reversed(place) if upright else place
        things.append(replace(thing, x=x, y=y))
    return replace(scene, things=tuple(things))


def three_different(rng: random.Random) -> Scene:
    while True:
        scene = sample_scene(rng, 3)
        if len({t.name for t in scene.things}) == 3:
            return scene


def three_in_a_row(rng: random.Random) -> Scene:
    while True:
        scene = sample_scene(rng, 3)
        for _ in range(20):
            row = in_a_row(scene, rng)
            if valid(row) and between(row):
                return row


def scene_with_rare_ones(rng: random.Random) -> Scene:
    """As `sample_scene`; but every fifth holds three different things, or has three in a row, which
    are rare by chance."""
    if rng.random() > 0.2:
        return sample_scene(rng)
    return three_in_a_row(rng) if rng.random() < 0.5 else three_different(rng)


def scene_to_draw(rng: random.Random, held_out: frozenset = HELD_OUT) -> Scene:
    """held_out: pairs of colour and shape that may only stand alone. A scene that shows one beside
    another thing gives way to a new one of as many things: else scenes of many things would be the
    rarer, the more pairs are held out."""
    scene = scene_with_rare_ones(rng)
    n = len(scene.things)
    while len(scene.things) != n or pairs_beside(scene) & held_out:
        scene = scene_with_rare_ones(rng)
    return scene


def say_spots(things: Sequence[Thing], speaker: Speaker) -> str:
    """Each with its place."""
    if speaker.plain:
        return with_spots(things)
    sentence = speaker.line("spot" if len(things) == 1 else "spots").sentences[0]
    parts = [sentence.format(a=a(t.label), at=speaker.at(spot(t))) for t in things]
    if len(parts) == 1:
        return parts[0]
    return speaker.say("list", head=", ".join(parts[:-1]), last=parts[-1])


def content(scene: Scene, speaker: Speaker) -> str:
    """What a caption says: what there is, and of two things where each is."""
    things = scene.things
    if len(things) == 1 and speaker.rng.random() < 0.6:
        place = speaker.at(spot(things[0]))
        corner = len(spot(things[0]).split()) == 2
        if corner and not speaker.plain and speaker.rng.random() < 0.15:
            place = speaker.rng.choice(("in the corner", "in a corner"))
        return speaker.say("spot", a=a(things[0].label), at=place)
    if sides(scene):
        return say_relation(scene, speaker)
    if not speaker.plain and between(scene):
        return say_between(scene, speaker)
    text = say_list(things, speaker)
    return say_first_two(scene, text, speaker) if len(things) > 2 else text


def open_with(text: str, speaker: Speaker) -> str:
    """'draw ...', 'a picture of ...'"""
    verb = "is" if text.startswith(("a ", "an ", "one ", "1 ")) else "are"
    if speaker.alone or not speaker.plain and speaker.rng.random() < 0.4:
        return text
    return speaker.say("opening", text=text, **{"is": verb})


def varied(scene: Scene, rng: random.Random) -> str:
    """The content of `plain` in one of a few simple wordings."""
    speaker = Speaker(rng, plain=True)
    return open_with(content(scene, speaker), speaker)


def with_background(scene: Scene, text: str, speaker: Speaker, white: float = 0.1) -> str:
    """A white background is mentioned now and then."""
    if scene.background == "white" and speaker.rng.random() >= white:
        return text
    return speaker.say("background", text=text, background=scene.background)


def say_caption(scene: Scene, speaker: Speaker) -> str:
    if not speaker.plain:
        return speaker.reword(with_background(scene, content(scene, speaker), speaker))
    if speaker.rng.random() < 0.5:
        return plain(scene) + background_phrase(scene)
    text = open_with(content(scene, speaker), speaker)
    return with_background(scene, text, speaker)


def caption(scene: Scene, rng: random.Random) -> str:
    """What a person might say to get this scene: the plain form or, more often, varied."""
    while True:
        speaker = Speaker(rng)
        text = say_caption(scene, speaker)
        if speaker.is_fit(text):
            return text


# how often ordinary people say what kind of text
REQUESTS = {"caption": 0.5, "places": 0.12, "list": 0.28, "beside": 0.07, "shapes": 0.03}
PLAIN_REQUESTS = {"caption": 0.4, "places": 0.25, "list": 0.35}


def request(
    scene: Scene, rng: random.Random, kind: str | None = None, other: bool = False
) -> tuple[str, str]:
    """-> a text to draw from, and the plain form of what it says.

    kind: 'caption'; 'places', a text that names the spot of each thing, like the longer captions
    of real pictures; 'list', what there is, with nothing about relations; 'beside', what is
    next to what, or between what; 'shapes', with nothing about colours. Where no order is
    stated, things are named from left to right, as people do.
    """
    # the others are never said in plain words
    plain_or_not = None if kind in (None, *PLAIN_REQUESTS) else False
    while True:
        speaker = Speaker(rng, other, plain_or_not)
        kinds = PLAIN_REQUESTS if speaker.plain else REQUESTS
        of_kind = kind or rng.choices(tuple(kinds), tuple(kinds.values()))[0]
        # Without its colour nothing has one behind it.
        speaker.late = not speaker.plain and of_kind != "shapes"
        text, meaning = SAYERS[of_kind](scene, speaker)
        if speaker.is_fit(text):
            return text, meaning


def left_to_right(scene: Scene) -> Scene:
    return replace(scene, things=columns(scene))


def address(scene: Scene, text: str, speaker: Speaker) -> str:
    """As a request to somebody: with the background and an opening."""
    if speaker.plain:
        opening = speaker.rng.choice(("", "draw ", "paint ", "a picture of "))
        return opening + text + background_phrase(scene)
    if speaker.late and speaker.rng.random() < 0.12:
        text = speaker.colours_behind(text)
    if scene.background != "white" and speaker.rng.random() < 0.25:
        text = speaker.say("background first", text=text, background=scene.background)
    else:
        text = open_with(with_background(scene, text, speaker, white=0.05), speaker)
    return speaker.finish(text)


def request_caption(scene: Scene, speaker: Speaker) -> tuple[str, str]:
    scene = scene if sides(scene) else left_to_right(scene)
    if speaker.plain:
        text = say_caption(scene, speaker)
    else:
        text = address(scene, content(scene, speaker), speaker)
    return text, plain(ordered(scene))


def request_places(scene: Scene, speaker: Speaker) -> tuple[str, str]:
    scene = left_to_right(scene)
    # four things with their places would make too long a text
    if len(scene.things) == 4 and not speaker.plain:
        return request_list(scene, speaker)
    # equal things are named together
    labels = [t.label for t in scene.things]
    things = sorted(scene.things, key=lambda t: labels.index(t.label))
    return address(scene, say_spots(things, speaker), speaker), plain(ordered(scene))


def request_list(scene: Scene, speaker: Speaker) -> tuple[str, str]:
    things = left_to_right(scene).things
    if speaker.late and len(things) > 1 and speaker.rng.random() < 0.08:
        text = speaker.say("total", n=NUMBERS[len(things)], text=listing(things))
    else:
        text = say_list(things, speaker)
    return address(scene, text, speaker), listing(things)


def request_beside(scene: Scene, speaker: Speaker) -> tuple[str, str]:
    if between(scene):
        return address(scene, say_between(scene, speaker), speaker), listing(columns(scene))
    scene = ordered(scene)
    if sides(scene) != "left of":
        return request_list(scene, speaker)
    first, second = (a(t.label) for t in scene.things)
    text = speaker.say("beside", a=first, b=second)
    return address(scene, text, speaker), plain(scene)


def request_shapes(scene: Scene, speaker: Speaker) -> tuple[str, str]:
    """As if all were red, and then without this word."""
    red = replace(scene, things=tuple(replace(t, colour="red") for t in scene.things))
    say = request_caption if speaker.rng.random() < 0.5 else request_list
    text, meaning = say(red, speaker)
    return re.sub(r"(?i)\bred ", "", text), meaning.replace("red ", "")


SAYERS = {
    "caption": request_caption,
    "places": request_places,
    "list": request_list,
    "beside": request_beside,
    "shapes": request_shapes,
}


# ---------------------------------------------------------------- which words refer to which thing

def fits(phrase: re.Match, thing: Thing) -> bool:
    """May these words mean this thing?"""
    shape = NOUNS[phrase["noun"]]
    colour = COLOUR_NAMES.get(phrase["colour"], thing.colour)
    size = SIZE_NAMES.get(phrase["size"], thing.size)
    return shape in (thing.shape, "object") and (colour, size) == (thing.colour, thing.size)


def meant(phrase: re.Match, things: Sequence[Thing]) -> Thing | None:
    """The one thing that these words fit, or None."""
    found = [t for t in things if fits(phrase, t)]
    return found[0] if len(found) == 1 and not phrase["several"] else None


def reference(phrase: re.Match, scene: Scene) -> list[tuple[int, Thing]]:
    """[(where it ends, thing)], also of 'the circle on the left'; [] if it is none."""
    things = [t for t in scene.things if fits(phrase, t)]
    if len(things) == 1:
        return [(phrase.end(), things[0])]
    rest = phrase.string[phrase.end():]
    for words, thing in standing_out(scene):
        if thing in things and rest.startswith(f" {words}"):
            return [(phrase.end() + 1 + len(words), thing)]
    return []


def mentions(text: str, scene: Scene) -> list[tuple[int, Thing]]:
    """-> [(where the words end, thing)] for all words in a text that refer to one thing."""
    text = text.lower()
    found = []
    for phrase in PHRASE.finditer(text):
        if phrase["the"] and not phrase["several"]:
            found += reference(phrase, scene)
    if len(scene.things) == 1:
        found += [(match.end(), scene.things[0]) for match in re.finditer(r"\bit\b", text)]
    return sorted(found, key=lambda mention: mention[0])


def in_order(text: str, things: Sequence[Thing]) -> list[Thing]:
    """Things in the order in which a text names them."""
    text = LATE.sub(r"\g<colour> \g<shape>", text.lower())
    # "One" alone is a number here.
    phrases = [phrase for phrase in PHRASE.finditer(text) if phrase[0] != "one"]

    def place(thing):
        """Of the first words that fit; of the colour alone in 'a red and a blue circle'."""
        starts = [phrase.start() for phrase in phrases if fits(phrase, thing)]
        colour = re.search(rf"\b({any_of(forms(thing.colour))}) and\b", text)
        if colour:
            starts.append(colour.start())
        return min(starts, default=len(text))
    return sorted(things, key=place)


SIDE_PHRASES = [
    (where, form)
    for where, words in (SIDES | {"next to": ("next to",)}).items()
    for word in words
    for form in forms(word)
]
SPOT_WORD = re.compile(r"\b(left|right|top|bottom|upper|lower|corner|centre|center|middle)\b")


def destination(instruction: str, scene: Scene) -> tuple[str, Thing | None] | None:
    """Where an instruction to add or move wants a thing.

    -> (its side, of which thing), where a side is as in world.OPPOSITE or 'next to';
    ('spot', None); or None if it may be anywhere.
    """
    text = instruction.lower()
    for where, words in SIDE_PHRASES:
        for match in re.finditer(rf"\b{words} (it\b)?", text):
            if match[1] and len(scene.things) == 1:
                return where, scene.things[0]
            phrase = PHRASE.match(text, match.end())
            thing = meant(phrase, scene.things) if phrase else None
            if thing:
                return where, thing
    return ("spot", None) if SPOT_WORD.search(text) else None


def standing_out(scene: Scene) -> list[tuple[str, Thing]]:
    """[('on the left', the only thing there), ...]; of two things the left one."""
    things = scene.things
    where = sides(scene)
    if where:
        first, second = ordered(scene).things
        if where in ("left of", "right of"):
            return [("on the left", first), ("on the right", second)]
        return [("at the top", first), ("at the bottom", second)]
    if len(things) == 2:
        return []
    found = []
    for words, axis, index in (("on the left", 0, 0), ("on the right", 0, 2),
                               ("at the top", 1, 0), ("at the bottom", 1, 2)):
        there = [t for t in things if cell(t)[axis] == index]
        if len(there) == 1:
            found.append((words, there[0]))
    if row := between(scene):
        found.append(("in the centre", row[2]))
    return found


def references(thing: Thing, scene: Scene, plain: bool = True) -> list[str]:
    """The ways to refer to this thing and no other: its name, its shape alone, its colour alone.

    plain=False: also its size, its place, and 'it' where it is alone.
    """
    ways = []
    if sum(t.name == thing.name for t in scene.things) == 1:
        ways.append(f"the {thing.name}")
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        ways.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        ways.append(f"the {thing.colour} object")
        ways += [] if plain else [f"the {thing.colour} one"]
    if plain:
        return ways

    if thing.size != "medium":
        alike = [t for t in scene.things if t.size == thing.size]
        ways += [f"the {thing.size} object", f"the {thing.size} one"] if len(alike) == 1 else []
        if sum(t.shape == thing.shape for t in alike) == 1:
            ways.append(f"the {thing.size} {thing.shape}")
    if len(scene.things) == 1:
        return ways + ["it"] * 4 + ["the object"]
    for words, t in standing_out(scene):
        ways += [f"the {t.shape} {words}"] if t == thing else []
    return ways


# ---------------------------------------------------------------- edits

def pick(
    scene: Scene, rng: random.Random, exclude: Thing | None = None, plain: bool = True
) -> tuple[Thing, str] | tuple[None, None]:
    """A random thing that words can single out, and such words; (None, None) if there is none."""
    things = [t for t in scene.things if t != exclude and references(t, scene)]
    if not things:
        return None, None
    thing = rng.choice(things)
    return thing, rng.choice(references(thing, scene, plain))


def swapped(scene: Scene, old: Thing, new: Thing) -> Scene:
    """The scene with a new thing instead of an old one."""
    return replace(scene, things=tuple(new if t == old else t for t in scene.things))


# An editor takes a scene, a speaker, a thing in the scene and words that refer to the thing, and
# proposes (block, slots, target scene). The target may be invalid or unchanged: `edit` asks again,
# unless it is None.

def recolour(scene, speaker, thing, words):
    colour = speaker.rng.choice(list(COLOURS))
    slots = dict(it=words, colour=colour, old=thing.colour)
    return "recolour", slots, swapped(scene, thing, replace(thing, colour=colour))


def groups(scene: Scene) -> list[tuple[str, tuple[Thing, ...]]]:
    """[('the circles', these), ...] for all shapes of which there are several, but not all."""
    found = []
    for shape in SHAPES:
        things = tuple(t for t in scene.things if t.shape == shape)
        if 1 < len(things) < len(scene.things):
            which = ["the", "all", "all the"] + (["both"] if len(things) == 2 else [])
            found += [(f"{word} {plural(shape)}", things) for word in which]
    return found


def recolour_all(scene, speaker, thing, words):
    """Everything, or all things of a shape."""
    rng = speaker.rng
    words, things = rng.choice(("everything", "all objects")), scene.things
    if len(scene.things) > 1:
        several = ["all objects", "all the objects", "all of them", "everything"]
        several += ["both objects", "both"] if len(scene.things) == 2 else []
        words = rng.choice(several)
    if groups(scene) and rng.random() < 0.5:
        words, things = rng.choice(groups(scene))
    colour = rng.choice(list(COLOURS))
    new = tuple(replace(t, colour=colour) if t in things else t for t in scene.things)
    return "recolour all", dict(it=words, colour=colour), replace(scene, things=new)


def exchange(scene, speaker, thing, words):
    colour, shape = sample_name(speaker.rng)
    # sometimes only the shape changes
    if speaker.rng.random() < 0.3:
        target = swapped(scene, thing, replace(thing, shape=shape))
        return "reshape", dict(it=words, new=a(shape)), target
    target = swapped(scene, thing, replace(thing, colour=colour, shape=shape))
    return "replace", dict(it=words, new=a(f"{colour} {shape}")), target


def remove(scene, speaker, thing, words):
    gone = (thing,)
    if not speaker.plain and groups(scene) and speaker.rng.random() < 0.3:
        words, gone = speaker.rng.choice(groups(scene))
    left = tuple(t for t in scene.things if t not in gone)
    return "remove", dict(it=words), replace(scene, things=left)


def centre_of(column: int, row: int, radius: float) -> tuple[float, float]:
    """The centre of a cell of the 3x3 grid, or as near to it as a thing of this radius can be."""
    low = radius + MARGIN
    x, y = ((c + 0.5) / 3 for c in (column, row))
    return min(max(x, low), 1 - low), min(max(y, low), 1 - low)


def add(scene, speaker, thing, words):
    """At a stated spot, at a stated side of another thing, or just anywhere."""
    rng = speaker.rng
    if not speaker.plain and rng.random() < 0.25:
        return add_another(scene, speaker)
    colour, shape = sample_name(rng)
    size = rng.choice(("small", "medium"))
    new = Thing(shape, colour, size, *sample_place(rng, SIZES[size]))
    place = ""
    if rng.random() < 0.4:
        name = rng.choice(list(SPOTS))
        x, y = centre_of(*SPOTS[name], new.radius)
        new = replace(new, x=x, y=y)
        place = f" {speaker.at(name)}"
    elif thing and rng.random() < 0.7 and relation(new, thing):
        place = f" {say_side(relation(new, thing), speaker)} {anchor(thing, scene, words)}"
    slots = dict(new=a(new.label), place=place)
    return "add", slots, replace(scene, things=scene.things + (new,))


def add_another(scene, speaker):
    """One more of a kind that is there."""
    rng = speaker.rng
    model = rng.choice(scene.things)
    x, y = sample_place(rng, model.radius)
    names = [model.label, model.name]
    if len({t.name for t in scene.things if t.shape == model.shape}) == 1:
        names += [model.shape, model.shape]
    new = f"{rng.choice(('another', 'another', 'one more'))} {rng.choice(names)}"
    target = replace(scene, things=scene.things + (replace(model, x=x, y=y),))
    return "add", dict(new=new, place=""), target


def say_side(where: str, speaker: Speaker) -> str:
    """Perhaps just 'next to'."""
    if not speaker.plain and where in ("left of", "right of") and speaker.rng.random() < 0.2:
        return "next to"
    return speaker.side(where)


def anchor(thing: Thing, scene: Scene, words: str) -> str:
    """Words for a thing that a place is named after: without a place of its own."""
    placed = any(words.endswith(place) for place, _ in standing_out(scene))
    return references(thing, scene)[0] if placed else words


def move(scene, speaker, thing, words):
    """To another side of another thing, or to a spot."""
    other, other_words = pick(scene, speaker.rng, exclude=thing, plain=speaker.plain)
    if other and speaker.rng.random() < 0.5:
        return move_beside(scene, speaker, thing, words, other, other_words)
    return move_to_spot(scene, speaker, thing, words)


def move_beside(scene, speaker, thing, words, other, other_words):
    x, y = sample_place(speaker.rng, thing.radius)
    new = replace(thing, x=x, y=y)
    where = relation(new, other)
    # there must be a side to name, and the thing must not be there already
    if where in (None, relation(thing, other, READ)) or distance(new, thing) < STEP:
        return "move", {}, scene
    # 'next to' says little to a thing that is at the other side already
    beside = {relation(thing, other, READ), where} <= {"left of", "right of"}
    words_of_side = speaker.side(where) if beside else say_side(where, speaker)
    place = f"{words_of_side} {anchor(other, scene, other_words)}"
    return "move", dict(it=words, to=place, at=place), swapped(scene, thing, new)


def move_to_spot(scene, speaker, thing, words):
    """'to the left' keeps the height, 'to the top' keeps the column."""
    # most people say 'to the left', not 'to the top left'
    common = not speaker.plain and speaker.rng.random() < 0.5
    name = speaker.rng.choice([*DIRECTIONS, "centre"] if common else list(SPOTS))
    x, y = centre_of(*SPOTS[name], thing.radius)
    if name in ("top", "bottom"):
        x = thing.x
    if name in ("left", "right"):
        y = thing.y
    new = replace(thing, x=x, y=y)
    if distance(new, thing) < STEP:
        return "move", {}, scene
    target = swapped(scene, thing, new)
    if not speaker.plain and name in DIRECTIONS and speaker.rng.random() < 0.35:
        return "push", dict(it=words, direction=DIRECTIONS[name]), target
    return "move", dict(it=words, to=speaker.to(name), at=speaker.at(name)), target


def distance(one: Thing, other: Thing) -> float:
    """Along the axis on which they are farther apart."""
    return max(abs(one.x - other.x), abs(one.y - other.y))


def swap(scene, speaker, thing, words):
    """Two things exchange their places."""
    other, other_words = pick(scene, speaker.rng, exclude=thing, plain=speaker.plain)
    if other is None:
        return None
    new = {
        thing: replace(thing, x=other.x, y=other.y),
        other: replace(other, x=thing.x, y=thing.y),
    }
    target = replace(scene, things=tuple(new.get(t, t) for t in scene.things))
    if len(scene.things) == 2 and speaker.rng.random() < 0.25:
        return "swap both", {}, target
    return "swap", dict(it=words, other=other_words), target


def resize(scene, speaker, thing, words):
    """By one step, or to a stated size."""
    rng = speaker.rng
    sizes = list(SIZES)
    step = rng.choice((-1, 1))
    i = sizes.index(thing.size) + step
    block, said = ("enlarge", "bigger") if step > 0 else ("shrink", "smaller")
    if not 0 <= i < len(sizes):
        return "resize", {}, scene
    if rng.random() < 0.2:
        i = 0 if step < 0 else len(sizes) - 1
        said = sizes[i]
        block = "resize"
    if rng.random() < 0.6:
        block = "resize"
    target = swapped(scene, thing, replace(thing, size=sizes[i]))
    return block, dict(it=words, size=said), target


def repaint(scene, speaker, thing, words):
    background = speaker.rng.choice(list(BACKGROUNDS))
    return "repaint", dict(colour=background), replace(scene, background=background)


EDITORS = {
    "recolour": recolour,
    "replace": exchange,
    "remove": remove,
    "add": add,
    "move": move,
    "background": repaint,
    "resize": resize,
    "recolour all": recolour_all,
    "swap": swap,
}
EDITS = tuple(EDITORS)

# these need no words for a single thing
OF_ALL = ("add", "background", "recolour all")


def edit(
    scene: Scene, rng: random.Random, action: str | None = None, held_out: bool = False,
    other: bool = False,
) -> tuple[str, Scene, str]:
    """-> (instruction, target scene, action), of a random action or of the given one.

    Raises ValueError where the given action is impossible in this scene.
    """
    actions = [action] if action else rng.sample(EDITS, len(EDITS))
    for name in actions:
        # propose blindly until the result is valid
        for _ in range(100):
            speaker = Speaker(rng, other)
            thing, words = pick(scene, rng, plain=speaker.plain)
            # in a scene of three red circles no words refer to one of them
            if thing is None and name not in OF_ALL:
                break
            proposal = EDITORS[name](scene, speaker, thing, words)
            if proposal is None:
                break
            block, slots, target = proposal
            if target == scene or not valid(target, held_out):
                continue
            instruction = instruct(block, slots, speaker)
            if speaker.is_fit(instruction):
                return instruction, target, name
    raise ValueError(f"cannot {action or 'edit'}: {describe(scene)}")


def scene_to_edit(rng: random.Random) -> tuple[Scene, str, Scene, str]:
    """-> (scene, instruction, target scene, action). The action is drawn first, then a
    scene for it: of the actions that a given scene allows, swapping would be one in 25."""
    action = rng.choice(EDITS)
    while True:
        scene = sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))
        # not every scene allows every action
        with suppress(ValueError):
            return scene, *edit(scene, rng, action)


def instruct(block: str, slots: dict[str, str], speaker: Speaker) -> str:
    """A sentence of a block, sometimes with 'please'."""
    text = speaker.say(block, **slots)
    if not speaker.plain and not speaker.alone and speaker.rng.random() < 0.25:
        text = speaker.say("please", text=text)
    return speaker.finish(text)


# ---------------------------------------------------------------- questions

# An asker returns its questions about a scene as [(block, slots, answer)]. seen says whether the
# picture is seen, or only its plain caption is known (no spots, no background).
# plain: only the plain ways to refer to a thing.

ONE = {"is": "is", "does": "does"}
MANY = {"is": "are", "does": "do"}


def ask_colour(scene, rng, seen, plain):
    asked = []
    if seen:
        asked.append(("colour", ONE | {"it": "the background"}, scene.background))
    for shape in SHAPES:
        colours = [t.colour for t in scene.things if t.shape == shape]
        # twice in the list: asked twice as often as the background
        if len(colours) == 1:
            asked += [("colour", ONE | {"it": f"the {shape}"}, colours[0])] * 2
        elif len(set(colours)) == 1:
            asked += [("colour", MANY | {"it": f"the {plural(shape)}"}, colours[0])] * 2
    if not plain and len(scene.things) == 1:
        asked.append(("colour", ONE | {"it": "it"}, scene.things[0].colour))
    return asked


def ask_shape(scene, rng, seen, plain):
    counts = Counter(t.colour for t in scene.things)
    asked = []
    for t in scene.things:
        if counts[t.colour] == 1:
            asked.append(("shape", {"it": f"the {t.colour} object"}, t.shape))
    if not plain and len(scene.things) == 1:
        asked.append(("shape", {"it": "it"}, scene.things[0].shape))
    return asked


def ask_count(scene, rng, seen, plain):
    thing = rng.choice(scene.things)
    colour, shape = sample_name(rng)
    # what is counted: something in the picture, and something that may not be there
    counts = {}
    for c, s in ((thing.colour, thing.shape), (colour, shape)):
        counts[plural(s)] = sum(t.shape == s for t in scene.things)
        name = "objects" if plain or rng.random() < 0.7 else "ones"
        counts[f"{c} {name}"] = sum(t.colour == c for t in scene.things)
    counts[plural(thing.name)] = sum(t.name == thing.name for t in scene.things)
    if not plain and rng.random() < 0.15:
        return [("count", {"things": plural(rng.choice(NEVER_THERE))}, NUMBERS[0])]
    return [("count", {"things": what}, NUMBERS[n]) for what, n in counts.items()]


def ask_total(scene, rng, seen, plain):
    return [("count", {"things": "objects"}, NUMBERS[len(scene.things)])]


def ask_where(scene, rng, seen, plain):
    asked = []
    if sides(scene):
        for t, other in (scene.things, scene.things[::-1]):
            where = relation(t, other)
            words = rng.choice(references(t, scene))
            asked.append(("where", {"it": words}, f"{where} the {other.name}"))
            asked.append(("what", {"that": beside(where, other, scene, rng, plain)}, a(t.name)))
    elif seen:
        for t in scene.things:
            asked += [("where", {"it": words}, at(spot(t))) for words in references(t, scene)]
        if not plain and len(scene.things) == 1:
            asked.append(("where", {"it": "it"}, at(spot(scene.things[0]))))
    return asked


def beside(where: str, other: Thing, scene: Scene, rng: random.Random, plain: bool) -> str:
    """'to the left of the blue square'"""
    words = rng.choice(references(other, scene))
    if plain:
        return f"{side(where)} {words}"
    options = SIDES[where] + (("next to",) if where in ("left of", "right of") else ())
    return f"{rng.choice(options)} {words}"


def ask_exists(scene, rng, seen, plain):
    """Half yes, half no; every second no differs from something there in one word only."""
    names = {(t.colour, t.shape) for t in scene.things}
    colour, shape = rng.choice(sorted(names))
    yes = rng.random() < 0.5
    if not plain and rng.random() < 0.5:
        words, verb = existing(scene, rng, colour, shape) if yes else missing(scene, rng)
        return [("exists", {"a": words, "is": verb}, "yes" if yes else "no")]
    if yes:
        return [("exists", {"a": a(f"{colour} {shape}"), "is": "is"}, "yes")]
    # not a held-out pair either: the model must not learn that the answer to those is no
    while (colour, shape) in names | HELD_OUT:
        other = sample_name(rng)
        colour, shape = rng.choice((other, other, (colour, other[1]), (other[0], shape)))
    return [("exists", {"a": a(f"{colour} {shape}"), "is": "is"}, "no")]


def existing(scene, rng, colour, shape) -> tuple[str, str]:
    """-> words for something that is there, and 'is' or 'are'."""
    n = sum(t.shape == shape for t in scene.things)
    options = [(a(shape), "is"), (f"a {colour} object", "is")]
    if n > 1:
        options += [(f"{NUMBERS[n]} {plural(shape)}", "are")] * 3
        options.append((f"any {plural(shape)}", "are"))
    return rng.choice(options)


def missing(scene, rng) -> tuple[str, str]:
    """-> words for something that is not there, and 'is' or 'are'."""
    options = [(a(rng.choice(NEVER_THERE)), "is")] * 4
    shapes = Counter(t.shape for t in scene.things)
    colours = {t.colour for t in scene.things}
    other_shape = rng.choice(SHAPES)
    # too few are not there; too many would be
    n = rng.choice((2, 3, 4))
    if shapes[other_shape] < n:
        options += [(f"{NUMBERS[n]} {plural(other_shape)}", "are")] * 2
    if not shapes[other_shape]:
        options += [(a(other_shape), "is"), (f"any {plural(other_shape)}", "are")]
    other_colour = rng.choice(list(COLOURS))
    if other_colour not in colours:
        options.append((f"a {other_colour} object", "is"))
    return rng.choice(options)


def ask_yes_no(scene, rng, seen, plain):
    """Attributes and relations, half yes, half no."""
    yes = rng.random() < 0.5
    answer = "yes" if yes else "no"
    # of three things a text need not say which is on the left
    plain = plain or not seen and len(scene.things) > 2
    asked = []
    for thing in scene.things:
        words = references(thing, scene, plain)
        if not words:
            continue
        # 'is the red object red?' asks nothing
        colour, shape = thing.colour, thing.shape
        # as in ask_exists, not a held-out pair
        if not yes:
            colours = [c for c in COLOURS if (c, shape) not in HELD_OUT]
            shapes = [s for s in SHAPES if (colour, s) not in HELD_OUT]
            colour, shape = another(colours, colour, rng), another(shapes, shape, rng)
        if unlike := [w for w in words if thing.colour not in w]:
            asked.append((rng.choice(unlike), colour))
        if unlike := [w for w in words if thing.shape not in w]:
            asked.append((rng.choice(unlike), a(shape)))
        asked += is_beside(thing, scene, rng, seen, yes, plain)
    if seen and rng.random() < 0.3:
        background = scene.background
        colour = background if yes else another(BACKGROUNDS, background, rng)
        asked.append(("the background", colour))
    found = [("yes or no", {"it": it, "what": what, "is": "is"}, answer) for it, what in asked]
    return found + (are_the_same(scene, rng, yes) if not plain else [])


def are_the_same(scene: Scene, rng: random.Random, yes: bool) -> list[tuple[str, dict, str]]:
    """Have two things the same colour, or shape? Mostly they do not: then it is asked less."""
    if len(scene.things) != 2:
        return []
    one, other = scene.things
    same = [("colour", one.colour == other.colour), ("shape", one.shape == other.shape)]
    return [("same", {"what": what}, "yes" if yes else "no") for what, truth in same
            if truth == yes and (yes or rng.random() < 0.3)]


def another(words: Sequence[str], word: str, rng: random.Random) -> str:
    return rng.choice([w for w in words if w != word])


def is_beside(thing, scene, rng, seen, yes, plain) -> list[tuple[str, str]]:
    """Is it at that side of the other thing? Mostly the opposite one where it is not."""
    if not (seen or sides(scene)):
        return []
    pairs = []
    for other in scene.things:
        where = relation(thing, other) if other != thing else None
        words, other_words = references(thing, scene), references(other, scene)
        if not (where and words and other_words):
            continue
        if not yes:
            opposite = rng.random() < 0.7
            where = OPPOSITE[where] if opposite else another(OPPOSITE, where, rng)
        how = rng.choice((where, side(where)) if plain else SIDES[where])
        # twice: relations are harder than attributes
        pairs += [(rng.choice(words), f"{how} {rng.choice(other_words)}")] * 2
    return pairs


def ask_which(scene, rng, seen, plain):
    """The shape of the one thing of a colour or at a side; what is on the left."""
    colours = Counter(t.colour for t in scene.things)
    asked = [("which", {"that": t.colour}, t.shape) for t in scene.things if colours[t.colour] == 1]
    if sides(scene):
        for t, other in (scene.things, scene.things[::-1]):
            words = beside(relation(t, other), other, scene, rng, plain)
            asked.append(("which", {"that": words}, t.shape))
    if seen or sides(scene):
        for words, t in standing_out(scene):
            asked.append(("which", {"that": words}, t.shape))
            asked += [("what", {"that": words}, a(t.name))] * 2
    return asked


def ask_describe(scene, rng, seen, plain):
    return [("describe", {}, describe(scene))] if seen else []


ASKERS = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "where": ask_where,
    "exists": ask_exists,
    "describe": ask_describe,
    "yes or no": ask_yes_no,
    "which": ask_which,
    "total": ask_total,
}
QUESTIONS = tuple(ASKERS)

# The kinds that take longest to learn are asked most: which colour, shape and place go together.
QUESTION_WEIGHTS = (2, 2, 1, 3, 1, 1, 2, 1.5, 0.5)


def question(
    scene: Scene, rng: random.Random, kind: str | None = None, seen: bool = True,
    other: bool = False,
) -> tuple[str, str, str]:
    """-> (question, answer, kind), of a random kind or of the given one.

    seen=False asks only what the plain caption answers. Raises ValueError where there is no
    such question about this scene.
    """
    while True:
        speaker = Speaker(rng, other)
        name, candidates = candidates_of(scene, speaker, kind, seen)
        block, slots, answer = rng.choice(candidates)
        text = speaker.finish(speaker.say(block, **slots))
        if speaker.is_fit(text):
            return text, answer, name


def candidates_of(scene: Scene, speaker: Speaker, kind: str | None, seen: bool) -> tuple:
    """-> a kind, and all its questions."""
    rng = speaker.rng
    first = kind or rng.choices(QUESTIONS, QUESTION_WEIGHTS)[0]
    if found := ASKERS[first](scene, rng, seen, speaker.plain):
        return first, found
    if kind is None:
        for name in rng.sample(QUESTIONS, len(QUESTIONS)):
            if found := ASKERS[name](scene, rng, seen, speaker.plain):
                return name, found
    raise ValueError(f"no {kind} question (seen={seen}) about: {describe(scene)}")


# ---------------------------------------------------------------- all words

SPOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+")


@cache
def words() -> frozenset[str]:
    """All words, in lower case, that training can ever say or hear."""
    lines = [line for block in TRAINED.values() for line in block]
    texts = [re.sub(r"{\w+}", " ", text) for line in lines for text in line.sentences]
    for word, others in REPLACEABLE.items():
        texts += [word, *others]
    for table in (SIDES, ITS_SIDES, PLACE_WORDS):
        texts += [text for wordings in table.values() for text in wordings]
    texts += [*COLOURS, *BACKGROUNDS, *SHAPES, *NUMBERS, *DIRECTIONS.values(), "1"]
    texts += [*NEVER_THERE, *map(plural, NEVER_THERE)]
    texts += [LITTLE_WORDS]
    return frozenset(SPOKEN.findall(" ".join(texts)))


def corpus(n: int, seed: int) -> list[str]:
    """n strings of every kind, the text that a tokenizer is trained on."""
    rng = random.Random(seed)
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        asked, answer, _ = question(scene, rng)
        texts += [request(scene, rng)[0], edit(scene, rng)[0], asked, answer]
    return texts[:n]
