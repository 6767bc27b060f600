"""One step of bench/gpu.sh: measures some rows, writes each to a JSON file as soon as it is there,
and goes on where one fails.

    python -m bench.gpu STEP --out FILE [--rehearse]

Steps, in order of value: machine, parity, draw, train, compile, toy (the peer's is bench.gpu_peer);
and, by itself, study. Models have the released sizes and random weights, made on the GPU itself;
study's are toys. --rehearse runs the same code on the CPU at a tiny size.
"""
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import torch

import train
from bench import memory
from bench.first_difference import differences, trace
from bench.measure import best_rates, cost, peak, repeated
from bench.parity import Recorded, exact_products
from bench.sizes import ROOT, SIZES, random_model
from bench.work import CAPTION, ORDER, Ours, Task, picture
from engine import fast
from engine.command import Parser
from engine.device import machine
from engine.files import read_json
from lab import ablate, plan, trials
from sample import TOY_FOLDER


# -------------------------------------------------------------------------------------- the rows

class Rows:
    """Rows of one step. add(name, f): f() gives a dict; the file is written again at once."""

    def __init__(self, args):
        self.file = args.out
        self.content = dict(run=machine(args.device) | dict(rehearsal=args.rehearse), rows={})

    def add(self, name, f):
        start = time.perf_counter()
        try:
            row = f()
        # Whatever it is (out of memory, a missing compiler): the next row may work.
        except Exception as e:
            lines = str(e).splitlines() or [""]
            row = dict(failed=f"{type(e).__name__}: {lines[0]}")
        row["took"] = time.perf_counter() - start
        self.content["rows"][name] = row
        self.file.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"{name}: {row.get('failed', '')} {row['took']:.1f} s", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(f, held, args, rates, n=5):
    """-> seconds (median of n, lowest, highest), operations, bytes read, bytes alive at most, the
    warm-up apart; and the floor: seconds that the operations need at the best rate, or the weights
    through the memory. held(): the tensors that are there before."""
    start = time.perf_counter()
    operations, read = cost(f)
    warm_up = time.perf_counter() - start
    most = peak(f, held(), args.device)
    row = repeated(f, 1 if args.rehearse else n, args.device)
    floor = max(operations / rates["flops"], read / rates["bandwidth"])
    return row | dict(operations=operations, read=read, memory=most, warm_up=warm_up, floor=floor)


def config_of(args):
    return SIZES["tiny" if args.rehearse else "full"]


def full_model(args, dtype=torch.bfloat16):
    return random_model(config_of(args), args.device, dtype)


def rates_of(args, dtype):
    large, room = (128, 1 << 20) if args.rehearse else (None, 1 << 30)
    flops, bandwidth = best_rates(args.device, dtype, large, room)
    return dict(flops=flops, bandwidth=bandwidth)


# ------------------------------------------------------------------------------------- the steps

def machine_step(rows, args):
    """Best rates of each precision, and how much memory there is."""
    exact_products()
    for name in ("float32", "bfloat16"):
        rows.add(f"best rates, {name}", functools.partial(rates_of, args, getattr(torch, name)))
    if args.device == "cuda":
        rows.add("memory", lambda: dict(bytes=torch.cuda.get_device_properties(0).total_memory))


def parity_step(rows, args):
    """The recorded outputs of the public libraries, and bfloat16 against float32, call by call."""
    exact_products()
    with tempfile.TemporaryDirectory() as scratch:
        recorded = Recorded(scratch)
        for quick, path in ((False, "plain"), (True, "fast")):
            for dtype in (torch.float32, torch.bfloat16):
                rows.add(f"{path}, {dtype}".replace("torch.", ""), lambda dtype=dtype, quick=quick:
                         recorded.errors(recorded.load(args.device, dtype, quick)))
    rows.add("full size, bfloat16 against float32, call by call",
             functools.partial(bfloat16_errors, args))


def bfloat16_errors(args):
    model = full_model(args, torch.float32)
    exact = trace(model)
    return dict(differences(trace(model.bfloat16()), exact))


