"""Operations and memory of each piece of work, ours and the peer's, counted: the same on every
machine. It needs transformers and diffusers, but neither weights nor their memory.

    python -m bench.counts            writes bench/counts.json

Weights and activations have shapes and no values (the meta device); what decides which work is
done, token ids, positions, masks and picture grids, is computed. Operations are those of matrix
products and convolutions. Bytes are those of all tensors alive at once, weights included, at the
worst moment. The answer of 64 tokens needs values, so it is counted on the CPU, at size mid only.
"""
import dataclasses
import functools
import json
import pathlib
import re
import tempfile
import unittest.mock
from collections import Counter as Tally

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bench.bench import Theirs
from bench.make_random import released_tensors, write_layouts
from bench.measure import Counter, Operations, bytes_read
from bench.sizes import ROOT, SIZES, empty_model, random_model
from bench.work import Ours, all_tasks
from engine.command import Parser

FILE = ROOT / "bench" / "counts.json"
# Modules of either model -> the part that they are counted under; the last line that fits holds.
PARTS = {
    "ours": {r"mllm": "language model", r"mllm\.vision": "ViT", r"ladder": "connector",
             r"dit": "DiT", r"dit\.caption": "captions",
             r"dit\.blocks\.\d+\.cross\.[kv]": "captions", r"dcae": "autoencoder"},
    "peer": {r"mllm": "language model", r"mllm\.visual": "ViT", r"connector": "connector",
             r"dit": "DiT", r"dit\.caption_projection": "captions",
             r"dit\.transformer_blocks\.\d+\.attn2\.to_[kv]": "captions",
             r"vae": "autoencoder"},
}


def part_of(path, parts):
    fitting = [part for pattern, part in parts.items() if re.match(pattern + r"(\.|$)", path)]
    return fitting[-1] if fitting else "other"


class Shapes(TorchDispatchMode):
    """Floating-point tensors without values, whole numbers with them, in one computation."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs))
                   if isinstance(t, torch.Tensor)]
        to_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if to_meta and not any(t.is_meta for t in tensors):
            out = f(*args, **kwargs | dict(device="cpu"))
            return out.to("meta") if out.is_floating_point() else out
        if any(t.is_meta for t in tensors):
            args, kwargs = tree_map(self.without_values, (args, kwargs))
        return f(*args, **kwargs)

    @staticmethod
    def without_values(t):
        return t.to("meta") if isinstance(t, torch.Tensor) and t.dim() else t


def on_the_cpu(name):
    """torch.autocast knows no meta device, and torch.tensor there forgets its numbers."""
    original = getattr(torch, name)

    def call(*args, **kwargs):
        kwargs = {key: "cpu" if str(value) == "meta" else value for key, value in kwargs.items()}
        return original(*args, **kwargs)
    return unittest.mock.patch(f"torch.{name}", call)


class ByPart(Operations):
    """Operations by the part of the model that runs; those of the backward pass by themselves."""

    def __init__(self, model, parts):
        super().__init__()
        self.tally = Tally()
        self.stack = ["other"]
        self.handles = []
        for path, module in model.named_modules():
            enter = functools.partial(self.enter, part_of(path, parts))
            self.handles.append(module.register_forward_pre_hook(enter))
            self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def enter(self, name, module, args):
        self.stack.append(name)

    def leave(self, module, args, output):
        self.stack.pop()

    def count(self, *call):
        n = super().count(*call)
        backward = torch._C._current_autograd_node() is not None
        self.tally["backward pass" if backward else self.stack[-1]] += n
        return n

    def remove(self):
        for handle in self.handles:
            handle.remove()


def counted(f, model, parts):
    """-> operations, by part; bytes read; bytes alive at most"""
    with Counter(*model.parameters()) as alive, ByPart(model, parts) as by_part:
        read = bytes_read(f)
    by_part.remove()
    return dict(operations=by_part.n, read=read, memory=alive.most,
                parts={part: n for part, n in by_part.tally.most_common() if n})


def sides(config, device):
    """-> Ours and Theirs with the same weights, without values on the meta device"""
    make = empty_model if device == "meta" else random_model
    model = make(config, device)
    ours = Ours(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_layouts(config, folder)
        theirs = Theirs(folder, ours.inputs, functools.partial(released_tensors, model))
    return ours, theirs


def count_task(ours, theirs, task):
    return dict(peer=count_side(theirs, theirs.peer, PARTS["peer"], task),
                ours=count_side(ours, ours.model, PARTS["ours"], task))


def count_side(side, model, parts, task):
    """All steps of a picture after the first cost the same: two are counted."""
    if task.kind != "draw":
        return counted(side.prepare(task), model, parts)
    one, two = (counted(side.prepare(dataclasses.replace(task, steps=n)), model, parts)
                for n in (1, 2))

    def all_steps(first, second):
        return first + (task.steps - 1) * (second - first)

    total = {key: all_steps(one[key], two[key]) for key in ("operations", "read")}
    by_part = {part: all_steps(one["parts"][part], n) for part, n in two["parts"].items()}
    return total | dict(memory=two["memory"], parts=by_part)


def count_size(config, only):
    ours, theirs = sides(config, "meta")
    rows = {}
    with Shapes(), on_the_cpu("autocast"), on_the_cpu("tensor"):
        for name, task in all_tasks(config.size).items():
            if only in name and task.kind != "answer":
                rows[name] = count_task(ours, theirs, task)
                show(name, rows[name])
    return rows


def show(name, row):
    peer, ours = row["peer"]["operations"], row["ours"]["operations"]
    print(f"{name}: {peer / 1e9:.0f}, {ours / 1e9:.0f}e9 operations, {ours / peer:.2f}", flush=True)


def main():
    p = Parser(description=__doc__)
    p.add_argument("--only", default="", help="rows whose name contains this")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=["mid", "full"])
    p.add_argument("--out", type=pathlib.Path, default=FILE)
    args = p.parse_args()
    found = {size: count_size(SIZES[size], args.only) for size in args.sizes}
    if "mid" in found:
        for name, task in all_tasks(SIZES["mid"].size).items():
            if args.only in name and task.kind == "answer":
                found["mid"][name] = count_task(*sides(SIZES["mid"], "cpu"), task)
                show(name, found["mid"][name])
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
