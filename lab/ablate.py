"""The study that the paper does not have: does a DiT that attends to many depths of the MLLM beat
one that attends to the last?

    python -m lab.ablate wirings    every wiring of ladder.py, and a frozen MLLM of random weights
    python -m lab.ablate queries    4, 8, 16, 32 queries, for ladder and final
    python -m lab.ablate shift      times shifted or not, in training and in sampling
    python -m lab.ablate settings   guidance, steps and image guidance against score
    python -m lab.ablate rungs      one rung at a time replaced
    python -m lab.ablate probes     what the queries' states tell, depth by depth

The first three train: stage t2i, three seeds of each kind, all from the same MLLM, DiT and
autoencoder (those of --model, its ladder thrown away and its DiT replaced by --dit). Runs of one
seed see the same data in the same order. Every run and every score is kept in --out: a study that
was stopped goes on where it was, and nothing is done twice. The last three look at --model as it
is.

A study writes STUDY.json into --out, and all but settings a picture beside it. How far its tables
can be trusted depends on the number of seeds and steps; both stand in the JSON file, with commit
and hardware.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import random
import subprocess

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from tqdm import tqdm

import ladder
import train
from engine import command, fast
from engine.files import new_file, prepare_folder, weight_files, write_text
from engine.limits import MAX_STEPS, MAX_WORKERS
from engine.options import store
from engine.state import ema_weights
from lab import evaluate
from mllm import MLLM
from sample import TOY_FOLDER
from tbac import TBAC
from toy import language, world

matplotlib.use("Agg")
ROOT = pathlib.Path(__file__).resolve().parents[1]
QUERIES = (4, 8, 16, 32)
DPI = 120


def load(folder, device="cpu"):
    return fast.enable(TBAC.load(folder, device))


def write_json(file, content):
    """A file that is there is whole."""
    write_text(file, json.dumps(content, indent=1, default=str))


def save(figure, file):
    """A PNG that is there is whole."""
    with new_file(file) as f:
        figure.savefig(f, format="png", dpi=DPI)


# ------------------------------------------------------------------------------------ to train

@functools.cache
def digest(*folders):
    """Eight letters that stand for all weights in some folders."""
    found = hashlib.sha256()
    for file in itertools.chain(*map(weight_files, folders)):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def parts(args, kind="parts"):
    """The folder that runs start from: MLLM and autoencoder of --model, the DiT of --dit.
    kind "blank": with an MLLM of random weights."""
    folder = args.out / f"{kind}-{digest(args.model, args.dit)}"
    if not (folder / "config.json").is_file():
        model = TBAC.load(args.model)
        model.dit = TBAC.load(args.dit).dit
        if kind == "blank":
            model.mllm = MLLM(model.config.mllm, model.mllm.tokenizer)
            model.mllm.init_weights(torch.Generator().manual_seed(0))
        model.save(folder)
    return folder


def kinds_of(args):
    """-> {kind: the options that make it}"""
    if args.study == "wirings":
        kinds = {wiring: ["--wiring", wiring] for wiring in ladder.WIRINGS}
        kinds["ladder, random MLLM"] = ["--model", str(parts(args, "blank"))]
    elif args.study == "queries":
        kinds = {}
        for wiring, n in itertools.product(("ladder", "final"), QUERIES):
            kinds[f"{wiring}, {n} queries"] = ["--wiring", wiring, "--queries", str(n)]
    else:
        kinds = {f"trained with shift {shift}": ["--shift", shift] for shift in ("1", "3")}
    return kinds


def plan(args):
    """-> {name of a run: its options beside those that all share}"""
    kinds = kinds_of(args)
    if wrong := set(args.only or ()) - kinds.keys():
        raise ValueError(f"--only {sorted(wrong)}: expected some of {list(kinds)}")
    runs = {}
    for seed in range(args.seeds):
        for kind, options in kinds.items():
            if not args.only or kind in args.only:
                runs[f"{kind} seed {seed}"] = [*options, "--seed", str(seed)]
    return runs


def place(args, options):
    """-> all options of a run, {word: value}, and its folder, named after everything that its
    scores depend on. So options that say the same as another study's share its run."""
    base = {"--model": str(parts(args)), "--wiring": "ladder",
            "--queries": str(args.default_queries), "--shift": "1"}
    base |= dict(zip(options[::2], options[1::2]))
    names = [pathlib.Path(value).name for value in base.values()]
    names += [f"{args.steps}x{args.batch}", f"{args.n}x{args.pictures}x{args.draw_steps}"]
    return base, args.out / "_".join(names)


