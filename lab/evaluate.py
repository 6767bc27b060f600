"""The benchmark on the toy world: does a model draw, change and say what it is asked for?

    python -m lab.evaluate                              # the shipped weights; 7 to 10 minutes
    python -m lab.evaluate --quick                      # under a minute, but rough
    python -m lab.evaluate --model runs/edit --out runs/scores

The times are those of one CPU core. There are three tasks:

draw   the six categories of GenEval (arXiv 2310.11513), several pictures per prompt
edit   the actions of ImgEdit (arXiv 2505.20275) that exist in this world:
       is the instruction followed, and is everything else unchanged?
ask    every kind of question, about pictures and about scenes in words;
       only the exact answer counts

"Never seen" are scenes in which a thing has a colour and shape (world.HELD_OUT) that training
draws only alone, and stands beside another thing. Pictures are graded by toy/grader.py, from
their pixels. The grader's results on correct pictures are reported too: on rendered ones (its own
error), and on the autoencoder's reconstructions (the ceiling for any model that paints with it).
"""
import argparse
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sample
from engine import command, fast
from engine.data import times_and_noise
from engine.device import commit, machine, set_threads
from engine.files import save_png, weights_digest, write_text
from engine.limits import MAX_PICTURES, MAX_STEPS
from engine.outputs import prepare_folder
from engine.pictures import contact_sheet, to_pixels
from tbac import TBAC, TBACConfig
from toy import grader, language, world
from toy.world import Scene, Thing

GENEVAL = (
    "single object", "two objects", "counting", "colours", "position", "colour attribution",
)
# Of every category, in wordings that training never uses. No part of the means.
OTHER = "other words"
# Training draws every colour and shape alone: these two have no prompts that are never seen.
ALONE = ("single object", "colours")
TASKS = ("draw", "edit", "ask")
# held_out -> its name in the tables
PAIRS = {False: "seen", True: "never seen"}
OPENINGS = ("draw ", "paint ", "show me ", "a picture of ", "an image of ")
QUICK = dict(n=8, pictures=2, steps=10)

# {(task, category, what is judged, pairs): [a number of each prompt]}
Scores = dict[tuple[str, str, str, str], list[float]]


@dataclass(frozen=True)
class Case:
    """One prompt. target: a scene that is right, or the right answer; source: the scene that is
    to be changed or asked about; like: the category by whose rules it is judged, if another."""
    category: str
    pairs: str
    prompt: str
    target: Scene | str = field(compare=False)
    source: Scene | None = None
    like: str | None = None

    @property
    def rules(self) -> str:
        return self.like or self.category

    def images(self, size: int) -> list[Image.Image]:
        return [world.render(self.source, size)] if self.source else []


# A row is a case and which of its pictures this is; a painter (or answerer) yields one picture
# (or text) for each of a list of rows.
Row = tuple[Case, int]
Response = Image.Image | Scene | str
Failure = tuple[Case, Response, str]


# ---------------------------------------------------------------- fixed lists of prompts

def plain_scene(rng: random.Random, n: int, held_out: bool = False) -> Scene:
    """A scene that its plain text describes fully: medium sizes, on white, and if there are two
    things, in a clear relation."""
    while True:
        scene = world.sample_scene(rng, n, held_out)
        scene = Scene(tuple(replace(t, size="medium") for t in scene.things))
        if world.valid(scene, held_out) and (n != 2 or world.sides(scene)):
            return scene


def scene_for(category: str, rng: random.Random, held_out: bool) -> Scene:
    """One thing; or two to four things of one name; or two things of different shapes (and
    colours, where these could be mixed up)."""
    if category in ALONE:
        return plain_scene(rng, 1)
    if category == "counting":
        return scene_to_count(rng, held_out)
    while True:
        scene = plain_scene(rng, 2, held_out)
        first, second = scene.things
        shapes_differ = first.shape != second.shape
        colours_differ = first.colour != second.colour
        if shapes_differ and (colours_differ or category != "colour attribution"):
            return scene


