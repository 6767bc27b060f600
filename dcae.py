"""DC-AE from scratch: the Deep Compression Autoencoder (arXiv 2410.10733, sections 3.1-3.2), in the
variant that SANA uses: f32c32, "sana-1.0".

pixels (B, 3, 32h, 32w) in [-1, 1] <-> latents (B, 32, h, w). It is deterministic: no mean and
variance, no sampling. Both halves go through the same stages, stage i at 1/2^i of the picture's
side: ResBlocks in the outer stages, where positions are many, and EfficientViT blocks in the inner
ones (multi-scale linear attention, arXiv 2205.14756; the feed-forward is SANA's gated convolution).
DC-AE's "residual autoencoding": around every Down and Up, and around the convolutions next to
the latents, runs a shortcut without parameters. It moves pixels into channels or back where the
side changes, and averages or repeats channels to the new width.

Dimension key: B batch, D width of a stage, D' of the next one, H heads, K head dim, h x w height
and width, N = h * w positions, C latent channels, f `DCAEConfig.factor`.
Left out: tiling for very large pictures, and the training losses.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import linear_attention


# --------------------------------------------------------------------- shortcuts over channels

def average_channels(x: Tensor, channels: int) -> Tensor:
    """(B, D, h, w) -> (B, channels, h, w): the mean of each run of D / channels channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """(B, D, h, w) -> (B, channels, h, w): each channel channels / D times in a row."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


# ---------------------------------------------------------------------------- parts of a stage

class RMSNorm(nn.Module):
    """RMS norm over the channels of (B, D, h, w), at each position by itself, with a bias."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + self.eps)
        x = (x * scale).to(x.dtype)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the norm stands last, inside the residual branch."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.conv1(x))
        return x + self.norm(self.conv2(hidden))


class MultiScaleAttention(nn.Module):
    """Linear attention on the positions themselves (heads 0 .. H-1) and on 5x5 neighbourhoods of
    them (heads H .. 2H-1)."""

    def __init__(self, dim: int, head_dim: int, kernel: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        # Depthwise: gathers the neighbourhood of each position.
        self.near = nn.Conv2d(3 * dim, 3 * dim, kernel, padding=kernel // 2, groups=3 * dim,
                              bias=False)
        # Mixes K channels at a time: one head's q, its k, or its v.
        self.mix = nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * dim // head_dim, bias=False)
        self.out = nn.Linear(2 * dim, dim, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)                                        # (B, h, w, D)
        qkv = torch.cat([self.q(rows), self.k(rows), self.v(rows)], dim=-1)
        qkv = qkv.movedim(-1, 1)                                       # (B, 3D, h, w)
        qkv = torch.cat([qkv, self.mix(self.near(qkv))], dim=1)        # (B, 6D, h, w)
        # The released model cuts these channels into runs of 3K and reads each as one head's q, k,
        # v; so the *names* q, k, v above are only three thirds of one learned projection (head 0 is
        # cut out of `q` alone). Kept, because the public weights are made for it.
        heads = qkv.flatten(2).unflatten(1, (-1, 3 * self.head_dim))   # (B, 2H, 3K, N)
        q, k, v = heads.transpose(2, 3).chunk(3, dim=3)                # (B, 2H, N, K) each
        out = linear_attention(q, k, v).to(x.dtype)                    # (B, 2H, N, K)
        out = self.out(out.transpose(1, 2).flatten(2))                 # (B, N, D)
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])            # (B, D, h, w)
        return x + self.norm(out)


class GatedConv(nn.Module):
    """The feed-forward ("GLUMBConv"), SANA's Mix-FFN: widen, 3x3 depthwise, gate, narrow."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.widen = nn.Conv2d(dim, 2 * ratio * dim, 1)
        self.depthwise = nn.Conv2d(2 * ratio * dim, 2 * ratio * dim, 3, padding=1,
                                   groups=2 * ratio * dim)
        self.narrow = nn.Conv2d(ratio * dim, dim, 1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.widen(x))                          # (B, 8D, h, w)
        value, gate = self.depthwise(hidden).chunk(2, dim=1)    # (B, 4D, h, w) each
        hidden = self.narrow(value * F.silu(gate))              # (B, D, h, w)
        return x + self.norm(hidden)


class EfficientViTBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int, kernel: int):
        super().__init__()
        self.attn = MultiScaleAttention(dim, head_dim, kernel)
        self.mlp = GatedConv(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Down(nn.Module):
    """Half the side: a strided convolution, plus each 2x2 square of pixels moved into channels and
    averaged to the new width."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        squares = F.pixel_unshuffle(x, 2)                       # (B, 4D, h/2, w/2)
        out = self.conv(x)                                      # (B, D', h/2, w/2)
        return out + average_channels(squares, out.shape[1])


