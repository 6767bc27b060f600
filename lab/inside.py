"""What a trained model holds, looked at as it is. Each study but `told`, which reads the toy's
code, works with any weights.

settings  guidance, steps and image guidance against score
rungs     one rung at a time replaced
probes    what the queries' states tell, depth by depth, in each MLLM of the study
slots     some of the queries muted, or taken from another prompt, by depth
noise     how much of place and number is the starting noise's
told      where edits are lost: what the queries' states say of them
overfit   the loss when one batch is learnt by heart (this one trains, for a minute)
"""
import contextlib
import functools
import itertools
import pathlib
import random
import tempfile
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from tqdm import tqdm

import sample
import train
from engine import fast, mixer
from engine.log import read_log, smooth
from lab import dots, evaluate, plan, statistics, tables, trials
from lab.pretrain import SummaryTokens, learnt_code
from ladder import tap_layers
from tbac import TBAC
from toy import grader, language, world

# Slots of neighbouring queries.
SLOTS = 4
# Noises that all prompts are drawn from.
NOISES = 8
PROMPTS = 100
# Prompts that probes are fitted to, and those that they are tested on.
FITTED = 1200
TESTED = 400
# The MLLMs that are not that of --model, trained or not, and their folders in --start.
OTHER_MLLMS = {name: folder for name, folder in trials.MLLM_FOLDERS.items()
               if folder != trials.MLLM_FOLDERS["facts"]}


def load(folder, device):
    return fast.enable(TBAC.load(folder, device))


def few_steps(args) -> dict:
    """How looks draw: in ten steps the toy does better by Euler's method than by DPM-Solver++, and
    nearly as well as by that in twenty (settings)."""
    return dict(steps=args.draw_steps, solver="euler")


def drawing_scores(args, model, **sampling):
    """-> {category, seen or never seen: [of each prompt how many pictures were right]}, by the
    category's own question."""
    sampling = few_steps(args) | sampling
    scores, _ = evaluate.benchmark(model, ("draw",), args.n, args.pictures, seed=0, **sampling)
    by_category = {}
    for (_, category, what, pairs), values in scores.items():
        if what == "category":
            by_category[f"{category}, {pairs}"] = values
    return by_category


def overall(scores: dict) -> dict:
    """The mean over the six categories of pairs seen in training."""
    return evaluate.measure(*(scores[f"{category}, seen"] for category in evaluate.GENEVAL))


# -------------------------------------------------------------------------------------- settings

def settings(args):
    """Guidance and steps when drawing, image guidance when editing, of one trained model."""
    model = load(args.model, args.device)
    plans = {}
    for g in (1.0, 2.0, 4.5, 6.5, 9.0):
        plans[f"guidance {g}, 20 steps"] = dict(guidance=g, steps=20, solver="dpm++")
    for n, solver in itertools.product((3, 5, 10), ("dpm++", "euler")):
        plans[f"{n} steps, {solver}"] = dict(steps=n, solver=solver)
    rows = {}
    for name, how in tqdm(plans.items(), "settings"):
        scores = drawing_scores(args, model, **how)
        row = {category: evaluate.measure(values) for category, values in scores.items()}
        rows[name] = row | {"mean of 6": overall(scores)}
        tqdm.write(f"{name:32} {100 * rows[name]['mean of 6']['mean']:.0f}")
    edits = {}
    for g in tqdm((1.0, 1.5, 3.0, 6.5), "image guidance"):
        name = f"image guidance {g}"
        scores, _ = evaluate.benchmark(model, ("edit",), args.n, image_guidance=g)
        edits[name] = mean_of_edits(scores)
        shown = [f"{what} {evaluate.percent(row)}" for what, row in edits[name].items()]
        tqdm.write(f"{name}: {', '.join(shown)}")
    other_edits = mean_of_edits(edits_not_chosen_on(args, model))
    return dict(table=rows, edits=edits, other_edits=other_edits)