def scene_to_count(rng: random.Random, held_out: bool) -> Scene:
    """Two to four things of one name."""
    while True:
        number = rng.choice((2, 3, 4))
        # plain_scene never gives two of one name, which are in no relation: take two of three
        scene = plain_scene(rng, max(3, number), held_out)
        if len({t.name for t in scene.things}) == 1:
            return replace(scene, things=scene.things[:number])


def draw_case(category: str, held_out: bool, rng: random.Random) -> Case:
    """Half of the prompts are in the plain form, half in varied wording."""
    if category == OTHER:
        like = rng.choice(GENEVAL)
        scene = scene_for(like, rng, held_out)
        kind = "caption" if like == "position" else "list"
        prompt, _ = language.request(scene, rng, kind, other=True)
        return Case(category, PAIRS[held_out], prompt, scene, like=like)
    scene = scene_for(category, rng, held_out)
    varied = rng.random() < 0.5
    if category == "position":
        prompt = language.varied(scene, rng) if varied else language.plain(scene)
    else:
        # 'a red circle and a blue square': no relation is stated
        opening = rng.choice(OPENINGS) if varied else ""
        prompt = opening + language.listing(scene.things)
    return Case(category, PAIRS[held_out], prompt, scene)


def edit_case(action: str, held_out: bool, rng: random.Random) -> Case:
    """Raises ValueError where the action is impossible in the scene that is drawn, or where
    doing nothing would count as following the instruction."""
    n = rng.choice((2, 2, 3) if held_out else (1, 1, 2, 2, 2, 3))
    scene = world.sample_scene(rng, n, held_out)
    other = action == OTHER
    like = rng.choice(language.EDITS) if other else action
    instruction, target, _ = language.edit(scene, rng, like, held_out, other)
    case = Case(action, PAIRS[held_out], instruction, target, scene, like)
    # the grader's limit for 'left of' is wider than the one that scenes are made with
    if edited(scene, case)["followed"]:
        raise ValueError(instruction)
    return case


def ask_case(kind: str, held_out: bool, rng: random.Random, seen: bool = True) -> Case:
    """About a picture, or with seen=False about a scene in words.

    Raises ValueError where there is no such question about the scene that is drawn.
    """
    scene = world.sample_scene(rng, held_out=held_out)
    other = kind == OTHER
    like = rng.choice(language.QUESTIONS) if other else kind
    question, answer, _ = language.question(scene, rng, like, seen, other)
    if seen:
        return Case(kind, PAIRS[held_out], question, answer, scene)
    return Case(kind, PAIRS[held_out], f"{language.caption(scene, rng)}. {question}", answer)


def first(n: int, make: Callable[..., Case], category: str, held_out: bool) -> list[Case]:
    """The first n different cases of a list that is the same for every n.

    Fewer where there are no more (never-seen pairs to count: 36).
    """
    rng = random.Random(f"{category} {held_out}")
    found = {}
    # after 300 tries without a new case there is none left
    tries = 0
    while len(found) < n and tries < 300:
        tries += 1
        with suppress(ValueError):
            case = make(category, held_out, rng)
            if case not in found:
                found[case] = None
                tries = 0
    return list(found)


@cache
def cases(task: str, n: int) -> list[Case]:
    """The cases of a task: n for each category, for seen and never-seen pairs separately."""
    makers = {
        "draw": (draw_case, GENEVAL),
        "edit": (edit_case, language.EDITS),
        "ask": (ask_case, language.QUESTIONS),
    }
    make, categories = makers[task]
    lists = []
    for category in categories:
        lists.append((make, category, False))
        if category not in ALONE:
            lists.append((make, category, True))
    lists.append((make, OTHER, False))
    if task == "ask":
        # the same about scenes in words; to describe one would be to repeat it
        in_words = partial(ask_case, seen=False)
        lists += [(in_words, c, held_out) for _, c, held_out in lists if c != "describe"]
    return [case for arguments in lists for case in first(n, *arguments)]


# ---------------------------------------------------------------- right or wrong

