"""Scores a model on the toy world: does it draw, change and say what it was asked? First version: a table, scores.json, failures.

    python evaluate.py --model runs/edit --n 100

Pictures are read by the grader in data.py, from pixels alone. Its own error and the autoencoder's ceiling are reported beside the
scores, so that nobody reads more into a score than is there. Intervals are 95 % bootstraps over the examples.
"""
import argparse
import json
import pathlib
import random
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import data
import sample
from tbac import TBAC


def batches(items, n, name):
    for i in tqdm(range(0, len(items), n), name, leave=False):
        yield items[i:i + n]


def plain_scene(rng, n, held_out=False):
    """A scene that its plain text describes fully: medium sizes on white, two things in a clear relation."""
    while True:
        s = data.sample_scene(rng, n, held_out)
        s = data.Scene(tuple(replace(t, size="medium") for t in s.things))
        if data.valid(s, held_out) and (n != 2 or data.relation(*s.things)):
            return s


def pictures(model, prompts, images, a, name):
    out, generator = [], torch.Generator(a.device).manual_seed(a.seed)
    for rows in batches(list(zip(prompts, images)), a.batch, name):
        p, i = zip(*rows)
        out += sample.generate(model, list(p), list(i), steps=a.steps, guidance=a.guidance, generator=generator)
    return out


def drawing(model, a):
    """-> {category: list of right or wrong}, the first six of each as (picture, prompt), and failures likewise"""
    scores, shown, failures = {}, [], []
    for name, n, held_out in (("one thing", 1, False), ("two things", 2, False), ("two things, held-out pair", 2, True), ("three or four", 3, False)):
        rng = random.Random(f"{a.seed} {name}")
        scenes = [plain_scene(rng, n if n < 3 else rng.choice((3, 4)), held_out) for _ in range(a.n)]
        prompts = [data.plain(s) for s in scenes]
        drawn = pictures(model, prompts, [[]] * a.n, a, name)
        checks = [data.check(data.grade(p), s) for p, s in zip(drawn, scenes)]
        scores[f"draw: {name}"] = [all(c.values()) for c in checks]
        scores[f"draw: {name}, colours and shapes"] = [c["colours_shapes"] for c in checks]
        shown += list(zip(drawn, prompts))[:6]
        failures += [(p, t) for p, t, c in zip(drawn, prompts, checks) if not all(c.values())][:8]
    return scores, shown, failures


def editing(model, a):
    """Was the instruction followed (all of the target is there, in place), and is the rest as it was?"""
    scores, shown, failures = {}, [], []
    for action in data.EDITS:
        rng, cases = random.Random(f"{a.seed} {action}"), []
        while len(cases) < max(1, a.n // 4):
            scene = data.sample_scene(rng, rng.choice((1, 2, 3)))
            try:
                cases.append((scene, *data.edit(scene, rng, action)[:2]))
            except ValueError:                                              # not possible in this scene
                continue
        drawn = pictures(model, [order for _, order, _ in cases], [[data.render(s)] for s, _, _ in cases], a, action)
        found = [data.grade(p) for p in drawn]
        follow = [data.matches(f, target, places=action == "move") for f, (_, _, target) in zip(found, cases)]
        scores[f"edit: {action}"] = follow
        scores[f"edit: {action}, rest unchanged"] = [
            all(any(t.name == f.name and abs(t.x - f.x) + abs(t.y - f.y) < 0.12 for f in seen.things) for t in set(s.things) & set(target.things))
            for seen, (s, _, target) in zip(found, cases)]
        shown += [pair for p, (s, order, _) in list(zip(drawn, cases))[:3] for pair in ((data.render(s), "before"), (p, order))]
        failures += [(p, order) for p, (_, order, _), ok in zip(drawn, cases, follow) if not ok][:4]
    return scores, shown, failures


def understanding(model, a):
    """Exact answers, about pictures and about scenes in words."""
    scores = {}
    for seen in (True, False):
        for kind in data.QUESTIONS:
            rng, rows = random.Random(f"{a.seed} {kind}"), []
            for _ in range(20 * a.n):
                scene = data.sample_scene(rng)
                try:
                    question, answer, _ = data.question(scene, rng, kind, seen=seen)
                except ValueError:                                          # nothing of this kind to ask
                    continue
                rows.append((question, [data.render(scene)], answer) if seen else (f"{data.plain(scene)}. {question}", [], answer))
                if len(rows) == a.n:
                    break
            said = [x for part in batches(rows, a.batch, kind) for x in model.ask_all([r[0] for r in part], [r[1] for r in part])]
            if rows:
                scores[f"ask about a {'picture' if seen else 'text'}: {kind}"] = [x == r[2] for x, r in zip(said, rows)]
    return scores


def ceilings(model, a):
    """The grader on rendered scenes, and on what the autoencoder gives back of them."""
    rng = random.Random(a.seed)
    scenes = [data.sample_scene(rng) for _ in range(a.n)]
    rendered = [data.render(s) for s in scenes]
    x = sample.to_pixels(rendered, a.device)
    back = [p for part in x.split(a.batch) for p in sample.decode(model, model.dcae.encode(part.to(model.dit.proj_out.weight.dtype)))]
    return {"grader on rendered scenes": [data.matches(data.grade(p), s) for p, s in zip(rendered, scenes)],
            "grader on reconstructions": [data.matches(data.grade(p), s) for p, s in zip(back, scenes)]}


def interval(values, seed=0, resamples=1000):
    """95 % bootstrap interval of a mean."""
    v = np.asarray(values, float)
    means = v[np.random.default_rng(seed).integers(0, len(v), (resamples, len(v)))].mean(1)
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(pathlib.Path(__file__).parent / "assets" / "toy"))
    p.add_argument("--n", type=int, default=100, help="examples per category (editing: a quarter of it per action)")
    p.add_argument("--quick", action="store_true", help="20 examples per category, 10 steps")
    p.add_argument("--seed", type=int, default=0), p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=4.5), p.add_argument("--batch", type=int, default=25)
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/evaluate"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args()
    if a.quick:
        a.n, a.steps = 20, 10
    model = TBAC.load(a.model, a.device)
    with torch.no_grad():
        scores, answers = ceilings(model, a), understanding(model, a)
        drawn, *pages = drawing(model, a)
        edited, *more = editing(model, a)
    scores |= answers | {"ask: all of these": sum(answers.values(), [])} | drawn | edited
    table = {k: dict(mean=float(np.mean(v)), interval=interval(v), n=len(v)) for k, v in scores.items()}
    for k, row in table.items():
        print(f"{k:48s} {row['mean']:.3f}   [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]   n = {row['n']}")
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "scores.json").write_text(json.dumps(dict(options={k: str(v) for k, v in vars(a).items()}, scores=table), indent=1))
    for name, page in zip(("shown", "failures"), map(list.__add__, pages, more)):
        if page:
            data.sheet([p for p, _ in page], [t for _, t in page], scale=2, columns=6).save(a.out / f"{name}.png")
    print("wrote", a.out)


if __name__ == "__main__":
    main()
