"""Pictures at the limits, and sizes with few latent positions: for bench/record_dcae.py and
tests/test_1_dcae.py. The tiny checkpoint's autoencoder has 4 pixels a position."""
import torch
from torch import Tensor

# (height, width) in pixels: 4, 32 and 33 positions.
SIZES = ((8, 8), (16, 32), (12, 44))


def odd_pictures(size: tuple[int, int]) -> dict[str, Tensor]:
    """{name: (1, 3, H, W) in [-1, 1]}"""
    height, width = size
    black = -torch.ones(1, 3, height, width)
    point = black.clone()
    point[:, :, height // 2, width // 3] = 1
    even = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    board = torch.where(even, 1.0, -1.0).expand(1, 3, height, width).clone()
    noise = 2 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) - 1
    return {"black": black, "white": -black, "board": board, "point": point, "noise": noise}
