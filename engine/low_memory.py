"""The parts take turns: MLLM, DiT and autoencoder are in memory when they work, not before and not
after, and only as many as fit into the size of the largest. So memory peaks at that part (the MLLM,
two thirds of all weights) instead of at the sum. The same numbers (tests/test_5_small.py).

On a CPU a part's weights are mapped, not copied: they are pages of the file, which the system keeps
as long as it has memory to spare, so that the next picture reads nothing again. On a GPU they are
copied from there. (A dtype other than the stored one has to be converted at each turn, as have
layers in 8 bits that are not stored so: weights_convert.py --dtype stores them.)
One view is enough to keep all pages of a file that were read; so no view is taken of a file of
which something has to be converted.

For drawing, editing and asking; training needs all parts at once.
"""
import functools

import torch
from torch import Tensor, nn

from engine.files import open_tensors, read_tensors, stored_tensors
from engine.loading import put

PARTS = ("mllm", "dit", "dcae")
# A part enters when one of these is about to run. (What runs first is not always the part itself.)
DOORS = ("mllm", "mllm.vision", "mllm.embed_tokens", "dit", "dit.caption", "dcae.encoder",
         "dcae.decoder")


def take_turns(model, files: list, device) -> None:
    """In place of loading.load_weights. The ladder is small and stays."""
    turns = Turns(model, files, torch.device(device))
    turns.read("ladder")
    for door in DOORS:
        enter = functools.partial(turns.enter, door.split(".")[0])
        model.get_submodule(door).register_forward_pre_hook(lambda *_, enter=enter: enter())
    model.save = refuse_to_save


def refuse_to_save(*_, **__) -> None:
    raise ValueError("a model whose parts take turns in memory cannot be saved: load it without "
                     "low_memory")


def own_tensors(module: nn.Module):
    """Yields (module, name, tensor) for parameters and buffers."""
    for m in module.modules():
        for kind in (m._parameters, m._buffers):
            yield from ((m, name, t) for name, t in list(kind.items()) if t is not None)


def size(module: nn.Module) -> int:
    """Bytes of all its weights, when they are in memory."""
    return sum(t.numel() * t.element_size() for _, _, t in own_tensors(module))


def absent(t: Tensor, device) -> Tensor:
    """What stands for a tensor that is not in memory: device, dtype and shape are its own, and all
    its values are one number, NaN, so that nobody computes with it unnoticed."""
    value = 0 if t.dtype == torch.int8 else torch.nan
    return torch.full((), value, dtype=t.dtype, device=device).expand(t.shape)


def stays_as_stored(model, name: str, stored) -> bool:
    """Or has this tensor of a file (files.Stored) to be converted?"""
    path, _, leaf = name.rpartition(".")
    there = getattr(model.get_submodule(path), leaf, None)
    # A layer in 8 bits has no weight.
    return there is not None and there.dtype == stored.dtype


class Turns:
    def __init__(self, model, files: list, device: torch.device):
        self.model = model
        self.device = device
        # {part: {file: its tensors in there}}
        self.stored = {part: {} for part in (*PARTS, "ladder")}
        for file in files:
            for name, stored in stored_tensors(file).items():
                self.stored[name.split(".")[0]].setdefault(file, {})[name] = stored
        self.limit = max(map(self.size_of, PARTS))
        self.present = []
        # Those whose convolutions fast.enable has laid out by channels.
        self.channels_last = set()
        for part in PARTS:
            self.leave(part)

    def enter(self, part: str) -> None:
        if part in self.present:
            return
        for other in PARTS:
            if other not in self.present:
                # Some switch may have given it memory since.
                self.leave(other)
        needed = self.size_of(part)
        while self.present and needed + sum(map(self.size_of, self.present)) > self.limit:
            self.leave(self.present.pop(0))
        self.read(part)
        self.present.append(part)

    def size_of(self, part: str) -> int:
        return size(getattr(self.model, part))

    def leave(self, part: str) -> None:
        module = getattr(self.model, part)
        # What is absent has no strides: it says nothing.
        here = [t for _, _, t in own_tensors(module) if any(t.stride())]
        if any(map(is_channels_last, here)):
            self.channels_last.add(part)
        elif here:
            self.channels_last.discard(part)
        for m, name, t in own_tensors(module):
            new = absent(t, self.device)
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, requires_grad=t.requires_grad)
            setattr(m, name, new)
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()

    def read(self, part: str) -> None:
        for file, tensors in self.stored[part].items():
            if all(stays_as_stored(self.model, *item) for item in tensors.items()):
                # Views of one mapping of the file, which goes with the last of them.
                with open_tensors(file) as f:
                    for name in tensors:
                        put(self.model, name, f.get_tensor(name), self.device, file, copy=False)
            else:
                for name, tensor in read_tensors(file, only=tensors):
                    put(self.model, name, tensor, self.device, file)
        if part in self.channels_last:
            getattr(self.model, part).to(memory_format=torch.channels_last)


def is_channels_last(t: Tensor) -> bool:
    return (t.dim() == 4 and not t.is_contiguous()
            and t.is_contiguous(memory_format=torch.channels_last))
