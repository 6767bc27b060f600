"""Weights in 8 bits, computed with in the dtype of what comes in: half the memory of bfloat16.

Each row of a weight matrix (all that leads to one output) is divided by its largest absolute value
and rounded to whole numbers from -127 to 127; that value / 127, rounded to bfloat16, is kept beside
them as their scale. (Symmetric, one scale for each output channel.) When a layer runs, its
matrix is written out again, used and dropped.

In 8 bits are the linear layers and 1 x 1 convolutions inside the repeated blocks of MLLM, ViT and
DiT, and the ViT's last but one layer: seven eighths of all weights. As they are stay norms, biases,
embeddings, the ladder, what every value passes on its way into a network or out of it, and the
autoencoder, which is small.
"""
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.files import stored_tensors, weight_files

INNER = re.compile(r"(mllm\.layers|mllm\.vision\.blocks|dit\.blocks)\.\d+\."
                   r"|mllm\.vision\.merger\.fc1")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, ...) -> whole numbers, int8 (out, ...), and scales (out, 1, ...), float32: their
    product is the weight, to half a scale."""
    weight = weight.float()
    # A row of zeros has any scale.
    largest = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp(min=1e-30)
    scale = (largest / 127).bfloat16().float()
    return (weight / scale).round().to(torch.int8), scale


class Int8(nn.Module):
    """In place of an nn.Linear or of a 1 x 1 nn.Conv2d."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.product = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
        self.bias = layer.bias
        int8, scale = quantize(layer.weight.detach())
        self.register_buffer("int8", int8)
        self.register_buffer("scale", scale)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        # Whole numbers and scales are exact in bfloat16 and in float32. A small scale would not be
        # in float16.
        exact = torch.float32 if dtype == torch.float16 else dtype
        return self.int8.to(exact).mul_(self.scale.to(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight_as(x.dtype), self.bias)


def is_kept_in_int8(name: str, module: nn.Module) -> bool:
    """name: the module's, in a TBAC"""
    flat = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return bool(INNER.match(name)) and (isinstance(module, nn.Linear) or flat)


def enable(model, names=None):
    """Replaces these layers of a whole model, of which they may have no values yet, or only those
    of the given names -> the model."""
    for name, module in list(model.named_modules()):
        if is_kept_in_int8(name, module) and (names is None or name in names):
            model.set_submodule(name, Int8(module))
    return model


def count_parameters(model) -> int:
    """Of layers in 8 bits, too, whose weights are no nn.Parameter."""
    in_8_bits = sum(m.int8.numel() for m in model.modules() if isinstance(m, Int8))
    return in_8_bits + sum(p.numel() for p in model.parameters())


def stored_layers(folder) -> set[str]:
    """The names of a model folder's layers in 8 bits. (A model whose parts are of several folders
    may have some.)"""
    names = (name for file in weight_files(folder) for name in stored_tensors(file))
    return {name.removesuffix(".int8") for name in names if name.endswith(".int8")}


def in_int8(model, tensors: Iterator) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a whole model's weights -> the same as they are stored: these layers in 8
    bits, what is left in bfloat16."""
    kept = {f"{name}.weight" for name, m in model.named_modules() if is_kept_in_int8(name, m)}
    for name, tensor in tensors:
        if name in kept:
            layer = name.removesuffix("weight")
            int8, scale = quantize(tensor)
            yield f"{layer}int8", int8
            yield f"{layer}scale", scale
        else:
            yield name, tensor.to(torch.bfloat16)


def in_dtype(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What is in 8 bits stays so."""
    return t if t.dtype == torch.int8 else t.to(dtype=dtype)
