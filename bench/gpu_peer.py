"""The peer's step of bench/gpu.sh: the same work by ours and by the public libraries, in turns,
with the same weights, which are made on the GPU itself. It needs transformers and diffusers.

    python -m bench.gpu_peer peer --out FILE [--rehearse]
"""
import functools
import pathlib
import tempfile

from bench.bench import Theirs
from bench.gpu import Rows, draw_tasks, full_model, options
from bench.make_random import released_tensors, write_layouts
from bench.measure import Operations, in_turns, peak
from bench.work import CAPTION, ORDER, Ours, Task, distance, picture


def tasks_of(config):
    """In order of value. Training steps: forward and backward, without an optimizer."""
    drawn = draw_tasks(config)
    captions = [f"{CAPTION} Number {i}." for i in range(16)]
    orders = [ORDER, "remove the square", "add a cross", "make it black"]
    sources = [[picture(config.size, seed)] for seed in range(4)]
    trained = {
        "training step t2i, batch 4": Task("train", captions[:4]),
        "training step edit, batch 4": Task("train", orders, sources),
        "training step t2i, batch 4, --grad-checkpoint":
            Task("train", captions[:4], grad_checkpoint=True),
        "training step t2i, batch 16": Task("train", captions),
    }
    first = {name: drawn.pop(name) for name in ("20-step picture", "20-step edit")}
    return first | trained | drawn


def counted(f):
    """-> f(), its operations"""
    with Operations() as counter:
        out = f()
    return out, counter.n


def compare(ours, theirs, task, args):
    """-> ratios of time, operations and memory, and how far the results are apart"""
    f, g = theirs.prepare(task), ours.prepare(task)
    (expected, of_peer), (found, of_ours) = counted(f), counted(g)
    used = dict(peer=peak(f, theirs.peer.parameters(), args.device),
                ours=peak(g, ours.model.parameters(), args.device))
    if args.device == "cuda":
        # Both models are there: take the other one's weights off.
        used["peer"] -= sum(p.nbytes for p in ours.model.parameters())
        used["ours"] -= sum(p.nbytes for p in theirs.peer.parameters())
    pairs = in_turns(f, g, 1 if args.rehearse else 3, args.device)
    return vars(pairs) | dict(apart=distance(found, expected), memory=used,
                              operations=dict(peer=of_peer, ours=of_ours))


def peer_step(rows, args):
    model = full_model(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_layouts(model.config, folder)
        ours = Ours(model)
        theirs = Theirs(folder, ours.inputs, functools.partial(released_tensors, model))
    for name, task in tasks_of(model.config).items():
        rows.add(name, functools.partial(compare, ours, theirs, task, args))


def main():
    args = options(("peer",), __doc__)
    peer_step(Rows(args), args)


if __name__ == "__main__":
    main()
