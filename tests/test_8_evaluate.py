"""The benchmark: right pictures score 1 in every category, pictures that are wrong on purpose score 0 where they should, prompts are fixed."""
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lab import evaluate
from toy import grader
from toy import language, world
from lab.evaluate import Case
from engine.options import TOY_FOLDER
from toy.world import Scene, Thing

RED, BLUE = Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5)
GREEN = Thing("cross", "green", "medium", 0.5, 0.2)
PAIR = Scene((RED, BLUE))
N = 12


def means(task, change, n=N):
    """The mean of every (category, what) when pictures show change(case), a scene."""
    scores, _ = evaluate.score(task, evaluate.cases(task, n), 1, lambda rows: (world.render(change(case)) for case, _ in rows))
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


def test_a_list_ends_where_there_are_no_more():
    assert len(evaluate.first(60, evaluate.draw_case, "counting", True)) == 36


def test_the_lists_of_today():
    """A change of these makes scores incomparable with older ones."""
    prompts = {c.category + ", " + c.pairs: c.prompt for task in ("edit", "draw") for c in reversed(evaluate.cases(task, 2))}
    assert prompts["two objects, seen"] == "an image of a blue triangle and a yellow square"
    assert prompts["position, never seen"] == "a yellow square above a purple triangle"
    assert prompts["move, seen"] == "move the blue triangle to the left of the cross"


def test_never_seen_pairs_are_in_their_own_lists_only():
    """In training these pairs stood alone, never beside another thing."""
    names = [f"{colour} {shape}" for colour, shape in world.HELD_OUT]
    for case in (case for task in evaluate.TASKS for case in evaluate.cases(task, 24)):
        scenes = [s for s in (case.source, case.target) if isinstance(s, Scene)]
        never = any(len(s.things) > 1 and any(t.name in names for t in s.things) for s in scenes)
        if not scenes:                                                          # a scene in words
            words = case.prompt.split(". ")[0]
            several = sum(words.count(shape) for shape in world.SHAPES) > 1 or any(number in words for number in language.NUMBERS[2:])
            never = several and any(name in words for name in names)
        assert never == (case.pairs == "never seen"), case


def test_prompts_say_what_their_category_is_about():
    for case in evaluate.cases("draw", 24):
        things = case.target.things
        shapes, colours = ({getattr(t, part) for t in things} for part in ("shape", "colour"))
        assert all(t.shape in case.prompt and t.colour in case.prompt for t in things) and case.target.background == "white"
        sides = [side for side in ("left", "right", "above", "below") if side in case.prompt]
        assert len(sides) == (case.category == "position")
        assert len(things) == {"single object": 1, "colours": 1, "counting": len(things)}.get(case.category, 2)
        assert len(shapes) == (1 if case.category == "counting" else len(things))
        if case.category == "counting":
            assert language.NUMBERS[len(things)] in case.prompt and len(colours) == 1
        if case.category == "colour attribution":
            assert len(colours) == 2


# ---- grading

def test_right_pictures_are_right():
    assert set(means("draw", lambda case: case.target, 24).values()) == {1}
    assert set(means("edit", lambda case: case.target, 24).values()) == {1}


def test_one_thing_missing_or_too_many():
    missing = means("draw", lambda case: replace(case.target, things=case.target.things[1:]))
    assert set(missing.values()) == {0}
    places = [Thing("circle", "green", "small", x / 20, y / 20) for x in range(3, 18) for y in range(3, 18)]
    room = lambda p, t: max(abs(p.x - t.x), abs(p.y - t.y)) - p.radius - t.radius
    extra = lambda case: max(places, key=lambda p: min(room(p, t) for t in case.target.things))
    assert set(means("draw", lambda case: replace(case.target, things=case.target.things + (extra(case),))).values()) == {0}


def test_swapped_colours():
    def swap(case):
        first, *rest = case.target.things
        if not rest:
            return Scene((replace(first, colour="blue" if first.colour == "red" else "red"),))
        return Scene((replace(first, colour=rest[-1].colour), *rest[:-1], replace(rest[-1], colour=first.colour)))
    found = means("draw", swap)
    for category in ("single object", "two objects", "counting", "position"):
        assert found[category, "category"] == 1                                 # colours are not what these ask
    assert found["colours", "category"] == found["colour attribution", "category"] == found["colour attribution", "whole prompt"] == 0


