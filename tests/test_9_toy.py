"""The shipped weights, last: pictures convince too early."""
import json
import random

import pytest
import torch

import sample
from engine.pictures import to_pixels
from lab import evaluate, make
from sample import TOY_FOLDER
from tbac import TBAC
from toy import grader, language, world

# the least fractions of right answers and right pictures
ANSWERED = 0.9
DRAWN = 0.8
EDITED = 0.7


@pytest.fixture(scope="module")
def model():
    return TBAC.load(TOY_FOLDER)


def test_it_fits_in_16_megabytes_and_says_how_it_was_made():
    assert sum(f.stat().st_size for f in TOY_FOLDER.iterdir()) < 16 * 2 ** 20
    record = json.loads((TOY_FOLDER / "record.json").read_text())
    assert not record["dry_run"] and "+" not in record["commit"]
    for stage in make.RECIPE:
        said = record["stages"][stage.name]
        preset = stage.preset()
        assert all(said[name] == preset[name] for name in ("steps", "batch", "lr"))
        assert said["cpu_minutes"] > 0
        assert (TOY_FOLDER / f"{stage.name}-sheet-{said['steps']:08d}.png").is_file()


def test_the_autoencoder_keeps_colours(model):
    """The mean error of a reconstruction is well under that of a blank page."""
    scenes = [world.sample_scene(random.Random(i)) for i in range(32)]
    x = to_pixels([world.render(scene) for scene in scenes], "cpu")
    with torch.no_grad():
        back = model.dcae.decode(model.dcae.encode(x))
    assert (back - x).pow(2).mean() < 0.1 * (x - x.median()).pow(2).mean()


def test_it_understands(model):
    """Exact answers about pictures and about scenes in words that training never saw."""
    rng = random.Random("test")
    questions, images, answers = [], [], []
    while len(questions) < 200:
        scene = world.sample_scene(rng)
        seen = rng.random() < 0.6
        question, answer, kind = language.question(scene, rng, seen=seen)
        if kind == "describe":
            continue
        questions.append(question if seen else f"{language.plain(scene)}. {question}")
        images.append([world.render(scene)] if seen else [])
        answers.append(answer)
    said = model.ask_all(questions, images, max_new_tokens=12)
    right = sum(s == answer for s, answer in zip(said, answers))
    assert right >= ANSWERED * len(questions)


def test_it_draws_what_it_is_asked_for(model):
    """Two things, named and placed by a plain prompt that training never saw; a picture counts
    when everything in it is right."""
    rng = random.Random("test")
    scenes = [evaluate.plain_scene(rng, 2) for _ in range(40)]
    prompts = [language.plain(scene) for scene in scenes]
    generator = torch.Generator().manual_seed(0)
    pictures = sample.generate(model, prompts, steps=10, generator=generator)
    found = [grader.grade(picture) for picture in pictures]
    right = sum(grader.matches(f, scene) for f, scene in zip(found, scenes))
    assert right >= DRAWN * len(scenes)


def test_it_edits_as_it_is_told(model):
    """The first of each kind of edit; with the model's own guidance, for pictures too."""
    cases = [case for case in evaluate.cases("edit", 3) if case.pairs == "seen"]
    scores, _ = evaluate.score("edit", cases, 1, lambda rows: evaluate.paint(
        model, rows, 0, 32, steps=10, solver="euler"))
    right = [value for (_, _, what, _), values in scores.items() if what == "followed"
             for value in values]
    assert len(right) == len(cases) > 25 and sum(right) >= EDITED * len(right)