def edits_not_chosen_on(args, model):
    """Scores by the model's own image guidance, of as many edits again: the next ones of each list.
    """
    first = set(evaluate.cases("edit", args.n))
    following = [case for case in evaluate.cases("edit", 2 * args.n) if case not in first]
    painter = functools.partial(evaluate.paint, model, seed=0, batch=32,
                                image_guidance=model.config.image_guidance)
    scores, _ = evaluate.score("edit", following, 1, painter)
    return scores


def mean_of_edits(scores):
    """Of pairs seen in training -> {what is judged: its mean over all kinds of edits}"""
    mean = f"mean of {len(language.EDITS)}"
    rows = evaluate.summary(scores)
    return {what: row for (_, name, what, pairs), row in rows.items()
            if (name, pairs) == (mean, "seen")}


# ----------------------------------------------------------------------------------------- rungs

REPLACED_BY = {
    "null prompt": "the null prompt's rung",
    "another rung": "a distant rung of the same prompt",
    "another prompt": "another prompt's rung",
}


@contextlib.contextmanager
def replaced(model, j, how):
    """The model with rung j of each prompt (not of the null prompts) replaced. how: of REPLACED_BY;
    the other prompt is that of half a batch further on, since pictures of one prompt stand side by
    side."""
    encode = model.encode

    def changed(prompts, images=None):
        # null prompts, then prompts
        rungs = encode(prompts, images).clone()         # (L, 2 B, Q, caption_dim)
        null, own = rungs.chunk(2, 1)
        texts, half = prompts[len(prompts) // 2:], own.shape[1] // 2
        if any(text == texts[i - half] for i, text in enumerate(texts)):
            raise ValueError("rungs: half a batch further on stands the same prompt: take fewer "
                             "--pictures, or another --n")
        distant = (j + len(rungs) // 2) % len(rungs)
        ways = {
            "null prompt": null[j],
            "another rung": own[distant],
            "another prompt": own[j].roll(half, 0),
        }
        own[j] = ways[how].clone()
        return rungs

    model.encode = changed
    try:
        yield
    finally:
        del model.encode


def rungs(args):
    """Scores when one rung is replaced: a heat map of rung by category for each way."""
    model = load(args.model, args.device)
    whole = drawing_scores(args, model)
    lost = {how: [] for how in REPLACED_BY}
    rows = itertools.product(REPLACED_BY, range(model.config.dit.n_layer))
    for how, j in tqdm(list(rows), "rungs"):
        with replaced(model, j, how):
            scores = drawing_scores(args, model)
        change = {name: 100 * (np.mean(scores[name]) - np.mean(whole[name])) for name in whole}
        lost[how].append(change)
    plot_rungs(lost, args.out / "rungs.png")
    means = {name: float(np.mean(values)) for name, values in whole.items()}
    return dict(whole=means, points=lost)


def rows_of(of_rungs: list[dict], pairs: str) -> dict[str, list[float]]:
    """[of each rung {"category, pairs": points}] -> {category: points of each rung}, for those of
    the pairs that are named; above them the mean of six, if they have all."""
    ending = f", {pairs}"
    rows = {}
    for name in of_rungs[0]:
        if name.endswith(ending):
            rows[name.removesuffix(ending)] = [rung[name] for rung in of_rungs]
    if rows.keys() >= set(evaluate.GENEVAL):
        rows = {"mean of six": np.mean([rows[name] for name in evaluate.GENEVAL], 0)} | rows
    return rows


def heat_map(ax, rows: dict[str, list[float]]):
    """A row for each category, a column for each rung, and the numbers."""
    values = np.array(list(rows.values()))
    shown = ax.imshow(values, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
    size = min(10, 60 / values.shape[1])
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 60 else "black"
        # no "-0"
        number = f"{value:+.0f}" if abs(value) >= 0.5 else "0"
        ax.text(j, i, number, ha="center", va="center", fontsize=size, color=colour)
    ax.set_xticks(range(values.shape[1]))
    ax.set_yticks(range(len(rows)), list(rows), fontsize=11)
    return shown


def plot_rungs(lost, file):
    """lost: {way: [of each rung {category: points}]}. Heat maps: ways side by side, pairs seen in
    training above those never seen."""
    maps = {}
    for how, of_rungs in lost.items():
        maps[how] = {pairs: rows_of(of_rungs, pairs) for pairs in evaluate.PAIRS.values()}
    lengths = [len(rows) for rows in next(iter(maps.values())).values()]
    figure, axes = plt.subplots(len(lengths), len(lost), figsize=(8, 2.2 + 0.3 * sum(lengths)),
                                height_ratios=lengths, layout="constrained", sharex="col",
                                sharey="row", squeeze=False)
    for column, (how, of_pairs) in zip(axes.T, maps.items()):
        for ax, rows in zip(column, of_pairs.values()):
            shown = heat_map(ax, rows)
        column[0].set_title(textwrap.fill(f"by {REPLACED_BY[how]}", 20), fontsize=12)
        column[-1].set_xlabel("rung = DiT block", fontsize=11)
    for ax, pairs in zip(axes[:, 0], evaluate.PAIRS.values()):
        ax.set_ylabel(f"pairs {pairs}", fontsize=11)
    figure.suptitle("Each prompt's rung replaced", fontsize=12)
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.6, aspect=40,
                    label="points gained (+) or lost (-)")
    dots.save(figure, file)


# ---------------------------------------------------------------------------------------- probes

def probe_facts(scene, text):
    """What a prompt says: colour and shape of the thing that it names first and of another one, how
    many things there are, and, if it tells, at which side of the other the first one is. None
    where it does not say."""
    first, *others = language.in_order(text, scene.things)
    other = next((t for t in others if t.name != first.name), None)
    return {
        "first colour": first.colour,
        "first shape": first.shape,
        "second colour": other and other.colour,
        "second shape": other and other.shape,
        "count": len(scene.things),
        "side": world.relation(first, other) if world.sides(scene) else None,
    }


def probe_prompts(n):
    """-> n different prompts, and what each says."""
    rng = random.Random(0)
    facts = {}
    while len(facts) < n:
        scene = world.sample_scene(rng)
        text = language.caption(scene, rng)
        if text not in facts:
            facts[text] = probe_facts(scene, text)
    return list(facts), list(facts.values())


def other_mllms(start: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """{name: folder} of those that are there."""
    found = {name: start / folder for name, folder in OTHER_MLLMS.items()} if start else {}
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def probes(args):
    """Linear (ridge) probes of the queries' states at every depth, of all queries together and of
    each by itself, fitted on some prompts and tested on others; in each MLLM that the plan knows,
    two of them that of --model. The queries are those that a run starts from: they have learnt from
    none of these."""
    texts, facts = probe_prompts(FITTED + TESTED)
    table = {fact: {} for fact in facts[0]}
    others = other_mllms(args.start)
    for name in plan.MLLMS:
        if name in OTHER_MLLMS and name not in others:
            print(f"{name}: left out, it is in no --start FOLDER")
            continue
        folder = others.get(name, args.model)
        model = fast.enable(trials.with_mllm(folder, name, args.device))
        states = probe_states(model, texts)                            # (depths, prompts, Q, M)
        for fact in tqdm(table, name):
            table[fact][name] = probed(states, [said[fact] for said in facts])
    print(tables.probes_by_state(table))
    plot_probes(table, model.config, args.out / "probes.png")
    return dict(table=table)


@torch.no_grad()
def probe_states(model, texts):
    """-> the queries' states at every depth (depths, prompts, Q, M)"""
    batches = []
    for i in tqdm(range(0, len(texts), 10), "read"):
        states = model.query_states(texts[i:i + 10])
        batches.append(torch.stack(states).float().cpu())
    return torch.cat(batches, 1)


def probed(states, answers) -> dict:
    """One fact; answers: of each prompt, None where it does not say -> how often a probe is right,
    of all queries together (depths,) and of each alone (depths, Q); and chance, which always says
    what is most frequent."""
    known = [i for i, answer in enumerate(answers) if answer is not None]
    classes = sorted({answers[i] for i in known}, key=str)
    y = torch.tensor([classes.index(answers[i]) for i in known])
    cut = sum(i < FITTED for i in known)
    chance = (y[cut:] == y[:cut].bincount().argmax()).float().mean().item()
    together, alone = [], []
    for depth in states[:, known]:                                     # (prompts, Q, M)
        together.append(round(ridge(depth.flatten(1), y, cut), 4))
        alone.append([round(ridge(query, y, cut), 4) for query in depth.unbind(1)])
    return dict(chance=round(chance, 4), together=together, alone=alone)


def ridge(x, y, cut):
    """A ridge regression to one-hot classes fitted to the rows before `cut` -> accuracy on the
    others. By features or by rows, whichever are fewer: both forms have the same solution."""
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-6)
    # a feature that is always 1, for the bias
    x = F.pad(x, (0, 1), value=1.0).double()
    fitted, wanted = x[:cut], F.one_hot(y[:cut]).to(x.dtype)
    penalty = 0.01 * fitted.square().sum() / cut
    if fitted.shape[1] < cut:
        gram = fitted.T @ fitted
        weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), fitted.T @ wanted)
    else:
        gram = fitted @ fitted.T
        weights = fitted.T @ torch.linalg.solve(gram + penalty * torch.eye(cut), wanted)
    guesses = (x[cut:] @ weights).argmax(1)
    return (guesses == y[cut:]).float().mean().item()


