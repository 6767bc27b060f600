"""What it saves to train models together: a step of N toy models (lab/trials.py), in stacks or not,
against N single steps of train.py, each with its own examples, latents and reading of the prompts.

    python -m bench.together [--n 4] [--width 1] [--times 5] [--device cpu]

On a CPU seconds of the processor, so that other programs count little; in turns, and the median of
the ratios.
"""
import pathlib
import statistics
import tempfile
import time

import torch

import train
from engine import command
from engine.options import store
from lab import ablate, plan, trials
from sample import TOY_FOLDER

# Examples a step: more than the study's own, as other stages have.
BATCH = 24


def stacked(n, width, device, out):
    """-> one step of n models, in stacks of `width`, all of it"""
    start = trials.all_of(TOY_FOLDER, out / "start")
    words = f"primary --start {start} --dtype float32 --n 1 --batch {BATCH} --out {out}"
    args = ablate.options([*words.split(), "--device", device, "--width", str(width)])
    group = trials.Group(plan.PARTS["primary"].runs((n + 1) // 2)[:n], args)
    batches = group.batches()
    return lambda: group.step(next(batches))


def single(device, out):
    """-> one step of one model as train.py takes it"""
    args = train.options(["--batch", str(BATCH), "--dtype", "float32", "--device", device,
                          "--out", str(out), "--wiring", "ladder"])
    out.mkdir(parents=True, exist_ok=True)
    store(args)
    steps = train.Run(args).steps()
    return lambda: next(steps)


def seconds(f, device):
    """Of one call; on a CPU those of the processor."""
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    f()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main():
    p = command.Parser(prog="python -m bench.together", description=__doc__)
    many = command.count(1, 1000)
    p.add_argument("--n", type=many, default=4, help="models")
    p.add_argument("--width", type=many, default=1, help="models in a stack")
    p.add_argument("--times", type=many, default=5, help="measured, after one that is not")
    p.add_argument("--device", type=command.device, default="cpu")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        all_of_them = stacked(args.n, args.width, args.device, folder)
        one_of_them = single(args.device, folder / "one")
        pairs = []
        for _ in range(args.times + 1):
            together = seconds(all_of_them, args.device) / args.n
            pairs.append((together, seconds(one_of_them, args.device)))
    pairs = pairs[1:]
    stack, one = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(alone / together for together, alone in pairs)
    print(f"{args.n} models in stacks of {args.width}: a step of one takes {stack:.3f} s, alone "
          f"{one:.3f} s, {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
