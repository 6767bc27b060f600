"""SANA by hand: the diffusion transformer that paints (arXiv 2410.10629; the right column of TBAC-UniImage's figure).

One change to the public model, and it is the paper's: block j attends to rung j, a condition of its own, where SANA gives
every block the same caption. `condition` turns the rungs into each block's keys and values once per picture; `forward` is one step.

Dimension key: B batch, L rungs = blocks, Q queries, N = h * w latent tokens, D width, H heads, K head dim, C latent channels.
Left out: patch sizes above 1, position embeddings, masks on the caption, query-key norm (the public 512 px weights use none).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class DiTConfig:
    n_layer: int = 20
    n_head: int = 70                    # of linear self-attention; dim = n_head * head_dim
    head_dim: int = 32
    cross_n_head: int = 20              # of softmax cross-attention
    mlp_ratio: float = 2.5
    channels: int = 32                  # of the latents, in and out
    caption_dim: int = 2304             # width of the rungs

    @property
    def dim(self):
        return self.n_head * self.head_dim


# ------------------------------------------------------------------------------------------------- math without parameters

def timestep_embedding(time, n=256):
    """time (B,) in 0..1000 -> (B, n): cosines, then sines, of time * 10000^(-i / (n/2))."""
    angle = time.float()[:, None] * 1e4 ** -(torch.arange(n // 2, device=time.device).float() / (n // 2))
    return torch.cat([angle.cos(), angle.sin()], 1)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def linear_attention(q, k, v, eps=1e-15):
    """out_n = sum_m (relu(q_n) . relu(k_m)) v_m / sum_m relu(q_n) . relu(k_m), for q, k, v (B, H, N, K).

    Summing over m first costs N * K^2 where softmax attention costs N^2 * K. In float32: sums over all places
    overflow float16, and bfloat16 loses their small terms.
    """
    q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
    kv = k.transpose(2, 3) @ v                                     # (B, H, K, K)
    total = q @ k.sum(2, keepdim=True).transpose(2, 3)             # (B, H, N, 1)
    return q @ kv / (total + eps)                                  # (B, H, N, K)


# ------------------------------------------------------------------------------------------------------ the parts of a block

class LinearAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q, self.k, self.v = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(3))
        self.out = nn.Linear(c.dim, c.dim)

    def forward(self, x):                                                              # (B, N, D)
        heads = lambda t: t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        y = linear_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))     # (B, H, N, K)
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))                      # (B, N, D)


class CrossAttention(nn.Module):
    """Where the picture looks at the queries. The softmax is a module of its own, so that a hook can read (B, H, N, Q)."""

    def __init__(self, c):
        super().__init__()
        self.n_head = c.cross_n_head
        self.q, self.k, self.v, self.out = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def heads(self, x):                                                                # (B, S, D) -> (B, H, S, K)
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)

    def keys_values(self, caption):                                                    # (B, Q, D) -> 2 x (B, H, Q, K)
        return self.heads(self.k(caption)), self.heads(self.v(caption))

    def forward(self, x, keys, values):
        scores = self.heads(self.q(x)) @ keys.transpose(2, 3)                          # (B, H, N, Q)
        weights = self.softmax(scores / math.sqrt(keys.shape[-1]))
        y = weights @ values                                                           # (B, H, N, K)
        return self.out(y.transpose(1, 2).flatten(2))                                  # (B, N, D)


class MixFFN(nn.Module):
    """A gated feed-forward with a 3x3 depthwise convolution inside: the only place where SANA learns what is next to what."""

    def __init__(self, c):
        super().__init__()
        hidden = int(c.dim * c.mlp_ratio)
        self.inverted = nn.Conv2d(c.dim, 2 * hidden, 1)
        self.depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point = nn.Conv2d(hidden, c.dim, 1, bias=False)

    def forward(self, x):                                                              # (B, D, h, w)
        x = self.depth(F.silu(self.inverted(x)))                                       # (B, 2 * hidden, h, w)
        x, gate = x.chunk(2, 1)
        return self.point(x * F.silu(gate))                                            # (B, D, h, w)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False), LinearAttention(c)
        self.cross = CrossAttention(c)
        self.norm2, self.ffn = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False), MixFFN(c)
        self.modulation = nn.Parameter(torch.empty(6, c.dim))                          # added to what the timestep says

    def forward(self, x, time, keys, values, size):
        """x (B, N, D), time (B, 6, D) shared by all blocks (adaLN-single), keys and values of rung j, size (h, w)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, 1)     # each (B, 1, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross(x, keys, values)                                            # neither norm nor gate here
        y = modulate(self.norm2(x), shift2, scale2)                                    # (B, N, D)
        y = self.ffn(y.transpose(1, 2).unflatten(2, size))                             # (B, D, h, w)
        return x + gate2 * y.flatten(2).transpose(1, 2)                                # (B, N, D)


# ----------------------------------------------------------------------------------------------------------- the whole DiT

class TimeEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2, self.modulation = nn.Linear(256, dim), nn.Linear(dim, dim), nn.Linear(dim, 6 * dim)

    def forward(self, time):
        e = timestep_embedding(time).to(self.fc1.weight.dtype)                         # (B, 256)
        e = self.fc2(F.silu(self.fc1(e)))                                              # (B, D), for the last layer
        return self.modulation(F.silu(e)).unflatten(1, (6, -1)), e[:, None]            # (B, 6, D), for the blocks; (B, 1, D)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(c.channels, c.dim, 1)
        self.time_embed = TimeEmbedding(c.dim)
        self.caption = nn.Sequential(nn.Linear(c.caption_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim), nn.RMSNorm(c.dim, eps=1e-5))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm_out = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.empty(2, c.dim))
        self.proj_out = nn.Linear(c.dim, c.channels)

    def init_weights(self, generator=None):
        """A start for training from nothing: xavier; what leaves cross-attention and the model at zero, so the first velocity is 0."""
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(p, std=self.config.dim ** -0.5, generator=generator)
            elif p.dim() > 1 and "proj_out" not in name and "cross.out" not in name and "ffn.depth" not in name:
                nn.init.xavier_uniform_(p.flatten(1), generator=generator)
            elif name.endswith("ffn.depth.weight"):                                    # 1 / sqrt(9 inputs); xavier would count all channels
                nn.init.uniform_(p, -1 / 3, 1 / 3, generator=generator)
            else:
                nn.init.constant_(p, 1.0 if name == "caption.3.weight" else 0.0)

    def condition(self, rungs):
        """Rungs (L, B, Q, caption_dim) -> per block its keys and values, 2 x (B, H, Q, K). Independent of the timestep."""
        captions = self.caption(rungs)                                                 # (L, B, Q, D)
        return [block.cross.keys_values(caption) for block, caption in zip(self.blocks, captions, strict=True)]

    def forward(self, x, time, conditions):
        """x (B, C, h, w) noisy latents, time (B,) in 0..1000, conditions from `condition` -> velocity (B, C, h, w)."""
        size = x.shape[2:]
        modulation, last = self.time_embed(time)                                       # (B, 6, D), (B, 1, D)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)                             # (B, N, D)
        for block, (keys, values) in zip(self.blocks, conditions, strict=True):
            x = block(x, modulation, keys, values, size)                               # (B, N, D)
        shift, scale = (self.modulation + last).chunk(2, 1)                            # (B, 1, D) each
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))                    # (B, N, C)
        return x.transpose(1, 2).unflatten(2, size)                                    # (B, C, h, w)
