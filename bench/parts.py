"""What each part of engine/fast.py saves. It needs no packages beside ours.

    python -m bench.parts /tmp/mid --threads 2

The folder is made as for bench.py; only its `ours` is read. Operations are counted while the parts
are switched on one after the other; time is measured for each state against the plain path, in
alternating pairs.
"""
import functools
import unittest.mock

from bench.measure import in_turns, operations
from bench.work import distance, load, parser, write
from engine import fast
from engine.command import one_line_errors

ROWS = ("encode a prompt with its null prompt", "encode an edit (three rows)",
        "20-step picture, encode to latents", "20-step edit", "training step t2i",
        "training step edit")


def packed_with_graph(model, *given, **settings):
    """fast.packed_query_states, but with a graph through all positions: it reads a prefix without
    one where gradients are wanted, and here it is told that they are not."""
    with unittest.mock.patch("torch.is_grad_enabled", lambda: False):
        return fast.packed_query_states(model, *given, **settings)


def pack_only(model):
    """Packing and equal things once, but with a graph through all positions."""
    fast.enable(model)
    model.query_states = functools.partial(packed_with_graph, model)


VARIANTS = {"packed": pack_only, "fast": fast.enable}


def fast_against_plain(ours, tasks, args):
    """-> {name: operations of the variants; time of the plain path over theirs}"""
    def at(switch, run):
        switch(ours.model)
        return run()

    rows = {}
    print("| work | plain, 1e9 operations | packed | and prefix without a graph | "
          "time, plain / packed | time, plain / both |")
    print("|---|---|---|---|---|---|")
    for name, task in tasks.items():
        run = ours.prepare(task)
        plain = functools.partial(at, fast.disable, run)
        # Counting is the warm-up, too.
        row = rows[name] = dict(operations=dict(plain=operations(plain)), times={})
        for variant, switch in VARIANTS.items():
            quick = functools.partial(at, switch, run)
            row["operations"][variant] = operations(quick)
            row["apart"] = distance(quick(), plain())
            pairs = in_turns(plain, quick, args.pairs, args.device)
            row["times"][variant] = dict(plain=pairs.first, variant=pairs.second,
                                         ratio=pairs.ratio, low=pairs.low, high=pairs.high)
        counts = [f"{n / 1e9:.0f}" for n in row["operations"].values()]
        times = [f"{t['ratio']:.2f} ({t['low']:.2f} - {t['high']:.2f})"
                 for t in row["times"].values()]
        print(f"| {' | '.join([name, *counts, *times])} |", flush=True)
    return rows


def main():
    args = parser(__doc__, "ours").parse_args()
    ours, tasks = load(args)
    tasks = {name: task for name, task in tasks.items() if name in ROWS}
    write(args, fast_against_plain(ours, tasks, args))


if __name__ == "__main__":
    with one_line_errors():
        main()