def plot_probes(table: dict, config, file) -> None:
    """Maps of depth by query: a column for each fact, a row for each MLLM, all on one scale."""
    names = list(next(iter(table.values())))
    figure, axes = plt.subplots(len(names), len(table), figsize=(11, 1.2 + 2.3 * len(names)),
                                layout="constrained", sharex=True, sharey=True, squeeze=False)
    taps = tap_layers(config.mllm.n_layer, config.dit.n_layer)
    for (fact, by_mllm), column in zip(table.items(), axes.T):
        column[0].set_title(f"{fact}\n(0: {by_mllm[names[0]]['chance']:.0%})", fontsize=12)
        for name, ax in zip(names, column):
            values = np.array(by_mllm[name]["alone"])
            chance = by_mllm[name]["chance"]
            shown = ax.imshow((values - chance) / (1 - chance), vmin=0, vmax=1, cmap="viridis",
                              aspect="auto", origin="lower", interpolation="nearest")
            ax.axhspan(taps[0] - 0.5, taps[-1] + 0.5, fill=False, ec="white", lw=1.5)
            ax.set_xticks(range(0, values.shape[1], 5))
            ax.set_yticks(range(0, len(values), 2))
    for name, ax in zip(names, axes[:, 0]):
        ax.set_ylabel(f"{name}\nstate", fontsize=12)
    figure.supxlabel("query, by itself", fontsize=12)
    figure.colorbar(shown, ax=axes, label="right, from chance (0) to all (1)", shrink=0.7)
    dots.save(figure, file)