def draw_tasks(config):
    image = picture(config.size)
    return {
        "encode a prompt with its null prompt": Task("encode", ["", CAPTION]),
        "20-step picture": Task("draw", [CAPTION]),
        "20-step edit": Task("draw", [ORDER], [[image]]),
        "four pictures of one prompt": Task("draw", [CAPTION] * 4),
        "20-step picture, twice the side": Task("draw", [CAPTION], size=2 * config.size),
        "answer of 64 tokens about a picture":
            Task("answer", ["what is in the image?"], [[image]]),
    }


def draw_step(rows, args):
    """Encoding, pictures, edits, answers, decoding."""
    model = full_model(args)
    ours, rates = Ours(model), rates_of(args, torch.bfloat16)
    work = {name: ours.prepare(task) for name, task in draw_tasks(model.config).items()}
    for name, size in (("decode", None), ("decode, twice the side", 2 * model.config.size)):
        work[name] = functools.partial(model.decode, ours.inputs.noise(1, size))
    for name, f in work.items():
        rows.add(name, functools.partial(measured, f, model.parameters, args, rates))


TRAINING = (("t2i", 4), ("t2i", 16), ("edit", 4))


def train_step(rows, args):
    """Whole steps of train.py (masters, AdamW, EMA), with and without checkpoints."""
    rates = rates_of(args, torch.bfloat16)
    for stage, batch in TRAINING:
        for switch in ("--no-grad-checkpoint", "--grad-checkpoint"):
            rows.add(f"{stage}, batch {batch}, {switch}", functools.partial(
                measure_training, args, rates, stage, batch, switch))


def measure_training(args, rates, stage, batch, switch):
    model = full_model(args)
    size = model.config.size
    given = memory.options("--preset", "paper", "--stage", stage, "--model", "none", "--device",
                           args.device, "--size", str(size), "--cond-drop", "0", switch)
    model.ladder.float()
    model.dit.float()
    task = dataclasses.replace(train.LADDER_TASK, build=lambda given: model)
    run = train.Run(given, task)

    def held():
        state = run.state
        moments = [t for values in state.optimizer.state.values() for t in values.values()]
        return [*model.parameters(), *state.params.values(), *state.ema.values(), *moments]

    def step():
        # Each time from the same random state, so that all steps do the same work.
        return train.training_step(run, [memory.examples(batch, size, stage == "edit")])

    return measured(step, held, args, rates, n=3)


def compile_step(rows, args):
    """sample.py --compile: the same pictures with compiled parts. A new shape compiles again: the
    first run apart."""
    ours = Ours(full_model(args))
    tasks = draw_tasks(ours.model.config)
    names = ("20-step picture",) if args.rehearse else ("20-step picture", "20-step edit")
    work = {name: ours.prepare(tasks[name]) for name in names}
    n = 1 if args.rehearse else 3
    for name, f in work.items():
        rows.add(f"{name}, as it is", functools.partial(first_and_next, f, n, args.device))
    rows.add("compile", functools.partial(compiled, ours.model, work["20-step picture"]))
    if is_compiled(ours.model):
        for name, f in work.items():
            rows.add(f"{name}, compiled", functools.partial(first_and_next, f, n, args.device))


def is_compiled(model):
    return model.dit._compiled_call_impl is not None


def first_and_next(f, n, device):
    first = repeated(f, 1, device)["seconds"]
    return repeated(f, n, device) | dict(warm_up=first)


def compiled(model, run):
    """Seconds of the warm-up. Where it fails, engine/fast.py warns and goes on without."""
    start = time.perf_counter()
    fast.compile_parts(model, run)
    if not is_compiled(model):
        raise RuntimeError("torch.compile failed: the warning above says why")
    return dict(warm_up=time.perf_counter() - start)


def toy_step(rows, args):
    """The scores of the shipped toy; then, as far as the time goes, a toy from nothing."""
    few = ["--n", "1", "--pictures", "1", "--steps", "2"] if args.rehearse else []
    # With the minute that gpu.sh leaves for the scores.
    limit = 60 * args.minutes + 60
    end = time.monotonic() + limit
    rows.add("lab.evaluate", functools.partial(evaluated, args.device, few, limit))
    if importlib.util.find_spec("lab.make") is None:
        print("lab.make is not there: no toy from nothing")
        return
    with tempfile.TemporaryDirectory() as scratch:
        words = ["lab.make", "--out", scratch, "--device", args.device]
        if args.rehearse:
            words += ["--dry-run"]
        rows.add("lab.make", functools.partial(command, words, max(1, end - time.monotonic())))


