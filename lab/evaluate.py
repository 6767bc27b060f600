"""The benchmark on the toy world: does a model draw, change and say what it was asked?

    python evaluate.py                                  # the shipped weights; under 5 minutes on two CPU cores
    python evaluate.py --quick                          # under one; rough
    python evaluate.py --model runs/edit --out runs/scores
    python evaluate.py ablate wirings                   # the study of the ladder: bench/ablate.py

draw   the six categories of GenEval (arXiv 2310.11513), several pictures per prompt
edit   the actions of ImgEdit (arXiv 2505.20275) that this world has: was the order followed, and is everything else as it was?
ask    every kind of question, about pictures and about scenes in words; only the exact answer counts

"Never seen" are scenes in which a pair of colour and shape that training drew only alone (world.HELD_OUT) stands beside another thing.
Pictures are read by grader.py, from pixels alone. What it makes of pictures that are right for certain is reported, too: as
rendered (its own error) and as the autoencoder gives them back (the ceiling for any model that paints with it).
"""
import argparse
import json
import pathlib
import random
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine import data
from toy import grader
import sample
from toy import language, world
from tbac import TBAC

GENEVAL = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
ALONE = ("single object", "colours")                                            # training has drawn every pair alone: no list of never-seen ones
TASKS = ("draw", "edit", "ask")
PAIRS = {False: "seen", True: "never seen"}
OPENINGS = ("draw ", "paint ", "show me ", "a picture of ", "an image of ")
QUICK = dict(n=8, pictures=2, steps=10)


@dataclass(frozen=True)
class Case:
    category: str
    pairs: str
    prompt: str
    target: object = field(compare=False)                                       # a scene that is right, or the right answer
    source: world.Scene | None = None                                            # what is changed or asked about

    def images(self, size):
        return [world.render(self.source, size)] if self.source else []


# ---------------------------------------------------------------- fixed lists of prompts

def plain_scene(rng, n, held_out=False):
    """A scene that its plain text describes fully: medium sizes on white, two things in a clear relation."""
    while True:
        s = world.sample_scene(rng, n, held_out)
        s = world.Scene(tuple(replace(t, size="medium") for t in s.things))
        if world.valid(s, held_out) and (n != 2 or world.sides(s)):
            return s


def scene_for(category, rng, held_out):
    """One thing, or two to four of one name, or two of different shapes (and colours, so that they can be mistaken for each other's)."""
    if category in ALONE:
        return plain_scene(rng, 1)
    while True:
        number = rng.choice((2, 3, 4)) if category == "counting" else 2
        scene = plain_scene(rng, 2 if category != "counting" else max(3, number), held_out)
        names, shapes, colours = ({getattr(t, part) for t in scene.things} for part in ("name", "shape", "colour"))
        if category == "counting" and len(names) == 1:
            return replace(scene, things=scene.things[:number])                 # two of one name have no sides
        if category != "counting" and len(shapes) == 2 and (category != "colour attribution" or len(colours) == 2):
            return scene


def draw_case(category, held_out, rng):
    """Half of the prompts in the plain form, half in varied wording."""
    scene = scene_for(category, rng, held_out)
    varied = rng.random() < 0.5
    if category == "position":
        prompt = language.varied(scene, rng) if varied else language.plain(scene)
    else:                                                                       # 'a red circle and a blue square': no sides
        prompt = (rng.choice(OPENINGS) if varied else "") + language.listing(scene.things)
    return Case(category, PAIRS[held_out], prompt, scene)


def edit_case(action, held_out, rng):
    """ValueError where this action is impossible in the scene that came up, or where doing nothing would do."""
    scene = world.sample_scene(rng, rng.choice((2, 2, 3) if held_out else (1, 1, 2, 2, 2, 3)), held_out)
    order, target, _ = language.edit(scene, rng, action, held_out)
    case = Case(action, PAIRS[held_out], order, target, scene)
    if edited(scene, case)["followed"]:                                         # hardly left of it is left of it to the grader already
        raise ValueError(order)
    return case


def ask_case(kind, held_out, rng, seen=True):
    """ValueError where there is no such question about the scene that came up."""
    scene = world.sample_scene(rng, held_out=held_out)
    question, answer, _ = language.question(scene, rng, kind, seen)
    return Case(kind, PAIRS[held_out], question if seen else f"{language.caption(scene, rng)}. {question}", answer, scene if seen else None)


