"""The study that no source we could read has: does a DiT that attends to many depths of the MLLM
beat one that attends to the last? docs/study.md says what is asked and what was fixed before.

    python -m lab.ablate primary     ladder against final: the one question that the study is for
    python -m lab.ablate penultimate the same against another single depth
    python -m lab.ablate wirings     every wiring of ladder.py
    python -m lab.ablate connectors  one connector for all blocks, or one for each
    python -m lab.ablate queries     4, 8, 16, 32 queries
    python -m lab.ablate pairs       2, 6, 12 pairs of colour and shape held out
    python -m lab.ablate mllms       four MLLMs
    python -m lab.ablate shift       times shifted in training, or not
    python -m lab.ablate others      these six: all but the first two

They train: stage t2i, several seeds of each model of lab/plan.py, all from the same DiT and
autoencoder, many models at a time (lab/trials.py). What they start from lies in --start. What is
finished is kept in --out. A study that was stopped, by Ctrl-C, by --minutes or by a power cut, goes
on where it was when the same command is given again. Given twice at once, in two shells, it uses
two cores.

    python -m lab.ablate settings    guidance, steps and image guidance against score
    python -m lab.ablate rungs       one rung at a time replaced
    python -m lab.ablate probes      what the queries' states tell, depth by depth (with --start)
    python -m lab.ablate slots       some of the queries muted, or taken from another prompt
    python -m lab.ablate noise       how much of place and number is the noise's
    python -m lab.ablate told        where edits are lost: what the queries' states say of them
    python -m lab.ablate overfit     the loss when one batch is learnt by heart

These look at --model as it is (lab/inside.py).

A study writes STUDY.json into --out, and all but settings, told and overfit a picture beside it.
How far its tables can be trusted depends on the number of seeds and steps; both stand in the JSON
file, with commit (of each run its own) and machine.
"""
import itertools
import pathlib
import sys
import time

import matplotlib
import numpy as np
import torch

from engine import command
from engine.device import commit, machine
from engine.distributed import StopSignal
from engine.files import weights_digest
from engine.limits import MAX_FACTOR, MAX_STEPS, MAX_TRAINING_STEPS, MAX_WORKERS
from engine.outputs import prepare_folder
from lab import dots, evaluate, inside, plan, statistics, tables, trials
from lab.plan import PARTS, Arm, Part
from lab.statistics import Estimate
from lab.trials import write_json
from sample import TOY_FOLDER
from toy.world import pairs_beside

# ----------------------------------------------------------------------------------- the prompts


def chosen(cases: list, pairs: str, n_held_out: int) -> list[int]:
    """The places of the prompts that the arms of a part are compared by: of pairs that none of them
    holds out, or with a pair that all of them do and no other that only some do."""
    all_hold, some_hold = plan.pairs_held_out(2), plan.pairs_held_out(n_held_out)
    found = []
    for i, case in enumerate(cases):
        if case.pairs == pairs and not pairs_beside(case.target) & (some_hold - all_hold):
            found.append(i)
    return found


def results(args, part: Part, arm: Arm) -> list[dict]:
    """Of each seed, what is known of its run."""
    return [trials.result(args, run) for run in part.runs(args.seeds) if run.arm == arm]


def scores_of(args, part: Part, pairs: str, step: int | None = None) -> tuple[dict, np.ndarray]:
    """At a step (default: the last) -> {label: 0 or 1 of each (seed, prompt)}, the prompts'
    categories."""
    cases = trials.cases(args)
    places = chosen(cases, pairs, max(arm.held_out for arm in part.arms.values()))
    found = {}
    for label, arm in part.arms.items():
        rows = [one["scores"][str(step or args.steps)] for one in results(args, part, arm)]
        found[label] = np.array([[float(row[i]) for i in places] for row in rows])
    return found, np.array([cases[i].category for i in places])


# -------------------------------------------------------------------------------------- analysis

def as_row(found: Estimate, table: np.ndarray, groups: np.ndarray) -> dict:
    """points: each seed's mean of the categories' means."""
    points = np.mean([table[:, groups == name].mean(1) for name in np.unique(groups)], 0)
    interval = np.clip([found.low, found.high], 0, 1).tolist()
    return dict(mean=found.mean, interval=interval, points=points.tolist())


