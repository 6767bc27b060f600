"""The paper's idea in one file: a ladder from a frozen MLLM to a pretrained DiT.
(TBAC-UniImage, arXiv 2508.08098, Fig. 2.)

The MLLM reads learnable queries after the prompt. Earlier systems (MetaQuery) give the DiT what
the queries have become at the very end. Here DiT block j attends to the queries as they stand on
entering MLLM layer n_mllm - n_dit + j:

    MLLM layer   15   16   17   ...   34   35       layers 0 to 35: states[i] enters layer i,
    state             16   17   ...   34   35       states[36] is the normed end (unused)
                       |    |          |    |       one shared connector
    DiT block          0    1   ...   18   19       20 blocks

The other wirings are there for comparison: no public source says whether the ladder is what helps.

Dimension key: B batch, Q queries, M MLLM width, L rungs = DiT blocks, T tapped states.
"""
import random

import torch
from torch import Tensor, nn

WIRINGS = {
    "ladder": "the paper's: the states that enter the last n_dit layers, in order",
    "final": "MetaQuery's: the normed end, for every block",
    "penultimate": "the state that enters the last layer, for every block",
    "uniform": "states spread over the whole depth",
    "first": "the states that enter the first n_dit layers",
    "reversed": "the ladder upside down",
    "shuffled": "the ladder's states in a fixed random order",
    "mean": "the average of all states, for every block",
    "routed": "a mixture of all states that each block learns",
}


def tap_layers(n_mllm: int, n_dit: int, wiring: str = "ladder") -> list[int]:
    """Which of the n_mllm + 1 hidden states feeds which DiT block: n_dit indexes, counted from 0.
    For "mean" and "routed", which mix all states, the indexes of all.

    ValueError for an unknown wiring, or where the MLLM has fewer layers than the DiT has blocks.
    """
    if n_dit > n_mllm:
        raise ValueError(f"{n_dit} DiT blocks need {n_dit} MLLM layers, got {n_mllm}")
    if wiring not in WIRINGS:
        raise ValueError(f"unknown wiring {wiring!r}, expected one of {list(WIRINGS)}")
    ladder = list(range(n_mllm - n_dit, n_mllm))
    if wiring == "ladder":
        return ladder
    if wiring == "final":
        return [n_mllm] * n_dit
    if wiring == "penultimate":
        return [n_mllm - 1] * n_dit
    if wiring == "uniform":
        return [round(j * (n_mllm - 1) / max(1, n_dit - 1)) for j in range(n_dit)]
    if wiring == "first":
        return list(range(n_dit))
    if wiring == "reversed":
        return ladder[::-1]
    if wiring == "shuffled":
        return random.Random(0).sample(ladder, n_dit)
    return list(range(n_mllm + 1))


class Ladder(nn.Module):
    """Queries, taps and connector: all that is new between the two pretrained models."""

    def __init__(self, n_query: int, mllm_dim: int, caption_dim: int, n_mllm: int, n_dit: int,
                 wiring: str = "ladder"):
        super().__init__()
        self.taps = tap_layers(n_mllm, n_dit, wiring)
        # A parameter of its own, not rows of the frozen embedding table (docs/paper_to_code.md).
        self.queries = nn.Parameter(torch.empty(n_query, mllm_dim))
        self.connector = nn.Sequential(
            nn.Linear(mllm_dim, caption_dim),
            nn.GELU("tanh"),
            nn.Linear(caption_dim, caption_dim),
            nn.RMSNorm(caption_dim, eps=1e-5),
        )
        # Only two wirings mix states: (L, T) logits of each block's mixture, at first the mean.
        routes = torch.zeros(n_dit, n_mllm + 1) if wiring in ("mean", "routed") else None
        if wiring == "routed":
            self.routes = nn.Parameter(routes)
        else:
            self.register_buffer("routes", routes)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Queries like token embeddings; a gain of sqrt(5.5) brings the rungs to the scale that
        SANA knows from its captions."""
        nn.init.normal_(self.queries, std=0.02, generator=generator)
        for layer in (self.connector[0], self.connector[2]):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.connector[3].weight, 5.5 ** 0.5)

    def forward(self, states: list[Tensor]) -> Tensor:
        """The queries' states at every depth, each (B, Q, M) -> rungs (L, B, Q, caption_dim)."""
        tapped = torch.stack([states[i] for i in self.taps])       # (T, B, Q, M), usually T = L
        if self.routes is not None:
            mixture = self.routes.float().softmax(1)               # (L, T)
            tapped = torch.einsum("lt,tbqm->lbqm", mixture, tapped.float())
        return self.connector(tapped.to(self.queries.dtype))       # (L, B, Q, caption_dim)