# ----------------------------------------------------------------------------------------- slots

def pairs_of_things(n: int) -> list[tuple]:
    """n times four things of different names, the first two and the last two each of different
    colours and shapes: what a prompt asks for, and what another one does."""
    rng = random.Random(0)
    names = [(shape, colour) for colour in world.COLOURS for shape in world.SHAPES
             if (colour, shape) not in world.HELD_OUT]
    found = []
    while len(found) < n:
        four = rng.sample(names, 4)
        if all(a != b for first, second in (four[:2], four[2:]) for a, b in zip(first, second)):
            found.append(tuple(world.Thing(*name, "medium", 0.5, 0.5) for name in four))
    return found


def with_slot(own, other, queries: range, depths: range):
    """Rungs (L, B, Q, caption_dim) with these queries, at these depths, from others."""
    changed = own.clone()
    cells = slice(depths.start, depths.stop), slice(None), slice(queries.start, queries.stop)
    changed[cells] = other[cells]
    return changed


@torch.no_grad()
def painted(model, own, null, args) -> list[Image.Image]:
    """Pictures of these rungs, of each prompt from a noise of its own."""
    *_, last = sample.denoise(model, [""] * own.shape[1], **few_steps(args),
                              conditioning=(torch.cat([null, own], 1), 2),
                              generator=torch.Generator().manual_seed(0))
    return model.decode(last.x_t)


