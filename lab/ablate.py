"""The study that the paper does not have: does a DiT that hears many depths of the MLLM beat one that hears the last?

    python evaluate.py ablate wirings            every wiring of ladder.py, three seeds each, and a frozen MLLM of random weights
    python evaluate.py ablate queries            4, 8, 16, 32 queries, for top and last
    python evaluate.py ablate shift              training with times shifted or not, sampling with them shifted or not
    python evaluate.py ablate settings           guidance, steps and image guidance against score, of the model as it is
    python evaluate.py ablate rungs              one rung at a time replaced, of the model as it is
    python evaluate.py ablate probes             what the queries' states tell, depth by depth

Trained is stage t2i, from the same MLLM, DiT and autoencoder (--model, its ladder thrown away and its DiT replaced by --dit), with the same
seeds and so the same data in the same order. Every run and every score is kept in --out: what was stopped goes on, what is there is not done again.
Tables of all wirings are only as good as the number of seeds and steps says; both stand in the JSON file that is written, with commit and hardware.
"""
import argparse
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
from matplotlib import pyplot as plt
from tqdm import tqdm

from lab import evaluate
import ladder
from toy import language, world
import train
from mllm import DRAW, MLLM
from tbac import TBAC, weight_files

matplotlib.use("Agg")
ROOT = pathlib.Path(__file__).parent.parent
WIRINGS = ("top", "last", "penultimate", "uniform", "first", "reversed", "shuffled", "mean", "routed")
QUERIES = (4, 8, 16, 32)


# -------------------------------------------------------------------------------------------------------------- to train

@functools.cache
def digest(*folders):
    """Eight letters that stand for all weights in some folders."""
    found = hashlib.sha256()
    for file in itertools.chain(*map(weight_files, folders)):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def parts(a, how="parts"):
    """A folder with the parts that runs start from: MLLM and autoencoder of --model, the DiT of --dit; "blank": with an MLLM of random weights."""
    folder = a.out / f"{how}-{digest(a.model, a.dit)}"
    if not (folder / "config.json").is_file():
        model = TBAC.load(a.model)
        model.dit = TBAC.load(a.dit).dit
        if how == "blank":
            model.mllm = MLLM(model.config.mllm, model.mllm.tokenizer)
            model.mllm.init_weights(torch.Generator().manual_seed(0))
        model.save(folder)
    return folder


def plan(a):
    """-> {name of a run: its options beside those that all share}"""
    seeds = {f" seed {seed}": ["--seed", str(seed)] for seed in range(a.seeds)}
    if a.study == "wirings":
        kinds = {w: ["--wiring", w] for w in WIRINGS} | {"top, random MLLM": ["--model", str(parts(a, "blank"))]}
    elif a.study == "queries":
        kinds = {f"{w}, {n} queries": ["--wiring", w, "--queries", str(n)] for w in ("top", "last") for n in QUERIES}
    else:
        kinds = {f"trained with shift {shift}": ["--shift", shift] for shift in ("1", "3")}
    if wrong := set(a.only or ()) - kinds.keys():
        raise ValueError(f"--only {sorted(wrong)}: expected some of {list(kinds)}")
    chosen = {name: options for name, options in kinds.items() if not a.only or name in a.only}
    return {name + seed: options + more for seed, more in seeds.items() for name, options in chosen.items()}


def place(a, options):
    """-> all options of a run, {word: value}, and its folder, named after all that its scores depend on. So options that say the same as another
    study's share its run."""
    base = {"--model": str(parts(a)), "--wiring": "top", "--queries": str(a.default_queries), "--shift": "1"}
    base |= dict(zip(options[::2], options[1::2]))
    names = [pathlib.Path(v).name for v in base.values()]
    return base, a.out / "_".join([*names, f"{a.steps}x{a.batch}", f"{a.n}x{a.pictures}x{a.draw_steps}"])


