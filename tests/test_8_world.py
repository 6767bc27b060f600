"""The toy world: every text is true of its scene, edits change what they say and no more, and the
grader reads what render draws."""
import io
import random
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from engine.words import never_heard
from tests.conftest import run
from toy import grader, language, world
from toy.world import Scene, Thing


def scenes(n, seed=0, **how):
    rng = random.Random(seed)
    return [world.sample_scene(rng, **how) for _ in range(n)]


def has_held_out(scene):
    return any((t.colour, t.shape) in world.HELD_OUT for t in scene.things)


RED = Thing("circle", "red", "medium", 0.25, 0.5)
BLUE = Thing("square", "blue", "medium", 0.75, 0.5)
PAIR = Scene((RED, BLUE))
CROSSES = tuple(Thing("cross", "red", "small", x, 0.5) for x in (0.2, 0.5, 0.8))


# ---- scenes

def test_same_seed_same_world():
    assert scenes(50, seed=1) == scenes(50, seed=1) != scenes(50, seed=2)
    assert language.corpus(200, seed=1) == language.corpus(200, seed=1)
    assert len(language.corpus(203, seed=0)) == 203


def test_scenes_are_apart_inside_and_of_every_sort():
    drawn = scenes(2000)
    for scene in drawn:
        for i, t in enumerate(scene.things):
            assert t.radius < min(t.x, t.y) and max(t.x, t.y) < 1 - t.radius
            for o in scene.things[:i]:
                assert max(abs(t.x - o.x), abs(t.y - o.y)) > t.radius + o.radius
    assert {len(s.things) for s in drawn} == {1, 2, 3, 4}
    assert {s.background for s in drawn} == set(world.BACKGROUNDS)
    names = {f"{c} {s}" for c in world.COLOURS for s in world.SHAPES}
    assert {t.name for s in drawn for t in s.things} == names

    # some pairs are two of one name, to be counted; most are in a clear relation
    pairs = [s.things for s in drawn if len(s.things) == 2]
    assert 0.1 < sum(a.name == b.name for a, b in pairs) / len(pairs) < 0.3
    sides = Counter(world.relation(a, b) for a, b in pairs)
    assert sides[None] < 0.1 * len(pairs)
    assert min(sides[side] for side in world.OPPOSITE) > 0.15 * len(pairs)

    # there is something to count
    most = {max(Counter(t.name for t in s.things).values()) for s in drawn}
    assert most == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="5"):
        world.sample_scene(random.Random(0), n=5)


def test_held_out_pairs_stay_out():
    rng = random.Random(0)
    assert not any(has_held_out(s) for s in scenes(2000) if len(s.things) > 1)
    for scene in scenes(2000):
        _, target, _ = language.edit(scene, rng)
        assert len(target.things) < 2 or not has_held_out(target)
    tests = scenes(200, held_out=True)
    assert all(has_held_out(s) and len(s.things) > 1 for s in tests)


# ---- language

RING = """
import random
from toy import world
world.SHAPES += ("ring",)
from toy import language
rng = random.Random(0)
texts = [language.request(world.sample_scene(rng), rng)[0] for _ in range(100)]
assert sum("ring" in text.lower().split() for text in texts) > 10
assert any("ring" in text.lower().split() for text in language.corpus(100, 0))
"""


def test_a_new_shape_needs_no_synonyms():
    """Whoever extends the world gives it a name, and it is spoken of."""
    assert run("-c", RING).returncode == 0


NOUNS = (*world.SHAPES, "object")
MEANS = {form: word for word, others in language.SYNONYMS.items() for form in others}
MEANS |= {language.plural(form): language.plural(MEANS[form]) for form in [*MEANS]
          if MEANS[form] in NOUNS}
FORM = re.compile(rf"\b({'|'.join(sorted(MEANS, key=len, reverse=True))})\b")


WHICH = f"(({'|'.join((*world.COLOURS, *world.SIZES))}) )"
THINGS = (*world.SHAPES, *language.NEVER_THERE)


def canonical(text):
    """In lower case, each word that has synonyms as one of them, 'one' as an article."""
    text = FORM.sub(lambda match: MEANS[match[0]], text.lower())
    return re.sub(r"\ban?\b|\b1\b|\bone\b", "a", text)