def score_table(scores: dict, groups: np.ndarray) -> dict:
    """{label: {category or "mean of 6": mean, interval, points}}"""
    rows = {}
    for label, table in scores.items():
        row = {}
        for name in dict.fromkeys(groups):
            own = groups == name
            row[name] = as_row(statistics.estimate(table[:, own]), table[:, own], groups[own])
        whole = statistics.estimate(table, groups)
        row[f"mean of {len(row)}"] = as_row(whole, table, groups)
        rows[label] = row
    return rows


def difference(ours: str, theirs: str | None = None) -> str:
    """What is compared, in words: what both have in common stands there once."""
    if theirs is None:
        return ours
    first, _, rest = ours.partition(", ")
    other, _, other_rest = theirs.partition(", ")
    if rest and rest == other_rest:
        return f"{first} minus {other}, {rest}"
    if rest and first == other:
        return f"{first}, {rest} minus {other_rest}"
    return f"{ours} minus {theirs}"


def compare(part: Part, scores: dict, groups: np.ndarray) -> dict[str, Estimate]:
    """{ours minus theirs, in words: the paired difference, prompt by prompt and seed by seed}"""
    found = {}
    for pair in part.compared:
        found[difference(*pair)] = statistics.estimate(minus(scores, *pair), groups)
    return found


def curve_of(args, part: Part) -> dict:
    """{label: {step: [of each seed the mean over the prompts that it was scored by on the way]}}"""
    cases = trials.cases(args)
    early = trials.early(args)
    places = [i for i, case in enumerate(cases) if case in early]
    found = {}
    for label, arm in part.arms.items():
        curve = found.setdefault(label, {})
        for one in results(args, part, arm):
            for step, row in one["scores"].items():
                row = row if len(row) == len(early) else [row[i] for i in places]
                curve.setdefault(int(step), []).append(float(np.mean(list(map(int, row)))))
    return found


def gaps(part: Part, scored: dict) -> dict[str, Estimate]:
    """scored: {pairs: what scores_of gives} -> {seen minus never seen, in words: the gap}"""
    return {gap_of(labels): gap(scored, labels) for labels in part.gaps}


def gap_of(labels: tuple[str, ...]) -> str:
    return f"{difference(*labels)}: seen minus never seen"


def gap(scored: dict, labels: tuple[str, ...]) -> Estimate:
    """Of one label, or of one minus another, over the categories that have both."""
    (seen, groups), (never, never_groups) = scored["seen"], scored["never seen"]
    both = np.isin(groups, never_groups)
    return statistics.gap(minus(seen, *labels)[:, both], minus(never, *labels),
                          groups[both], never_groups)


def minus(scores: dict, ours: str, theirs: str | None = None) -> np.ndarray:
    return scores[ours] - scores[theirs] if theirs else scores[ours]


def again(args, part: Part, scores: dict, groups: np.ndarray) -> dict[str, Estimate]:
    """What is compared, once more: without the categories of a single object, which may be near
    their ceiling; and by the prompts that no pilot run was judged by, which are not those of the
    looks along the way."""
    early, cases = trials.early(args), trials.cases(args)
    new = [cases[i] not in early for i in chosen(cases, "seen", 2)]
    ways = {"several objects": ~np.isin(groups, evaluate.ALONE), "new prompts": np.array(new)}
    found = {}
    for way, own in ways.items():
        if not own.any():
            continue
        kept = {label: table[:, own] for label, table in scores.items()}
        found |= {f"{label}, {way}": test
                  for label, test in compare(part, kept, groups[own]).items()}
    return found


def order(part: Part, scores: dict, groups: np.ndarray) -> dict[str, Estimate]:
    """Of all arms together -> {a category minus the next one, in words: the gap}"""
    found = {}
    whole = np.mean(list(scores.values()), 0)                               # (seeds, prompts)
    for easier, harder in itertools.pairwise(part.order):
        first, second = groups == easier, groups == harder
        found[f"{easier} minus {harder}"] = statistics.gap(
            whole[:, first], whole[:, second], groups[first], groups[second])
    return found


