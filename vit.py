"""Qwen2.5-VL's ViT: a picture becomes tokens for the MLLM (arXiv 2502.13923, sec. 2.1.1).

Picture -> resized -> patches -> blocks, most of them with attention inside windows -> 2 x 2 patches
merged to one token. Frozen in the paper's three stages. RMSNorm, rotary positions, attention and
SwiGLU serve the decoder, too (mllm.py).

Dimension key: B pictures, P patches of a picture, U units (2 x 2 patches, one token each; P / 4),
W windows of V units, S = 4 V patches, D width, M the MLLM's width, H heads, K head dim, N pictures
or windows; in `attention` also G key heads and T positions that are attended to.
Left out: video.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# CLIP's mean and standard deviation of red, green, blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """The defaults are those of Qwen2.5-VL-3B."""
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


# ------------------------------------------------------------------------------------ pictures

def smart_size(width: int, height: int, factor: int, area: int) -> tuple[int, int]:
    """(width, height), both multiples of `factor`, with about `area` pixels and about the same
    aspect ratio. ValueError for an aspect ratio above 200."""
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"picture of {width}x{height} is too thin: aspect ratio above 200")
    w, h = round(width / factor) * factor, round(height / factor) * factor
    if w * h == area:
        return w, h
    # Never above the area when the picture is too large (unless it is so thin that a side has only
    # one factor), nor below it when too small. (Dividing by a scale rounds differently from
    # multiplying by its inverse; this follows the public code.)
    if w * h > area:
        scale = math.sqrt(width * height / area)
        w = max(factor, math.floor(width / scale / factor) * factor)
        h = max(factor, math.floor(height / scale / factor) * factor)
    else:
        scale = math.sqrt(area / (width * height))
        w = math.ceil(width * scale / factor) * factor
        h = math.ceil(height * scale / factor) * factor
    return w, h


def patchify(image: Image.Image, c: ViTConfig) -> tuple[Tensor, tuple[int, int]]:
    """PIL picture -> patches (P, 3 * frames * patch * patch) and their grid (h, w).

    Order: unit by unit, so that merge^2 consecutive patches can later become one token.
    """
    image = image.convert("RGB")
    size = smart_size(*image.size, c.patch * c.merge, c.area)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(image, np.float32) / 255)          # (height, width, 3)
    x = (x - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    h, w = size[1] // c.patch, size[0] // c.patch
    x = x.view(h // c.merge, c.merge, c.patch, w // c.merge, c.merge, c.patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)         # unit row, unit column, row, column, 3, patch, patch
    # A still picture is its own next frame.
    x = torch.stack([x] * c.frames, dim=5)     # ..., 3, frames, patch, patch
    return x.reshape(h * w, -1), (h, w)


# ------------------------------------------------------------------ shared with the decoder

class RMSNorm(nn.Module):
    """Qwen2.5-VL's: rounds to x's dtype before the gain. nn.RMSNorm rounds after it, which differs
    in bfloat16."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (x.float() * scale).to(x.dtype)


def frequencies(n: int, theta: float, device) -> Tensor:
    """The n rotary frequencies theta^(-i/n). Computed when needed: a buffer would have no values
    on the meta device."""
    return theta ** -(torch.arange(n, device=device).float() / n)