def evaluated(device, options, limit):
    """-> seconds; scores as lab.evaluate writes them, if it came to its end"""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["lab.evaluate", "--device", device, "--out", scratch, *options]
        row, file = command(words, limit), pathlib.Path(scratch) / "scores.json"
        return row | dict(scores=read_json(file) if file.exists() else None)


# Models that learn at once.
TOGETHER = (2, 8, 32)


def study_words(args):
    """The command line of the study's largest part. A rehearsal takes the toy for all that it
    starts from."""
    start = args.study or trials.all_of(TOY_FOLDER, args.out.parent / "start")
    words = ["primary", "--device", args.device, "--out", args.out.parent / "study", "--start",
             start]
    if args.rehearse:
        words += ["--seeds", 1, "--steps", 2, "--looks", 1, "--batch", 2, "--n", 1,
                  "--draw-steps", 1]
    return list(map(str, words))


def study_step(rows, args):
    """How fast models learn together; then the primary question, as far as the time goes."""
    start = time.monotonic()
    given = ablate.options(study_words(args))
    for n in TOGETHER[:1] if args.rehearse else TOGETHER:
        rows.add(f"twelve steps of {n} models", functools.partial(step_together, given, n, args))
    minutes = args.minutes - (time.monotonic() - start) / 60
    rows.add("primary", functools.partial(study_part, args, max(0.1, minutes)))


def step_together(given, n, args):
    """-> seconds of twelve steps of n models; bytes alive at most. (Inputs are made for some steps
    at once, trials.AHEAD: of twelve, each time for as many.)"""
    group = trials.Group(plan.PARTS["primary"].runs(n // 2), given)
    batches = group.batches()

    def steps():
        for _ in range(1 if args.rehearse else 12):
            group.step(next(batches))

    steps()
    row = repeated(steps, 1 if args.rehearse else 3, args.device)
    if args.device == "cuda":
        row["memory"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return row


def study_part(args, minutes):
    """-> seconds, what it printed, and what it found if it came to its end"""
    words = study_words(args)
    row = command(["lab.ablate", *words, "--minutes", f"{minutes:.2f}"])
    folder = args.out.parent / "study"
    found = folder / "primary.json"
    # An unfinished study, too, has runs that are finished.
    runs = {file.stem: read_json(file) for file in folder.glob("runs-*/*.json")}
    return row | dict(found=read_json(found) if found.exists() else None, runs=runs)


def command(words, limit=None):
    """A module of ours in processes of its own -> seconds, the end of what it printed, and whether
    it was stopped after `limit` seconds."""
    start = time.perf_counter()
    # A session of its own, so that what it starts is stopped with it.
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=limit)
        stopped = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        stopped = True
    finally:
        # When this process is told to end, too.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = printed.splitlines()
    if process.returncode and not stopped:
        raise RuntimeError(f"python -m {' '.join(words)}: {lines[-1] if lines else 'no message'}")
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, stopped=stopped, printed=lines[-40:])


# ---------------------------------------------------------------------------------- command line

STEPS = {"machine": machine_step, "parity": parity_step, "draw": draw_step, "train": train_step,
         "compile": compile_step, "toy": toy_step, "study": study_step}


def options(steps, doc):
    p = Parser(description=doc)
    p.add_argument("step", choices=steps)
    p.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    p.add_argument("--minutes", type=float, default=0.1,
                   help="for the toy from nothing, or for the study")
    p.add_argument("--study", type=pathlib.Path, metavar="FOLDER",
                   help="what the study starts from (docs/study.md)")
    p.add_argument("--rehearse", action="store_true", help="on the CPU, at a tiny size")
    args = p.parse_args()
    args.device = "cpu" if args.rehearse else "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"error: PyTorch {torch.__version__} sees no GPU; --rehearse runs on the "
                         "CPU")
    if args.step == "study" and not (args.study or args.rehearse):
        raise SystemExit("error: study needs --study FOLDER")
    return args


def main():
    args = options(STEPS, __doc__)
    # As an exception, so that `command` ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = Rows(args)
    STEPS[args.step](rows, args)


if __name__ == "__main__":
    main()
