"""SANA from scratch: the diffusion transformer that paints (arXiv 2410.10629; the right column of
the paper's Fig. 2).

One change to the public model, and it is the paper's: block j attends to rung j, where SANA gives
every block the same caption. `project_kv` turns the rungs into each block's keys and values, once
per picture; `forward` is one step.

Dimension key: B batch, L rungs = blocks, Q queries, N = h * w latent tokens, D width, H heads,
K head dim, C latent channels.
Left out: patch sizes above 1, position embeddings, query-key norm (the public 512 px weights use
none of them); SANA's mask on the caption (the queries have no padding).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiTConfig:
    """The defaults are those of SANA-1.6B at 512 px."""
    n_layer: int = 20
    n_head: int = 70                    # of linear self-attention; dim = n_head * head_dim
    head_dim: int = 32
    cross_n_head: int = 20              # of softmax cross-attention
    mlp_ratio: float = 2.5
    channels: int = 32                  # of the latents, in and out
    caption_dim: int = 2304             # width of the rungs

    @property
    def dim(self) -> int:
        return self.n_head * self.head_dim


# --------------------------------------------------------------------- math without parameters

def timestep_embedding(timestep: Tensor, n: int = 256) -> Tensor:
    """timestep (B,) in 0..1000 -> (B, n): cosines, then sines, of timestep * 10000^(-i / (n/2))."""
    i = torch.arange(n // 2, device=timestep.device).float()
    angle = timestep.float()[:, None] * 1e4 ** -(i / (n // 2))         # (B, n/2)
    return torch.cat([angle.cos(), angle.sin()], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """out_n = (sum_m (relu(q_n) . relu(k_m)) v_m) / (sum_m relu(q_n) . relu(k_m)), for q, k, v
    (B, H, N, K).

    To sum over m first costs N * K^2, where softmax attention costs N^2 * K. In float32: sums over
    all positions overflow float16, and bfloat16 loses their small terms.
    """
    q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
    kv = k.transpose(2, 3) @ v                                         # (B, H, K, K)
    total = q @ k.sum(2, keepdim=True).transpose(2, 3)                 # (B, H, N, 1)
    return q @ kv / (total + eps)                                      # (B, H, N, K)


# ------------------------------------------------------------------------ the parts of a block

class LinearAttention(nn.Module):
    """Self-attention of the latent tokens."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.dim, c.dim, bias=False)
        self.k = nn.Linear(c.dim, c.dim, bias=False)
        self.v = nn.Linear(c.dim, c.dim, bias=False)
        self.out = nn.Linear(c.dim, c.dim)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, K)"""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        y = linear_attention(q, k, v).to(x.dtype)                      # (B, H, N, K)
        return self.out(y.transpose(1, 2).flatten(2))                  # (B, N, D)


class CrossAttention(nn.Module):
    """Where the picture attends to the queries. The softmax is a module of its own, so that a hook
    can read its weights (B, H, N, Q)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.n_head = c.cross_n_head
        self.q = nn.Linear(c.dim, c.dim)
        self.k = nn.Linear(c.dim, c.dim)
        self.v = nn.Linear(c.dim, c.dim)
        self.out = nn.Linear(c.dim, c.dim)
        self.softmax = nn.Softmax(-1)

    def heads(self, x: Tensor) -> Tensor:
        """Latent tokens or queries: (B, N or Q, D) -> (B, H, N or Q, K)"""
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)

    def project_kv(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """This block's rung, projected to (B, Q, D) -> its keys and values, (B, H, Q, K) each."""
        return self.heads(self.k(caption)), self.heads(self.v(caption))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.heads(self.q(x))                                      # (B, H, N, K)
        scores = q @ keys.transpose(2, 3) / math.sqrt(q.shape[-1])     # (B, H, N, Q)
        y = self.softmax(scores) @ values                              # (B, H, N, K)
        return self.out(y.transpose(1, 2).flatten(2))                  # (B, N, D)


class MixFFN(nn.Module):
    """A gated feed-forward with a 3x3 depthwise convolution inside: the only place where SANA
    learns what is next to what."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        hidden = int(c.dim * c.mlp_ratio)
        self.inverted = nn.Conv2d(c.dim, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.pointwise = nn.Conv2d(hidden, c.dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)"""
        x = self.depthwise(F.silu(self.inverted(x)))                   # (B, 2 * hidden, h, w)
        x, gate = x.chunk(2, 1)
        return self.pointwise(x * F.silu(gate))                        # (B, D, h, w)


class Block(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.attn = LinearAttention(c)
        self.cross = CrossAttention(c)
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.ffn = MixFFN(c)
        # The block's own offset to what the timestep says.
        self.scale_shift_table = nn.Parameter(torch.empty(6, c.dim))

    def forward(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor,
                size: tuple[int, int]) -> Tensor:
        """x (B, N, D), modulation (B, 6, D) by the timestep, shared by all blocks (adaLN-single),
        keys and values of rung j, latent size (h, w) -> (B, N, D)"""
        modulation = self.scale_shift_table + modulation               # (B, 6, D)
        # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        # As in SANA, cross-attention has no norm, no modulation and no gate.
        x = x + self.cross(x, keys, values)
        y = modulate(self.norm2(x), shift2, scale2)                    # (B, N, D)
        y = self.ffn(y.transpose(1, 2).unflatten(2, size))             # (B, D, h, w)
        return x + gate2 * y.flatten(2).transpose(1, 2)                # (B, N, D)


# ------------------------------------------------------------------------------- the whole DiT

class TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(256, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep (B,) in 0..1000 -> modulation of the blocks (B, 6, D), embedding (B, 1, D)"""
        e = timestep_embedding(timestep).to(self.fc1.weight.dtype)     # (B, 256)
        e = self.fc2(F.silu(self.fc1(e)))                              # (B, D)
        return self.modulation(F.silu(e)).unflatten(1, (6, -1)), e[:, None]


class DiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = c = config
        self.patch_embed = nn.Conv2d(c.channels, c.dim, 1)
        self.time_embed = TimeEmbedding(c.dim)
        # From a rung, or a caption of SANA's (caption_dim), to the blocks' width.
        self.caption = nn.Sequential(
            nn.Linear(c.caption_dim, c.dim),
            nn.GELU("tanh"),
            nn.Linear(c.dim, c.dim),
            nn.RMSNorm(c.dim, eps=1e-5),
        )
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm_out = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(2, c.dim))
        self.proj_out = nn.Linear(c.dim, c.channels)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """A start for training from nothing: xavier; zero for the output of the whole, so that
        the first velocity is 0, and for that of cross-attention, so that at first the rungs change
        nothing."""
        for name, p in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(p, std=self.config.dim ** -0.5, generator=generator)
            elif name.endswith("depthwise.weight"):
                # 1 / sqrt(9 inputs): xavier would count all channels.
                nn.init.uniform_(p, -1 / 3, 1 / 3, generator=generator)
            elif p.dim() == 1 or "proj_out" in name or "cross.out" in name:
                nn.init.constant_(p, 1.0 if name == "caption.3.weight" else 0.0)
            else:
                nn.init.xavier_uniform_(p, generator=generator)

    def project_kv(self, rungs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rungs (L, B, Q, caption_dim) -> for each block its keys and values, (B, H, Q, K) each.
        They do not depend on the timestep."""
        rungs = rungs.to(self.proj_out.weight.dtype)
        captions = self.caption(rungs)                                 # (L, B, Q, D)
        return [block.cross.project_kv(caption)
                for block, caption in zip(self.blocks, captions, strict=True)]

    def forward(self, x: Tensor, timestep: Tensor,
                keys_values: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x (B, C, h, w) noisy latents, timestep (B,) in 0..1000, keys_values from `project_kv`
        -> velocity (B, C, h, w)."""
        size = x.shape[2:]
        modulation, embedding = self.time_embed(timestep)              # (B, 6, D), (B, 1, D)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)             # (B, N, D)
        for block, (keys, values) in zip(self.blocks, keys_values, strict=True):
            x = block(x, modulation, keys, values, size)               # (B, N, D)
        shift, scale = (self.scale_shift_table + embedding).chunk(2, 1)  # (B, 1, D) each
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))    # (B, N, C)
        return x.transpose(1, 2).unflatten(2, size)                    # (B, C, h, w)