def last_quarter(args, part: Part) -> dict[str, Estimate]:
    """By how much the mean of all arms moves in the last quarter of the steps; each arm; and what
    is compared. Nothing where they were scored at the end only."""
    start = trials.three_quarters(args)
    if start is None:
        return {}
    (before, groups), (after, _) = (scores_of(args, part, "seen", step)
                                    for step in (start, args.steps))
    moved = {label: after[label] - before[label] for label in part.arms}
    found = {"all arms": np.mean(list(moved.values()), 0)} | moved
    found |= {difference(*pair): minus(moved, *pair) for pair in part.compared}
    return {label: statistics.estimate(table, groups) for label, table in found.items()}


def analyse(args, name: str) -> dict:
    """Of one part, all of whose runs are finished."""
    part = PARTS[name]
    scored = {pairs: scores_of(args, part, pairs) for pairs in part.scored}
    content = dict(question=part.question, scored={})
    for pairs, (scores, groups) in scored.items():
        content["scored"][pairs] = dict(table=score_table(scores, groups),
                                        compared=compare(part, scores, groups),
                                        prompts=len(groups))
    contrasts = gaps(part, scored) | order(part, *scored["seen"])
    if part.again:
        contrasts = again(args, part, *scored["seen"]) | contrasts
    moved = {label: test.json() for label, test in last_quarter(args, part).items()}
    runs = {run.name: trials.result(args, run) for run in part.runs(args.seeds)}
    return content | dict(
        contrasts=contrasts, curve=curve_of(args, part), last_quarter=moved, runs=runs)


def tests_of(content: dict) -> dict[str, dict]:
    """{which prompts: {what is compared, in words: the test}}"""
    found = {pairs: scored["compared"] for pairs, scored in content["scored"].items()}
    return found | dict(contrasts=content["contrasts"])


def at_the_floor(part: Part, content: dict) -> set[tuple[str, str]]:
    """{(which prompts, what is compared)} where neither arm draws what it should."""
    found = set()
    tables = {pairs: scored["table"] for pairs, scored in content["scored"].items()}
    for pairs, rows in tables.items():
        means = {label: list(row.values())[-1]["mean"] for label, row in rows.items()}
        found |= {(pairs, difference(*pair)) for pair in part.compared
                  if max(means[label] for label in pair) < plan.FLOOR}
    for labels in part.gaps:
        # Of the categories that have both.
        *both, _ = tables["never seen"][labels[0]]
        means = [np.mean([rows[label][category]["mean"] for category in both])
                 for rows in tables.values() for label in labels]
        if max(means) < plan.FLOOR:
            found.add(("contrasts", gap_of(labels)))
    return found


def correct(found: dict[str, dict]) -> None:
    """Puts p by Holm's correction and a verdict, which goes by it, beside every comparison. The
    primary one is asked for by itself: it needs no correction. All others are corrected for the
    whole plan, whichever parts are found here."""
    family = {}
    for name, content in found.items():
        for which, tests in tests_of(content).items():
            family |= {(name, which, label): test for label, test in tests.items()}
    rest = {key: test.p for key, test in family.items() if key[:2] != ("primary", "seen")}
    corrected = statistics.holm(rest, plan.n_compared())
    floor = {name: at_the_floor(PARTS[name], content) for name, content in found.items()}
    for key, test in family.items():
        name, which, label = key
        p = corrected.get(key)
        verdict = statistics.verdict(test, plan.SMALLEST / 100, p)
        if (which, label) in floor[name]:
            verdict = "both at the floor"
        row = test.json() | dict(verdict=verdict)
        if p is not None:
            row["holm"] = dict(p=p, of=plan.n_compared())
        tests_of(found[name])[which][label] = row


# ----------------------------------------------------------------------------------------- shown

def plot_part(name: str, content: dict, out: pathlib.Path) -> None:
    """Arms and differences; and for each arm its categories, in order of difficulty."""
    scores, differences, categories = {}, {}, {}
    several = len(content["scored"]) > 1
    for pairs, scored in content["scored"].items():
        ending = f" ({pairs})" if several else ""
        for label, row in scored["table"].items():
            *names, mean = row
            scores[label + ending] = row[mean]
            for category in names:
                categories.setdefault(category + ending, {})[label] = row[category]
        for label, test in scored["compared"].items():
            differences[label + ending] = test
    panels = [differences, content["contrasts"]] if content["contrasts"] else [differences]
    dots.plot_arms(scores, panels, plan.SMALLEST, out / f"{name}.png")
    if len(PARTS[name].arms) == 2:
        by_score = sorted(categories.items(), reverse=True,
                          key=lambda item: np.mean([row["mean"] for row in item[1].values()]))
        dots.plot_series(dict(by_score), out / f"{name}-categories.png", "right, %")