def learn(a, options):
    """One run, to its end, with scores at every --every steps (file scores-STEP.json), in a process of its own."""
    base, folder = place(a, options)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // a.jobs))
    fixed = ["--stage", "t2i", "--steps", str(a.steps), "--batch", str(a.batch), "--device", a.device, "--out", str(folder), "--sheet-every", "0",
             "--warmup", "100", "--save-every", str(a.every), "--keep", "1", "--resume"]
    if not (folder / f"scores-{a.steps:05d}.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        args = train.options([*fixed, *itertools.chain(*base.items())])
        (folder / "options.json").write_text(json.dumps(vars(args), indent=1, default=str))
        run = train.Run(args)
        with open(folder / "log.jsonl", "a") as log:
            for r in run.steps():
                log.write(json.dumps(dict(step=r.step, loss=r.loss, norm=r.norm)) + "\n")
                if r.step % a.every == 0 or r.step == a.steps:
                    with train.mean_weights(run.learner, run.state):
                        write(folder / f"scores-{r.step:05d}.json", drawn(a, run.model))
                    run.save()


def write(file, content):
    file.with_suffix(".new").write_text(json.dumps(content, indent=1, default=str))
    os.replace(file.with_suffix(".new"), file)


def drawn(a, model, **settings):
    """-> {category, seen or never seen: [of each prompt how many pictures were right]}, by the category's own question."""
    settings = dict(steps=a.draw_steps) | settings
    scores, _ = evaluate.benchmark(model, ("draw",), a.n, a.pictures, seed=0, **settings)
    return {f"{category}, {pairs}": values for (_, category, what, pairs), values in scores.items() if what == "category"}


def run_all(a):
    """Trains what is missing, --jobs runs at a time -> {kind: {step: [scores of each seed]}}"""
    runs, found = plan(a), {}
    parts(a)                                                                    # here, or each process would make them
    fresh = multiprocessing.get_context("spawn")                                # a fork would inherit locks of threads that it does not have
    with concurrent.futures.ProcessPoolExecutor(a.jobs, mp_context=fresh) as pool:
        waiting = [pool.submit(learn, a, options) for options in runs.values()]
        for done in tqdm(concurrent.futures.as_completed(waiting), "runs", len(waiting)):
            done.result()                                                       # raises what went wrong there
    for name, options in runs.items():
        for file in sorted(place(a, options)[1].glob("scores-*.json")):
            found.setdefault(name.split(" seed ")[0], {}).setdefault(int(file.stem[7:]), []).append(json.loads(file.read_text()))
    return found


# ------------------------------------------------------------------------------------------------------------- to compare

def overall(scores):
    """The mean over the six categories of pairs seen in training, per prompt: categories have equally many."""
    return np.concatenate([values for name, values in scores.items() if name.endswith(", seen")])


def resampled(rows, seed=0, n=2000):
    """rows (seeds, prompts) -> mean and 95 % interval, seeds and prompts both drawn again."""
    rng, rows = np.random.default_rng(seed), np.asarray(rows, float)
    s, p = rows.shape
    means = [rows[rng.integers(0, s, s)][:, rng.integers(0, p, p)].mean() for _ in range(n)]
    return dict(mean=rows.mean().item(), interval=[float(x) for x in np.percentile(means, (2.5, 97.5))])


def paired(ours, theirs, n=10_000):
    """The same prompts and seeds with two wirings -> mean difference, its interval, and how often chance alone, turning the sign of each
    prompt's difference at random, makes one as large."""
    difference = np.array([overall(x) - overall(y) for x, y in zip(ours, theirs)])                  # (seeds, prompts)
    each = difference.mean(0)
    signs = np.random.default_rng(0).choice((-1, 1), (n, len(each)))
    return resampled(difference) | dict(p=float((1 + (abs((signs * each).mean(1)) >= abs(each.mean()) - 1e-12).sum()) / (n + 1)))


def points(test):
    """What `paired` found, as two cells of a table, in points: "+3 [-2, +8] | 0.210"."""
    change = "{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * x for x in (test["mean"], *test["interval"])))
    return f"{change} | {test['p']:.3f}" if test["p"] >= 0.001 else f"{change} | < 0.001"


def table(found, *against):
    """-> {kind: {category: mean and interval, "mean of 6": ..., "minus <against>": paired test}} at the last step, printed as it goes."""
    rows, last = {}, {kind: by_step[max(by_step)] for kind, by_step in found.items()}
    for kind, scores in last.items():
        row = {name: resampled([s[name] for s in scores]) for name in scores[0]}
        row["mean of 6"] = resampled([overall(s) for s in scores])
        row |= {f"minus {other}": paired(scores, last[other]) for other in against if other in last and kind != other}
        rows[kind] = row | dict(seeds=len(scores))
    names = [name for name in next(iter(rows.values())) if not name.startswith(("minus", "seeds"))]
    print("\n| |", " | ".join(names), f"| minus {against[0]} | p |\n" + "|---" * (len(names) + 3) + "|")
    for kind, row in rows.items():
        cells = [evaluate.percent(row[name]) for name in names]
        test = row.get(f"minus {against[0]}")
        cells += [points(test) if test else " | "]
        print(f"| {kind} |", " | ".join(cells), "|")
    return rows


def plot_curves(found, file):
    """Mean of six categories over training steps, one line a kind, a point for each of its seeds, names at the ends of the lines."""
    figure, ax = plt.subplots(figsize=(9, 5), constrained_layout=True)
    ends = []
    for i, (kind, by_step) in enumerate(found.items()):
        steps = sorted(by_step)
        values = [[100 * overall(s).mean() for s in by_step[step]] for step in steps]
        ax.plot(steps, [np.mean(v) for v in values], color=f"C{i % 10}", marker="o", ls="-" if i < 10 else "--")
        ax.plot(steps, values, ".", color=f"C{i % 10}", ms=3)
        ends.append((float(np.mean(values[-1])), steps[-1], kind, f"C{i % 10}"))
    ends.sort()
    at = [y for y, *_ in ends]                                                  # names stand where lines end, but at least 3.5 points apart
    for i, j in itertools.chain(*([(i, i + 1) for i in range(len(at) - 1)] for _ in range(200))):
        push = max(0, 3.5 - (at[j] - at[i])) / 2
        at[i], at[j] = at[i] - push, at[j] + push
    for where, (y, step, kind, colour) in zip(at, ends):
        ax.annotate(f"{kind}  {y:.0f}", (step, y), xytext=(step * 1.02, where), textcoords="data", color=colour, va="center", fontsize=10)
    ax.set(xlabel="training steps", ylabel="right, mean of six categories, %", ylim=(0, 100)), ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=100), plt.close(figure)