class Up(nn.Module):
    """Twice the side: a convolution of the enlarged map, plus channels repeated to 4 times the new
    width and moved into 2x2 squares."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.interpolate(x, scale_factor=2))       # (B, D', 2h, 2w)
        squares = repeat_channels(x, 4 * out.shape[1])          # (B, 4D', h, w)
        return out + F.pixel_shuffle(squares, 2)


# ----------------------------------------------------------------------- the whole autoencoder

@dataclass(frozen=True)
class DCAEConfig:
    """The defaults are the public f32c32 autoencoder (312.3M parameters). Stage 0 is the outermost
    one."""

    widths: tuple = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple = (3, 3, 3, 3, 3, 3)
    # How many of the innermost stages are EfficientViT blocks; the others are ResBlocks.
    attention_stages: int = 3
    in_channels: int = 3
    latent_channels: int = 32
    head_dim: int = 32
    # Side of the neighbourhood that the second half of the heads sees.
    kernel: int = 5
    # 1 / standard deviation of the raw latents: the diffusion model wants unit variance.
    scaling_factor: float = 0.41407

    @property
    def factor(self) -> int:
        """Pixels per latent position, along a side."""
        return 2 ** (len(self.widths) - 1)


def stage_blocks(c: DCAEConfig, stage: int, n: int) -> list[nn.Module]:
    """n blocks: outside ResBlocks, in the innermost stages EfficientViT blocks."""
    width = c.widths[stage]
    if stage < len(c.widths) - c.attention_stages:
        return [ResBlock(width) for _ in range(n)]
    return [EfficientViTBlock(width, c.head_dim, c.kernel) for _ in range(n)]


class Encoder(nn.Module):
    """Each stage: its blocks, then Down to the next stage (the innermost has none)."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        downs = [Down(a, b) for a, b in zip(widths, widths[1:])]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, n in enumerate(config.encoder_layers):
            stage = stage_blocks(config, i, n)
            if i < len(downs):
                stage.append(downs[i])
            self.stages.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, fh, fw) -> (B, C, h, w)"""
        x = self.conv_in(x)                                     # (B, widths[0], fh, fw)
        # Each stage but the last gives (B, widths[i+1], half, half).
        for stage in self.stages:
            x = stage(x)                                        # at last (B, widths[-1], h, w)
        out = self.conv_out(x)                                  # (B, C, h, w)
        return out + average_channels(x, out.shape[1])


class Decoder(nn.Module):
    """Each stage: Up from the next inner stage (the innermost has none), then its blocks. Numbered
    as in the encoder, run backwards."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        ups = [Up(b, a) for a, b in zip(widths, widths[1:])]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, n in enumerate(config.decoder_layers):
            stage = stage_blocks(config, i, n)
            if i < len(ups):
                stage.insert(0, ups[i])
            self.stages.append(nn.Sequential(*stage))
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, fh, fw)"""
        x = self.conv_in(z)                                     # (B, widths[-1], h, w)
        x = x + repeat_channels(z, x.shape[1])
        # Each stage but the innermost gives (B, widths[i], twice, twice).
        for stage in reversed(self.stages):
            x = stage(x)                                        # at last (B, widths[0], fh, fw)
        x = F.relu(self.norm_out(x))                            # (B, widths[0], fh, fw)
        return self.conv_out(x)                                 # (B, 3, fh, fw)


class DCAE(nn.Module):
    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, fh, fw) in [-1, 1] -> latents (B, C, h, w), scaled to about unit variance.
        ValueError if a side is not a multiple of f."""
        factor = self.config.factor
        height, width = pixels.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, "
                             f"got {(height, width)}")
        return self.encoder(pixels) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) as encode gives them -> pixels (B, 3, fh, fw), not clipped."""
        return self.decoder(latents / self.config.scaling_factor)
