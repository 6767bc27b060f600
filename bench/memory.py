"""How much memory a model of any size needs, counted tensor by tensor without the memory: the code runs on the meta device.

    python bench/memory.py                 the table for the released sizes
    python bench/memory.py --check DIR     beside the count, what the operating system says of a real step with the model in DIR, on the CPU

Counted are the bytes of all tensors alive at once, at the worst moment of a training step (forward, backward, AdamW) or of sampling. Not
counted: the CUDA context (about 0.5 GB), what the allocator cannot use between blocks, and workspaces inside of single operations.
"""
import argparse
import pathlib
import random
import resource
import sys
import weakref

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import sample
import train
from mllm import Tokenizer
from tbac import TBAC, TBACConfig

TINY = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "tiny"


class Counter(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; the most at once."""

    def __init__(self, *held):
        super().__init__()
        self.known, self.now, self.most = {}, 0, 0
        for t in held:
            self.see(t)

    def see(self, t):
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key], self.now = storage.nbytes(), self.now + storage.nbytes()
            weakref.finalize(storage, self.free, key)
            self.most = max(self.most, self.now)

    def free(self, key):
        self.now -= self.known.pop(key, 0)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.see(t)
        return out


def model_of(config, trained, device="meta"):
    """Released sizes by default: frozen parts in bfloat16; what learns in float32 if it is to be trained."""
    with torch.device(device):
        model = TBAC(config, Tokenizer(TINY / "qwen" / "tokenizer.json"))
    model.to(torch.bfloat16)
    return (model.ladder.float(), model.dit.float(), model)[2] if trained else model


def rows(n, size, edit):
    picture = Image.new("RGB", (size, size), "red")
    text = "a long caption of about eighty words, as those of the training sets are. " * 8                # no two alike: those were read once
    return [(train.data.Example(f"{i} {text}", (picture,) if edit else (), picture), random.Random(i)) for i in range(n)]


def train_step(model, a, batch, edit):
    """-> bytes at the worst moment of a step. AdamW in one fused operation needs its two moments and nothing beside them."""
    learner, trained, _ = train.prepare(model, a, 1)
    state = train.State(trained, a)
    moments = [torch.zeros_like(p) for p in trained.values() for _ in range(2)]
    with Counter(*model.parameters(), *state.mean.values(), *moments) as counter:
        losses, _ = learner(rows(batch, a.size, edit))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), a.clip)
    return counter.most


def sampling(model, size, edit):
    picture = [[Image.new("RGB", (size, size), "red")]] if edit else None
    with Counter(*model.parameters()) as counter, torch.no_grad():
        *_, last = sample.denoise(model, ["a dog"], picture, steps=2)
        model.dcae.decode(last.x_t.to(model.dit.proj_out.weight.dtype))
    return counter.most


def check(folder, batch=4, edit=False):
    """Counted on meta and measured on the CPU: one step of the model in `folder`, float32."""
    a = train.options(["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--ema", "0"])
    model = train.build(a)
    a.size = model.config.size
    unit = 1e9 if sys.platform == "darwin" else 1e6                             # bytes there, kilobytes elsewhere
    held = sum(p.nbytes for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    train_step(model, a, batch, edit)
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit - before + held / 1e9
    a.device = "meta"
    counted = train_step(model_of(model.config, True).float(), a, batch, edit) / 1e9
    print(f"batch {batch}{', editing' * edit}: counted {counted:.2f} GB, measured {measured:.2f} GB")


def table():
    print("| released sizes, 512 px | GB |\n|---|---|")
    print(f"| sampling | {sampling(model_of(TBACConfig(), False), 512, False) / 1e9:.1f} |")
    print(f"| sampling, editing | {sampling(model_of(TBACConfig(), False), 512, True) / 1e9:.1f} |")
    for stage, batch in (("t2i", 4), ("t2i", 16), ("edit", 4)):
        for more in ("--no-grad-checkpoint", "--grad-checkpoint"):
            a = train.options(["--preset", "paper", "--stage", stage, "--device", "meta", more])
            used = train_step(model_of(TBACConfig(), True), a, batch, stage == "edit")
            print(f"| {stage}, batch {batch}{', gradient checkpointing' * (more == '--grad-checkpoint')} | {used / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", type=pathlib.Path, metavar="DIR", help="a model folder")
    p.add_argument("--edit", action="store_true", help="with --check: an editing step")
    a = p.parse_args()
    check(a.check, edit=a.edit) if a.check else table()
