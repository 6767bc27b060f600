"""What it saves to train models together: a step of N toy models (lab/trials.py), in stacks or not,
against N single steps of train.py, each with its own examples, latents and reading of the prompts.

    python -m bench.together [--n 4] [--width 1] [--times 5] [--device cpu]

On a CPU seconds of the processor, so that other programs count little; in turns, and the median of
the ratios.
"""
import argparse
import itertools
import pathlib
import statistics
import tempfile
import time

import torch

import train
from engine.options import store
from lab import ablate, plan, trials
from sample import TOY_FOLDER


def stacked(n, width, device, out):
    """-> one step of n models, in stacks of `width`, all of it"""
    words = f"primary --dit {TOY_FOLDER} --captions {TOY_FOLDER} --dtype float32 --out {out}"
    args = ablate.options([*words.split(), "--device", device, "--width", str(width)])
    group = trials.Group(plan.PARTS["primary"].runs((n + 1) // 2)[:n], args)
    batches = group.batches()
    return lambda: group.step(next(batches))


def single(device, out):
    """-> one step of one model as train.py takes it"""
    args = train.options(["--batch", str(plan.BATCH), "--dtype", "float32", "--device", device,
                          "--out", str(out), "--wiring", "ladder"])
    out.mkdir(parents=True, exist_ok=True)
    store(args)
    steps = train.Run(args).steps()
    return lambda: next(steps)


def seconds(f, device):
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    f()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=4, help="models")
    p.add_argument("--width", type=int, default=1, help="models in a stack")
    p.add_argument("--times", type=int, default=5, help="measured, after one that is not")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        together = stacked(args.n, args.width, args.device, folder)
        alone = single(args.device, folder / "one")
        pairs = []
        for _ in range(args.times + 1):
            pairs.append((seconds(together, args.device) / args.n, seconds(alone, args.device)))
    pairs = pairs[1:]
    stack, one = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(itertools.starmap(lambda a, b: b / a, pairs))
    print(f"{args.n} models in stacks of {args.width}: a step of one takes {stack:.3f} s, alone "
          f"{one:.3f} s, {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