def train_one(args, options):
    """One run, to its end, with scores at every --every steps (file scores-STEP.json), in a process
    of its own."""
    base, folder = place(args, options)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    if (folder / f"scores-{args.steps:05d}.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    fixed = ["--stage", "t2i", "--steps", str(args.steps), "--batch", str(args.batch),
             "--warmup", "100", "--device", args.device, "--out", str(folder), "--resume",
             "--save-every", str(args.every), "--keep", "1", "--sheet-every", "0"]
    run_args = train.options([*fixed, *itertools.chain(*base.items())])
    store(run_args)
    run = train.Run(run_args)
    with open(folder / "log.jsonl", "a") as log:
        for report in run.steps():
            row = dict(step=report.step, loss=report.loss, norm=report.norm)
            log.write(json.dumps(row) + "\n")
            if report.step % args.every == 0 or report.step == args.steps:
                with ema_weights(run.state):
                    scores = drawing_scores(args, run.model)
                write_json(folder / f"scores-{report.step:05d}.json", scores)
                run.save()


def drawing_scores(args, model, **sampling):
    """-> {category, seen or never seen: [of each prompt how many pictures were right]}, by the
    category's own question."""
    sampling = dict(steps=args.draw_steps) | sampling
    scores, _ = evaluate.benchmark(model, ("draw",), args.n, args.pictures, seed=0, **sampling)
    by_category = {}
    for (_, category, what, pairs), values in scores.items():
        if what == "category":
            by_category[f"{category}, {pairs}"] = values
    return by_category


def run_all(args):
    """Trains what is missing, --jobs runs at a time -> {kind: {step: [scores of each seed]}}"""
    runs = plan(args)
    # Here, or each process would make them.
    parts(args)
    # A fork would inherit locks of threads that it does not have.
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=fresh) as pool:
        waiting = [pool.submit(train_one, args, options) for options in runs.values()]
        for done in tqdm(concurrent.futures.as_completed(waiting), "runs", len(waiting)):
            # Raises what went wrong there.
            done.result()
    found = {}
    for name, options in runs.items():
        by_step = found.setdefault(name.split(" seed ")[0], {})
        for file in sorted(place(args, options)[1].glob("scores-*.json")):
            step = int(file.stem.removeprefix("scores-"))
            by_step.setdefault(step, []).append(json.loads(file.read_text()))
    return found


# ---------------------------------------------------------------------------------- to compare

def overall(scores):
    """The mean over the six categories of pairs seen in training, per prompt: categories have
    equally many."""
    return np.concatenate([values for name, values in scores.items() if name.endswith(", seen")])


def resampled(rows, seed=0, n=2000):
    """rows (seeds, prompts) -> mean and 95 % interval, seeds and prompts both drawn again."""
    rng = np.random.default_rng(seed)
    rows = np.asarray(rows, float)
    s, p = rows.shape
    means = [rows[rng.integers(0, s, s)][:, rng.integers(0, p, p)].mean() for _ in range(n)]
    interval = [float(x) for x in np.percentile(means, (2.5, 97.5))]
    return dict(mean=rows.mean().item(), interval=interval)