def drawn(found: Scene, case: Case) -> dict[str, bool]:
    """category: what the category is about. The shapes are right, and the colours or the relation
    where the category asks for these. Stricter than GenEval: one thing too many is always wrong.
    whole prompt: everything is right, and the background, which goes without saying, is white."""
    target = case.target
    shapes = sorted(t.shape for t in found.things) == sorted(t.shape for t in target.things)
    names = sorted(t.name for t in found.things) == sorted(t.name for t in target.things)
    sides = True
    if case.rules == "position" and shapes:
        by_shape = {t.shape: t for t in found.things}
        first, second = (by_shape[t.shape] for t in target.things)
        sides = world.relation(first, second, world.READ) == world.relation(*target.things)
    asked = names if "colour" in case.rules else shapes
    return {
        "category": asked and sides,
        "whole prompt": names and sides and found.background == target.background,
    }


def in_place(thing: Thing, wanted: Thing, found: Scene, case: Case) -> bool:
    """Is a thing where the instruction says: at a side of another thing, or at a spot?

    Where the instruction says neither, a new thing may be anywhere; others stay in place.
    """
    where = None
    if case.rules in ("add", "move"):
        where, other = language.destination(case.prompt, case.source) or (None, None)
    if case.rules == "add" and where is None:
        return True
    if where in (None, "spot"):
        return grader.near(thing, wanted)
    others = [t for t in found.things if t.name == other.name]
    asked = ("left of", "right of") if where == "next to" else (where,)
    return any(world.relation(thing, t, world.READ) in asked for t in others)


def is_right(thing: Thing, wanted: Thing, found: Scene, case: Case) -> bool:
    """Is it in place, and of the size that was asked for?"""
    size = case.rules != "resize" or thing.size == wanted.size
    return size and in_place(thing, wanted, found, case)


def edited(found: Scene, case: Case) -> dict[str, bool | float]:
    """followed: the thing (or background) that the instruction is about is as it asks.
    unchanged: all other things are where they were, nothing is there besides, and the background
    is the same.
    both: the two together, since a model that does nothing leaves everything unchanged, and one
    that ignores the picture often removes what it should.
    objects kept: the fraction of the other things, if there are any, that are where they were."""
    before, after = set(case.source.things), set(case.target.things)
    removed, new = before - after, after - before
    kept = before & after

    followed = all(count(found, t.name) == count(case.target, t.name) for t in removed | new)
    # A thing that should stay is not what was to be added, whatever its name.
    changed = [t for t in found.things if not is_near_any(t, kept)]
    for thing in new:
        same_name = [t for t in changed if t.name == thing.name]
        followed = followed and any(is_right(t, thing, found, case) for t in same_name)

    stayed = [is_near_any(thing, found.things) for thing in kept]
    # besides the other things, at most what is new, or what should be gone and is not
    names = {t.name for t in removed}
    left = sum(max(0, count(found, name) - count(case.target, name)) for name in names)
    unchanged = all(stayed) and len(found.things) <= len(kept) + (len(new) or left)

    same_background = found.background == case.target.background
    if case.rules == "background":
        followed = same_background
    else:
        unchanged = unchanged and same_background

    verdict = {"followed": followed, "unchanged": unchanged, "both": followed and unchanged}
    if kept:
        verdict["objects kept"] = sum(stayed) / len(kept)
    return verdict


def is_near_any(thing: Thing, things: Iterable[Thing]) -> bool:
    return any(grader.near(t, thing) for t in things)


def count(scene: Scene, name: str) -> int:
    return sum(t.name == name for t in scene.things)


def answered(answer: str, case: Case) -> dict[str, bool]:
    return {"a picture" if case.source else "words": answer == case.target}


def read(found: Scene, case: Case) -> dict[str, bool]:
    return {"everything": grader.matches(found, case.target, places=True)}


JUDGES = {"draw": drawn, "edit": edited, "ask": answered, "read": read}


# ---------------------------------------------------------------- the benchmark

def noise(rows: list[Row], seed: int, config: TBACConfig, device) -> Tensor:
    """(B, C, h, w): for each prompt and number k of its picture one of its own."""
    rngs = [random.Random(f"{seed} {case.category} {case.prompt} {k}") for case, k in rows]
    return times_and_noise(rngs, sample.latent_shape(config), device)[1]


