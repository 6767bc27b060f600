"""The paper's idea in one file: a ladder from a frozen MLLM to a pretrained DiT (TBAC-UniImage, arXiv 2508.08098, Fig. 2).

Learnable queries are read by the MLLM after the prompt. While earlier systems (MetaQuery) hand the DiT what the queries have
become at the very end, here DiT block j hears them as they stand on entering MLLM layer n_mllm - n_dit + j:

    MLLM layer   15   16   17   ...   34   35        36 layers: states[i] enters layer i, states[36] is the normed end (unused)
    state             16   17   ...   34   35
                       |    |          |    |        one shared connector
    DiT block          0    1   ...   18   19        20 blocks

The other wirings are there to be compared with it: no public source says whether the ladder is what helps.

Dimension key: B batch, Q queries, M MLLM width, L rungs = DiT blocks, T tapped states.
"""
import random

import torch
from torch import nn


def rungs(n_mllm, n_dit, how="top"):
    """Which MLLM state feeds which DiT block: a list of n_dit indexes into the n_mllm + 1 hidden states. "mean" and "routed" mix all states,
    and list them all. ValueError for another word, or where the MLLM is too short."""
    if n_dit > n_mllm:
        raise ValueError(f"{n_dit} DiT blocks need {n_dit} MLLM layers, got {n_mllm}")
    top = list(range(n_mllm - n_dit, n_mllm))
    ways = {
        "top": top,                                                             # the paper's: what enters the last n_dit layers, in order
        "last": [n_mllm] * n_dit,                                               # MetaQuery's: the normed end, for every block
        "penultimate": [n_mllm - 1] * n_dit,                                    # what enters the last layer, for every block
        "uniform": [round(j * (n_mllm - 1) / max(1, n_dit - 1)) for j in range(n_dit)],    # spread over the whole depth
        "first": list(range(n_dit)),                                            # what enters the first n_dit layers
        "reversed": top[::-1],
        "shuffled": random.Random(0).sample(top, n_dit),
        "mean": list(range(n_mllm + 1)),                                        # the same average for every block
        "routed": list(range(n_mllm + 1)),                                      # each block learns its own weights
    }
    if how not in ways:
        raise ValueError(f"unknown wiring {how!r}, expected one of {list(ways)}")
    return ways[how]


class Ladder(nn.Module):
    """Queries, taps and connector: all that is new between the two pretrained models."""

    def __init__(self, n_query, mllm_dim, caption_dim, n_mllm, n_dit, how="top"):
        super().__init__()
        self.taps = rungs(n_mllm, n_dit, how)                                   # state indexes
        self.queries = nn.Parameter(torch.empty(n_query, mllm_dim))             # a parameter of its own, not rows of a frozen table
        self.connector = nn.Sequential(nn.Linear(mllm_dim, caption_dim), nn.GELU("tanh"),
                                       nn.Linear(caption_dim, caption_dim), nn.RMSNorm(caption_dim, eps=1e-5))
        routes = torch.zeros(n_dit, n_mllm + 1) if how in ("mean", "routed") else None               # (L, T) logits, 0: all states alike
        if how == "routed":
            self.routes = nn.Parameter(routes)
        else:
            self.register_buffer("routes", routes)

    def init_weights(self, generator=None):
        """Queries like token embeddings; the connector's gain sqrt(5.5) brings the rungs to the size SANA knows from its captions."""
        nn.init.normal_(self.queries, std=0.02, generator=generator)
        for layer in (self.connector[0], self.connector[2]):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.connector[3].weight, 5.5 ** 0.5)

    def forward(self, states):
        """states: list of (B, Q, M), the queries' hidden states at every depth -> rungs (L, B, Q, caption_dim)."""
        tapped = torch.stack([states[i] for i in self.taps])                    # (T, B, Q, M), where T = L unless they are mixed:
        if self.routes is not None:                                             # mean, routed: each block has its own mixture of all T states
            tapped = torch.einsum("lt,tbqm->lbqm", self.routes.float().softmax(1), tapped.float())
        return self.connector(tapped.to(self.queries.dtype))                    # (L, B, Q, caption_dim)