def first(n, make, category, held_out):
    """The first n different cases of a list that is the same for every n; fewer where there are no more (counting never-seen pairs: 36)."""
    rng, found, waited = random.Random(f"{category} {held_out}"), {}, 0
    while len(found) < n and waited < 300:                                      # so many without a new one: there is none
        waited += 1
        with suppress(ValueError):
            case = make(category, held_out, rng)
            waited = waited if case in found else 0
            found[case] = None
    return list(found)


@cache
def cases(task, n):
    """-> the cases of a task, n for each category and for seen and never-seen pairs apart."""
    make, categories = {"draw": (draw_case, GENEVAL), "edit": (edit_case, language.EDITS), "ask": (ask_case, language.QUESTIONS)}[task]
    lists = [(make, c, held_out) for c in categories for held_out in PAIRS if not (held_out and c in ALONE)]
    if task == "ask":                                                           # a scene in words is its own description
        lists += [(partial(ask_case, seen=False), c, held_out) for _, c, held_out in lists if c != "describe"]
    return [case for which in lists for case in first(n, *which)]


# ---------------------------------------------------------------- right or wrong

def drawn(found, case):
    """The category's own question: are there things of these shapes, with the colours or the sides where these are the category? Stricter
    than GenEval: a thing too many is always wrong. And: is all of the prompt right, with the white background that goes without saying?"""
    listed = lambda scene, part: sorted(getattr(t, part) for t in scene.things)
    right = {part: listed(found, part) == listed(case.target, part) for part in ("shape", "name")}
    sides = True
    if case.category == "position" and right["shape"]:
        one, other = ([f for f in found.things if f.shape == t.shape][0] for t in case.target.things)
        sides = world.relation(one, other, ratio=1.2) == world.relation(*case.target.things)
    asked = right["name" if "colour" in case.category else "shape"]
    return {"category": asked and sides, "whole prompt": right["name"] and sides and found.background == case.target.background}


def in_place(thing, wanted, found, case):
    """Does a thing stand where the order says: at a side of another thing, or at a spot? Where it says neither, any place will do."""
    order, source = case.prompt, case.source
    for side in world.OPPOSITE:
        if f" {language.side(side)} the " in order:
            other = next(t for t in source.things if any(order.endswith(words) for words in language.references(t, source)))
            return any(world.relation(thing, f, ratio=1.2) == side for f in found.things if f.name == other.name)
    anywhere = case.category == "add" and not any(order.endswith(language.at(spot)) for spot in world.SPOTS)
    return anywhere or grader.near(thing, wanted)


def edited(found, case):
    """followed: the thing (or background) in question is as ordered. unchanged: all other things stand where they stood, at most one more beside
    them, on the same background. both: for a model that does nothing leaves all unchanged, and one that ignores the picture often removes what it
    should. things kept: of the other things, where there are any, the part that stand where they stood."""
    before, after = case.source, case.target
    gone, new = set(before.things) - set(after.things), set(after.things) - set(before.things)
    kept = set(before.things) & set(after.things)
    count = lambda scene, name: sum(t.name == name for t in scene.things)
    followed = all(count(found, t.name) == count(after, t.name) for t in gone | new) and all(
        any(in_place(f, t, found, case) for f in found.things if f.name == t.name) for t in new)
    stayed = [any(grader.near(f, t) for f in found.things) for t in kept]
    others = all(stayed) and len(found.things) <= len(kept) + (len(gone | new) > 0)
    ground = found.background == after.background
    if case.category == "background":
        followed, ground = ground, True
    verdict = {"followed": followed, "unchanged": others and ground, "both": followed and others and ground}
    return verdict | ({"things kept": sum(stayed) / len(kept)} if kept else {})


def answered(said, case):
    return {"a picture" if case.source else "words": said == case.target}


def read(found, case):
    return {"everything": grader.matches(found, case.target, places=True)}


JUDGES = {"draw": drawn, "edit": edited, "ask": answered, "read": read}


# ---------------------------------------------------------------- scores: {(task, category, what, pairs): [of each prompt]}

def paint(model, rows, seed, batch, **settings):
    """rows: (case, which of its pictures) -> yields a picture for each. Its noise has a seed of its own, so it depends neither on the other
    pictures nor on the batch (but for rounding)."""
    c = model.config
    shape = c.dit.channels, c.size // c.dcae.factor, c.size // c.dcae.factor
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        rngs = [random.Random(f"{seed} {case.category} {case.prompt} {k}") for case, k in part]
        eps = data.noise(rngs, shape, model.ladder.queries.device)[1]
        yield from sample.generate(model, [case.prompt for case, _ in part], [case.images(c.size) for case, _ in part], eps=eps, **settings)