def paint(model: TBAC, rows: list[Row], seed: int, batch: int, **settings) -> Iterator[Image.Image]:
    """Yields a picture for each row. (But for rounding) it depends neither on the other ones nor on
    the batch size: its noise is its own."""
    config = model.config
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        eps = noise(part, seed, config, model.ladder.queries.device)
        prompts = [case.prompt for case, _ in part]
        images = [case.images(config.size) for case, _ in part]
        yield from sample.generate(model, prompts, images, eps=eps, **settings)


def answer(model: TBAC, rows: list[Row], batch: int) -> Iterator[str]:
    """Yields an answer for each row."""
    for i in range(0, len(rows), batch):
        part = [case for case, _ in rows[i:i + batch]]
        images = [case.images(model.config.size) for case in part]
        yield from model.ask_all([case.prompt for case in part], images)


def score(
    task: str, prompts: list[Case], k: int, respond: Callable[[list[Row]], Iterator[Response]]
) -> tuple[Scores, list[Failure]]:
    """Judges k responses to each prompt; respond(rows) yields a picture, the scene that it would
    show, or a text for each row.

    -> scores, and the failures as (case, response, label)
    """
    rows = [(case, i) for case in prompts for i in range(k)]
    verdicts = {}
    failures = []
    for (case, _), response in tqdm(zip(rows, respond(rows)), task, len(rows), leave=False):
        found = grader.grade(response) if isinstance(response, Image.Image) else response
        verdict = JUDGES[task](found, case)
        for what, right in verdict.items():
            by_case = verdicts.setdefault((task, case.category, what, case.pairs), {})
            by_case.setdefault(case, []).append(right)
        if min(verdict.values()) < 1:
            if task != "ask":
                found = ", ".join(t.name for t in found.things) or "nothing"
            label = f"{case.category}: {case.prompt} -> {found}"
            failures.append((case, response, label))

    # for each prompt the mean over its pictures
    scores = {}
    for key, by_case in verdicts.items():
        scores[key] = [float(np.mean(right)) for right in by_case.values()]
    return scores, failures


@torch.no_grad()
def benchmark(
    model: TBAC, tasks: Sequence[str] = TASKS, n: int = 24, pictures: int = 4, batch: int = 32,
    seed: int = 0, **settings,
) -> tuple[Scores, list[Failure]]:
    """-> scores and failures over n prompts of every category.

    Each prompt is drawn `pictures` times, each edit once, and there are n * pictures questions
    of a kind. seed: of the noise; settings: those of `sample.denoise`.
    """
    painter = partial(paint, model, seed=seed, batch=batch, **settings)
    answerer = partial(answer, model, batch=batch)
    plans = {
        "draw": (n, pictures, painter),
        "edit": (n, 1, painter),
        "ask": (n * pictures, 1, answerer),
    }
    scores = {}
    failures = []
    for task in tasks:
        n_case, k, respond = plans[task]
        new_scores, new_failures = score(task, cases(task, n_case), k, respond)
        scores |= new_scores
        failures += new_failures
    return scores, failures


@torch.no_grad()
def ceilings(model: TBAC, n: int, batch: int) -> Scores:
    """The grader's scores on correct pictures, rendered and as reconstructed by the autoencoder.

    The pictures are the targets of the benchmark, and scenes of every kind, of which everything
    must be right, places too.
    """
    size = model.config.size
    device, dtype = model.ladder.queries.device, model.dit.proj_out.weight.dtype

    def rendered(rows):
        return (world.render(case.target, size) for case, _ in rows)

    def reconstructed(rows):
        for i in range(0, len(rows), batch):
            pixels = to_pixels(list(rendered(rows[i:i + batch])), device, dtype)
            yield from model.decode(model.dcae.encode(pixels))

    rng = random.Random("every sort")
    scenes = [world.sample_scene(rng, held_out=h) for h in PAIRS for _ in range(5 * n)]
    every_kind = [Case("scene", "", "", scene, scene) for scene in scenes]
    lists = {"draw": cases("draw", n), "edit": cases("edit", n), "read": every_kind}
    result = {}
    for task, of_task in lists.items():
        for painter in (rendered, reconstructed):
            scores, _ = score(task, of_task, 1, painter)
            # one number for all categories
            for (_, _, what, _), values in scores.items():
                key = ("grader", f"{task}: {what}", "right pictures", painter.__name__)
                result.setdefault(key, []).extend(values)
    return result