# ----------------------------------------------------------------------------------- the studies

class Clock:
    """Says when to stop: told to by a signal, or after so many minutes."""

    def __init__(self, minutes: float | None):
        self.signal = StopSignal()
        self.signal.listen()
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self) -> bool:
        late = self.end is not None and time.monotonic() > self.end
        return late or self.signal.number is not None


def is_complete(args, part: Part) -> bool:
    return all(trials.is_finished(args, run) for run in part.runs(args.seeds))


def starts(args) -> list[str]:
    """The folders in --start that these parts need. Probes take what is there, and the MLLM of
    --model, too."""
    if args.study in inside.STUDIES:
        return [folder.name for folder in inside.other_mllms(args.start).values()]
    mllms = {arm.mllm for name in args.parts for arm in PARTS[name].arms.values()}
    return sorted({folder for mllm in mllms for folder in trials.starts(mllm)})


def train(args, names: list[str]) -> None:
    """Trains what is missing of these parts, then analyses those that are complete. ValueError
    where they have nothing to start from."""
    missing = [name for name in starts(args) if not (args.start / name).is_dir()]
    if missing:
        raise ValueError(f"--start {args.start} has no {', '.join(missing)}: docs/study.md says "
                         'under "To repeat it" how to make them')
    about = origin(args)
    runs = [run for name in names for run in PARTS[name].runs(args.seeds)]
    clock = Clock(args.minutes)
    finished = trials.train_all(runs, args, clock)
    found = {name: analyse(args, name) for name in names if is_complete(args, PARTS[name])}
    correct(found)
    for name, content in found.items():
        print(f"\n## {name}: {content['question']}\n\n{tables.part(content)}")
        plot_part(name, content, args.out)
        write_json(args.out / f"{name}.json", about | content)
    if not finished:
        n = sum(trials.is_finished(args, run) for run in set(runs))
        why = "stopped" if clock() else "another process is at the rest"
        print(f"\n{why}: {n} of {len(set(runs))} models are finished. The same command goes on")


def look(args, name: str) -> None:
    # First: what is missing should not show after the work only.
    about = origin(args)
    write_json(args.out / f"{name}.json", about | inside.STUDIES[name](args))
    print(f"wrote {args.out / name}.json")


# ---------------------------------------------------------------------------------- command line

# Prompts per category of the studies that look at a model, as docs/ quotes them.
N_INSIDE = dict(slots=inside.PROMPTS, noise=inside.PROMPTS)


MANY = command.count(1, 100_000)


def options(argv=None):
    p = command.Parser(prog="python -m lab.ablate", description=__doc__)
    p.add_argument("study", choices=[*PARTS, "others", *inside.STUDIES],
                   help="what each one does stands above")
    add_folders(p.add_argument)
    add_plan(p.add_argument)
    add_machine(p.add_argument, torch.cuda.is_available())
    args = p.parse_args(argv)
    args.parts = [args.study]
    if args.study == "others":
        args.parts = [name for name in PARTS if not plan.is_long(name)]
    long = plan.is_long(args.study)
    args.steps = args.steps or (plan.STEPS if long else plan.OTHER_STEPS)
    args.looks = args.looks or (plan.LOOKS if long else plan.OTHER_LOOKS)
    trains = args.study not in inside.STUDIES
    args.n = args.n or (plan.PROMPTS if trains else N_INSIDE.get(args.study, 24))
    args.n_early = min(args.n, args.n_early)
    refuse_unused(p, args, sys.argv[1:] if argv is None else argv)
    if trains:
        refuse_missing(p, args)
    return args


def add_folders(add) -> None:
    add("--model", type=command.path_text, default=str(TOY_FOLDER),
        help="folder of the model that studies which do not train look at (default: the toy)")
    add("--start", type=command.path, help="folder with what runs start from, needed to train: "
        "dit, the DiT before it met a ladder; mllm, captions, gist, the MLLMs (docs/study.md: \"To "
        "repeat it\"). For probes the last two, if it is given")
    add("--out", type=command.path, default=pathlib.Path("runs/ablate"),
        help="folder for runs, tables and pictures (default: runs/ablate)")


