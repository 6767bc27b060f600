"""From --data to the examples of this process: sources, their weights, one order, batches."""
import itertools
import math
import os
import random
import re

from tqdm import tqdm

from engine.checks import printable
from engine.data import Reader, Share
from engine.limits import MAX_COUNT, MAX_TRAINING_STEPS
from engine.sources import Generated, open_source, source


def split_weight(spec: str) -> tuple[str, float | None]:
    """"a=0.7" -> ("a", 0.7); without a weight None. A folder that is called so has none."""
    name, equals, weight = spec.rpartition("=")
    number = re.fullmatch(r"\d+\.?\d*|\.\d+", weight, re.ASCII)
    if not equals or not number or os.path.isdir(spec):
        return spec, None
    if not 0 < float(weight) <= MAX_COUNT:
        raise ValueError(f"--data {printable(spec)}: a weight must be above 0, at most {MAX_COUNT}")
    return name, float(weight)


def check_data(args, makers: dict) -> None:
    """ValueError for what --data cannot name: before a model is loaded. (Whether a record can be
    read depends on the latents that are cached.)"""
    for spec in args.data or ():
        name, _ = split_weight(spec)
        open_source(name, makers, args.seed)


def open_sources(args, makers: dict, latents) -> tuple[list, list]:
    """--data -> sources and their weights, None where none was given. makers: {word: make(rng, i)
    -> Example} of sources that are made as they are asked for."""
    specs = [split_weight(spec) for spec in args.data]
    sources = [source(name, makers, args.seed, args.size, latents) for name, _ in specs]
    return sources, [weight for _, weight in specs]


def open_reader(args, state, rank: int, world: int, makers: dict, latents) -> Reader:
    """The examples of this process, from where the run has come to; --epochs becomes --steps."""
    sources, weights = open_sources(args, makers, latents)
    if args.overfit:
        # Always the first batch.
        state.history = []
    if not state.history or state.history[-1][0] != world:
        state.history.append((world, [0] * world))
    if args.epochs:
        records = count_records(sources, rank)
        left = args.epochs * sum(records) - state.seen
        # Of fewer epochs than were seen nothing is left.
        more = math.ceil(max(0, left) / (args.batch * args.accumulate * world))
        args.steps = max(1, state.step + more)
        if args.steps > MAX_TRAINING_STEPS:
            raise ValueError(f"--epochs {args.epochs:g} are {args.steps} steps, "
                             f"{MAX_TRAINING_STEPS} are the limit")
        # An epoch has all of each source, unless weights say otherwise.
        if set(weights) == {None}:
            weights = records
            # --resume --steps N has to go on in the same order.
            args.data = [f"{spec}={n}" for spec, n in zip(args.data, records)]
    weights = [1.0 if weight is None else weight for weight in weights]
    return Reader(Share(sources, weights, args.seed, rank, state.history), args.workers,
                  args.max_bad)


def count_records(sources, rank: int) -> list[int]:
    if any(isinstance(s, Generated) for s in sources):
        raise ValueError("--epochs: generated sources are endless, give --steps")
    counts = []
    for s in sources:
        locations = tqdm(s.locations(random.Random(0)), "count records", disable=rank > 0)
        counts.append(sum(1 for _ in locations))
    return counts


def first_examples(reader: Reader, n: int) -> list:
    """The first n examples of the whole order, the same on every process and at every time."""
    share = reader.share
    fresh = Share(share.sources, share.weights, share.seed, 0, [(1, [0])])
    examples = itertools.islice(Reader(fresh, max_bad=reader.max_bad), n)
    return [example for _, example in examples]


def batches(reader: Reader, state, args):
    """Yields the rows of one pass, [(example, random.Random of its own), ...]. What is random about
    an example depends on (seed, step, its number), not on who reads it."""
    examples = iter(reader)
    if args.overfit:
        # Those of the first step, again and again.
        first = list(itertools.islice(examples, args.batch * args.accumulate))
        examples = itertools.cycle(first)
    while True:
        rows = []
        for number, example in itertools.islice(examples, args.batch):
            rows.append((example, random.Random(f"{args.seed} {state.step} {number}")))
        yield rows
