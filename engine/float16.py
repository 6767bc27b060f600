"""float16 without overflow, for GPUs that have no bfloat16 (before compute capability 8.0).

float16 ends at 65504. Qwen2.5's residual stream passes 1e4 at a few positions, and the products
within its MLPs go higher; in float16 throughout, they become infinite and then NaN ("!!!!" as an
answer, a black picture). Here only the matrix products and convolutions are in float16, weights and
inputs; each gives float32, and what lies between them (residual streams, norms, rotary angles,
softmax, gates) is in float32. A product is at most the largest input times the sum of one output's
absolute weights; an input row for which that is too much is divided before the product, and the
result multiplied after it, so that no product overflows.
"""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.int8 import Int8

# Somewhat below the largest float16, for rounding.
LARGEST = 60_000


def product(layer: nn.Module, x: Tensor, weight: Tensor, multiply, dims) -> Tensor:
    """multiply(x, weight), both in float16, in float32. dims: over which x is divided by one
    number. layer: keeps the largest input, which its weights decide."""
    if not hasattr(layer, "largest_input"):
        sums = torch.linalg.vector_norm(weight.flatten(1), 1, dim=1, dtype=torch.float32)
        layer.largest_input = LARGEST / sums.max().clamp(min=1)
    x = x.float()
    factor = (x.abs().amax(dims, keepdim=True) / layer.largest_input).clamp(min=1)
    return multiply((x / factor).half(), weight).float() * factor


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """nn.Linear, x (..., in)"""
    y = product(layer, x, weight_of(layer), F.linear, -1)
    return y if layer.bias is None else y + layer.bias


def convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """nn.Conv2d, x (B, C, h, w)"""
    how = {} if isinstance(layer, Int8) else dict(
        stride=layer.stride, padding=layer.padding, groups=layer.groups)
    y = product(layer, x, weight_of(layer), functools.partial(F.conv2d, **how), (1, 2, 3))
    return y if layer.bias is None else y + layer.bias[:, None, None]


def weight_of(layer: nn.Module) -> Tensor:
    return layer.weight_as(torch.float16) if isinstance(layer, Int8) else layer.weight


def logits(mllm, x: Tensor) -> Tensor:
    """MLLM.logits"""
    return product(mllm.embed_tokens, x, mllm.embed_tokens.weight, F.linear, -1)


def enable(model):
    """To be called before the weights are loaded: what is not a matrix gets float32 -> the
    model."""
    in_half = set()
    for module in model.modules():
        is_convolution = isinstance(module, nn.Conv2d)
        if isinstance(module, Int8):
            is_convolution = module.product is F.conv2d
        if is_convolution or isinstance(module, nn.Linear | Int8):
            module.forward = functools.partial(convolution if is_convolution else linear, module)
            in_half.add(getattr(module, "weight", None))
    model.mllm.logits = functools.partial(logits, model.mllm)
    model.mllm.embed_tokens.register_forward_hook(lambda module, ids, rows: rows.float())
    in_half.add(model.mllm.embed_tokens.weight)
    for p in model.parameters():
        p.data = p.data.half() if p in in_half else p.data.float()
    return model
