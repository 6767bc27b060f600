"""Qwen2.5-VL's ViT by hand: a picture becomes tokens for the MLLM (arXiv 2502.13923, section 2.1.1).

Picture -> resized -> patches -> blocks, most of them with attention inside windows -> merged 2 x 2 to one token. Frozen in the paper's stages.
RMSNorm, rotary positions, attention and SwiGLU are those of the decoder, too (mllm.py).

Dimension key: B pictures, P patches of a picture, U merged units (P / 4), D width, M the MLLM's width, H heads, K head dim, S positions, N
pictures or windows; in `attention` also G key heads, T positions that are seen.
Left out: video.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ------------------------------------------------------------------------------------------------------------ pictures

def smart_size(width, height, unit, area):
    """(width, height), both multiples of `unit`, close to `area` pixels in all and to the aspect ratio given."""
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"picture of {width}x{height} is too thin: aspect ratio above 200")
    w, h = round(width / unit) * unit, round(height / unit) * unit
    if w * h == area:
        return w, h
    if w * h > area:                                                # never above the area when too large, nor below when too small
        scale = math.sqrt(width * height / area)                    # divided by: the inverse would round otherwise than the public code
        return max(unit, math.floor(width / scale / unit) * unit), max(unit, math.floor(height / scale / unit) * unit)
    scale = math.sqrt(area / (width * height))
    return math.ceil(width * scale / unit) * unit, math.ceil(height * scale / unit) * unit


def patchify(image, c):
    """PIL picture -> patches (P, 3 * 2 * patch * patch) and their grid (h, w).

    Order: units of merge x merge neighbours, unit by unit, so that merge^2 consecutive patches can later be merged into one token.
    """
    image = image.convert("RGB")
    size = smart_size(*image.size, c.patch * c.merge, c.area)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(image, np.float32) / 255)                                     # (height, width, 3)
    x = (x - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    h, w = size[1] // c.patch, size[0] // c.patch
    x = x.view(h // c.merge, c.merge, c.patch, w // c.merge, c.merge, c.patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5).expand(-1, -1, -1, -1, -1, c.frames, -1, -1)  # a still is its own next frame
    return x.reshape(h * w, -1), (h, w)


# ---------------------------------------------------------------------------------------------- the math of the decoder, too

class RMSNorm(nn.Module):
    """Qwen2.5-VL's: rounded to x's dtype before the gain, where nn.RMSNorm rounds after it; in bfloat16 the two differ."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (x.float() * scale).to(x.dtype)


def frequencies(n, theta, device):
    """The n rotary frequencies theta^(-i/n). Computed when needed: a buffer would have no values on the meta device."""
    return theta ** -(torch.arange(n, device=device).float() / n)


def apply_rope(x, angle):
    """Turns the channel pairs (i, i + K/2) of x (..., S, K) by angle (..., S, K/2), in float32."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(K)) v for q (B, H, S, K), k and v (B, G, T, K), mask (B, 1, S, T) or broadcastable, False = unseen.

    Grouped queries: each of the G key heads serves H / G query heads, stacked along S, so that keys and values need not be repeated.
    """
    G, S = k.shape[1], q.shape[2]
    q = q.unflatten(1, (G, -1)).flatten(2, 3) / math.sqrt(q.shape[-1])       # (B, G, H/G * S, K)
    scores = q @ k.transpose(2, 3)                                           # (B, G, H/G * S, T)
    scores = scores.unflatten(2, (-1, S)).masked_fill(~mask[:, :, None], -math.inf)
    out = scores.softmax(-1).flatten(2, 3) @ v                               # (B, G, H/G * S, K)
    return out.unflatten(2, (-1, S)).flatten(1, 2)                           # (B, H, S, K)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias), nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ----------------------------------------------------------------------------------------------------------------- ViT

@dataclass(frozen=True)
class ViTConfig:
    n_layer: int = 32
    dim: int = 1280
    n_head: int = 16
    mlp_dim: int = 3420
    patch: int = 14                     # pixels
    frames: int = 2                     # a patch spans two video frames
    merge: int = 2                      # merge x merge patches become one MLLM token
    window: int = 112                   # pixels; attention stays inside windows ...
    full_attention: tuple = (7, 15, 23, 31)  # ... but in these layers
    area: int = 256 * 28 * 28           # pixels; every picture is resized to about this area


