"""From nothing to the toy in toy/weights, by one command:

    python -m lab.make --out runs/toy               # hours on two CPU cores; says how long
    python -m lab.make --out runs/dry --dry-run     # every stage a few steps: does all of it work?
    python -m lab.make --out runs/toy --beside runs/toy1    # another seed's scores in its record

    vit (and the tokenizer) -> dcae -> mllm -> dit -> ladder -> t2i -> edit -> scores -> `weights`

Each stage starts from the model of the one before. On a CPU it is two processes, with a thread and
half of the batch each. Where it was stopped or killed, the same command goes on. `--out` then holds
a folder for each stage and `weights`, which is what is shipped: the model, record.json (how it was
made, and its scores), logs.json, curves.png, words.txt, and sheets of pictures from each stage.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

import train
from engine.command import SEED, Parser, device, one_line_errors, path
from engine.device import commit, machine
from engine.files import digest, new_file, read_json, weight_files, write_text
from engine.state import checkpoints
from lab import curves, pretrain
from tbac import TBAC
from toy import language

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Stage:
    """seconds: of a step, measured on two cores of an AMD EPYC (family 25, model 17); words: more
    of its command line; like: the stage it is to the script, where that has another name."""
    name: str
    module: str
    seconds: float
    words: tuple[str, ...] = ()
    like: str = ""

    def option(self) -> str:
        return self.like or self.name

    def preset(self) -> dict:
        presets = train.PRESETS if self.module == "train" else pretrain.PRESETS
        return presets["toy"][self.option()]


RECIPE = (
    Stage("vit", "lab.pretrain", 0.11),
    Stage("dcae", "lab.pretrain", 0.34),
    Stage("mllm", "lab.pretrain", 0.54),
    Stage("dit", "lab.pretrain", 0.49),
    # First the ladder learns to speak to the DiT as it is, then both learn together.
    Stage("ladder", "train", 0.45, ("--shift", "3", "--train", "ladder"), like="t2i"),
    Stage("t2i", "train", 0.59, ("--shift", "3")),
    Stage("edit", "train", 0.61, ("--shift", "3")),
)
# Steps of each stage in a dry run, and the benchmark's options.
DRY_STEPS = 2
DRY_SCORES = ("--n", "1", "--pictures", "1", "--steps", "1")
# What the diary keeps of each stage.
MINUTES = ("minutes", "cpu_minutes")
BENCHMARK_SECONDS = 540


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m lab.make", description=__doc__)
    add = parser.add_argument
    add("--out", type=path, default=pathlib.Path("runs/toy"), help="folder (default: runs/toy)")
    add("--seed", type=SEED, default=0, help="of everything (default: 0)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    add("--dry-run", action="store_true", help=f"{DRY_STEPS} steps a stage")
    add("--beside", nargs="+", type=path, default=[], metavar="FOLDER",
        help="what this command made with other seeds: their scores stand in the record too")
    add("--stop-after", choices=[stage.name for stage in RECIPE],
        help="do not go on to what comes after this stage")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ what was made how

def open_diary(args) -> dict:
    """{commit, seed, dry_run, minutes: {stage: so far}, cpu_minutes: the same, finished: [stages],
    made: {stage: how}} of this --out. ValueError where it was made otherwise so far: one toy is of
    one commit."""
    made = dict(commit=commit(), seed=args.seed, dry_run=args.dry_run)
    file = args.out / "make.json"
    if not file.exists():
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty, and not of this command")
        args.out.mkdir(parents=True, exist_ok=True)
        diary = made | {what: {} for what in MINUTES} | dict(finished=[], made={})
        # What comes to lie here is of this command, even if it is killed at once.
        keep(diary, args)
        return diary
    diary = read_json(file)
    if not isinstance(diary, dict) or {*made, *MINUTES, "finished", "made"} - diary.keys():
        raise ValueError(f"{file} is not of this command: give another --out")
    if len(diary["finished"]) == len(RECIPE):
        made["commit"] = diary["commit"]
    for name, value in made.items():
        if diary.get(name) != value:
            raise ValueError(f"{args.out} was begun with {name} {diary.get(name)}, not {value}: "
                             "go on with that, or give another --out")
    return diary


def keep(diary: dict, args) -> None:
    write_text(args.out / "make.json", json.dumps(diary, indent=1))


# ---------------------------------------------------------------------------------- its processes

def command(stage: Stage, args) -> list[str]:
    """The command line of a stage."""
    batch = stage.preset()["batch"]
    start = [sys.executable, "-m", stage.module]
    if args.device == "cpu":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", "-m", stage.module]
        batch //= 2
    words = ["--stage", stage.option(), "--out", str(args.out / stage.name),
             "--seed", str(args.seed), "--device", args.device, "--batch", str(batch),
             *stage.words]
    before = RECIPE.index(stage) - 1
    if before >= 0:
        words += ["--model", str(args.out / RECIPE[before].name)]
    if args.dry_run:
        words += ["--steps", str(DRY_STEPS), "--warmup", "1", "--sheet-every", str(DRY_STEPS)]
    if (args.out / stage.name / "options.json").exists():
        words.append("--resume")
    return start + words


def steps(stage: Stage, args) -> int:
    return DRY_STEPS if args.dry_run else stage.preset()["steps"]


def done(stage: Stage, args) -> int:
    """The last step in its log."""
    with contextlib.suppress(OSError), open(args.out / stage.name / "log.jsonl", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
        if steps := re.findall(rb'^{"step": (\d+), "loss"', log.read(), re.MULTILINE):
            return int(steps[-1])
    return 0


def at_its_end(stage: Stage, args) -> bool:
    """Is its last checkpoint that of its last step, and its model there? (Then it may still have
    something to do: pretrain.FINISH. The diary says which stages have done all.)"""
    last = f"step-{steps(stage, args):08d}"
    found = [folder.name for folder in checkpoints(args.out / stage.name)]
    return found[-1:] == [last] and (args.out / stage.name / "model.safetensors").exists()


def train_all(args, diary: dict) -> None:
    """Runs the stages that are not finished, one after the other. ValueError if one fails."""
    names = [stage.name for stage in RECIPE]
    last = names.index(args.stop_after) if args.stop_after else len(names) - 1
    stages = RECIPE[:last + 1]
    left = Left(args, diary, stages)
    print(f"makes {args.out}, in about {duration(left.seconds())} on two CPU cores")
    total = sum(steps(stage, args) for stage in stages)
    with tqdm(total=total, desc="steps", mininterval=1) as bar:
        for stage in stages:
            if stage.name not in diary["finished"]:
                run(stage, args, diary, lambda: left.show(bar))


def check_commit(diary: dict, args) -> None:
    """ValueError where the code has become another since the beginning."""
    now, begun = commit(), diary["commit"]
    if now != begun:
        raise ValueError(f"the code is {now} by now, not {begun}, with which {args.out} was begun: "
                         "go back to that")


def run(stage: Stage, args, diary: dict, show: Callable) -> None:
    """A stage, to its end, or until this process is told to stop; then it saves first. The diary
    says how long it took, and how long the processor worked for it: beside other work it takes more
    minutes, but hardly more of these."""
    check_commit(diary, args)
    (args.out / stage.name).mkdir(exist_ok=True)
    file = args.out / f"{stage.name}.txt"
    with open(file, "ab") as output:
        process = subprocess.Popen(command(stage, args), cwd=ROOT, stdout=output, stderr=output,
                                   env=environment())
    before = diary["minutes"].get(stage.name, 0)
    began, worked = time.time(), cpu_seconds()
    try:
        while process.poll() is None:
            time.sleep(0.5 if args.dry_run else 5)
            diary["minutes"][stage.name] = before + (time.time() - began) / 60
            keep(diary, args)
            show()
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        before = diary["cpu_minutes"].get(stage.name, 0)
        diary["cpu_minutes"][stage.name] = before + (cpu_seconds() - worked) / 60
        keep(diary, args)
    if status or not at_its_end(stage, args):
        said = file.read_text(errors="replace")
        raise ValueError(f"stage {stage.name} failed (status {status}):\n" + said[-2000:])
    diary["finished"].append(stage.name)
    diary["made"][stage.name] = made_by(stage, args)
    keep(diary, args)


class Left:
    """What is left to do, by the steps in the logs, at their speed, else at the recipe's."""

    def __init__(self, args, diary: dict, stages: tuple[Stage, ...]):
        self.args, self.diary, self.stages = args, diary, stages

    def seconds(self) -> float:
        left = sum((steps(stage, self.args) - done(stage, self.args)) * self.per_step(stage)
                   for stage in self.stages)
        unscored = self.args.stop_after or self.args.dry_run
        return left + (0 if unscored else BENCHMARK_SECONDS)

    def per_step(self, stage: Stage) -> float:
        n, minutes = done(stage, self.args), self.diary["minutes"].get(stage.name, 0)
        return minutes * 60 / n if n > 20 and minutes else stage.seconds

    def show(self, bar: tqdm) -> None:
        bar.n = sum(done(stage, self.args) for stage in self.stages)
        now = ", ".join(f"{stage.name} {n}/{steps(stage, self.args)}" for stage in self.stages
                        if 0 < (n := done(stage, self.args)) < steps(stage, self.args))
        bar.set_postfix_str(f"{now}; {duration(self.seconds())} left")


