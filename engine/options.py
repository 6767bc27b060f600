"""The command line of train.py and lab/pretrain.py: options and their defaults.

What the command line says comes first, then the options of the run that --resume goes on with, then
the preset's of the stage.
"""
import argparse
import json
import os
import pathlib
import re

import torch

from engine.checks import shown
from engine.command import SEED, Parser, count, device, path, path_text, real
from engine.files import read_json, write_text
from engine.limits import (
    MAX_COUNT,
    MAX_FACTOR,
    MAX_QUERIES,
    MAX_RATE,
    MAX_SIZE,
    MAX_TRAINING_STEPS,
    MAX_WORKERS,
)
from ladder import CONNECTORS, WIRINGS

SWITCH = argparse.BooleanOptionalAction                     # --this, --no-this

# -------------------------------------------------------------------------------------- options


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def what_learns(add, presets):
    """What learns, and from what"""
    stages = dict.fromkeys(stage for preset in presets.values() for stage in preset)
    first = next(iter(stages))
    add("--stage", choices=stages, default=first,
        help="which examples, and these defaults; in lab.pretrain also what learns")
    add("--preset", choices=presets, default="toy", help="defaults of this stage for what follows")
    add("--model", type=path_text, help="folder to start from")
    add("--take", type=take, nargs="*", default=[], metavar="PART=FOLDER",
        help="take a part (mllm, dcae, dit, ladder) from another folder")
    add("--wiring", choices=WIRINGS, help="start with a fresh ladder, wired like this")
    add("--connector", choices=CONNECTORS, help="start with a fresh ladder, with one connector for "
        "all rungs or one for each")
    add("--queries", type=count(1, MAX_QUERIES),
        help="start with a fresh ladder of so many queries")
    add("--data", type=path_text, nargs="+", metavar="SOURCE[=WEIGHT]", help="toy, toy-edit, "
        "a folder with metadata.jsonl or .csv, a folder of tars, 'a-{000..123}.tar'")
    add("--size", type=count(1, MAX_SIZE), help="side of a picture in pixels")
    # With pictures it happens three times.
    add("--cond-drop", type=real(0, 1 / 3), default=0.1, help="fraction of the examples without "
        "text; with pictures: without text, without picture, without both, each")
    add("--shift", type=real(1e-3, MAX_FACTOR), default=1.0, help="above 1: times nearer to the "
        "noise, as `sample.schedule` shifts them; the paper has 1")
    add("--max-bad", type=real(0, 1), default=0.01,
        help="stop when more than this fraction of the records is broken")
    add("--overfit", action=SWITCH, default=False, help="the first batch again and again")


def how_it_learns(add, presets):
    """Steps and the optimizer"""
    add("--steps", type=count(1, MAX_TRAINING_STEPS), help="optimizer steps")
    add("--epochs", type=real(1e-6, 1e6), help="instead of --steps: times through the data")
    add("--batch", type=count(1, 100_000), help="examples per process and pass")
    add("--accumulate", type=count(1, 100_000), default=1, help="passes per step")
    add("--lr", type=real(0, MAX_RATE), help="highest learning rate")
    add("--warmup", type=count(0, MAX_COUNT), help="steps up to it; a cosine down follows")
    add("--min-lr-ratio", type=real(0, 1), default=0.1,
        help="where the cosine ends, as a fraction of --lr")
    add("--betas", type=real(0, 0.9999999), nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight-decay", type=real(0, MAX_RATE), help="of matrices")
    add("--clip", type=real(1e-9, 1e9), help="largest gradient norm")
    add("--ema", type=real(0, 0.9999999), help="decay of the running mean of the weights, which is "
        "what is saved; 0: no mean")
    add("--guard", action=SWITCH, default=True,
        help="take no step where loss or gradient have a spike")
    add("--seed", type=SEED, default=0, help="of everything")


def where_it_runs(add, presets):
    """Machine, memory, files"""
    add("--out", type=path,
        help="folder for model, checkpoints, log, sheets and curves")
    add("--resume", action="store_true",
        help="go on from the last checkpoint in --out, with the options of that run")
    add("--workers", type=count(0, MAX_WORKERS), default=0, help="helper processes that read data")
    add("--cache-latents", action=SWITCH, default=False,
        help="run the autoencoder once per picture (known by its name), keep latents in --out")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="to compute in; the optimizer steps on float32 weights in any case")
    add("--plain", action=SWITCH, default=False,
        help="the plain path only: leave engine/fast.py out")
    add("--fsdp", action=SWITCH, default=False,
        help="with torchrun: shard what learns (FSDP2) instead of keeping a copy in each process")
    add("--grad-checkpoint", action=SWITCH, default=False,
        help="compute inner results again in the backward pass: less memory, more time")
    add("--save-every", type=count(1, MAX_COUNT), help="steps between checkpoints")
    add("--keep", type=count(1, MAX_COUNT), default=2, help="checkpoints that stay")
    add("--sheet-every", type=count(0, MAX_COUNT),
        help="steps between pictures of fixed prompts; 0: none")
    add("--dry-run", action="store_true",
        help="go once through everything, a step, a checkpoint, a sheet, and leave nothing")
    add("--curves", action="store_true", help="only draw curves.png from the log in --out")