def study(a):
    """wirings, queries, shift: train, compare, draw."""
    if a.study == "shift":
        found = {}
        for kind, by_step in run_all(a).items():
            models = [TBAC.load(place(a, options)[1], a.device) for name, options in plan(a).items() if name.startswith(kind)]
            for shift in (1.0, 3.0):
                found[f"{kind}, sampled with {shift:.0f}"] = {max(by_step): [drawn(a, model, shift=shift) for model in models]}
    else:
        found = run_all(a)
    against = {"wirings": ("last", "top"), "queries": ["last, 16 queries"], "shift": ["trained with shift 1, sampled with 3"]}[a.study]
    rows = table(found, *against)
    for n in QUERIES if a.study == "queries" else ():                           # as many queries, other taps
        top, last = (found.get(f"{wiring}, {n} queries") for wiring in ("top", "last"))
        if top and last:
            rows[f"top, {n} queries"]["minus last"] = paired(top[max(top)], last[max(last)])
            print(f"{n} queries, top minus last: {points(rows[f'top, {n} queries']['minus last'])}")
    plot_curves(found, a.out / f"{a.study}.png")
    curve = {kind: {step: [overall(s).mean() for s in scores] for step, scores in by_step.items()} for kind, by_step in found.items()}
    return dict(table=rows, curve=curve)


# ------------------------------------------------------------------------------------------------------------ to look inside

def settings(a):
    """Guidance and steps when drawing, image guidance when editing, of one trained model."""
    model, rows = TBAC.load(a.model, a.device), {}
    plans = {f"guidance {g}, 20 steps": dict(guidance=g, steps=20) for g in (1.0, 2.0, 4.5, 8.0)}
    plans |= {f"guidance 4.5, {n} steps, {solver}": dict(steps=n, solver=solver) for n in (3, 5, 10) for solver in ("dpm++", "euler")}
    for name, how in tqdm(plans.items(), "settings"):
        scores = drawn(a, model, **how)
        rows[name] = {c: resampled([v]) for c, v in scores.items()} | {"mean of 6": resampled([overall(scores)])}
        tqdm.write(f"{name:32} {100 * rows[name]['mean of 6']['mean']:.0f}")
    edits = {}
    for g in tqdm((1.0, 1.5, 3.0), "image guidance"):
        scores, _ = evaluate.benchmark(model, ("edit",), a.n, image_guidance=g)
        mean = {what: row for (_, name, what, pairs), row in evaluate.summary(scores).items() if (name, pairs) == ("mean of 6", "seen")}
        tqdm.write(f"image guidance {g}: " + ", ".join(f"{what} {evaluate.percent(row)}" for what, row in mean.items()))
        edits[f"image guidance {g}"] = mean
    return dict(table=rows, edits=edits)