def things_there(pictures, asked) -> dict[str, list[bool]]:
    """{which of the four things: is it in the picture?}, and whether there are more than two
    things, of whatever name."""
    found = {what: [] for what in (*tables.THINGS, tables.MORE)}
    for picture, four in zip(pictures, asked):
        names = [thing.name for thing in grader.grade(picture).things]
        for what, thing in zip(tables.THINGS, four):
            found[what].append(thing.name in names)
        found[tables.MORE].append(len(names) > 2)
    return found


def surgeries(n_layer: int, n_query: int) -> dict[str, tuple[str, range, range]]:
    """{in words: (mute or splice, queries, depths)}: each slot at every depth, and at each alone"""
    depths = {"every rung": range(n_layer)}
    depths |= {f"rung {j}": range(j, j + 1) for j in range(n_layer)}
    return {f"{what} slot {i}, {where}": (what, queries, depths[where])
            for what in ("mute", "splice") for where in depths
            for i, queries in enumerate(mixer.slots(n_query, SLOTS))}


@torch.no_grad()
def slots(args):
    """Two objects are asked for ("a red circle and a blue square"). One slot of queries is muted
    (it gets the null prompt's rungs) or spliced (another prompt's): which objects are drawn?"""
    model = load(args.model, args.device)
    asked = pairs_of_things(args.n)
    null, own, other = [], [], []
    for i in tqdm(range(0, len(asked), 10), "read"):
        part = asked[i:i + 10]
        null.append(model.encode([""] * len(part)))
        own.append(model.encode([language.listing(four[:2]) for four in part]))
        other.append(model.encode([language.listing(four[2:]) for four in part]))
    null, own, other = (torch.cat(parts, 1) for parts in (null, own, other))
    found = {"as it is": things_there(painted(model, own, null, args), asked)}
    donors = dict(mute=null, splice=other)
    todo = surgeries(len(own), own.shape[2])
    for name, (what, queries, depths) in tqdm(todo.items(), "slots"):
        changed = with_slot(own, donors[what], queries, depths)
        found[name] = things_there(painted(model, changed, null, args), asked)
    rows = {}
    for name, of_things in found.items():
        row = {what: evaluate.measure(there) for what, there in of_things.items()}
        rows[name] = row
        print(f"| {name} | " + " | ".join(map(evaluate.percent, row.values())) + " |")
    # Of single rungs there are too many.
    shown = {name: row for name, row in rows.items() if ", rung" not in name}
    dots.plot_series(shown, args.out / "slots.png", "pictures, %")
    return dict(table=rows)


# ----------------------------------------------------------------------------------------- noise

def layout(picture, things) -> dict[str, float]:
    """Where the first of two things is, whether it is further to the left than the second, and how
    many things there are at all; NaN where it cannot be told."""
    found = grader.grade(picture).things
    # Of several of one name the first.
    by_name = {thing.name: thing for thing in reversed(found)}
    first, second = (by_name.get(thing.name) for thing in things)
    x, y = (first.x, first.y) if first else (np.nan, np.nan)
    left = float(first.x < second.x) if first and second else np.nan
    return {"first, across": x, "first, up and down": y, "first is left": left,
            "number": float(len(found))}


@torch.no_grad()
def noise(args):
    """Every prompt from every noise: of the variance of places and number, how much is the noise's,
    how much the prompt's, and how much both together decide? Prompts name two objects and no
    place."""
    model = load(args.model, args.device)
    asked = [four[:2] for four in pairs_of_things(args.n)]
    texts = [language.listing(things) for things in asked]
    generator = torch.Generator().manual_seed(0)
    # What: [of each noise [of each prompt]]
    table = {}
    for _ in tqdm(range(NOISES), "noises"):
        eps = torch.randn(1, *sample.latent_shape(model.config), generator=generator)
        pictures = []
        for i in range(0, len(texts), 32):
            part = texts[i:i + 32]
            pictures += sample.generate(model, part, eps=eps.expand(len(part), -1, -1, -1),
                                        **few_steps(args))
        layouts = [layout(*pair) for pair in zip(pictures, asked)]
        for what in layouts[0]:
            table.setdefault(what, []).append([found[what] for found in layouts])
    rows = {what: noise_shares(np.array(values)) for what, values in table.items()}
    shown = {}
    for what, row in rows.items():
        shown[what] = {part: row[part] for part in PARTS_OF_VARIANCE.values()}
        cells = map(evaluate.percent, shown[what].values())
        print(f"| {what} | {' | '.join(cells)} | {row['known']} |")
    dots.plot_series(shown, args.out / "noise.png", "share of the variance, %")
    return dict(table=rows)