# ---------------------------------------------------------------- means and intervals

def interval(*groups: list[float], seed: int = 0, resamples: int = 1000) -> list[float]:
    """95 % bootstrap interval of the mean of the groups' means, each group resampled by itself.

    The numbers are one a prompt, whatever the number of pictures, since pictures of one prompt
    tend to be right or wrong together. If all n prompts are right (or all wrong) the interval has
    no width, though the truth may be 3 / n away.
    """
    rng = np.random.default_rng(seed)
    means = 0
    for group in groups:
        values = np.asarray(group, float)
        resampled = values[rng.integers(0, len(values), (resamples, len(values)))]
        means = means + resampled.mean(1) / len(groups)
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def measure(*groups: list[float]) -> dict:
    """The mean of the groups' means, its interval, and the number of prompts."""
    return dict(
        mean=float(np.mean([np.mean(values) for values in groups])),
        interval=interval(*groups),
        prompts=sum(len(values) for values in groups),
    )


def percent(measured: dict) -> str:
    """'92 [87, 96]'"""
    low, high = measured["interval"]
    return f"{100 * measured['mean']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def layout(scores: dict, task: str) -> tuple[list[str], list[tuple[str, str]]]:
    """-> the categories of a task, and the columns (what, pairs) of its table."""
    keys = [key for key in scores if key[0] == task]
    categories, whats, pairs = (list(dict.fromkeys(key[i] for key in keys)) for i in (1, 2, 3))
    columns = [(what, pair) for what in whats for pair in pairs]
    used = {key[2:] for key in keys}
    return categories, [column for column in columns if column in used]


def summary(scores: Scores) -> dict[tuple[str, str, str, str], dict]:
    """-> {key: its mean, interval and number of prompts}, with means over categories.

    There is a mean over all categories, for the columns that have all of them; and where not all
    columns do, another one over the categories that every column has.
    """
    rows = {key: measure(values) for key, values in scores.items()}
    for task in TASKS:
        categories, columns = layout(scores, task)
        categories = [c for c in categories if c != OTHER]
        common = [c for c in categories if all((task, c, *column) in scores for column in columns)]
        means = {f"mean of {len(categories)}": categories}
        if len(common) < len(categories):
            means[f"mean of {len(common)} in all columns"] = common
        for title, names in means.items():
            for column in columns:
                keys = [(task, name, *column) for name in names]
                if all(key in scores for key in keys):
                    rows[(task, title, *column)] = measure(*(scores[key] for key in keys))
    return rows


# ---------------------------------------------------------------- tables, pictures, files

def show(rows: dict, task: str) -> None:
    """Prints the table of a task, in percent: a line for each category, a column for each thing
    that is judged and each kind of pairs."""
    categories, columns = layout(rows, task)
    width = max(len(name) for name in categories) + 2
    print()
    for label, i in ((task, 0), ("", 1)):
        print_line(label, width, [column[i] for column in columns])
    for name in categories:
        cells = [rows.get((task, name, *column)) for column in columns]
        print_line(name, width, [percent(cell) if cell else "" for cell in cells])


def print_line(label: str, width: int, texts: list[str]) -> None:
    cells = "".join(f"{text:16}" for text in texts)
    print(f"{label:{width}}" + cells.rstrip())


