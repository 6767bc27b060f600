"""From nothing to the toy in toy/weights, by one command:

    python -m lab.make --out runs/toy               # hours on two CPU cores; says how long
    python -m lab.make --out runs/dry --dry-run     # every stage a few steps: does all of it work?
    python -m lab.make --out runs/toy --beside runs/toy1    # another seed's scores in its record

    vit (and the tokenizer) -> mllm -+
                                     +-> t2i -> edit -> benchmark -> the folder `weights`
    dcae -> dit ---------------------+

What does not need each other runs side by side, each in a process of its own. Where it was stopped
or killed, the same command goes on. `--out` then holds a folder for each stage and `weights`, which
is what is shipped: the model, record.json (how it was made, and its scores), logs.json, curves.png,
words.txt, and sheets of pictures from each stage.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import train
from engine.command import SEED, Parser, device, one_line_errors, path
from engine.device import machine
from engine.files import digest, read_json, weight_files, write_text
from engine.state import checkpoints
from lab import curves, pretrain
from tbac import TBAC
from toy import language

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Stage:
    """seconds: of a step, measured on two cores of an AMD EPYC (family 25, model 17); model: the
    stage whose weights it starts from; also: another that has to be finished first; words: more of
    its command line, with {out}."""
    name: str
    module: str
    seconds: float
    model: str | None = None
    also: str | None = None
    words: tuple[str, ...] = ()

    def needs(self) -> list[str]:
        return [name for name in (self.model, self.also) if name]

    def preset(self) -> dict:
        presets = train.PRESETS if self.module == "train" else pretrain.PRESETS
        return presets["toy"][self.name]


RECIPE = (
    Stage("vit", "lab.pretrain", 0.13),
    Stage("mllm", "lab.pretrain", 0.7, "vit"),
    Stage("dcae", "lab.pretrain", 0.57),
    Stage("dit", "lab.pretrain", 0.72, "dcae"),
    Stage("t2i", "train", 0.7, "dit", "mllm", ("--shift", "3", "--take", "mllm={out}/mllm")),
    Stage("edit", "train", 0.77, "t2i", words=("--shift", "3")),
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

def commit() -> str:
    """The code's commit; with "+" if it was changed since; "unknown" outside a git checkout."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def open_diary(args) -> dict:
    """{commit, seed, dry_run, minutes: {stage: so far}, cpu_minutes: the same} of this --out.
    ValueError where it was made otherwise so far: one toy is trained by one commit."""
    made = dict(commit=commit(), seed=args.seed, dry_run=args.dry_run)
    file = args.out / "make.json"
    if not file.exists():
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty, and not of this command")
        args.out.mkdir(parents=True, exist_ok=True)
        return made | {what: {} for what in MINUTES}
    diary = read_json(file)
    if all(finished(stage, args) for stage in RECIPE):
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
    """The command line of a stage. On a CPU the paper's stages, which run alone, are two processes
    with half of the batch each; the others run side by side."""
    batch = stage.preset()["batch"]
    start = [sys.executable, "-m", stage.module]
    if args.device == "cpu" and stage.module == "train":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", "-m", stage.module]
        batch //= 2
    words = ["--stage", stage.name, "--out", str(args.out / stage.name), "--seed", str(args.seed),
             "--device", args.device, "--batch", str(batch)]
    if stage.model:
        words += ["--model", str(args.out / stage.model)]
    words += [word.format(out=args.out) for word in stage.words]
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


def finished(stage: Stage, args) -> bool:
    """Is its last checkpoint that of its last step, and its model there?"""
    last = f"step-{steps(stage, args):08d}"
    found = [folder.name for folder in checkpoints(args.out / stage.name)]
    return found[-1:] == [last] and (args.out / stage.name / "model.safetensors").exists()