PARTS_OF_VARIANCE = dict(rows="the noise's", columns="the prompt's", rest="of both together")


def noise_shares(values: np.ndarray) -> dict:
    """values (noises, prompts), NaN where it cannot be told -> {whose: share of the variance, with
    an interval over prompts, by leaving out each once, which does not tell how much another eight
    noises would change}; known: of how many pictures it could be told. (The bootstrap would draw a
    prompt twice, and call what is its own the noise's.)"""
    P = values.shape[1]
    whole = statistics.shares(values)
    without = [statistics.shares(np.delete(values, i, 1)) for i in range(P)]
    found = dict(known=int((~np.isnan(values)).sum()))
    for part, name in PARTS_OF_VARIANCE.items():
        # Without some prompt too little may be known.
        known = [shares[part] for shares in without if not np.isnan(shares[part])]
        error = np.std(known) * (P - 1) ** 0.5 if known else np.nan
        interval = np.clip([whole[part] - 1.96 * error, whole[part] + 1.96 * error], 0, 1)
        found[name] = dict(mean=whole[part], interval=interval.tolist())
    return found


# ------------------------------------------------------------------------------- a batch by heart

OVERFIT = "--overfit --batch 8 --steps 200 --warmup 20"


def overfit(args):
    """Training on one batch again and again: the loss at its start, at its height, at its end, and
    by time."""
    with tempfile.TemporaryDirectory() as out:
        train.main(train.options([*OVERFIT.split(), "--model", args.model, "--out", f"{out}/run",
                                  "--device", args.device]))
        rows = read_log(pathlib.Path(out, "run"))
    losses = np.array([row["loss"] for row in rows])
    means = smooth(losses, 20)[19:]
    late = np.ma.masked_invalid(np.array([row["by_t"] for row in rows[100:]], float)).mean(0)
    return dict(command=f"python train.py {OVERFIT}", start=means[0], highest=means.max(),
                end=means[-1], by_t=late.filled(np.nan).tolist())


# ------------------------------------------------------------------------------------------ told

@torch.no_grad()
def told(args):
    """What the queries' states say of each edit, in the code of lab/pretrain.py, judged as pictures
    are: all depths together, and each by itself. (A fixed reading: the DiT, which reads through a
    connector that learns, may find more.)"""
    model = load(args.model, args.device)
    if len(model.ladder.queries) != SummaryTokens.n:
        raise ValueError(f"told reads {SummaryTokens.n} queries, {args.model} has "
                         f"{len(model.ladder.queries)}")
    code = learnt_code(model, args).to(args.device)
    cases = evaluate.cases("edit", args.n)
    states = {case: model.query_states([case.prompt], [case.images(model.config.size)])
              for case in tqdm(cases, "edits")}

    def score(depths):
        def say(rows):
            return (code.scenes([states[case][i] for i in depths])[0] for case, _ in rows)

        scores, _ = evaluate.score("edit", cases, 1, say)
        return evaluate.by_category(evaluate.summary(scores))["edit"]

    depths = range(code.DEPTH, model.config.mllm.n_layer + 1)
    return dict(table=score(depths), by_state={i: score([i]) for i in depths})


# What each of them can be asked, beside --model, --out and --device.
OPTIONS = dict(settings=("n", "pictures"), rungs=("n", "pictures", "draw_steps"),
               probes=("start",), slots=("n", "draw_steps"), noise=("n", "draw_steps"),
               told=("n",), overfit=())
STUDIES = dict(settings=settings, rungs=rungs, probes=probes, slots=slots, noise=noise, told=told,
               overfit=overfit)
