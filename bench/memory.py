"""How much memory a model of any size needs, counted tensor by tensor without that memory: the code
runs on the meta device, where tensors have a shape and no values.

    python -m bench.memory                 the table for the released sizes
    python -m bench.memory --check DIR     the count beside what the operating system reports for
                                           a real step on the CPU with the model in DIR

Counted are the bytes of all tensors alive at once, at the worst moment of a training step (forward,
backward, AdamW) or of sampling. Not counted: the CUDA context (about 0.5 GB), what the allocator
cannot use between blocks, and workspaces inside single operations.
"""
import dataclasses
import pathlib
import random

import torch
from PIL import Image

import sample
import train
from bench.measure import Counter
from bench.sizes import ROOT, empty_model
from engine import fast
from engine.command import Parser
from engine.sources import Example
from engine.files import read_json
from engine.log import peak_memory
from tbac import TBACConfig


def model_of(config, trained, device="meta"):
    """A model of these sizes: bfloat16; if it is to be trained, what learns in float32."""
    model = empty_model(config, device, torch.bfloat16)
    if trained:
        model.ladder.float()
        model.dit.float()
    return model


# ------------------------------------------------------------------------------------- training

def examples(n, size, edit):
    """Rows of a training step. No two prompts and no two pictures are alike: equal ones would be
    read once."""
    caption = "a long caption of about eighty words, as those of the training sets are. " * 8
    rows = []
    for i in range(n):
        picture = Image.new("RGB", (size, size), (10 * i, 80, 120))
        images = (picture,) if edit else ()
        rows.append((Example(f"{i} {caption}", images, picture), random.Random(i)))
    return rows


def options(*given):
    """train.py's. The data are never read, and there is no run to go on with."""
    return train.options([*given, "--data", "toy", "--steps", "1", "--out", str(ROOT / "bench")])


def train_step(model, args, batch, edit):
    """-> bytes at the worst moment of a step. AdamW in one fused operation needs its two moments
    and nothing beside them."""
    task = dataclasses.replace(train.LADDER_TASK, build=lambda args: model)
    run = train.Run(args, task)
    params = run.state.params.values()
    moments = [torch.zeros_like(p) for p in params for _ in range(2)]
    held = [*model.parameters(), *params, *run.state.ema.values(), *moments]
    with Counter(*held) as counter:
        losses, _ = run.loss(examples(batch, args.size, edit))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(params, args.clip)
    return counter.most


# ------------------------------------------------------------------------------------- sampling

def sampling(model, size, edit):
    """-> bytes at the worst moment of drawing a picture."""
    picture = [[Image.new("RGB", (size, size), "red")]] if edit else None
    with Counter(*model.parameters()) as counter, torch.no_grad():
        *_, last = sample.denoise(model, ["a dog"], picture, steps=2)
        model.dcae.decode(last.x_t.to(model.dit.proj_out.weight.dtype))
    return counter.most


# --------------------------------------------------------------------------------- command line

def check(folder, edit, plain, batch=4):
    """Counted on the meta device and measured on the CPU: one step of the model in `folder`,
    float32."""
    config = TBACConfig.from_dict(read_json(folder / "config.json"))
    args = options("--model", str(folder), "--size", str(config.size), "--device", "cpu",
                   "--dtype", "float32", "--ema", "0", "--plain" if plain else "--no-plain")
    model = train.build(args)
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    before = peak_memory("cpu")
    train_step(model, args, batch, edit)
    measured = peak_memory("cpu") - before + weights
    args.device = "meta"
    counted = train_step(model_of(config, True).float(), args, batch, edit) / 1e9
    what = f"batch {batch}, editing" if edit else f"batch {batch}"
    print(f"{what}: counted {counted:.2f} GB, measured {measured:.2f} GB")


def table(plain):
    print("| released sizes, 512 px | GB |")
    print("|---|---|")
    for what, edit in (("sampling", False), ("sampling, editing", True)):
        model = model_of(TBACConfig(), trained=False)
        if not plain:
            fast.enable(model)
        print(f"| {what} | {sampling(model, 512, edit) / 1e9:.1f} |", flush=True)
    for stage, batch in (("t2i", 4), ("t2i", 16), ("edit", 4)):
        for switch, note in (("--no-grad-checkpoint", ""),
                             ("--grad-checkpoint", ", gradient checkpointing")):
            args = options("--preset", "paper", "--stage", stage, "--model", "none", "--device",
                           "cpu", switch, "--plain" if plain else "--no-plain")
            # Which no command line takes.
            args.device = "meta"
            model = model_of(TBACConfig(), trained=True)
            used = train_step(model, args, batch, stage == "edit")
            print(f"| {stage}, batch {batch}{note} | {used / 1e9:.1f} |", flush=True)


def main():
    p = Parser(description=__doc__)
    p.add_argument("--check", type=pathlib.Path, metavar="DIR", help="a model folder")
    p.add_argument("--edit", action="store_true", help="with --check: an editing step")
    p.add_argument("--plain", action="store_true", help="without engine/fast.py")
    args = p.parse_args()
    if args.check:
        check(args.check, args.edit, args.plain)
    else:
        table(args.plain)


if __name__ == "__main__":
    main()