def test_swapped_sides():
    found = means("draw", lambda case: Scene(tuple(replace(t, x=1 - t.x, y=1 - t.y) for t in case.target.things)))
    assert found["position", "category"] == found["position", "whole prompt"] == 0
    assert {score for (category, _), score in found.items() if category != "position"} == {1}


def test_wrong_shape_and_wrong_background():
    other = lambda t: world.SHAPES[world.SHAPES.index(t.shape) - 1]
    found = means("draw", lambda case: replace(case.target, things=tuple(replace(t, shape=other(t)) for t in case.target.things)))
    assert all(score == 0 for (category, _), score in found.items() if category not in ("two objects", "position", "colour attribution"))
    found = means("draw", lambda case: replace(case.target, background="grey"))
    assert all(score == (what == "category") for (_, what), score in found.items())


def test_a_model_that_does_nothing_follows_nothing_and_changes_nothing_else():
    found = means("edit", lambda case: case.source, 48)
    assert all(score == (what in ("unchanged", "things kept")) for (_, what), score in found.items()), found


@pytest.mark.parametrize("order, action, before, after, shown, followed, unchanged", [
    ("make the circle green", "recolour", (RED, BLUE), (replace(RED, colour="green"), BLUE), (replace(RED, colour="yellow"), BLUE), 0, 1),
    ("make the circle green", "recolour", (RED, BLUE), (replace(RED, colour="green"), BLUE), (replace(RED, colour="green"), GREEN), 1, 0),
    ("make the circle green", "recolour", (RED, BLUE), (replace(RED, colour="green"), BLUE),
     (replace(RED, colour="green"), replace(BLUE, y=0.75)), 1, 0),                                          # the other thing moved
    ("make the circle green", "recolour", (RED, BLUE), (replace(RED, colour="green"), BLUE), (replace(RED, colour="green", y=0.8), BLUE), 0, 1),
    ("remove the circle", "remove", (RED, BLUE), (BLUE,), (RED,), 0, 0),                                    # the wrong one went
    ("remove the circle", "remove", (RED, BLUE), (BLUE,), (BLUE, GREEN, replace(GREEN, y=0.8)), 1, 0),
    ("add a green cross", "add", (RED, BLUE), (RED, BLUE, GREEN), (RED, BLUE, replace(GREEN, y=0.8)), 1, 1),  # anywhere
    ("add a green cross at the top", "add", (RED, BLUE), (RED, BLUE, GREEN), (RED, BLUE, replace(GREEN, y=0.8)), 0, 1),
    ("add a green cross above the red circle", "add", (RED,), (RED, replace(GREEN, x=0.25, y=0.15)), (RED, replace(GREEN, x=0.2, y=0.15)), 1, 1),
    ("add a green cross above the red circle", "add", (RED,), (RED, replace(GREEN, x=0.25, y=0.15)), (RED, replace(GREEN, y=0.8)), 0, 1),
    ("move the square to the left of the red circle", "move", (replace(RED, x=0.5), replace(BLUE, x=0.84)),
     (replace(RED, x=0.5), replace(BLUE, x=0.16)), (replace(RED, x=0.5), replace(BLUE, x=0.16, y=0.4)), 1, 1),
    ("move the square to the top right", "move", (RED, BLUE), (RED, replace(BLUE, x=0.82, y=0.18)), (RED, replace(BLUE, y=0.4)), 0, 1),
    ("replace the circle with a green cross", "replace", (RED, BLUE), (replace(GREEN, x=0.25, y=0.5), BLUE), (GREEN, BLUE), 0, 1),
])
def test_edits(order, action, before, after, shown, followed, unchanged):
    case = Case(action, "seen", order, Scene(after), Scene(before))
    right, wrong = (evaluate.edited(grader.grade(world.render(Scene(things))), case) for things in (after, shown))
    kept = {what: score.pop("things kept", None) for what, score in (("right", right), ("wrong", wrong))}
    assert right == {"followed": 1, "unchanged": 1, "both": 1} and kept["right"] == 1
    assert wrong == {"followed": followed, "unchanged": unchanged, "both": followed and unchanged} and (kept["wrong"] == 1 or not unchanged)