def take(value: str) -> str:
    if not re.fullmatch("(mllm|dcae|dit|ladder)=.+", path_text(value)):
        expected = "expected PART=FOLDER, where PART is mllm, dcae, dit or ladder"
        raise argparse.ArgumentTypeError(f"{shown(value)}: {expected}")
    return value


def parse(argv, about: str, presets: dict, learns=("all",), own=None) -> argparse.Namespace:
    """presets: {name: {stage: {option: value}}}; learns: choices of --train; own(add): adds more
    options"""
    p = Parser(description=about, formatter_class=Help, add_help=False)
    for group in (what_learns, how_it_learns, where_it_runs):
        group(p.add_argument_group(group.__doc__).add_argument, presets)
    about_train = ("of what the stage teaches, all or a part: the rest stays as it is, in --dtype "
                   "and without optimizer state")
    p.add_argument("--train", choices=learns, default="all",
                   help=about_train if len(learns) > 1 else argparse.SUPPRESS)
    if own:
        own(p.add_argument)
    said, _ = p.parse_known_args(argv)
    if said.steps is not None and said.epochs is not None:
        p.error("--steps and --epochs say the same in two ways: leave one out")
    # Only now, so that the help shows the preset's values.
    p.add_argument("-h", "--help", action="help", help="show this")
    if said.stage not in presets[said.preset]:
        p.error(f"preset {said.preset} has no stage {said.stage}")
    out = said.out or pathlib.Path("runs") / said.stage
    p.set_defaults(**presets[said.preset][said.stage], out=out)
    if said.resume and os.path.exists(out / "options.json"):
        p.set_defaults(**options_to_go_on_with(p, argv, out))
    args = p.parse_args(argv)
    if said.steps is not None:
        # Not the preset's.
        args.epochs = None
    if args.dry_run:
        args.steps = args.warmup = args.save_every = args.sheet_every = 1
        args.epochs, args.resume = None, False
    return args


def options_to_go_on_with(p: Parser, argv, out: pathlib.Path) -> dict:
    """Those of the run in `out`. Another stage or preset would be another run, and is refused."""
    stored = stored_options(p, out / "options.json")
    # What stands there then is no default.
    asked, _ = p.parse_known_args(argv, argparse.Namespace(stage=None, preset=None))
    for name in ("stage", "preset"):
        if getattr(asked, name) not in (None, stored[name]):
            p.error(f"--resume goes on with --{name} {stored[name]}: what comes next begins with "
                    f"--model {out}, in another --out")
    return stored | dict(out=out)


# ---------------------------------------------------------------------------- the options of a run

# What may stand as null in options.json.
OPTIONAL = ("model", "wiring", "connector", "queries", "data", "steps", "epochs")
# What --resume does not take from there: it is asked for anew each time.
NOT_TAKEN = ("out", "resume", "dry_run", "curves")


def store(args) -> None:
    """options.json, for --resume."""
    write_text(args.out / "options.json", json.dumps(vars(args), indent=1, default=str))


def stored_options(p: Parser, file: pathlib.Path) -> dict:
    """What `store` has written. It is read as if it stood on the command line, so it is checked in
    the same way; whatever is wrong ends the command, with the file's name."""
    p.source = f"{file}: "
    try:
        found = read_json(file)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    if not are_options(found):
        p.error("expected an object with the options of a run, such as stage and preset")
    found = {name: value for name, value in found.items() if name not in NOT_TAKEN}
    if unknown := found.keys() - vars(p.parse_args([])).keys():
        p.error(f"unknown option {shown(min(unknown))}")
    empty = {name: None for name, value in found.items() if value is None}
    if wrong := empty.keys() - set(OPTIONAL):
        p.error(f"{min(wrong)} is null, expected a value")
    given = found.keys() - empty.keys()
    args = vars(p.parse_args([word for name in given for word in as_words(name, found[name])]))
    p.source = ""
    return {name: args[name] for name in given} | empty


def are_options(found) -> bool:
    return isinstance(found, dict) and {"stage", "preset"} <= found.keys()


def is_of_a_run(file: pathlib.Path) -> bool:
    """Did `store` write this file?"""
    try:
        return are_options(read_json(file))
    except ValueError:
        return False


def as_words(name: str, value) -> list[str]:
    """An option as words of a command line."""
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    if value is False:
        return ["--no-" + option[2:]]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]