def cpu_seconds() -> float:
    """Of all processes that this one has started, and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def environment() -> dict:
    """One thread a process: there are two, and tiny products wait for each other's threads. And ten
    minutes to save for who is told to stop: torchrun by itself waits for half a minute, and before
    PyTorch 2.12 does not listen."""
    return os.environ | dict(OMP_NUM_THREADS="1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ------------------------------------------------------------------------------- what is shipped

def score(args, diary: dict) -> dict:
    """Runs the benchmark, unless this commit has. ValueError if it fails."""
    file = args.out / "scores" / "scores.json"
    now = commit()
    # Changes that no commit has may be others by now.
    if not file.exists() or diary.get("scored_by") != now or now.endswith("+"):
        words = [sys.executable, "-m", "lab.evaluate", "--model", str(args.out / "edit"),
                 "--out", str(file.parent), "--device", args.device]
        status = subprocess.run(words + list(DRY_SCORES if args.dry_run else ()), cwd=ROOT)
        if status.returncode:
            raise ValueError(f"the benchmark failed (status {status.returncode}): see above")
        diary["scored_by"] = now
        keep(diary, args)
    return read_json(file)


def ship(args, diary: dict, scores: dict, others: list[dict]) -> pathlib.Path:
    """The folder `weights` -> its place. others: what is said of other seeds."""
    folder = args.out / "weights"
    TBAC.load(args.out / "edit").save(folder, torch.float16)
    copy(args.out / "mllm" / pretrain.CODE, folder / pretrain.CODE)
    write_text(folder / "words.txt", "\n".join(sorted(language.words())) + "\n")
    curves.write({stage.name: args.out / stage.name for stage in RECIPE}, folder)
    for stage in RECIPE:
        for sheet in some(sorted((args.out / stage.name).glob("sheet-*.png")), 4):
            copy(sheet, folder / f"{stage.name}-{sheet.name}")
    found = record(args, diary, scores, folder) | dict(other_seeds=others)
    write_text(folder / "record.json", json.dumps(found, indent=1))
    return folder


def copy(source: pathlib.Path, file: pathlib.Path) -> None:
    """Whole or not at all."""
    with new_file(file) as f:
        f.write(source.read_bytes())


def record(args, diary: dict, scores: dict, folder: pathlib.Path) -> dict:
    """How it was made, with folders as they are for whoever types the commands that stand there."""
    scores["options"] |= dict(model="runs/toy/edit", out="runs/toy/scores")
    stages = {}
    for stage in RECIPE:
        took = {what: round(diary[what].get(stage.name, 0), 2) for what in MINUTES}
        stages[stage.name] = diary["made"][stage.name] | took
    return dict(
        command=f"python -m lab.make --seed {args.seed}", commit=diary["commit"], seed=args.seed,
        dry_run=args.dry_run, machine=machine(args.device), stages=stages,
        sha256={file.name: digest(file) for file in weight_files(folder)}, scores=scores,
        scored_by=diary["scored_by"])


def made_by(stage: Stage, args) -> dict:
    """How a stage is made by this code, here."""
    args = argparse.Namespace(**vars(args) | dict(out=pathlib.Path("runs/toy")))
    return dict(command=plain_command(stage, args), steps=steps(stage, args),
                batch=stage.preset()["batch"], lr=stage.preset()["lr"],
                on=machine(args.device)["device"])


def beside(folder: pathlib.Path) -> dict:
    """What is said of another seed. ValueError for what is no such record."""
    file = folder / "weights" / "record.json"
    other = read_json(file)
    kept = ("command", "commit", "seed", "machine", "stages", "scores")
    if not isinstance(other, dict) or set(kept) - other.keys():
        raise ValueError(f"--beside {folder}: {file} has not all of {', '.join(kept)}")
    return {name: other[name] for name in kept}


def plain_command(stage: Stage, args) -> str:
    """As one would type it."""
    words = command(stage, args)
    words = words[words.index(stage.module):]
    # In one process: all of the batch.
    words[words.index("--batch") + 1] = str(stage.preset()["batch"])
    return " ".join(["python", "-m", *(word for word in words if word != "--resume")])


def some(files: list, n: int) -> list:
    """n of them, evenly spread, the last one included."""
    picked = np.linspace(0, len(files) - 1, min(n, len(files))).round().astype(int)
    return [files[i] for i in picked]


# ----------------------------------------------------------------------------------- command line

def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    # Its stages run in the folder of the code.
    args.out = args.out.resolve()
    signal.signal(signal.SIGTERM, interrupt)
    with one_line_errors():
        # What is wrong with them should not show after hours only.
        others = [beside(other) for other in args.beside]
        diary = open_diary(args)
        train_all(args, diary)
        if args.stop_after:
            return
        folder = ship(args, diary, score(args, diary), others)
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()