def add_plan(add) -> None:
    """What the plan says, for those who try something else."""
    add("--seeds", type=MANY, help="runs of each model (default: the plan's, 8 or 5; with 1, "
        "intervals and p know nothing of how seeds differ)")
    add("--steps", type=command.count(1, MAX_TRAINING_STEPS),
        help=f"of training (default: {plan.STEPS} for primary and penultimate, {plan.OTHER_STEPS} "
        "for the others)")
    add("--batch", type=MANY, default=plan.BATCH,
        help=f"examples a step (default: {plan.BATCH})")
    add("--lr", type=command.real(0, 1), default=plan.LR,
        help=f"learning rate (default: {plan.LR})")
    add("--looks", type=MANY, help="how often models are scored, the last time at the end "
        f"(default: {plan.LOOKS} for primary and penultimate, {plan.OTHER_LOOKS} for the others)")
    add("--n", type=MANY, help=f"prompts per category (default: {plan.PROMPTS} to train, 24 else; "
        "slots and noise: 100 in all)")
    add("--n-early", type=MANY, default=plan.PROMPTS_EARLY,
        help=f"the same, before the end (default: {plan.PROMPTS_EARLY})")
    add("--pictures", type=MANY, default=1, help="per prompt, of settings and rungs (default: 1)")
    add("--draw-steps", type=command.count(1, MAX_STEPS), default=plan.DRAW_STEPS,
        help=f"of a picture (default: {plan.DRAW_STEPS})")
    add("--guidance", type=command.real(0, MAX_FACTOR), default=plan.GUIDANCE,
        help=f"of pictures of models that are trained (default: {plan.GUIDANCE})")


def add_machine(add, gpu: bool) -> None:
    add("--width", type=MANY, default=40 if gpu else 1,
        help="models in one stack, as far as their shapes agree (default: 40, CPU 1)")
    add("--together", type=MANY, default=1000 if gpu else 8,
        help="models that learn from the same examples at once; on a CPU few, so that some are "
        "finished soon (default: 1000, CPU 8)")
    add("--workers", type=command.count(0, MAX_WORKERS), default=4 if gpu else 0,
        help="processes that make examples (default: 4, CPU none)")
    add("--jobs", type=command.count(1, MAX_WORKERS), default=8 if gpu else 1,
        help="processes that grade pictures (default: 8, CPU 1)")
    add("--minutes", type=command.real(0, 1e6), help="stop after these, to go on later")
    add("--device", type=command.device, default="cuda" if gpu else "cpu",
        help="(default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="to compute in, the weights are float32 (default: bfloat16)")


def refuse_missing(p, args) -> None:
    """The parts that runs start from."""
    if not args.start:
        p.error(f"--start FOLDER: what runs start from, {', '.join(starts(args))}; made as "
                "docs/study.md says under \"To repeat it\"")


def options_of(args) -> set[str]:
    """Those that its study uses."""
    if args.study in inside.STUDIES:
        return {"study", "model", "out", "device", *inside.OPTIONS[args.study]}
    return vars(args).keys() - {"parts", "model", "pictures"}


def refuse_unused(p, args, words: list[str]) -> None:
    """Options that are for other studies."""
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if unused := given - {f"--{name.replace('_', '-')}" for name in options_of(args)}:
        p.error(f"{args.study} does not ask for {', '.join(sorted(unused))}: leave it out")


def origin(args) -> dict:
    """What was asked for (folders without the way to them), by which code, on what."""
    names = options_of(args)
    said = {name: value for name, value in vars(args).items() if name in names}
    for folder in said.keys() & {"model", "start", "out"}:
        said[folder] = pathlib.Path(said[folder] or "").name
    if "model" in said:
        said["weights"] = weights_digest(args.model)
    if args.start:
        said |= {f"{name} weights": weights_digest(args.start / name) for name in starts(args)}
    return dict(options=said, commit=commit(), machine=machine(args.device))


def main(argv=None):
    args = options(argv)
    # Figures go to files: a command needs no screen.
    matplotlib.use("Agg")
    with command.one_line_errors():
        endings = (".json", ".png", "-categories.png")
        prepare_folder(args.out, *(name + ending for name in args.parts for ending in endings))
        if args.study in inside.STUDIES:
            look(args, args.study)
        else:
            train(args, args.parts)


if __name__ == "__main__":
    main()
