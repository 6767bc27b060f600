"""The command line of train.py: what can be said, and what holds where nothing is said.

Options of the command line come first, then those of the run that --resume goes on with, then the preset's of the stage.
"""
import argparse
import json
import pathlib
import re

import torch

LADDER = ("t2i", "edit", "mix")                                                 # the paper's stages
LEARNS = {"vit": ["mllm.vision"], "mllm": ["mllm"], "dcae": ["dcae"], "dit": ["dit"]} | dict.fromkeys(LADDER, ["ladder", "dit"])
PRESETS = {
    "toy": {stage: dict(steps=n, batch=b, lr=lr, warmup=200, weight_decay=0.01, clip=1.0, ema=0.999, size=64, save_every=250, sheet_every=500)
            for stage, n, b, lr in (("vit", 3000, 32, 2e-3), ("mllm", 8000, 32, 2e-3), ("dcae", 2000, 32, 2e-3), ("dit", 3000, 48, 1e-3),
                                    ("t2i", 5000, 48, 1e-3), ("edit", 6000, 48, 1e-3), ("mix", 6000, 48, 1e-3))},
    "paper": {stage: dict(lr=1e-4, warmup=5000, weight_decay=0.05, clip=0.5, ema=0.0, size=512, save_every=1000, sheet_every=1000, workers=8,
                          grad_checkpoint=True, **length)                       # the released YAML files; batch is per GPU
              for stage, length in (("t2i", dict(steps=150_000, batch=16)), ("edit", dict(epochs=10, batch=4)), ("mix", dict(epochs=100, batch=4)))},
}
PRESETS["toy"]["mllm"] |= dict(betas=[0.9, 0.98], ema=0.998)                    # AdamW's longer memory is too slow for this one
TOY_FOLDER = pathlib.Path(__file__).parent.parent / "toy" / "weights"
SWITCH = argparse.BooleanOptionalAction                                         # --this, --no-this


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def what_learns(add):
    """What learns, and from what"""
    add("--stage", choices=LEARNS, default="t2i", help="what learns")
    add("--preset", choices=PRESETS, default="toy", help="defaults of this stage for what follows")
    add("--model", help="folder to start from; none: a fresh toy")
    add("--take", nargs="*", default=[], metavar="PART=FOLDER", help="take a part (mllm, dcae, dit, ladder) from another folder")
    add("--wiring", help="start with a fresh ladder, wired like this: ladder.rungs has the words")
    add("--queries", type=int, help="start with a fresh ladder of so many queries")
    add("--data", nargs="+", metavar="SOURCE[=WEIGHT]", help="toy, toy-edit, a folder with metadata.jsonl, a folder of tars, 'a-{000..123}.tar'")
    add("--size", type=int, help="side of a picture in pixels")
    add("--drop", type=float, default=0.1, help="part of the examples without text; with pictures: without text, picture, both")
    add("--shift", type=float, default=1.0, help="above 1: times nearer to the noise, as `sample.schedule` shifts them; the paper has 1")
    add("--max-bad", type=float, default=0.01, help="stop when more than this part of the records is broken")
    add("--overfit", action=SWITCH, default=False, help="the first batch again and again")


def how_it_learns(add):
    """Steps and the optimizer"""
    add("--steps", type=int, help="optimizer steps")
    add("--epochs", type=float, help="instead of --steps: times through the data")
    add("--batch", type=int, help="examples per process and pass")
    add("--accumulate", type=int, default=1, help="passes per step")
    add("--lr", type=float, help="highest learning rate")
    add("--warmup", type=int, help="steps up to it; a cosine down follows")
    add("--floor", type=float, default=0.1, help="where the cosine ends, as a part of --lr")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight-decay", type=float, help="of matrices")
    add("--clip", type=float, help="largest gradient norm")
    add("--ema", type=float, help="decay of the running mean of the weights, which is what is saved; 0: no mean")
    add("--guard", action=SWITCH, default=True, help="take no step where loss or gradient have a spike")
    add("--seed", type=int, default=0, help="of everything")


def where_it_runs(add):
    """Machine, memory, files"""
    add("--out", type=pathlib.Path, help="folder for model, checkpoints, log, sheets and curves")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, with the options of that run")
    add("--workers", type=int, default=0, help="helper processes that read data")
    add("--cache-latents", action=SWITCH, default=False, help="run the autoencoder once per picture (known by its name), keep latents in --out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="to compute in; what learns is kept in float32")
    add("--fsdp", action=SWITCH, default=False, help="with torchrun: shard what learns (FSDP2), instead of a copy in each process (DDP)")
    add("--grad-checkpoint", action=SWITCH, default=False, help="compute inner results again in the backward pass: less memory, more time")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--sheet-every", type=int, help="steps between pictures of fixed prompts; 0: none")
    add("--dry-run", action="store_true", help="go once through everything, a step, a checkpoint, a sheet, and leave nothing")
    add("--curves", action="store_true", help="only draw curves.png from the log in --out")


def arguments(about):
    """The command line; what has no default here has one in the preset."""
    p = argparse.ArgumentParser(description=about, formatter_class=Help, add_help=False)
    for group in (what_learns, how_it_learns, where_it_runs):
        group(p.add_argument_group(group.__doc__).add_argument)
    return p


def options(argv=None, about=""):
    """The preset's values, over them those of the run that --resume goes on with, over them what the command line says."""
    p = arguments(about)
    first, _ = p.parse_known_args(argv)
    p.add_argument("-h", "--help", action="help", help="show this")             # only now, to show the preset's values
    if first.stage not in PRESETS[first.preset]:
        p.error(f"preset {first.preset} has no stage {first.stage}")
    out = first.out or pathlib.Path("runs") / first.stage
    p.set_defaults(**PRESETS[first.preset][first.stage], out=out)
    if first.preset == "toy":
        p.set_defaults(data=["toy=0.5", "toy-edit=0.5"] if first.stage in ("edit", "mix") else ["toy"],
                       model=str(TOY_FOLDER) if first.stage in LADDER else None)
    if first.resume and (out / "options.json").is_file():
        p.set_defaults(**json.loads((out / "options.json").read_text()) | dict(out=out))
    a = p.parse_args(argv)
    if wrong := [take for take in a.take if not re.fullmatch("(mllm|dcae|dit|ladder)=.+", take)]:
        p.error(f"--take {wrong[0]}: expected PART=FOLDER, where PART is mllm, dcae, dit or ladder")
    if wrong := [n for n in ("batch", "accumulate", "save_every", "keep", "steps", "queries") if getattr(a, n) is not None and getattr(a, n) < 1]:
        p.error(f"--{wrong[0].replace('_', '-')} must be 1 or more")
    if wrong := [n for n in ("epochs", "shift", "clip") if getattr(a, n) is not None and getattr(a, n) <= 0]:
        p.error(f"--{wrong[0]} must be more than 0")
    if not 0 <= a.drop <= 1 / 3:
        p.error("--drop must be 0 to 1/3: with pictures it happens three times, without text, without picture, without both")
    if first.steps is not None:
        a.epochs = first.epochs                                                 # not the preset's
    if a.dry_run:
        a.steps, a.epochs, a.warmup, a.save_every, a.sheet_every, a.resume = 1, None, 1, 1, 1, False
    return a