@contextlib.contextmanager
def replaced(model, j, how):
    """The model with rung j of each prompt (not of the null prompts) replaced: by the null prompt's, by a distant rung, by another prompt's:
    that of half a batch further on, since pictures of one prompt stand side by side."""
    encode = model.encode

    def changed(prompts, images=None):
        rungs = encode(prompts, images).clone()                                 # (L, 2 B, Q, caption_dim): null prompts, prompts
        null, own = rungs.chunk(2, 1)
        ways = {"null prompt": null[j], "another rung": own[(j + len(rungs) // 2) % len(rungs)], "another prompt": own[j].roll(own.shape[1] // 2, 0)}
        own[j] = ways[how].clone()
        return rungs
    model.encode = changed
    try:
        yield
    finally:
        del model.encode


def rungs(a):
    """Scores when one rung is replaced: a heat map of rung by category for each way."""
    model, found = TBAC.load(a.model, a.device), {}
    whole, L = drawn(a, model), model.config.dit.n_layer
    ways = ("null prompt", "another rung", "another prompt")
    for how, j in tqdm(list(itertools.product(ways, range(L))), "rungs"):
        with replaced(model, j, how):
            found.setdefault(how, []).append(drawn(a, model))
    names = list(whole)
    lost = {how: [[100 * (np.mean(s[n]) - np.mean(whole[n])) for n in names] for s in each] for how, each in found.items()}
    figure, axes = plt.subplots(1, len(ways), figsize=(15, 4.5), constrained_layout=True, sharey=True)
    for ax, how in zip(axes, ways):
        shown = ax.imshow(lost[how], cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
        for j, i in itertools.product(range(L), range(len(names))):
            ax.text(i, j, f"{lost[how][j][i]:+.0f}", ha="center", va="center", fontsize=8)
        ax.set(title=f"rung as that of {how}", xticks=range(len(names)), yticks=range(L), ylabel="rung = DiT block")
        ax.set_xticklabels(names, rotation=60, ha="right", fontsize=8)
    figure.colorbar(shown, ax=axes, label="points lost or won")
    figure.savefig(a.out / "rungs.png", dpi=70), plt.close(figure)
    return dict(whole={n: float(np.mean(v)) for n, v in whole.items()}, points={how: [dict(zip(names, row)) for row in lost[how]] for how in ways})


def probe_facts(scene, text):
    """What a prompt says: colour and shape of the thing that it names first and of another one, how many things there are, and, if it tells, at
    which side of the other the first one is. None where it does not say."""
    first, *others = sorted(scene.things, key=lambda t: text.find(t.name))
    other = next((t for t in others if t.name != first.name), None)
    side = world.relation(first, other) if world.sides(scene) else None
    return {"first colour": first.colour, "first shape": first.shape, "second colour": other and other.colour, "second shape": other and other.shape,
            "count": len(scene.things), "side": side}


def probes(a, train_n=1600, test_n=400):
    """Linear (ridge) probes of the queries' states at every depth, fitted on some prompts and tested on others."""
    model, rng, texts, facts = TBAC.load(a.model, a.device), random.Random(0), [], []
    while len(texts) < train_n + test_n:
        scene = world.sample_scene(rng)
        text = language.caption(scene, rng)
        if text not in texts:
            texts.append(text), facts.append(probe_facts(scene, text))
    model.ladder.taps = [model.config.mllm.n_layer]                             # so that every layer runs
    read = model.mllm.rows(texts, None, DRAW, then="<|vision_start|>")
    with torch.no_grad():
        parts = [torch.stack(model.hear([read[i:i + 10]])).float().cpu() for i in tqdm(range(0, len(read), 10), "read")]               # packs of ten
    states = torch.cat(parts, 1).flatten(2)                                     # (depths, prompts, Q M)
    rows = {}
    for fact in facts[0]:
        known = [i for i, f in enumerate(facts) if f[fact] is not None]
        classes = sorted({facts[i][fact] for i in known}, key=str)
        y = torch.tensor([classes.index(facts[i][fact]) for i in known])
        cut = sum(i < train_n for i in known)
        most = y[:cut].bincount().argmax()
        rows[fact] = dict(chance=(y[cut:] == most).float().mean().item(), depths=[ridge(x[known], y, cut) for x in states])
        print(f"{fact:13} chance {100 * rows[fact]['chance']:3.0f}, depth by depth", *(f"{100 * v:3.0f}" for v in rows[fact]["depths"]))
    plot_probes(rows, model, a.out / "probes.png")
    return dict(table=rows)


def plot_probes(rows, model, file):
    """Right answers depth by depth, chance dotted; the depths that the ladder taps are shaded."""
    c = model.config
    taps = ladder.rungs(c.mllm.n_layer, c.dit.n_layer, c.wiring)
    figure, ax = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    ax.axvspan(min(taps) - 0.3, max(taps) + 0.3, color="0.92", label=f"tapped by {c.wiring}")
    for i, (fact, row) in enumerate(rows.items()):
        ax.plot([100 * v for v in row["depths"]], "o-", color=f"C{i}", label=fact)
        ax.axhline(100 * row["chance"], color=f"C{i}", ls=":", lw=1)
    ax.set(xlabel="MLLM state (0 enters the first layer)", ylabel="right, %", ylim=(0, 102)), ax.grid(alpha=0.3), ax.legend(loc="lower right")
    figure.savefig(file, dpi=100), plt.close(figure)


def ridge(x, y, cut):
    """A ridge regression to one-hot classes fitted to the rows before `cut` (in its dual form: features are many more) -> accuracy on the others."""
    x = torch.nn.functional.pad((x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-6), (0, 1), value=1.0).double()
    gram = x[:cut] @ x[:cut].T
    penalty = 0.01 * gram.diagonal().mean() * torch.eye(cut, dtype=x.dtype)
    weights = torch.linalg.solve(gram + penalty, torch.nn.functional.one_hot(y[:cut]).to(x.dtype))
    return ((x[cut:] @ x[:cut].T @ weights).argmax(1) == y[cut:]).float().mean().item()


STUDIES = dict(wirings=study, queries=study, shift=study, settings=settings, rungs=rungs, probes=probes)


def options(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--model", default=str(ROOT / "toy" / "weights"),
                   help="its MLLM and autoencoder are what training starts from; the last three studies look at all of it (default: the toy)")
    p.add_argument("--dit", help="folder with the DiT before it met a ladder (stage dit), needed to train")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/ablate"))
    p.add_argument("--only", nargs="+", help="only these wirings (or other kinds)")
    p.add_argument("--seeds", type=int, default=3), p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--batch", type=int, default=24), p.add_argument("--every", type=int, default=250, help="steps between scores")
    p.add_argument("--n", type=int, default=24, help="prompts per category"), p.add_argument("--pictures", type=int, default=1, help="per prompt")
    p.add_argument("--draw-steps", type=int, default=10)
    p.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2, help="runs at a time")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args(argv)
    if min(a.seeds, a.steps, a.batch, a.every, a.n, a.pictures, a.draw_steps, a.jobs) < 1:
        p.error("seeds, steps, batch, every, n, pictures, draw-steps and jobs must be 1 or more")
    if STUDIES[a.study] is not study and a.only:
        p.error(f"--only: {a.study} has no kinds to choose from")
    if STUDIES[a.study] is study and not a.dit:
        p.error("--dit FOLDER: the DiT that the runs start from, made by `python train.py --stage dit --model runs/dcae --out runs/dit`")
    return a


def main(argv=None):
    a = options(argv)
    try:
        a.out.mkdir(parents=True, exist_ok=True)
        a.default_queries = TBAC.load(a.model).config.n_query
        found = STUDIES[a.study](a)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if a.device.startswith("cuda") else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    said = vars(a) | {folder: pathlib.Path(getattr(a, folder) or "").name for folder in ("model", "dit", "out")}     # without the way to it
    said |= dict(weights=digest(a.model, *filter(None, [a.dit])))
    write(a.out / f"{a.study}.json", dict(options=said, commit=commit, hardware=hardware, torch=torch.__version__) | found)
    print(f"wrote {a.out / a.study}.json")