def answer(model, rows, batch):
    """Yields a text for each row."""
    for i in range(0, len(rows), batch):
        part = [case for case, _ in rows[i:i + batch]]
        yield from model.ask_all([case.prompt for case in part], [case.images(model.config.size) for case in part])


def score(task, every, k, respond):
    """every: cases, each answered k times by respond(rows), a generator of pictures or texts -> scores, failures [(case, response, label)]"""
    rows, hits, failures = [(case, i) for case in every for i in range(k)], {}, []
    for (case, _), response in tqdm(zip(rows, respond(rows)), task, len(rows), leave=False):
        found = response if task == "ask" else grader.grade(response)
        verdict = JUDGES[task](found, case)
        for what, right in verdict.items():
            hits.setdefault((task, case.category, what, case.pairs), {}).setdefault(case, []).append(right)
        if min(verdict.values()) < 1:
            seen = found if task == "ask" else ", ".join(t.name for t in found.things) or "nothing"
            failures.append((case, response, f"{case.category}: {case.prompt} -> {seen}"))
    return {key: [float(np.mean(right)) for right in each.values()] for key, each in hits.items()}, failures


@torch.no_grad()
def benchmark(model, tasks=TASKS, n=24, pictures=4, batch=32, seed=0, **settings):
    """n prompts of every category: with several pictures each when drawing, one when editing; and as many questions as there are pictures of a
    category. seed: of the noise; settings: of `sample.denoise` -> scores, failures."""
    scores, failures = {}, []
    painter = partial(paint, model, seed=seed, batch=batch, **settings)
    plans = {"draw": (n, pictures, painter), "edit": (n, 1, painter), "ask": (n * pictures, 1, partial(answer, model, batch=batch))}
    for task in tasks:
        many, k, respond = plans[task]
        found, wrong = score(task, cases(task, many), k, respond)
        scores, failures = scores | found, failures + wrong
    return scores, failures


@torch.no_grad()
def ceilings(model, n=24, batch=32):
    """The grader on pictures that are right for certain: those that the benchmark asks for, and scenes of every sort (all of it right, places
    too); as rendered, and as the autoencoder gives them back -> scores."""
    size, device, dtype = model.config.size, model.ladder.queries.device, model.dit.proj_out.weight.dtype

    def rendered(rows):
        return (world.render(case.target, size) for case, _ in rows)

    def reconstructed(rows):
        for i in range(0, len(rows), batch):
            x = data.to_pixels(list(rendered(rows[i:i + batch])), device, dtype)
            yield from sample.decode(model, model.dcae.encode(x))

    rng, sorts, scores = random.Random("every sort"), [], {}
    for scene in [world.sample_scene(rng, held_out=held_out) for held_out in PAIRS for _ in range(5 * n)]:
        sorts.append(Case("scene", "", "", scene, scene))
    for task, every in (("draw", cases("draw", n)), ("edit", cases("edit", n)), ("read", sorts)):
        for painter in (rendered, reconstructed):
            for (_, _, what, _), values in score(task, every, 1, painter)[0].items():
                scores.setdefault(("grader", f"{task}: {what}", "right pictures", painter.__name__), []).extend(values)
    return scores


def interval(*groups, seed=0, resamples=1000):
    """95 % bootstrap interval of the mean of the means of some lists, each resampled by itself. What is resampled are prompts, one number each
    whatever the number of pictures: pictures of one prompt are right or wrong together. With n prompts all right (or all wrong) the interval
    has no width, though the truth may be 3 / n away."""
    rng, means = np.random.default_rng(seed), 0
    for v in (np.asarray(values, float) for values in groups):
        means = means + v[rng.integers(0, len(v), (resamples, len(v)))].mean(1) / len(groups)
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def measure(*groups):
    return dict(mean=float(np.mean([np.mean(values) for values in groups])), interval=interval(*groups), prompts=sum(map(len, groups)))


def percent(measured):
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (measured["mean"], *measured["interval"])))


def layout(scores, task):
    """-> the categories of a task, and its columns (what, pairs): what was judged side by side for seen and never-seen pairs."""
    categories, whats, pairs = (list(dict.fromkeys(key[i] for key in scores if key[0] == task)) for i in (1, 2, 3))
    columns = [(what, pair) for what in whats for pair in pairs]
    return categories, [c for c in columns if any((task, name) + c in scores for name in categories)]