def failures_sheet(failures: list[Failure], size: int, each: int = 4) -> Image.Image | None:
    """A contact sheet of the first prompts of every category that failed, for seen and never-seen
    pairs separately; edits are shown beside the picture that was to be changed."""
    groups = {}
    for case, response, label in failures:
        tiles = [(image, "before") for image in case.images(size)]
        if isinstance(response, Image.Image):
            tiles.append((response, label))
        elif tiles:
            # of a question there is only the picture that it is about
            tiles[-1] = (tiles[-1][0], label)
        group = groups.setdefault((case.category, case.pairs), {})
        if tiles and case not in group and len(group) < each:
            group[case] = tiles
    shown = [tiles for group in groups.values() for tiles in group.values()]
    if not shown:
        return None

    # two tiles of one edit come first: so they stay together in rows of 8
    shown.sort(key=len, reverse=True)
    images = [image for tiles in shown for image, _ in tiles]
    labels = [label for tiles in shown for _, label in tiles]
    return contact_sheet(images, labels, scale=max(1, 128 // size), columns=8)


def by_category(rows: dict) -> dict:
    """-> {task: {category: {"what is judged, pairs": row}}}"""
    found = {}
    for (task, category, what, pairs), row in rows.items():
        found.setdefault(task, {}).setdefault(category, {})[f"{what}, {pairs}"] = row
    return found


def origin(args: argparse.Namespace) -> dict:
    """What is scored, how, and by which code: to be asked before the work, which takes a while."""
    said = vars(args) | {"weights": weights_digest(args.model)}
    return dict(options=said, commit=commit(), machine=machine(args.device))


def save(out: pathlib.Path, record: dict, sheet: Image.Image | None) -> None:
    """scores.json, and failures.png if there are any."""
    write_text(out / "scores.json", json.dumps(record, indent=1, default=str))
    if sheet:
        save_png(sheet, out / "failures.png")
    else:
        # not one of an earlier run
        (out / "failures.png").unlink(missing_ok=True)


# ---------------------------------------------------------------- command line

def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(prog="python -m lab.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", type=command.path_text, default=str(sample.TOY_FOLDER),
        help="folder of the model (default: the toy)")
    add("--out", type=command.path, default=pathlib.Path("runs/evaluate"),
        help="folder for scores.json and failures.png")
    add("--quick", action="store_true",
        help="{n} prompts, {pictures} pictures each, {steps} steps".format(**QUICK))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    add("--n", type=command.count(1, 10_000), default=24,
        help="prompts per category, the first of lists that never change (default: 24)")
    add("--pictures", type=command.count(1, MAX_PICTURES), default=4,
        help="pictures per prompt, when drawing (default: 4, as in GenEval)")
    add("--seed", type=command.SEED, default=0, help="of the noise (default: 0)")
    add("--steps", type=command.count(1, MAX_STEPS), default=20, help="(default: 20)")
    add("--solver", choices=sample.SOLVERS, default="dpm++", help="(default: dpm++)")
    add("--guidance", type=command.FACTOR, help="(default: the model's)")
    add("--image-guidance", type=command.FACTOR, help="(default: the model's)")
    add("--batch", type=command.count(1, 10_000), default=32,
        help="prompts at a time (default: 32)")
    add("--device", type=command.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the model's)")
    add("--int8", action="store_true", help="most weights in 8 bits: engine/int8.py")
    add("--plain", action="store_true", help="the plain path only: leave engine.fast out")
    # --quick changes defaults only: what is given on the command line still counts
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    start = time.time()
    with command.one_line_errors():
        prepare_folder(args.out, "scores.json", "failures.png")
        dtype = args.dtype and getattr(torch, args.dtype)
        model = TBAC.load(args.model, args.device, dtype, int8=args.int8)
        set_threads(model)
        if not args.plain:
            fast.enable(model)
        sample.default_guidance(args, model)
        record = origin(args)
        scores, failures = benchmark(
            model, args.tasks, args.n, args.pictures, args.batch, args.seed, steps=args.steps,
            solver=args.solver, guidance=args.guidance, image_guidance=args.image_guidance,
        )
        rows = summary(scores | ceilings(model, args.n, args.batch))
        for task in dict.fromkeys(key[0] for key in rows):
            show(rows, task)
        record |= dict(seconds=round(time.time() - start), scores=by_category(rows))
        save(args.out, record, failures_sheet(failures, model.config.size))
    print("\nPercent right, with 95 % bootstrap intervals over prompts.")
    print(f"A category has {args.n} prompts, each drawn {args.pictures} times, {args.n} edits or "
          f"{args.n * args.pictures} questions, or all that exist.")
    print("Where an interval has no width, the truth may still be 300 / prompts away.")
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