def test_edits_of_the_background():
    grey = Case("background", "seen", "make the background grey", replace(PAIR, background="grey"), PAIR)
    assert evaluate.edited(replace(PAIR, background="grey"), grey) == {"followed": True, "unchanged": True, "both": True, "things kept": 1}
    assert evaluate.edited(Scene((RED,), "grey"), grey) == {"followed": True, "unchanged": False, "both": False, "things kept": 0.5}
    green = Case("recolour", "seen", "make the circle green", Scene((replace(RED, colour="green"), BLUE)), PAIR)
    black = replace(green.target, background="black")
    assert evaluate.edited(black, green) == {"followed": True, "unchanged": False, "both": False, "things kept": 1}
    alone = replace(green, source=Scene((RED,)), target=Scene((replace(RED, colour="green"),)))
    assert "things kept" not in evaluate.edited(alone.target, alone)            # there is nothing to keep


@pytest.mark.parametrize("change, right", [(str, 1), (lambda text: text + ".", 0), (lambda text: "", 0)])
def test_only_the_exact_answer_counts(change, right):
    every = evaluate.cases("ask", 4)
    scores, failures = evaluate.score("ask", every, 1, lambda rows: (change(case.target) for case, _ in rows))
    assert {x for values in scores.values() for x in values} == {right} and len(failures) == (1 - right) * len(every)
    kinds = {(kind, what) for kind in language.QUESTIONS for what in ("a picture", "words")}
    assert {key[1:3] for key in scores} == kinds - {("describe", "words")}


# ---- numbers

def test_prompts_are_resampled_not_pictures():
    """Ten prompts, all four pictures of each alike: the interval is that of ten numbers, twice as wide as that of forty."""
    every = evaluate.cases("draw", 10)[:10]
    pictures = lambda rows: (world.render(case.target if every.index(case) % 2 else Scene(())) for case, _ in rows)
    scores, failures = evaluate.score("draw", every, 4, pictures)
    values = scores["draw", "single object", "category", "seen"]
    assert values == [0, 1] * 5 and len(failures) == 20
    low, high = evaluate.interval(values)
    fewer, more = evaluate.interval(values * 4)
    assert 0.5 < high - low < 0.7 and high - low > 1.7 * (more - fewer)
    assert evaluate.interval([1, 1], [0, 0]) == [0.5, 0.5]                      # each list is resampled by itself


def test_means_are_over_the_same_categories():
    scores = {("draw", "a", "right", "seen"): [1, 1], ("draw", "b", "right", "seen"): [0, 1], ("draw", "b", "right", "never seen"): [0, 0]}
    rows = evaluate.summary(scores)
    assert rows["draw", "mean of 2", "right", "seen"]["mean"] == 0.75 and ("draw", "mean of 2", "right", "never seen") not in rows
    assert [rows["draw", "mean of 1 in all columns", "right", pairs]["mean"] for pairs in ("seen", "never seen")] == [0.5, 0]


def test_noise_depends_on_neither_batch_nor_number(tiny, monkeypatch):
    def noise(n, **how):
        rows, seen = [(case, k) for case in evaluate.cases("draw", n)[:n] for k in range(3)], []
        with monkeypatch.context() as m:
            m.setattr(evaluate.sample, "generate", lambda model, prompts, images, eps: seen.extend(eps) or prompts)
            list(evaluate.paint(tiny, rows, **how))
        return [tuple(eps.flatten().tolist()) for eps in seen]
    assert noise(2, seed=0, batch=2) == noise(2, seed=0, batch=6) == noise(4, seed=0, batch=5)[:6]
    assert len(set(noise(4, seed=0, batch=5) + noise(4, seed=1, batch=5))) == 24


def test_the_command_line_writes_scores_and_failures(tmp_path, capsys):
    evaluate.main(["--model", str(TOY_FOLDER), "--out", str(tmp_path), "--n", "1", "--pictures", "1", "--steps", "1"])
    table, record = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert all(category in table for category in (*evaluate.GENEVAL, *language.EDITS, *language.QUESTIONS, "reconstructed"))
    assert record["scores"]["edit"]["move"]["unchanged, never seen"].keys() == {"mean", "interval", "prompts"}
    assert record["options"]["steps"] == 1
    page = Image.open(tmp_path / "failures.png")
    assert page.width > 1000 and len(page.getcolors(1 << 20)) > 20