def summary(scores):
    """-> {key: its mean, interval and number of prompts}, and the same for means over categories: all of them, for columns that have all, and
    those that every column has."""
    rows = {key: measure(values) for key, values in scores.items()}
    for task in TASKS:
        categories, columns = layout(scores, task)
        common = [name for name in categories if all((task, name) + c in scores for c in columns)]
        for some in [categories] + [common] * (len(common) < len(categories)):
            title = f"mean of {len(some)}" + " in all columns" * (some is common)
            for c in columns:
                if all((task, name) + c in scores for name in some):
                    rows[(task, title) + c] = measure(*(scores[(task, name) + c] for name in some))
    return rows


# -------------------------------------------------------------------------------------------------------- command line

def show(rows, task):
    """One task's table, in percent: categories down, what was judged and the pairs across."""
    categories, columns = layout(rows, task)
    wide = max(map(len, categories)) + 2
    print()
    for label, line in zip((task, ""), zip(*columns)):
        print(f"{label:{wide}}" + "".join(f"{text:16}" for text in line).rstrip())
    for name in categories:
        cells = [rows.get((task, name) + c) for c in columns]
        print(f"{name:{wide}}" + "".join(f"{percent(c) if c else '':16}" for c in cells).rstrip())


def failures_sheet(failures, size, each=4):
    """A contact sheet: of every category, seen and never-seen pairs apart, the first prompts that failed; edits beside what was to be changed."""
    groups = {}
    for case, response, label in failures:
        group, shown = groups.setdefault((case.category, case.pairs), {}), case.images(size) + [response] * isinstance(response, Image.Image)
        if shown and len(group) < each:                                         # a question about words has no picture
            group.setdefault(case, [(image, "before") for image in shown[:-1]] + [(shown[-1], label)])
    # pairs come first: in rows of 8 they stay together
    tiles = sorted((tiles for group in groups.values() for tiles in group.values()), key=len, reverse=True)
    return data.sheet(*zip(*sum(tiles, [])), scale=max(1, 128 // size), columns=8) if tiles else None


def options(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(pathlib.Path(__file__).parent.parent / "toy" / "weights"), help="folder (default: the toy)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/evaluate"), help="folder for scores.json and failures.png")
    p.add_argument("--quick", action="store_true", help=f"{QUICK['n']} prompts, {QUICK['pictures']} pictures each, {QUICK['steps']} steps")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    p.add_argument("--n", type=int, default=24, help="prompts per category, the first of lists that never change (default: 24)")
    p.add_argument("--pictures", type=int, default=4, help="per prompt, when drawing (default: 4, as in GenEval)")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--steps", type=int, default=20, help="(default: 20)")
    p.add_argument("--guidance", type=float, default=4.5, help="(default: 4.5)")
    p.add_argument("--image-guidance", type=float, help="(default: the model's)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: the model's)")
    if p.parse_args(argv).quick:
        p.set_defaults(**QUICK)                                                 # what is said on the command line still counts
    a = p.parse_args(argv)
    if min(a.n, a.pictures, a.batch) < 1:
        p.error(f"--n {a.n} --pictures {a.pictures} --batch {a.batch}: expected at least 1")
    return a


def save(a, rows, sheet, seconds):
    nested = {}
    for (task, category, *column), row in rows.items():
        nested.setdefault(task, {}).setdefault(category, {})[", ".join(filter(None, column))] = row
    record = dict(options=vars(a), torch=torch.__version__, seconds=round(seconds), scores=nested)
    (a.out / "scores.json").write_text(json.dumps(record, indent=1, default=str))
    (a.out / "failures.png").unlink(missing_ok=True)                            # of a run before
    if sheet:
        sheet.save(a.out / "failures.png")


def main(argv=None):
    a, start = options(argv), time.time()
    try:
        a.out.mkdir(parents=True, exist_ok=True)
        model = TBAC.load(a.model, a.device, a.dtype and getattr(torch, a.dtype))
        a.image_guidance = model.config.image_guidance if a.image_guidance is None else a.image_guidance
        scores, failures = benchmark(model, a.tasks, a.n, a.pictures, a.batch, seed=a.seed, steps=a.steps, guidance=a.guidance,
                                     image_guidance=a.image_guidance)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    rows = summary(scores | ceilings(model, a.n, a.batch))
    for task in dict.fromkeys(key[0] for key in rows):
        show(rows, task)
    save(a, rows, failures_sheet(failures, model.config.size), time.time() - start)
    print(f"\nPercent right with 95 % bootstrap intervals over prompts: {a.n} a category, or all that there are; {a.pictures} pictures each when "
          f"drawing, {a.n * a.pictures} questions.\nWhere an interval has no width, the truth may still be 300 / prompts away. Wrote {a.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ablate"]:
        from lab import ablate                                                # only now, since it imports this file
        ablate.main(sys.argv[2:])
    else:
        main()