def frame(text):
    """What is left of a text without its things: 'draw N left of N'."""
    text = re.sub(rf"\bthe {WHICH}+(object|a)\b", "circle", canonical(text))
    text = re.sub(r"\b(the|a|an|two|three|four)\b|[.,?!:]", "", text)
    text = re.sub(rf"\b({'|'.join(world.BACKGROUNDS)})\b", "B", text)
    text = re.sub(rf"\b({'|'.join(map(language.plural, THINGS))})\b", "Ns", text)
    text = " ".join(re.sub(rf"\b({'|'.join(THINGS)})\b", "N", text).split())
    # 'blue' in 'make it blue' stays, as any colour
    text = re.sub(rf"\b{WHICH}+(?=N|object)", "", text)
    return re.sub(rf"\b({'|'.join(world.COLOURS)})\b", "C", text)


def samples(n, seed=0, other=False):
    """{kind: n texts of it}; ten of each scene."""
    rng = random.Random(seed)
    found = {"draw": [], "edit": [], "ask": []}
    drawn = [language.scene_to_draw(rng) for _ in range(n // 10)]
    for scene in drawn * 10:
        found["draw"].append(language.request(scene, rng, other=other)[0])
        found["ask"].append(language.question(scene, rng, other=other)[0])
        with suppress(ValueError):
            found["edit"].append(language.edit(scene, rng, other=other)[0])
    return found


@pytest.fixture(scope="module")
def trained():
    return samples(7_000)


@pytest.fixture(scope="module")
def others():
    return samples(1_500, other=True)


@pytest.fixture(scope="module")
def in_reach():
    """The frames of many texts about a few scenes."""
    rng = random.Random(0)
    green = Thing("cross", "green", "small", 0.5, 0.5)
    left, right = replace(RED, size="small", x=0.2), replace(BLUE, size="small", x=0.8)
    kinds = [
        (RED, BLUE), (replace(RED, y=0.2), replace(BLUE, x=0.25, y=0.8)),
        (RED, replace(RED, colour="blue", x=0.75)), CROSSES[:2], (left, green, right),
        (left, replace(left, y=0.8), right), (green,), (replace(green, x=0.8, y=0.2),),
        (RED, replace(BLUE, colour="red")), CROSSES,
    ]
    assert all(world.valid(Scene(things)) for things in kinds)
    texts = set()
    for scene in [Scene(things) for things in kinds] * 5000:
        texts.add(language.request(scene, rng)[0])
        texts.add(language.edit(scene, rng)[0])
        texts.add(language.question(scene, rng)[0])
    return set(map(frame, texts))


def test_plain_form():
    assert language.plain(PAIR) == "a red circle left of a blue square"
    assert language.plain(Scene((BLUE, RED))) == "a blue square right of a red circle"
    large = Thing("cross", "orange", "large", 0.5, 0.5)
    assert language.plain(Scene((large,))) == "a large orange cross"
    medium = Thing("cross", "orange", "medium", 0.5, 0.5)
    assert language.plain(Scene((medium,))) == "an orange cross"
    assert language.plain(Scene(CROSSES)) == "three small red crosses"
    blue = Thing("square", "blue", "medium", 0.5, 0.2)
    scene = Scene(CROSSES[:2] + (blue,))
    assert language.plain(scene) == "two small red crosses and a blue square"
    scene = Scene((RED, blue, CROSSES[2]))
    assert language.plain(scene) == "a red circle, a blue square and a small red cross"
    said = language.describe(Scene((BLUE, RED), "grey"))
    assert said == "a red circle at the left and a blue square at the right, on a grey background"


def said_relation(text, scene):
    """-> (thing, its side, other thing) as a text about two things says it."""
    first, second = language.in_order(text, scene.things)
    text = canonical(text)
    sides = re.findall(r"\b(left|right|above|below|top|bottom)\b", text)
    side = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
    side = side.get(sides[0], sides[0])
    # 'on the left a circle, on the right a square': the first side is that of the first thing
    if len(sides) == 2:
        return first, side, second
    its = re.search(r"\b(its|of it|above it|below it)\b", text)
    if its or text.find(sides[0]) < text.find(first.shape):
        return second, side, first
    return first, side, second


def colours_in_front(text):
    """'a circle and a square, both red' -> 'a red circle and a red square'"""
    text = language.LATE.sub(r"\g<colour> \g<shape>", text)
    late = re.search(rf"(?:,| and) (?:both|all)(?: of them| in)? ({'|'.join(world.COLOURS)})", text)
    if late is None:
        return text
    shapes = "|".join(world.SHAPES)
    return re.sub(rf"\b({shapes})(s|es)?\b", rf"{late[1]} \1\2", text)


def assert_says_what_is_there(text, scene):
    text = colours_in_front(canonical(text))
    labels = Counter(t.label for t in scene.things)
    for label, n in labels.items():
        number = f"({language.NUMBERS[n]}|pair of|couple of)" if n > 1 else ""
        things = language.plural(label) if n > 1 else label
        counted = rf"{number} ?\b{things}\b|{things}, (just )?{language.NUMBERS[n]}\b"
        # 'a red and a blue circle'
        alike = rf"{label.split()[0]} and a \w+ {label.split()[-1]}"
        # 'a circle, a square and a circle, in a row'
        one_by_one = len(re.findall(rf"\b{label}\b", text)) == n
        found = re.search(counted, text) or re.search(alike, text) or one_by_one
        assert found, (text, label)


@pytest.mark.parametrize("other", [False, True])
def test_captions_say_what_counts(other):
    rng = random.Random(0)
    plains = 0
    for scene in scenes(3000):
        text, meaning = language.request(scene, rng, "caption", other)
        plains += text.startswith(language.plain(scene))
        assert_says_what_is_there(text, scene)
        assert_says_what_is_there(meaning, scene)
        background = scene.background
        said = re.search(rf"\b(on|in front of|is|should be) {background}|{background} background"
                         rf"|background {background}", canonical(text))
        assert said or background == "white", text
        if world.sides(scene):
            thing, side, second = said_relation(text, scene)
            assert world.relation(thing, second) == side, text
    assert other or 0.2 < plains / 3000 < 0.4


def test_requests_of_every_kind():
    rng = random.Random(0)
    for kind in ("caption", "list", "beside"):
        for scene in scenes(500):
            assert_says_what_is_there(language.request(scene, rng, kind)[0], scene)
    for scene in scenes(500):
        text, meaning = language.request(scene, rng, "places")
        text = re.sub("upper", "top", re.sub("lower", "bottom", canonical(text)))
        if len(scene.things) < 4:
            assert all(world.spot(t) in text for t in scene.things), text
        # what has no colour in words has none in its meaning either
        for said in language.request(scene, rng, "shapes"):
            assert not any(re.search(rf"\b{colour}\b", said) for colour in world.COLOURS)
    # a thing that is said to be between two others is: nearer to their middle than these are
    said = 0
    for scene in [language.scene_to_draw(rng) for _ in range(3000)]:
        text = canonical(language.request(scene, rng)[0])
        if "between" in text:
            first, second, c = language.between(scene)
            middle = (first.x + second.x) / 2, (first.y + second.y) / 2
            away = {t: max(abs(t.x - middle[0]), abs(t.y - middle[1])) for t in scene.things}
            assert min(away, key=away.get) == c
            said += 1
    assert said > 10


def test_words_are_found_in_the_text():
    green = Thing("circle", "green", "large", 0.5, 0.8)
    scene = Scene((RED, BLUE, green))
    text = "Is the big ball under THE RED DISC, or next to the box?"
    ends = [(text[:end].split()[-1], thing) for end, thing in language.mentions(text, scene)]
    assert ends == [("ball", green), ("DISC", RED), ("box", BLUE)]
    # the circle, a circle, the circles: none of them is one thing
    assert language.mentions("the circle, a red circle, the red circles", scene) == []
    alone = Scene((RED,))
    assert language.mentions("make it bigger", alone) == [(7, RED)]
    assert language.mentions("make it bigger", scene) == []
    two = Scene((RED, replace(green, x=0.8, y=0.5)))
    assert language.mentions("move the circle on the left up", two) == [(27, RED)]

    assert language.in_order("a box, then a green and a red ball", scene.things) == [
        BLUE, green, RED]
    assert language.in_order("one blue square and one red circle", (RED, BLUE)) == [BLUE, RED]
    asked = language.destination
    assert asked("put a cross to the left side of the blue box", scene) == ("left of", BLUE)
    assert asked("add a dot beneath it", alone) == ("below", RED)
    assert asked("put it beside the BOX, please", scene) == ("next to", BLUE)
    assert asked("add a cross in the lower left corner", scene) == ("spot", None)
    assert asked("add another red circle", scene) is None


def assert_says_how_it_changed(order, action, t, was):
    fields = ("colour", "shape", "size", "x", "y")
    same = [getattr(t, field) == getattr(was, field) for field in fields]
    order = canonical(order)
    if action in ("recolour", "recolour all"):
        assert same == [False, True, True, True, True] and t.colour in order
    if action == "replace":
        assert same[2:] == [True] * 3 and t.shape in order
        assert same[0] or t.colour in order
    if action in ("move", "swap"):
        assert same[:3] == [True] * 3 and same[3:] != [True, True]
    if action == "add":
        another = "another" in order or "a more" in order
        assert t.shape in order and (another or re.search(rf"\b{t.label}\b", order))
    if action == "resize":
        assert same == [True, True, False, True, True]
        larger = world.SIZES[t.size] > world.SIZES[was.size]
        words = "bigger|enlarge|grow|scale .*up|large" if larger else \
            "smaller|shrink|reduce|scale .*down|small"
        assert re.search(rf"\b({words})", order), order


def assert_is_where_it_should_be(order, action, t, scene):
    """At the side of the thing, or in the spot, that the order names."""
    where, other = language.destination(order, scene) or (None, None)
    if other:
        asked = ("left of", "right of") if where == "next to" else (where,)
        assert world.relation(t, other, world.READ) in asked, order
    elif where == "spot" and not re.search("(left|right) (to|up|down|in|at|on|should)", order):
        order = canonical(order).replace("upper", "top").replace("lower", "bottom")
        spots = [name for name in world.SPOTS if re.search(rf"\b{name}\b", order)]
        assert any(set(name.split()) <= set(world.spot(t).split()) for name in spots) or (
            action == "move" and re.search(r"\b(up|down)\b", order)), order


@pytest.mark.parametrize("other", [False, True])
def test_edits_change_only_what_they_say(other):
    rng = random.Random(0)
    seen = Counter()
    n_changed = {"remove": (1, 0), "add": (0, 1), "background": (0, 0), "swap": (2, 2)}
    for scene in scenes(4000):
        order, target, action = language.edit(scene, rng, other=other)
        seen[action] += 1
        old = set(scene.things) - set(target.things)
        new = set(target.things) - set(scene.things)
        assert world.valid(target) and target != scene
        assert (scene.background == target.background) == (action != "background")
        if len(old) < 2 or action == "swap":
            assert (len(old), len(new)) == n_changed.get(action, (1, 1))
        else:
            assert action in ("recolour all", "remove")
            assert re.search(r"\b(all|both|everything|the \w+s)\b", canonical(order)), order
        if action == "background":
            assert target.background in canonical(order)
        # things that change keep their place in the list
        pairs = zip(scene.things, target.things) if len(new) == len(old) else [(t, t) for t in new]
        for was, t in pairs:
            if t in new:
                assert_says_how_it_changed(order, action, t, was)
        if action in ("add", "move"):
            assert_is_where_it_should_be(order, action, *new, scene)
    assert min(seen[action] for action in language.EDITS) > 100


def test_every_action_is_practised_equally_often():
    rng = random.Random(0)
    n = 1800
    found = Counter(language.scene_to_edit(rng)[3] for _ in range(n))
    mean = n / len(language.EDITS)
    assert {*found} == {*language.EDITS}
    assert all(abs(count - mean) < 4 * mean ** 0.5 for count in found.values()), found


def test_edits_speak_of_the_thing_that_changes():
    """Words with 'the' that fit one thing only: the first such thing is it."""
    rng = random.Random(0)
    n = 0
    for scene in scenes(2000):
        with suppress(ValueError):
            action = rng.choice(("recolour", "remove", "move", "resize"))
            order, target, _ = language.edit(scene, rng, action)
            found = language.mentions(order, scene)
            changed = set(scene.things) - set(target.things)
            if found and len(changed) == 1:
                n += 1
                assert {found[0][1]} == changed, order
    assert n > 1000


def test_swapped_things_exchange_their_places():
    rng = random.Random(0)
    order, target, _ = language.edit(PAIR, rng, "swap")
    red, blue = target.things
    assert (red.name, red.x, blue.name, blue.x) == ("red circle", 0.75, "blue square", 0.25)


def test_impossible_requests_raise():
    rng = random.Random(0)
    alone = Scene((RED,))
    for action in ("remove", "swap"):
        with pytest.raises(ValueError, match=action):
            language.edit(alone, rng, action)
    with pytest.raises(ValueError, match="where"):
        language.question(alone, rng, "where", seen=False)
    # no words refer to one of three red crosses
    three = Scene(CROSSES)
    with pytest.raises(ValueError, match="recolour"):
        language.edit(three, rng, "recolour")
    possible = {"add", "background", "recolour all"}
    assert {language.edit(three, rng)[2] for _ in range(50)} == possible


def fitting(text, scene):
    """The things that the last words for things in a text fit, one or several."""
    phrases = [*language.PHRASE.finditer(text)]
    *_, phrase = [p for p in phrases if p["colour"] or p["size"]] or phrases
    return [t for t in scene.things if language.fits(phrase, t)]


def possible_places(things, scene):
    """The answers that are true of one of the things."""
    spots = [language.at(world.spot(t)) for t in things]
    return spots + [f"{world.relation(t, o)} the {o.name}" for t in things for o in scene.things]


def is_true(asked, scene):
    """A yes-or-no question's answer, or None where words without an article are ambiguous."""
    asked = re.sub(r"\bis it true( that)?\b", "", asked.lower())
    if "background" in canonical(asked):
        return scene.background in canonical(asked)
    if "same" in asked:
        what = "colour" if "colour" in canonical(asked) else "shape"
        return len({getattr(thing, what) for thing in scene.things}) == 1
    found = language.mentions(asked, scene)
    if not found:
        return None
    (end, thing), *_ = found
    # 'the circle on the left' is one of several circles, and not found by its words
    its_place = r"^ on the (left|right)\b(?! (side )?of)|^ at the (top|bottom)|^ in the centre"
    said = re.sub(its_place, "", canonical(asked[end:]))
    for side in world.OPPOSITE:
        if side in said or side.replace("of", "from") in said or \
                side.replace("of", "side of") in said:
            return world.relation(thing, found[-1][1]) == side if len(found) > 1 else None
    colours = [c for c in world.COLOURS if re.search(rf"\b{c}\b", said)]
    shapes = [s for s in world.SHAPES if re.search(rf"\b{s}\b", said)]
    return [thing.colour] == colours or [thing.shape] == shapes


@pytest.mark.parametrize("other", [False, True])
def test_answers_are_true(other):
    rng = random.Random(0)
    judged = Counter()
    for scene in scenes(12_000):
        asked, answer, kind = language.question(scene, rng, other=other)
        text = canonical(asked)
        judged[kind] += 1
        if kind == "colour" and "background" not in text:
            meant = fitting(text, scene) if not re.search(r"\bit\b", text) else scene.things
            assert {t.colour for t in meant} == {answer}
        if kind == "shape" and not re.search(r"\bit\b", text):
            assert {t.shape for t in fitting(text, scene)} == {answer}
        if kind in ("count", "total"):
            nothing = any(re.search(rf"\b{language.plural(x)}\b", text)
                          for x in language.NEVER_THERE)
            assert answer == language.NUMBERS[0 if nothing else len(fitting(text, scene))]
        if kind == "exists":
            judged[answer] += 1
            n = [n for n, word in enumerate(language.NUMBERS) if word in text]
            nothing = any(re.search(rf"\b{x}\b", text) for x in language.NEVER_THERE)
            there = 0 if nothing else len(fitting(text, scene))
            assert (answer == "yes") == (there >= (n or [1])[0]), asked
        if kind == "where" and answer.startswith(("a ", "an ")):
            assert answer in [language.a(t.name) for t in scene.things]
            assert answer.split(" ", 1)[1] not in text
        elif kind == "where":
            meant = fitting(text, scene) if not re.search(r"\bit\b", text) else scene.things
            assert answer in possible_places(meant, scene)
        if kind == "which" and answer in world.SHAPES:
            assert answer in [t.shape for t in scene.things]
        if kind == "yes or no":
            judged[f"really {answer}"] += 1
            truth = is_true(asked, scene)
            judged["not judged"] += truth is None
            assert truth is None or truth == (answer == "yes"), (asked, scene)
        if kind == "describe":
            assert answer == language.describe(scene)
    assert all(judged[kind] > 100 for kind in language.QUESTIONS)
    for yes, no in (("yes", "no"), ("really yes", "really no")):
        assert 0.45 < judged[yes] / (judged[yes] + judged[no]) < 0.55
    assert judged["not judged"] < 0.35 * (judged["really yes"] + judged["really no"])


def test_what_is_on_the_left():
    rng = random.Random(0)
    where = {"left": RED, "right": BLUE}
    for _ in range(300):
        asked, answer, _ = language.question(PAIR, rng, "which")
        said = re.search(r"\b(left|right)\b(?! (side )?(of|from))", asked.lower())
        if said:
            assert answer in (where[said[1]].shape, f"a {where[said[1]].name}"), asked


def test_questions_about_a_text_need_no_picture():
    rng = random.Random(0)
    asked = [language.question(scene, rng, seen=False) for scene in scenes(1000)]
    assert {kind for *_, kind in asked} == set(language.QUESTIONS) - {"describe"}
    assert not any(answer.startswith(("at ", "in ")) for _, answer, _ in asked)
    assert not any("background" in canonical(question) for question, _, _ in asked)


def test_a_given_kind_draws_no_other_kind():
    """Two generators agree after the same question, whatever the number of kinds."""
    once, again = random.Random(0), random.Random(0)
    for scene in scenes(50):
        language.question(scene, once, "total")
        speaker = language.Speaker(again)
        block, slots, _ = again.choice(language.ask_total(scene, again, True, speaker.plain))
        speaker.finish(speaker.say(block, **slots))
    assert once.random() == again.random()


# ---- words and wordings

def test_half_of_the_texts_are_plain(trained):
    """In lower case, without synonyms, in the frames that are marked so; and some of the others
    happen to look like that."""
    for kind, texts in trained.items():
        as_before = [text for text in texts if text == canonical(text).replace("a o", "an o")]
        assert 0.45 < len(as_before) / len(texts) < 0.75, kind
        lengths = [len(text.split()) for text in texts]
        assert sum(lengths) / len(lengths) < 13


def test_training_never_says_what_is_held_out(trained, others):
    """In 21 000 texts neither the frames nor the pairs of words; and the others always say one of
    these."""
    for kind in trained:
        def pairs(text):
            return [pair for pair in language.APART if all(word in text.lower() for word in pair)]
        assert not any(map(pairs, trained[kind]))
        known = {frame(text) for text in trained[kind]}
        same = {text for text in others[kind] if frame(text) in known and not pairs(text)}
        assert not same, list(same)[:9]
        assert len({frame(text) for text in others[kind]} - known) > 60
    assert sum(map(len, language.OTHER.values())) > 120


def test_words_are_closed(trained, others):
    """`words` lists what training says and hears, all of it and no more; what is held out is said
    in these words too. Zero is an answer only."""
    rng = random.Random(0)

    def said(texts):
        return {word for of_kind in texts.values() for text in of_kind
                for word in language.SPOKEN.findall(text.lower())}
    # what is rare
    rare = [language.question(PAIR, rng, kind)[0] for kind in ("exists", "count")
            for _ in range(3000)]
    assert said(trained | {"rare": rare}) | {"zero"} == language.words()
    assert said(others) <= language.words()
    answers = {"zero"} | {language.question(scene, rng)[1] for scene in scenes(2000)}
    assert said({"answers": answers}) <= language.words()
    assert len(language.words()) < 300


def test_what_was_never_heard():
    words = language.words()
    assert never_heard("Draw 2 CORGIS, please: a corgi's ball!", words) == [
        "corgis", "corgi's"]
    assert never_heard("7 red circles & a plus-sign?", words) == ["7"]
    assert never_heard("", words) == []
    assert never_heard("dogs", {"dog"}) == never_heard("dog", {"dogs"}) == []


@pytest.mark.parametrize("text", [
    "RED CIRCLE LEFT OF BLUE SQUARE", "red circle, blue square", "a red ball next to a blue box",
    "What color is the square?", "How many shapes are there?", "is the circle left of the square?",
    "is there a cat?", "make it bigger", "make everything blue", "swap the circle and the square",
    "add another ball", "please draw 2 green triangles.", "a blue box under a red ball",
    "two circles and a square", "on the left a red circle, on the right a blue square",
    "red circle left, blue square right", "a red circle and, on its right, a blue square",
    "a green cross in the middle", "a green cross in the corner", "can you draw a red circle",
    "which shape is red?", "what is on the left?", "is the square blue?", "what do you see?",
    "are there two circles?", "get rid of the ball", "make the background gray",
    "change the circle to blue", "turn the square blue", "put the circle on the left",
    "make the circle smaller", "shrink the box", "a red and a blue circle", "make all shapes red",
    "a red circle between a blue square and a green cross", "move the ball up",
    "a circle that is red", "a box in red", "a circle and a square, both red",
    "two things: a red circle and a blue square", "four crosses, all of them red",
    "red circle, blue square, green cross", "red circle blue square", "red circle + blue square",
    "from left to right: a circle, a square, a cross", "a red circle pls", "an x and a box",
    "red x", "two red xs",
    "colour of the box?", "how many red ones are there?", "how many things are there altogether?",
    "are both the same colour?", "what is in the middle?",
])
def test_what_a_newcomer_types_is_in_reach(text, in_reach):
    assert never_heard(text, language.words()) == []
    assert frame(text) in in_reach


# ---- pictures and their grades

def test_render_is_antialiased_and_scales():
    small, large = (np.asarray(world.render(PAIR, size), dtype=float) for size in (64, 128))
    assert small.shape == (64, 64, 3) and large.shape == (128, 128, 3)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert abs(small - halved).mean() < 0.5
    assert tuple(small[32, 16]) == world.COLOURS["red"]
    assert tuple(small[32, 48]) == world.COLOURS["blue"]
    # red, blue, white, and mixtures along the circle
    assert len(np.unique(small.reshape(-1, 3), axis=0)) > 8


def test_check_names_what_is_wrong():
    def wrong(found):
        return [what for what, right in grader.check(found, PAIR).items() if not right]
    # neither the order of the things nor their size nor their exact place counts
    assert grader.matches(Scene((BLUE, RED)), PAIR)
    circle = Thing("circle", "red", "large", 0.75, 0.5)
    square = Thing("square", "blue", "small", 0.25, 0.5)
    assert wrong(Scene((circle, square))) == ["relation"]
    assert wrong(Scene(PAIR.things, "grey")) == ["background"]
    assert wrong(Scene((RED,))) == ["colours_shapes", "count", "relation"]
    elsewhere = Scene((Thing("circle", "red", "medium", 0.5, 0.5),))
    assert not grader.matches(elsewhere, Scene((RED,)), places=True)
    assert not grader.matches(Scene(()), PAIR)


def degrade(image, rng, blur=1.0, noise=8, quality=75):
    """Blurred by 1 pixel, noisy, and through a JPEG: worse than what an autoencoder does."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    numpy_rng = np.random.default_rng(rng.randrange(2 ** 32))
    noisy = pixels + numpy_rng.normal(0, noise, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("size, worse, n, least", [
    (64, False, 200, 0.995),
    pytest.param(64, False, 2000, 0.995, marks=pytest.mark.slow),
    pytest.param(64, True, 500, 0.985, marks=pytest.mark.slow),
    (128, False, 200, 0.995),
])
def test_grader_reads_what_is_drawn(size, worse, n, least):
    """Measured on other seeds: 3000 of 3000 clean, 1999 of 2000 degraded."""
    rng = random.Random(size)
    right = 0
    for scene in scenes(n // 2) + scenes(n // 2, held_out=True):
        image = world.render(scene, size)
        found = grader.grade(degrade(image, rng) if worse else image)
        sizes = sorted((t.name, t.size) for t in scene.things)
        sizes_right = sorted((t.name, t.size) for t in found.things) == sizes
        right += grader.matches(found, scene, places=True) and sizes_right
    assert right >= least * n


def test_grader_is_not_fooled():
    def read(*calls):
        """The names found in a page on which these (method of ImageDraw, where, colour) draw."""
        image = Image.new("RGB", (256, 256), "white")
        page = ImageDraw.Draw(image)
        for method, where, colour in calls:
            getattr(page, method)(where, world.COLOURS[colour])
        return [t.name for t in grader.grade(image.reduce(4)).things]

    assert read(("ellipse", (60, 60, 160, 160), "red")) == ["red circle"]
    left, right = (40, 60, 120, 140), (110, 60, 190, 140)
    assert read(("ellipse", left, "red"), ("ellipse", right, "red")) == ["red blob"]
    upside_down = [(60, 60), (160, 60), (110, 160)]
    assert read(("polygon", upside_down, "red")) == ["red blob"]
    upper, lower = (60, 60, 160, 110), (60, 110, 160, 160)
    two_coloured = read(("rectangle", upper, "red"), ("rectangle", lower, "blue"))
    assert two_coloured[0].endswith("blob")
    speck = (60, 60, 68, 68)
    assert read(("ellipse", speck, "red")) == []

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not grader.matches(grader.grade(Image.fromarray(noise)), PAIR)
