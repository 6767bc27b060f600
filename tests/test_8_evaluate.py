"""The benchmark: correct pictures score 1 in every category, pictures that are wrong on purpose
score 0 where they should, and the prompts are fixed."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lab import evaluate
from lab.evaluate import Case
from sample import TOY_FOLDER
from toy import grader, language, world
from toy.world import Scene, Thing

RED = Thing("circle", "red", "medium", 0.25, 0.5)
BLUE = Thing("square", "blue", "medium", 0.75, 0.5)
GREEN = Thing("cross", "green", "medium", 0.5, 0.2)
PAIR = Scene((RED, BLUE))
N = 12


def means(task, change, n=N):
    """The mean of every (category, what) when the pictures show change(case), a scene."""
    def respond(rows):
        return (world.render(change(case)) for case, _ in rows)
    scores, _ = evaluate.score(task, evaluate.cases(task, n), 1, respond)
    found = {}
    for (_, category, what, _), values in scores.items():
        found.setdefault((category, what), []).extend(values)
    return {key: np.mean(values) for key, values in found.items()}


# ---- prompts

@pytest.mark.parametrize("task", evaluate.TASKS)
def test_lists_are_fixed_and_longer_ones_go_on(task):
    """Whatever the process, the seed of the noise and the length."""
    longer = evaluate.cases(task, 6)
    for case in evaluate.cases.__wrapped__(task, 3):
        assert sum(c == case and c.target == case.target for c in longer) == 1
    groups = {}
    for case in longer:
        groups.setdefault((case.category, case.pairs, case.source is None), []).append(case)
    assert all(len(set(group)) == len(group) == 6 for group in groups.values())
    shorter = [c for group in groups.values() for c in group[:3]]
    assert set(shorter) == set(evaluate.cases(task, 3))


def test_other_words_are_of_every_category_and_no_part_of_a_mean():
    for task in evaluate.TASKS:
        found = [case for case in evaluate.cases(task, 6) if case.category == evaluate.OTHER]
        assert {case.pairs for case in found} == {"seen"}
    for make, categories in ((evaluate.draw_case, evaluate.GENEVAL),
                             (evaluate.edit_case, language.EDITS)):
        found = evaluate.first(80, make, evaluate.OTHER, False)
        assert {case.rules for case in found} == set(categories)
    scores = {
        ("draw", "a", "right", "seen"): [1, 1],
        ("draw", evaluate.OTHER, "right", "seen"): [0, 0],
    }
    rows = evaluate.summary(scores)
    assert rows["draw", "mean of 1", "right", "seen"]["mean"] == 1
    assert rows["draw", evaluate.OTHER, "right", "seen"]["mean"] == 0


@pytest.mark.slow
def test_a_list_ends_where_there_are_no_more():
    assert len(evaluate.first(60, evaluate.draw_case, "counting", True)) == 36


def test_the_lists_of_today():
    """A change of these makes scores incomparable with older ones."""
    prompts = {}
    for task in ("edit", "draw"):
        for case in evaluate.cases(task, 2):
            prompts.setdefault((task, case.category, case.pairs), case.prompt)
    two_objects = prompts["draw", "two objects", "seen"]
    assert two_objects == "an image of a blue triangle and a yellow square"
    position = prompts["draw", "position", "never seen"]
    assert position == "a yellow square above a purple triangle"
    move = prompts["edit", "move", "seen"]
    assert move == "move the square to the bottom left"


def test_never_seen_pairs_are_in_their_own_lists_only():
    """Training draws these pairs only alone, never beside another thing."""
    names = [f"{colour} {shape}" for colour, shape in world.HELD_OUT]
    some = ("two", "three", "four", "2", "3", "4", "pair", "couple")

    def has_pair(scene):
        return len(scene.things) > 1 and any(t.name in names for t in scene.things)

    for case in (case for task in evaluate.TASKS for case in evaluate.cases(task, 24)):
        scenes = [s for s in (case.source, case.target) if isinstance(s, Scene)]
        never = any(has_pair(s) for s in scenes)
        # a scene in words
        if not scenes:
            words = case.prompt.split(". ")[0]
            phrases = [*language.PHRASE.finditer(words.lower())]
            # 'a red and a blue circle'
            several = len(phrases) > 1 or any(f" {w} " in f" {words} " for w in (*some, "and a"))
            found = [(language.COLOUR_NAMES.get(p["colour"]), language.NOUNS[p["noun"]])
                     for p in phrases]
            never = several and any(pair in world.HELD_OUT for pair in found)
        assert never == (case.pairs == "never seen"), case


def test_prompts_say_what_their_category_is_about():
    for case in evaluate.cases("draw", 24):
        if case.category == evaluate.OTHER:
            continue
        things = case.target.things
        shapes = {t.shape for t in things}
        colours = {t.colour for t in things}
        assert all(t.shape in case.prompt and t.colour in case.prompt for t in things)
        assert case.target.background == "white"
        sides = [side for side in ("left", "right", "above", "below") if side in case.prompt]
        assert len(sides) == (case.category == "position")
        if case.category == "counting":
            assert language.NUMBERS[len(things)] in case.prompt
            assert len(colours) == len(shapes) == 1
        else:
            assert len(things) == (1 if case.category in ("single object", "colours") else 2)
            assert len(shapes) == len(things)
        if case.category == "colour attribution":
            assert len(colours) == 2


# ---- grading

def test_right_pictures_are_right():
    assert set(means("draw", lambda case: case.target, 24).values()) == {1}
    assert set(means("edit", lambda case: case.target, 24).values()) == {1}


def test_one_thing_missing_or_too_many():
    missing = means("draw", lambda case: replace(case.target, things=case.target.things[1:]))
    assert set(missing.values()) == {0}

    def with_one_more(case):
        """A small green circle where there is most room."""
        things = case.target.things

        def room(place):
            distances = []
            for t in things:
                distance = max(abs(place.x - t.x), abs(place.y - t.y))
                distances.append(distance - place.radius - t.radius)
            return min(distances)
        grid = [(x / 20, y / 20) for x in range(3, 18) for y in range(3, 18)]
        places = [Thing("circle", "green", "small", x, y) for x, y in grid]
        return replace(case.target, things=things + (max(places, key=room),))
    assert set(means("draw", with_one_more).values()) == {0}


def test_swapped_colours():
    def swap(case):
        first, *rest = case.target.things
        if not rest:
            return Scene((replace(first, colour="blue" if first.colour == "red" else "red"),))
        *middle, last = rest
        swapped = replace(first, colour=last.colour), replace(last, colour=first.colour)
        return Scene((swapped[0], *middle, swapped[1]))
    found = means("draw", swap)
    # colours are not what these ask for
    for category in ("single object", "two objects", "counting", "position"):
        assert found[category, "category"] == 1
    assert found["colours", "category"] == 0
    assert found["colour attribution", "category"] == 0
    assert found["colour attribution", "whole prompt"] == 0


def test_swapped_sides():
    def turn(case):
        return Scene(tuple(replace(t, x=1 - t.x, y=1 - t.y) for t in case.target.things))
    found = means("draw", turn)
    assert found["position", "category"] == found["position", "whole prompt"] == 0
    placed = ("position", evaluate.OTHER)
    others = {score for (category, _), score in found.items() if category not in placed}
    assert others == {1}


def test_wrong_shape_and_wrong_background():
    def other_shapes(case):
        things = []
        for t in case.target.things:
            things.append(replace(t, shape=world.SHAPES[world.SHAPES.index(t.shape) - 1]))
        return replace(case.target, things=tuple(things))
    found = means("draw", other_shapes)
    several = ("two objects", "position", "colour attribution", evaluate.OTHER)
    assert all(score == 0 for (category, _), score in found.items() if category not in several)
    found = means("draw", lambda case: replace(case.target, background="grey"))
    assert all(score == (what == "category") for (_, what), score in found.items())


@pytest.mark.slow
def test_a_model_that_does_nothing_follows_nothing_and_changes_nothing_else():
    found = means("edit", lambda case: case.source, 48)
    for (_, what), score in found.items():
        assert score == (what in ("unchanged", "objects kept")), found


GREEN_CIRCLE = replace(RED, colour="green")
RED_MIDDLE = replace(RED, x=0.5)
GREEN_LOW = replace(GREEN, y=0.8)
GREEN_ABOVE = replace(GREEN, x=0.25, y=0.15)
RECOLOUR = ("make the circle green", "recolour", (RED, BLUE), (GREEN_CIRCLE, BLUE))
REMOVE = ("remove the circle", "remove", (RED, BLUE), (BLUE,))
ADD = ("add a green cross", "add", (RED, BLUE), (RED, BLUE, GREEN))
ADD_AT = ("add a green cross at the top", "add", (RED, BLUE), (RED, BLUE, GREEN))
ADD_BESIDE = ("add a green cross above the red circle", "add", (RED,), (RED, GREEN_ABOVE))
MOVE_BESIDE = ("move the square to the left of the red circle", "move",
               (RED_MIDDLE, replace(BLUE, x=0.84)), (RED_MIDDLE, replace(BLUE, x=0.16)))
MOVE_TO = ("move the square to the top right", "move",
           (RED, BLUE), (RED, replace(BLUE, x=0.82, y=0.18)))
RESIZE = ("make the circle bigger", "resize", (RED, BLUE), (replace(RED, size="large"), BLUE))
SWAPPED = (replace(RED, x=0.75), replace(BLUE, x=0.25))
SWAP = ("swap the circle and the square", "swap", (RED, BLUE), SWAPPED)
ALL_GREEN = (GREEN_CIRCLE, replace(BLUE, colour="green"))
RECOLOUR_ALL = ("make everything green", "recolour all", (RED, BLUE), ALL_GREEN)
BESIDE = ("put the circle next to the square", "move",
          (replace(RED, x=0.75, y=0.16), replace(BLUE, y=0.75)),
          (replace(RED, y=0.75), replace(BLUE, y=0.75)))
ADD_ANOTHER = ("add a red circle to the left of the red circle", "add",
               (RED_MIDDLE,), (RED_MIDDLE, replace(RED_MIDDLE, x=0.15)))
ADD_ALIKE = ("add a red circle left of the blue square", "add",
             (RED, BLUE), (RED, BLUE, replace(RED, y=0.15)))
REPLACE = ("replace the circle with a green cross", "replace",
           (RED, BLUE), (replace(GREEN, x=0.25, y=0.5), BLUE))


# (instruction, action, before, after), and what another picture shows and scores
@pytest.mark.parametrize("edit, shown, followed, unchanged", [
    (RECOLOUR, (replace(RED, colour="yellow"), BLUE), 0, 1),
    (RECOLOUR, (GREEN_CIRCLE, GREEN), 1, 0),
    # the other thing has moved
    (RECOLOUR, (GREEN_CIRCLE, replace(BLUE, y=0.75)), 1, 0),
    (RECOLOUR, (replace(GREEN_CIRCLE, y=0.8), BLUE), 0, 1),
    # the wrong one is gone
    (REMOVE, (RED,), 0, 0),
    # Something else in its place is not what was asked for.
    (REMOVE, (GREEN, BLUE), 1, 0),
    (REMOVE, (BLUE, GREEN, GREEN_LOW), 1, 0),
    # anywhere will do
    (ADD, (RED, BLUE, GREEN_LOW), 1, 1),
    (ADD_AT, (RED, BLUE, GREEN_LOW), 0, 1),
    (ADD_BESIDE, (RED, replace(GREEN, x=0.2, y=0.15)), 1, 1),
    (ADD_BESIDE, (RED, GREEN_LOW), 0, 1),
    # The old one is where the new one should be.
    (ADD_ANOTHER, (RED_MIDDLE, replace(RED, x=0.85)), 0, 1),
    (ADD_ALIKE, (RED, BLUE, replace(RED, x=0.75, y=0.85)), 0, 1),
    (MOVE_BESIDE, (RED_MIDDLE, replace(BLUE, x=0.16, y=0.4)), 1, 1),
    (MOVE_TO, (RED, replace(BLUE, y=0.4)), 0, 1),
    (REPLACE, (GREEN, BLUE), 0, 1),
    (RESIZE, (RED, BLUE), 0, 1),
    (RESIZE, (replace(RED, size="small"), BLUE), 0, 1),
    (RESIZE, (replace(RED, size="large", y=0.75), BLUE), 0, 1),
    (SWAP, (RED, BLUE), 0, 1),
    (SWAP, (*SWAPPED, GREEN), 1, 0),
    (RECOLOUR_ALL, (GREEN_CIRCLE, BLUE), 0, 1),
    (RECOLOUR_ALL, (*ALL_GREEN, GREEN_LOW), 1, 0),
    (BESIDE, (replace(RED, y=0.8), replace(BLUE, y=0.75)), 1, 1),
    (BESIDE, (replace(RED, x=0.75, y=0.3), replace(BLUE, y=0.75)), 0, 1),
])
def test_edits(edit, shown, followed, unchanged):
    instruction, action, before, after = edit
    case = Case(action, "seen", instruction, Scene(after), Scene(before))
    right = evaluate.edited(grader.grade(world.render(Scene(after))), case)
    kept = right.pop("objects kept", None)
    assert kept == 1 or not set(before) & set(after)
    assert right == {"followed": 1, "unchanged": 1, "both": 1}
    wrong = evaluate.edited(grader.grade(world.render(Scene(shown))), case)
    kept = wrong.pop("objects kept", None)
    assert kept in (1, None) or not unchanged
    both = followed and unchanged
    assert wrong == {"followed": followed, "unchanged": unchanged, "both": both}


def test_edits_of_the_background():
    def verdict(followed, unchanged, both, kept):
        return {
            "followed": followed, "unchanged": unchanged, "both": both, "objects kept": kept,
        }
    target = replace(PAIR, background="grey")
    case = Case("background", "seen", "make the background grey", target, PAIR)
    assert evaluate.edited(target, case) == verdict(True, True, True, 1)
    assert evaluate.edited(Scene((RED,), "grey"), case) == verdict(True, False, False, 0.5)

    target = Scene((GREEN_CIRCLE, BLUE))
    case = Case("recolour", "seen", "make the circle green", target, PAIR)
    black = replace(target, background="black")
    assert evaluate.edited(black, case) == verdict(True, False, False, 1)

    # there is nothing to keep
    alone = replace(case, source=Scene((RED,)), target=Scene((GREEN_CIRCLE,)))
    assert "objects kept" not in evaluate.edited(alone.target, alone)


@pytest.mark.parametrize("change, right", [
    (str, 1),
    (lambda text: text + ".", 0),
    (lambda text: "", 0),
])
def test_only_the_exact_answer_counts(change, right):
    every = evaluate.cases("ask", 4)

    def respond(rows):
        return (change(case.target) for case, _ in rows)
    scores, failures = evaluate.score("ask", every, 1, respond)
    assert {x for values in scores.values() for x in values} == {right}
    assert len(failures) == (1 - right) * len(every)
    kinds = {(kind, what) for kind in (*language.QUESTIONS, evaluate.OTHER)
             for what in ("a picture", "words")}
    assert {key[1:3] for key in scores} == kinds - {("describe", "words")}


# ---- numbers

def test_prompts_are_resampled_not_pictures():
    """Ten prompts, all four pictures of each alike: the interval is that of ten numbers, twice as
    wide as that of forty."""
    every = evaluate.cases("draw", 10)[:10]

    def respond(rows):
        """Every second prompt is drawn right, the others are empty pages."""
        for case, _ in rows:
            yield world.render(case.target if every.index(case) % 2 else Scene(()))
    scores, failures = evaluate.score("draw", every, 4, respond)
    values = scores["draw", "single object", "category", "seen"]
    assert values == [0, 1] * 5 and len(failures) == 20
    low, high = evaluate.interval(values)
    fewer, more = evaluate.interval(values * 4)
    assert 0.5 < high - low < 0.7 and high - low > 1.7 * (more - fewer)
    # each list is resampled by itself
    assert evaluate.interval([1, 1], [0, 0]) == [0.5, 0.5]


def test_means_are_over_the_same_categories():
    scores = {
        ("draw", "a", "right", "seen"): [1, 1],
        ("draw", "b", "right", "seen"): [0, 1],
        ("draw", "b", "right", "never seen"): [0, 0],
    }
    rows = evaluate.summary(scores)
    assert rows["draw", "mean of 2", "right", "seen"]["mean"] == 0.75
    assert ("draw", "mean of 2", "right", "never seen") not in rows
    common = "mean of 1 in all columns"
    assert rows["draw", common, "right", "seen"]["mean"] == 0.5
    assert rows["draw", common, "right", "never seen"]["mean"] == 0


def test_noise_depends_on_neither_batch_nor_number(tiny, monkeypatch):
    def noise(n, **how):
        rows = [(case, k) for case in evaluate.cases("draw", n)[:n] for k in range(3)]
        seen = []

        def generate(model, prompts, images, eps):
            seen.extend(eps)
            return prompts
        with monkeypatch.context() as patch:
            patch.setattr(evaluate.sample, "generate", generate)
            list(evaluate.paint(tiny, rows, **how))
        return [tuple(eps.flatten().tolist()) for eps in seen]
    expected = noise(2, seed=0, batch=2)
    assert noise(2, seed=0, batch=6) == expected
    assert noise(4, seed=0, batch=5)[:6] == expected
    assert len(set(noise(4, seed=0, batch=5) + noise(4, seed=1, batch=5))) == 24


def test_the_command_line_writes_scores_and_failures(tmp_path, capsys):
    evaluate.main(["--model", str(TOY_FOLDER), "--out", str(tmp_path), "--n", "1",
                   "--pictures", "1", "--steps", "1"])
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "scores.json").read_text())
    categories = (*evaluate.GENEVAL, *language.EDITS, *language.QUESTIONS, "reconstructed")
    assert all(category in table for category in categories)
    row = record["scores"]["edit"]["move"]["unchanged, never seen"]
    assert row.keys() == {"mean", "interval", "prompts"}
    assert record["options"]["steps"] == 1
    assert record["commit"] and record["machine"]["versions"]["torch"] == str(torch.__version__)
    page = Image.open(tmp_path / "failures.png")
    assert page.width > 1000 and len(page.getcolors(1 << 20)) > 20