def paired(ours, theirs, n=10_000):
    """The same prompts and seeds with two wirings -> mean difference, its interval, and how often
    chance alone, turning the sign of each prompt's difference at random, makes one as large."""
    difference = np.array([overall(x) - overall(y) for x, y in zip(ours, theirs)])
    by_prompt = difference.mean(0)                                  # (prompts,)
    signs = np.random.default_rng(0).choice((-1, 1), (n, len(by_prompt)))
    by_chance = abs((signs * by_prompt).mean(1))                    # (n,)
    as_large = (by_chance >= abs(by_prompt.mean()) - 1e-12).sum()
    return resampled(difference) | dict(p=float((1 + as_large) / (n + 1)))


def points(test):
    """What `paired` found, as two cells of a table, in points: "+3 [-2, +8] | 0.210"."""
    numbers = [100 * x for x in (test["mean"], *test["interval"])]
    change = "{:+.0f} [{:+.0f}, {:+.0f}]".format(*numbers)
    return f"{change} | {test['p']:.3f}" if test["p"] >= 0.001 else f"{change} | < 0.001"


def table(found, *against):
    """-> {kind: {category: mean and interval, "mean of 6": ..., "minus <against>": paired test}} at
    the last step, printed as it goes."""
    at_end = {kind: by_step[max(by_step)] for kind, by_step in found.items()}
    rows = {}
    for kind, scores in at_end.items():
        row = {name: resampled([s[name] for s in scores]) for name in scores[0]}
        row["mean of 6"] = resampled([overall(s) for s in scores])
        for other in against:
            if other in at_end and kind != other:
                row[f"minus {other}"] = paired(scores, at_end[other])
        rows[kind] = row | dict(seeds=len(scores))
    print_table(rows, against[0])
    return rows


def print_table(rows, against):
    first = next(iter(rows.values()))
    names = [name for name in first if not name.startswith(("minus", "seeds"))]
    print("\n| |", " | ".join(names), f"| minus {against} | p |")
    print("|---" * (len(names) + 3) + "|")
    for kind, row in rows.items():
        cells = [evaluate.percent(row[name]) for name in names]
        test = row.get(f"minus {against}")
        cells.append(points(test) if test else " | ")
        print(f"| {kind} |", " | ".join(cells), "|")


def curve_of(found):
    """-> {kind: {step: [mean of the six categories, of each seed]}}"""
    curve = {}
    for kind, by_step in found.items():
        curve[kind] = {step: [overall(s).mean() for s in scores]
                       for step, scores in by_step.items()}
    return curve


def spread(values, distance):
    """Sorted values -> the same, pushed apart until neighbours have about this distance."""
    values = list(values)
    for _ in range(200):
        for i in range(len(values) - 1):
            push = max(0, distance - (values[i + 1] - values[i])) / 2
            values[i] -= push
            values[i + 1] += push
    return values


def line_style(kind, i):
    """-> colour and dashes of the i-th kind. A wiring has the same colour in every picture; with
    as many queries, ladder and final have the same colour, and final is dashed."""
    wiring, _, rest = kind.partition(", ")
    if kind in ladder.WIRINGS:
        return f"C{list(ladder.WIRINGS).index(kind)}", "-"
    if rest.endswith(" queries"):
        n = int(rest.removesuffix(" queries"))
        return f"C{QUERIES.index(n)}", "--" if wiring == "final" else "-"
    return f"C{i}", "-"