def window_order(grid, c):
    """Merged units sorted window by window, for a picture of grid (h, w) patches.

    -> order (windows, units per window), the row-major index of each unit, 0 where an edge window is not full, and
    real (same shape), False there. A window covers window/merge/patch units a side.
    """
    h, w, side = grid[0] // c.merge, grid[1] // c.merge, c.window // c.merge // c.patch
    index = torch.arange(h * w).view(1, 1, h, w) + 1                                   # 0 will mean "outside the picture"
    index = F.pad(index, (0, -w % side, 0, -h % side)).flatten(0, 1)                   # (1, h', w'), multiples of side
    index = index.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)    # (1, rows, columns, side, side)
    index = index.reshape(-1, side * side)                                             # (windows, side * side)
    return (index - 1).clamp(min=0), index > 0


class VisionAttention(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, angle, real):
        """x (N, S, D) with N pictures or windows; angle (N, S, K/2); real (N, S), False for padding."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)           # 3 x (N, H, S, K)
        q, k = apply_rope(q, angle[:, None]), apply_rope(k, angle[:, None])
        x = attention(q, k, v, real[:, None, None])                                               # (N, H, S, K)
        return self.out(x.transpose(1, 2).flatten(2))                                             # (N, S, D)


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = RMSNorm(c.dim), VisionAttention(c.dim, c.n_head)
        self.norm2, self.mlp = RMSNorm(c.dim), SwiGLU(c.dim, c.mlp_dim, bias=True)

    def forward(self, x, angle, real):
        x = x + self.attn(self.norm1(x), angle, real)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge neighbouring patches -> one token of the decoder's width."""

    def __init__(self, c, out_dim):
        super().__init__()
        wide = c.merge ** 2 * c.dim
        self.norm, self.fc1, self.fc2 = RMSNorm(c.dim), nn.Linear(wide, wide), nn.Linear(wide, out_dim)

    def forward(self, x):                                          # (B, U, merge^2, D)
        return self.fc2(F.gelu(self.fc1(self.norm(x).flatten(2))))  # (B, U, M)


class ViT(nn.Module):
    def __init__(self, c, out_dim):
        super().__init__()
        self.config = c
        self.patch_embed = nn.Linear(3 * c.frames * c.patch ** 2, c.dim, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.n_layer))
        self.merger = Merger(c, out_dim)

    def angles(self, grid, device):
        """(P, K/2) rotary angles, half of the channels for the patch's row and half for its column, in merge order."""
        c, (h, w) = self.config, grid
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        place = torch.stack([rows, columns], -1).view(h // c.merge, c.merge, w // c.merge, c.merge, 2)
        place = place.transpose(1, 2).reshape(h * w, 2, 1)
        return (place * frequencies(c.dim // c.n_head // 4, 1e4, device)).flatten(1)

    def forward(self, patches, grid):
        """patches (B, P, 3 * frames * patch^2) of B pictures that share one grid (h, w) in patches -> (B, U, M)."""
        c, B, dev = self.config, len(patches), patches.device
        order, real = window_order(grid, c)                                              # W windows of T units, `unit` patches each
        W, unit, where = len(order), c.merge ** 2, real.flatten().nonzero()[:, 0]
        back = where[order.flatten()[where].argsort()].to(dev)                           # of each unit the slot in which it stands now
        order, real = order.to(dev), real.to(dev)
        windowed = lambda x: x.unflatten(-2, (-1, unit))[..., order, :, :].flatten(-4, -2)         # (..., P, n) -> (..., W*T*unit, n)
        x = windowed(self.patch_embed(patches))                                          # (B, W*T*unit, D), edge windows filled up
        angle = windowed(self.angles(grid, dev)).expand(B, -1, -1)                       # (B, W*T*unit, K/2)
        real_patch = real.flatten().repeat_interleave(unit).expand(B, -1)                # (B, W*T*unit)
        split = lambda x: x.unflatten(1, (W, -1)).flatten(0, 1)                          # (B, W*T*unit, ...) -> (B*W, T*unit, ...)
        for i, block in enumerate(self.blocks):
            whole = i in c.full_attention
            x = block(x, angle, real_patch) if whole else block(split(x), split(angle), split(real_patch)).reshape(B, -1, c.dim)
        return self.merger(x.unflatten(1, (-1, unit)))[:, back]                          # (B, U, M), row by row again
