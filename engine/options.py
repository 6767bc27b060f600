"""The command line of train.py and lab/pretrain.py: options, their defaults, and a check of what
makes no sense.

What the command line says comes first, then the options of the run that --resume goes on with, then
the preset's of the stage.
"""
import argparse
import json
import os
import pathlib
import re

import torch

SWITCH = argparse.BooleanOptionalAction                     # --this, --no-this


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def what_learns(add, presets):
    """What learns, and from what"""
    stages = dict.fromkeys(stage for preset in presets.values() for stage in preset)
    first = next(iter(stages))
    add("--stage", choices=stages, default=first, help="what learns")
    add("--preset", choices=presets, default="toy", help="defaults of this stage for what follows")
    add("--model", help="folder to start from")
    add("--take", nargs="*", default=[], metavar="PART=FOLDER",
        help="take a part (mllm, dcae, dit, ladder) from another folder")
    add("--wiring", help="start with a fresh ladder, wired like this: ladder.WIRINGS has the words")
    add("--queries", type=int, help="start with a fresh ladder of so many queries")
    add("--data", nargs="+", metavar="SOURCE[=WEIGHT]", help="toy, toy-edit, a folder with "
        "metadata.jsonl, a folder of tars, 'a-{000..123}.tar'")
    add("--size", type=int, help="side of a picture in pixels")
    add("--cond-drop", type=float, default=0.1, help="fraction of the examples without text; with "
        "pictures: without text, without picture, without both, each")
    add("--shift", type=float, default=1.0, help="above 1: times nearer to the noise, as "
        "`sample.schedule` shifts them; the paper has 1")
    add("--max-bad", type=float, default=0.01,
        help="stop when more than this fraction of the records is broken")
    add("--overfit", action=SWITCH, default=False, help="the first batch again and again")


def how_it_learns(add, presets):
    """Steps and the optimizer"""
    add("--steps", type=int, help="optimizer steps")
    add("--epochs", type=float, help="instead of --steps: times through the data")
    add("--batch", type=int, help="examples per process and pass")
    add("--accumulate", type=int, default=1, help="passes per step")
    add("--lr", type=float, help="highest learning rate")
    add("--warmup", type=int, help="steps up to it; a cosine down follows")
    add("--min-lr-ratio", type=float, default=0.1,
        help="where the cosine ends, as a fraction of --lr")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight-decay", type=float, help="of matrices")
    add("--clip", type=float, help="largest gradient norm")
    add("--ema", type=float, help="decay of the running mean of the weights, which is what is "
        "saved; 0: no mean")
    add("--guard", action=SWITCH, default=True,
        help="take no step where loss or gradient have a spike")
    add("--seed", type=int, default=0, help="of everything")


def where_it_runs(add, presets):
    """Machine, memory, files"""
    add("--out", type=pathlib.Path,
        help="folder for model, checkpoints, log, sheets and curves")
    add("--resume", action="store_true",
        help="go on from the last checkpoint in --out, with the options of that run")
    add("--workers", type=int, default=0, help="helper processes that read data")
    add("--cache-latents", action=SWITCH, default=False,
        help="run the autoencoder once per picture (known by its name), keep latents in --out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="to compute in; the optimizer steps on float32 weights in any case")
    add("--plain", action=SWITCH, default=False,
        help="the plain path only: leave engine/fast.py out")
    add("--fsdp", action=SWITCH, default=False,
        help="with torchrun: shard what learns (FSDP2) instead of keeping a copy in each process")
    add("--grad-checkpoint", action=SWITCH, default=False,
        help="compute inner results again in the backward pass: less memory, more time")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--sheet-every", type=int, help="steps between pictures of fixed prompts; 0: none")
    add("--dry-run", action="store_true",
        help="go once through everything, a step, a checkpoint, a sheet, and leave nothing")
    add("--curves", action="store_true", help="only draw curves.png from the log in --out")


def parse(argv, about: str, presets: dict) -> argparse.Namespace:
    """presets: {name: {stage: {option: value}}}"""
    p = argparse.ArgumentParser(description=about, formatter_class=Help, add_help=False)
    for group in (what_learns, how_it_learns, where_it_runs):
        group(p.add_argument_group(group.__doc__).add_argument, presets)
    said, _ = p.parse_known_args(argv)
    # Only now, so that the help shows the preset's values.
    p.add_argument("-h", "--help", action="help", help="show this")
    if said.stage not in presets[said.preset]:
        p.error(f"preset {said.preset} has no stage {said.stage}")
    out = said.out or pathlib.Path("runs") / said.stage
    p.set_defaults(**presets[said.preset][said.stage], out=out)
    if said.resume and (out / "options.json").is_file():
        p.set_defaults(**json.loads((out / "options.json").read_text()) | dict(out=out))
    args = p.parse_args(argv)
    refuse_nonsense(p, args)
    if said.steps is not None:
        # Not the preset's.
        args.epochs = said.epochs
    if args.dry_run:
        args.steps = args.warmup = args.save_every = args.sheet_every = 1
        args.epochs, args.resume = None, False
    return args


def store(args) -> None:
    """options.json, for --resume."""
    new = args.out / ".options.json"
    new.write_text(json.dumps(vars(args), indent=1, default=str))
    os.replace(new, args.out / "options.json")


def refuse_nonsense(p: argparse.ArgumentParser, args) -> None:
    for take in args.take:
        if not re.fullmatch("(mllm|dcae|dit|ladder)=.+", take):
            p.error(f"--take {take}: expected PART=FOLDER, where PART is mllm, dcae, dit or ladder")
    for name in ("batch", "accumulate", "save_every", "keep", "steps", "queries"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("epochs", "shift", "clip"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            p.error(f"--{name} must be more than 0")
    if not 0 <= args.cond_drop <= 1 / 3:
        p.error("--cond-drop must be 0 to 1/3: with pictures it happens three times, without text, "
                "without picture, without both")