def plot_curves(curve, file):
    """What `curve_of` gives: a line for each kind, a point for each of its seeds, names at the ends
    of the lines."""
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    ends, highest = [], 0
    for i, (kind, by_step) in enumerate(curve.items()):
        colour, dashes = line_style(kind, i)
        steps = sorted(by_step)
        values = [[100 * x for x in by_step[step]] for step in steps]
        means = [float(np.mean(v)) for v in values]
        ax.plot(steps, means, color=colour, marker="o", ls=dashes)
        ax.plot(steps, values, ".", color=colour, ms=4)
        ends.append((means[-1], steps[-1], kind, colour))
        highest = max(highest, np.max(values))
    ends.sort()
    top = min(100, 20 * (highest // 20 + 1))
    heights = spread([mean for mean, *_ in ends], 0.04 * top)
    for height, (mean, step, kind, colour) in zip(heights, ends):
        ax.annotate(f"{kind}  {mean:.0f}", (step, mean), xytext=(step * 1.02, height),
                    color=colour, va="center", fontsize=11)
    ax.set_xlabel("training steps", fontsize=11)
    ax.set_ylabel("right, %: mean of six categories", fontsize=11)
    ax.set_ylim(0, top)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, file)
    plt.close(figure)


def sampled_with_shifts(args):
    """-> like `run_all`, of the trained models with both ways to sample."""
    found = {}
    for kind, by_step in run_all(args).items():
        folders = [place(args, options)[1] for name, options in plan(args).items()
                   if name.startswith(kind)]
        models = [load(folder, args.device) for folder in folders]
        for shift in (1.0, 3.0):
            scores = [drawing_scores(args, model, shift=shift) for model in models]
            found[f"{kind}, sampled with {shift:.0f}"] = {max(by_step): scores}
    return found


def study(args):
    """wirings, queries, shift: train, compare, draw."""
    found = sampled_with_shifts(args) if args.study == "shift" else run_all(args)
    against = {
        "wirings": ["final", "ladder"],
        "queries": ["final, 16 queries"],
        "shift": ["trained with shift 1, sampled with 3"],
    }
    rows = table(found, *against[args.study])
    if args.study == "queries":
        compare_wirings(rows, found)
    curve = curve_of(found)
    plot_curves(curve, args.out / f"{args.study}.png")
    return dict(table=rows, curve=curve)


def compare_wirings(rows, found):
    """Adds to the rows: as many queries, other taps."""
    for n in QUERIES:
        ours, theirs = found.get(f"ladder, {n} queries"), found.get(f"final, {n} queries")
        if ours and theirs:
            test = paired(ours[max(ours)], theirs[max(theirs)])
            rows[f"ladder, {n} queries"]["minus final"] = test
            print(f"{n} queries, ladder minus final: {points(test)}")


# ------------------------------------------------------------------------------ to look inside

def settings(args):
    """Guidance and steps when drawing, image guidance when editing, of one trained model."""
    model = load(args.model, args.device)
    plans = {}
    for g in (1.0, 2.0, 4.5, 8.0):
        plans[f"guidance {g}, 20 steps"] = dict(guidance=g, steps=20)
    for n, solver in itertools.product((3, 5, 10), ("dpm++", "euler")):
        plans[f"guidance 4.5, {n} steps, {solver}"] = dict(steps=n, solver=solver)
    rows = {}
    for name, how in tqdm(plans.items(), "settings"):
        scores = drawing_scores(args, model, **how)
        row = {category: resampled([values]) for category, values in scores.items()}
        rows[name] = row | {"mean of 6": resampled([overall(scores)])}
        tqdm.write(f"{name:32} {100 * rows[name]['mean of 6']['mean']:.0f}")
    edits = {}
    for g in tqdm((1.0, 1.5, 3.0), "image guidance"):
        name = f"image guidance {g}"
        scores, _ = evaluate.benchmark(model, ("edit",), args.n, image_guidance=g)
        edits[name] = mean_of_edits(scores)
        shown = [f"{what} {evaluate.percent(row)}" for what, row in edits[name].items()]
        tqdm.write(f"{name}: {', '.join(shown)}")
    return dict(table=rows, edits=edits)


def mean_of_edits(scores):
    """Of pairs seen in training -> {what is judged: its mean over the six kinds of edits}"""
    found = {}
    for (_, name, what, pairs), row in evaluate.summary(scores).items():
        if (name, pairs) == ("mean of 6", "seen"):
            found[what] = row
    return found


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
        distant = (j + len(rungs) // 2) % len(rungs)
        ways = {
            "null prompt": null[j],
            "another rung": own[distant],
            "another prompt": own[j].roll(own.shape[1] // 2, 0),
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


def plot_rungs(lost, file):
    """lost: {way: [of each rung {category: points}]}. A heat map for each way, one above the
    other."""
    names = list(next(iter(lost.values()))[0])
    n_row = sum(map(len, lost.values()))
    figure, axes = plt.subplots(len(lost), 1, figsize=(8, 2.6 + 0.34 * n_row),
                                layout="constrained", sharex=True)
    for ax, (how, of_rungs) in zip(axes, lost.items()):
        values = np.array([[row[name] for name in names] for row in of_rungs])
        shown = ax.imshow(values, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
        for (j, i), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 60 else "black"
            # no "-0"
            number = f"{value:+.0f}" if abs(value) >= 0.5 else "0"
            ax.text(i, j, number, ha="center", va="center", fontsize=11, color=colour)
        ax.set_title(f"replaced by {REPLACED_BY[how]}", loc="left", fontsize=12)
        ax.set_ylabel("rung = DiT block", fontsize=11)
        ax.set_yticks(range(len(values)))
    labels = [name.replace(", ", ",\n") for name in names]
    axes[-1].set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=10.5,
                        rotation_mode="anchor")
    figure.colorbar(shown, ax=axes, label="points lost (-) or gained (+)", shrink=0.5)
    save(figure, file)
    plt.close(figure)


def probe_facts(scene, text):
    """What a prompt says: colour and shape of the thing that it names first and of another one, how
    many things there are, and, if it tells, at which side of the other the first one is. None
    where it does not say."""
    first, *others = sorted(scene.things, key=lambda t: text.find(t.name))
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


def probes(args, train_n=1600, test_n=400):
    """Linear (ridge) probes of the queries' states at every depth, fitted on some prompts and
    tested on others; and, as a control, of those in an MLLM of random weights."""
    model = load(args.model, args.device)
    texts, facts = probe_prompts(train_n + test_n)
    states = probe_states(model, texts)
    model.mllm.init_weights(torch.Generator().manual_seed(0))
    control = probe_states(model, texts)
    rows = {}
    for fact in facts[0]:
        known = [i for i, said in enumerate(facts) if said[fact] is not None]
        classes = sorted({facts[i][fact] for i in known}, key=str)
        y = torch.tensor([classes.index(facts[i][fact]) for i in known])
        cut = sum(i < train_n for i in known)
        most_frequent = y[:cut].bincount().argmax()
        chance = (y[cut:] == most_frequent).float().mean().item()
        depths = [ridge(x[known], y, cut) for x in states]
        untrained = [ridge(x[known], y, cut) for x in control]
        rows[fact] = dict(chance=chance, depths=depths, untrained=untrained)
        print(f"{fact:13} chance {100 * chance:3.0f}, depth by depth {shown_percent(depths)}; "
              f"untrained MLLM {shown_percent(untrained)}")
    plot_probes(rows, model.config, args.out / "probes.png")
    return dict(table=rows)


@torch.no_grad()
def probe_states(model, texts):
    """-> the queries' states at every depth (depths, prompts, Q M)"""
    batches = []
    for i in tqdm(range(0, len(texts), 10), "read"):
        states = model.query_states(texts[i:i + 10])
        batches.append(torch.stack(states).float().cpu())
    return torch.cat(batches, 1).flatten(2)


def shown_percent(values):
    return " ".join(f"{100 * value:3.0f}" for value in values)


def plot_probes(rows, config, file):
    """Right answers depth by depth; dashed those of an untrained MLLM, dotted chance. The depths
    that the ladder taps are shaded."""
    taps = ladder.tap_layers(config.mllm.n_layer, config.dit.n_layer, config.wiring)
    figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
    label = f"tapped by {config.wiring}"
    ax.axvspan(min(taps) - 0.3, max(taps) + 0.3, color="0.92", label=label)
    for i, (fact, row) in enumerate(rows.items()):
        ax.plot([100 * value for value in row["depths"]], "o-", color=f"C{i}", label=fact)
        ax.plot([100 * value for value in row["untrained"]], "--", color=f"C{i}", lw=1)
        ax.axhline(100 * row["chance"], color=f"C{i}", ls=":", lw=1)
    ax.set_xlabel("MLLM state (i enters layer i; the last one is the end)", fontsize=11)
    ax.set_ylabel("right, % (dashed: untrained MLLM, dotted: chance)", fontsize=11)
    ax.set_ylim(0, 103)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=11)
    save(figure, file)
    plt.close(figure)


def ridge(x, y, cut):
    """A ridge regression to one-hot classes fitted to the rows before `cut` (in its dual form:
    features are many more) -> accuracy on the others."""
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-6)
    # a feature that is always 1, for the bias
    x = F.pad(x, (0, 1), value=1.0).double()
    gram = x[:cut] @ x[:cut].T
    penalty = 0.01 * gram.diagonal().mean() * torch.eye(cut, dtype=x.dtype)
    weights = torch.linalg.solve(gram + penalty, F.one_hot(y[:cut]).to(x.dtype))
    guesses = (x[cut:] @ x[:cut].T @ weights).argmax(1)
    return (guesses == y[cut:]).float().mean().item()


# -------------------------------------------------------------------------------- command line

TRAINS = ("wirings", "queries", "shift")
STUDIES = dict.fromkeys(TRAINS, study) | dict(settings=settings, rungs=rungs, probes=probes)


def options(argv=None):
    p = command.Parser(prog="python -m lab.ablate", description=__doc__)
    add = p.add_argument
    many = command.count(1, 100_000)
    add("study", choices=STUDIES, help="what each one does stands above")
    add("--model", type=command.path_text, default=str(TOY_FOLDER),
        help="folder whose MLLM and autoencoder training starts from; settings, rungs and probes "
        "look at all of it (default: the toy)")
    add("--dit", type=command.path_text, help="folder with the DiT before it met a ladder "
        "(lab.pretrain --stage dit), needed to train")
    add("--out", type=command.path, default=pathlib.Path("runs/ablate"),
        help="folder for runs, tables and pictures (default: runs/ablate)")
    add("--only", nargs="+", help="only these wirings (or other kinds)")
    add("--seeds", type=many, default=3, help="runs of each kind (default: 3)")
    add("--steps", type=many, default=1000, help="of training (default: 1000)")
    add("--batch", type=many, default=24, help="examples a step (default: 24)")
    add("--every", type=many, default=250, help="steps between scores (default: 250)")
    add("--n", type=many, default=24, help="prompts per category (default: 24)")
    add("--pictures", type=many, default=1, help="per prompt (default: 1)")
    add("--draw-steps", type=command.count(1, MAX_STEPS), default=10,
        help="of a picture (default: 10)")
    add("--jobs", type=command.count(1, MAX_WORKERS), default=1 if torch.cuda.is_available() else 2,
        help="runs at a time (default: 1 on a GPU, else 2)")
    add("--device", type=command.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    args = p.parse_args(argv)
    refuse_nonsense(p, args)
    return args


def refuse_nonsense(p, args):
    if args.study not in TRAINS and args.only:
        p.error(f"--only: {args.study} has no kinds to choose from")
    if args.study in TRAINS and not args.dit:
        p.error("--dit FOLDER: the DiT that the runs start from, made by "
                "`python -m lab.pretrain --stage dit --model runs/dcae --out runs/dit`")


def origin(args):
    """What was asked for (folders without the way to them), by which code, on what."""
    said = dict(vars(args))
    for folder in ("model", "dit", "out"):
        said[folder] = pathlib.Path(said[folder] or "").name
    said["weights"] = digest(args.model, *filter(None, [args.dit]))
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if args.device.startswith("cuda"):
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return dict(options=said, commit=commit, hardware=hardware, torch=torch.__version__)


def main(argv=None):
    args = options(argv)
    with command.one_line_errors():
        prepare_folder(args.out, f"{args.study}.json", f"{args.study}.png")
        args.default_queries = TBAC.load(args.model).config.n_query
        found = STUDIES[args.study](args)
        write_json(args.out / f"{args.study}.json", origin(args) | found)
    print(f"wrote {args.out / args.study}.json")


if __name__ == "__main__":
    main()