def apply_rope(x: Tensor, angle: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + K/2) of x (..., S, K) by angle (..., S, K/2), in float32."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for q (B, H, S, K), k and v (B, G, T, K) -> (B, H, S, K).
    mask (B, 1, S, T) or broadcastable, False = not attended to.

    Grouped queries: each of the G heads of keys and values serves H / G heads of queries.
    """
    q = q.unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])       # (B, G, H/G, S, K)
    scores = torch.einsum("bghsk, bgtk -> bghst", q, k)                 # (B, G, H/G, S, T)
    scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    out = torch.einsum("bghst, bgtk -> bghsk", scores.softmax(-1), v)
    return out.flatten(1, 2)                                            # (B, H, S, K)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias)
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ------------------------------------------------------------------------------------- windows

def window_index(grid: tuple[int, int], c: ViTConfig) -> tuple[Tensor, Tensor]:
    """Which units each window holds, for a picture of grid (h, w) patches.

    -> index (W, units per window), the row-major number of each unit, and valid (same shape):
    False where an edge window reaches beyond the picture (the index there is 0).
    """
    h, w = grid[0] // c.merge, grid[1] // c.merge                      # in units
    side = c.window // c.merge // c.patch                              # of a window, in units
    units = torch.arange(h * w).view(h, w)
    units = F.pad(units, (0, -w % side, 0, -h % side), value=-1)       # whole windows: (h', w')
    windows = units.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # (rows, side, columns, side)
    windows = windows.transpose(1, 2).reshape(-1, side * side)         # (W, side * side)
    return windows.clamp(min=0), windows >= 0


def to_windows(x: Tensor, index: Tensor, per_unit: int) -> Tensor:
    """x (B, P, n), `per_unit` patches for each unit in turn -> (B, W * S, n): the patches window by
    window. What an edge window lacks is filled with copies of unit 0, to be masked."""
    x = x.unflatten(1, (-1, per_unit))                                 # (B, U, per_unit, n)
    x = x[:, index]                                                    # (B, W, V, per_unit, n)
    return x.flatten(1, 3)


def from_windows(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """x (B, W * V, M), one token for each unit, window by window -> (B, U, M), row by row,
    without what filled the edge windows."""
    x = x[:, valid.flatten()]                                          # (B, U, M)
    return x[:, index[valid].argsort()]                                # row by row


# ----------------------------------------------------------------------------------------- ViT

class VisionAttention(nn.Module):
    def __init__(self, dim: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angle: Tensor, valid: Tensor) -> Tensor:
        """x (N, S, D) of N pictures or windows; angle (N, S, K/2); valid (N, S), False for what
        fills an edge window."""
        qkv = self.qkv(x).unflatten(2, (3, self.n_head, -1))           # (N, S, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (N, H, S, K) each
        q = apply_rope(q, angle[:, None])
        k = apply_rope(k, angle[:, None])
        x = attention(q, k, v, valid[:, None, None])                   # (N, H, S, K)
        return self.out(x.transpose(1, 2).flatten(2))                  # (N, S, D)


class VisionBlock(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.norm1 = RMSNorm(c.dim)
        self.attn = VisionAttention(c.dim, c.n_head)
        self.norm2 = RMSNorm(c.dim)
        self.mlp = SwiGLU(c.dim, c.mlp_dim, bias=True)

    def forward(self, x: Tensor, angle: Tensor, valid: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), angle, valid)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """The patches of a unit, merge x merge neighbours -> one token of the decoder's width."""

    def __init__(self, c: ViTConfig, out_dim: int):
        super().__init__()
        wide = c.merge ** 2 * c.dim
        self.norm = RMSNorm(c.dim)
        self.fc1 = nn.Linear(wide, wide)
        self.fc2 = nn.Linear(wide, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, U, merge^2, D) -> (B, U, M)"""
        x = self.norm(x).flatten(2)
        return self.fc2(F.gelu(self.fc1(x)))


class ViT(nn.Module):
    def __init__(self, c: ViTConfig, out_dim: int):
        super().__init__()
        self.config = c
        self.patch_embed = nn.Linear(3 * c.frames * c.patch ** 2, c.dim, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.n_layer))
        self.merger = Merger(c, out_dim)

    def angles(self, grid: tuple[int, int], device) -> Tensor:
        """(P, K/2) rotary angles in the order of patchify: half of the channels turn with the
        patch's row, half with its column."""
        c, (h, w) = self.config, grid
        rows, columns = torch.meshgrid(torch.arange(h, device=device),
                                       torch.arange(w, device=device), indexing="ij")
        position = torch.stack([rows, columns], -1)                    # (h, w, 2)
        position = position.view(h // c.merge, c.merge, w // c.merge, c.merge, 2)
        position = position.transpose(1, 2).reshape(h * w, 2, 1)
        return (position * frequencies(c.dim // c.n_head // 4, 1e4, device)).flatten(1)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches (B, P, 3 * frames * patch^2) of B pictures with one grid (h, w) of patches
        -> tokens (B, U, M), row by row."""
        c, device = self.config, patches.device
        B = len(patches)
        per_unit = c.merge ** 2
        index, valid = window_index(grid, c)                           # (W, V) each
        x = to_windows(self.patch_embed(patches), index, per_unit)     # (B, W * S, D)
        angle = to_windows(self.angles(grid, device)[None], index, per_unit)
        angle = angle.expand(B, -1, -1)                                # (B, W * S, K/2)
        valid_patch = valid.flatten().repeat_interleave(per_unit).to(device)
        valid_patch = valid_patch.expand(B, -1)                        # (B, W * S)

        def per_window(t: Tensor) -> Tensor:
            """(B, W * S, ...) -> (B * W, S, ...)"""
            return t.unflatten(1, (len(index), -1)).flatten(0, 1)

        # All blocks keep the windows' order, with what fills them up: full attention does not
        # depend on the order (angles travel along), and the mask hides the filling.
        window_angle, window_valid = per_window(angle), per_window(valid_patch)
        for i, block in enumerate(self.blocks):
            if i in c.full_attention:
                x = block(x, angle, valid_patch)
            else:
                x = block(per_window(x), window_angle, window_valid)   # (B * W, S, D)
                x = x.reshape(B, -1, c.dim)                            # (B, W * S, D)
        x = self.merger(x.unflatten(1, (-1, per_unit)))                # (B, W * V, M)
        return from_windows(x, index, valid)                           # (B, U, M)