class Processes:
    """Runs the stages that can run, side by side, until all are finished."""

    def __init__(self, args, diary: dict):
        self.args, self.diary = args, diary
        self.running = {}
        self.began = {}
        names = [stage.name for stage in RECIPE]
        last = names.index(args.stop_after) if args.stop_after else len(names) - 1
        self.stages = RECIPE[:last + 1]
        self.finished = {stage.name for stage in self.stages if finished(stage, args)}
        self.start_done = {stage.name: done(stage, args) for stage in self.stages}

    def run(self) -> None:
        """ValueError if a stage fails."""
        print(f"makes {self.args.out}, in about {duration(self.seconds_left())} on two CPU cores")
        total = sum(steps(stage, self.args) for stage in self.stages)
        bar = tqdm(total=total, desc="steps", mininterval=1)
        try:
            while len(self.finished) < len(self.stages):
                self.start_ready()
                time.sleep(0.5 if self.args.dry_run else 5)
                self.collect()
                self.show(bar)
        finally:
            self.stop()
            bar.close()

    def start_ready(self) -> None:
        for stage in self.stages:
            ready = self.finished.issuperset(stage.needs())
            if ready and stage.name not in self.finished and stage.name not in self.running:
                folder = self.args.out / stage.name
                folder.mkdir(exist_ok=True)
                words = command(stage, self.args)
                with open(self.args.out / f"{stage.name}.txt", "ab") as output:
                    self.running[stage.name] = subprocess.Popen(
                        words, cwd=ROOT, stdout=output, stderr=output, env=environment())
                self.began[stage.name] = time.time()

    def collect(self) -> None:
        """Takes leave of the processes that have ended, and keeps the diary."""
        for stage in self.stages:
            process = self.running.get(stage.name)
            if process is None:
                continue
            now = time.time()
            spent = (now - self.began[stage.name]) / 60
            self.began[stage.name] = now
            self.note("minutes", stage, spent)
            if self.ended(stage):
                del self.running[stage.name]
                if process.returncode or not finished(stage, self.args):
                    said = (self.args.out / f"{stage.name}.txt").read_text(errors="replace")
                    raise ValueError(f"stage {stage.name} failed (status {process.returncode}):\n"
                                     + said[-2000:])
                self.finished.add(stage.name)
        keep(self.diary, self.args)

    def note(self, what: str, stage: Stage, minutes: float) -> None:
        noted = self.diary[what]
        noted[stage.name] = noted.get(stage.name, 0) + minutes

    def ended(self, stage: Stage, wait: bool = False) -> bool:
        """Has its process ended? Then what the CPU did for it is known, and noted: beside other
        work it takes more minutes, but hardly more of these."""
        process, before = self.running[stage.name], cpu_seconds()
        status = process.wait() if wait else process.poll()
        self.note("cpu_minutes", stage, (cpu_seconds() - before) / 60)
        return status is not None

    def stop(self) -> None:
        """Each saves first."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for stage in self.stages:
            if stage.name in self.running:
                self.ended(stage, wait=True)
        keep(self.diary, self.args)

    def seconds_left(self) -> float:
        """By the steps that are left, at the speed of those in the log, else of the recipe."""
        ends = {}
        for stage in self.stages:
            left = steps(stage, self.args) - done(stage, self.args)
            start = max([ends[name] for name in stage.needs()], default=0)
            ends[stage.name] = start + max(0, left) * self.seconds_per_step(stage)
        unscored = self.args.stop_after or self.args.dry_run
        return max(ends.values()) + (0 if unscored else BENCHMARK_SECONDS)

    def seconds_per_step(self, stage: Stage) -> float:
        new = done(stage, self.args) - self.start_done[stage.name]
        minutes = self.diary["minutes"].get(stage.name, 0)
        old = self.start_done[stage.name]
        if new + old > 20 and minutes:
            return minutes * 60 / (new + old)
        return stage.seconds

    def show(self, bar: tqdm) -> None:
        bar.n = sum(done(stage, self.args) for stage in self.stages)
        now = ", ".join(f"{stage.name} {done(stage, self.args)}/{steps(stage, self.args)}"
                        for stage in self.stages if stage.name in self.running)
        bar.set_postfix_str(f"{now}; {duration(self.seconds_left())} left")


def cpu_seconds() -> float:
    """Of all processes that this one has started, and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def environment() -> dict:
    """One thread a process: there are two, and tiny products wait for each other's threads."""
    return os.environ | dict(OMP_NUM_THREADS="1")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ------------------------------------------------------------------------------- what is shipped

def score(args, diary: dict) -> dict:
    """Runs the benchmark, unless this commit has. ValueError if it fails."""
    file = args.out / "scores" / "scores.json"
    if not file.exists() or diary.get("scored_by") != commit():
        words = [sys.executable, "-m", "lab.evaluate", "--model", str(args.out / "edit"),
                 "--out", str(file.parent), "--device", args.device]
        status = subprocess.run(words + list(DRY_SCORES if args.dry_run else ()), cwd=ROOT)
        if status.returncode:
            raise ValueError(f"the benchmark failed (status {status.returncode}): see above")
        diary["scored_by"] = commit()
        keep(diary, args)
    return read_json(file)


def ship(args, diary: dict, scores: dict, others: list[dict]) -> pathlib.Path:
    """The folder `weights`, made anew -> its place. others: what is said of other seeds."""
    folder = args.out / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    TBAC.load(args.out / "edit").save(folder, torch.float16)
    write_text(folder / "words.txt", "\n".join(sorted(language.words())) + "\n")
    curves.write({stage.name: args.out / stage.name for stage in RECIPE}, folder)
    for stage in RECIPE:
        for sheet in some(sorted((args.out / stage.name).glob("sheet-*.png")), 4):
            shutil.copyfile(sheet, folder / f"{stage.name}-{sheet.name}")
    found = record(args, diary, scores, folder) | dict(other_seeds=others)
    write_text(folder / "record.json", json.dumps(found, indent=1))
    return folder


def record(args, diary: dict, scores: dict, folder: pathlib.Path) -> dict:
    """How it was made, with folders as they are for whoever types the commands that stand there."""
    args = argparse.Namespace(**vars(args) | dict(out=pathlib.Path("runs/toy")))
    scores["options"] |= dict(model=str(args.out / "edit"), out=str(args.out / "scores"))
    stages = {}
    for stage in RECIPE:
        stages[stage.name] = dict(
            command=plain_command(stage, args), steps=steps(stage, args),
            batch=stage.preset()["batch"],
            **{what: round(diary[what].get(stage.name, 0), 2) for what in MINUTES})
    return dict(
        command=f"python -m lab.make --seed {args.seed}", commit=diary["commit"], seed=args.seed,
        dry_run=args.dry_run, machine=machine(args.device), stages=stages,
        sha256={file.name: digest(file) for file in weight_files(folder)}, scores=scores)


def beside(folder: pathlib.Path) -> dict:
    """What is said of another seed."""
    other = read_json(folder / "weights" / "record.json")
    kept = ("command", "commit", "seed", "machine", "stages", "scores")
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
    signal.signal(signal.SIGTERM, interrupt)
    with one_line_errors():
        # What is wrong with them should not show after hours only.
        others = [beside(other) for other in args.beside]
        diary = open_diary(args)
        Processes(args, diary).run()
        if args.stop_after:
            return
        folder = ship(args, diary, score(args, diary), others)
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()
