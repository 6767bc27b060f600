"""The paper's idea in one file: a ladder from a frozen MLLM to a pretrained DiT.
(TBAC-UniImage, arXiv 2508.08098, Fig. 2.)

The MLLM reads learnable queries after the prompt. Earlier systems (MetaQuery) give the DiT what
the queries have become at the very end. Here DiT block j attends to the queries as they stand on
entering MLLM layer n_mllm - n_dit + j:

    MLLM layer   15   16   17   ...   34   35       layers 0 to 35: states[i] enters layer i,
    state             16   17   ...   34   35       states[36] is the normed end (unused)
                       |    |          |    |       one shared connector
    DiT block          0    1   ...   18   19       20 blocks

The other wirings are there for a comparison that no source we could read has made.
All are one matrix A, row by row, with rung_j = connector(sum over i of A[j, i] states[i]):

    ladder      row j has its 1 at state n_mllm - n_dit + j
    final       every row has it at state n_mllm
    mean        every row is 1 / T throughout
    routed      A is learnt: the softmax of a row of logits

Dimension key: B batch, Q queries, M MLLM width, L rungs = DiT blocks, T states = n_mllm + 1.
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
CONNECTORS = {
    "shared": "the paper's: one for all rungs",
    "per-block": "each rung has its own, as in Bria FIBO",
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
    every = list(range(n_mllm + 1))
    taps = {
        "ladder": ladder,
        "final": [n_mllm] * n_dit,
        "penultimate": [n_mllm - 1] * n_dit,
        # This one and the next begin at state 0: the queries themselves, whatever the prompt.
        "uniform": [round(j * (n_mllm - 1) / max(1, n_dit - 1)) for j in range(n_dit)],
        "first": every[:n_dit],
        "reversed": ladder[::-1],
        "shuffled": random.Random(0).sample(ladder, n_dit),
        "mean": every,
        "routed": every,
    }
    return taps[wiring]


def build_connector(mllm_dim: int, caption_dim: int) -> nn.Sequential:
    """From the MLLM's width to that of SANA's captions."""
    return nn.Sequential(
        nn.Linear(mllm_dim, caption_dim),
        nn.GELU("tanh"),
        nn.Linear(caption_dim, caption_dim),
        nn.RMSNorm(caption_dim, eps=1e-5),
    )


class PerBlock(nn.ModuleList):
    """Connectors, one for each rung."""

    def forward(self, tapped: Tensor) -> Tensor:
        """(L, B, Q, M) -> (L, B, Q, caption_dim)"""
        return torch.stack([connect(x) for connect, x in zip(self, tapped, strict=True)])


class Ladder(nn.Module):
    """Queries, taps and connector: all that is new between the two pretrained models."""

    def __init__(self, n_query: int, mllm_dim: int, caption_dim: int, n_mllm: int, n_dit: int,
                 wiring: str = "ladder", connector: str = "shared"):
        super().__init__()
        if connector not in CONNECTORS:
            raise ValueError(f"unknown connector {connector!r}, expected one of {list(CONNECTORS)}")
        self.taps = tap_layers(n_mllm, n_dit, wiring)
        self.n_state = n_mllm + 1
        # A parameter of its own, not rows of the frozen embedding table (docs/paper_to_code.md).
        self.queries = nn.Parameter(torch.empty(n_query, mllm_dim))
        if connector == "per-block":
            self.connector = PerBlock(build_connector(mllm_dim, caption_dim) for _ in range(n_dit))
        else:
            self.connector = build_connector(mllm_dim, caption_dim)
        # Two wirings mix states, by the softmax of each row of (L, T) logits: zeros give the mean.
        routes = torch.zeros(n_dit, self.n_state) if wiring in ("mean", "routed") else None
        if wiring == "routed":
            self.routes = nn.Parameter(routes)
        else:
            self.register_buffer("routes", routes)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Queries scattered like token embeddings (the released code starts all of them near the
        mean of the table's rows); a gain of sqrt(5.5) brings the rungs to the scale that SANA knows
        from its captions."""
        nn.init.normal_(self.queries, std=0.02, generator=generator)
        for layer in self.connector.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.RMSNorm):
                nn.init.constant_(layer.weight, 5.5 ** 0.5)

    def matrix(self) -> Tensor:
        """A (L, T): how much of each state goes into each rung."""
        if self.routes is not None:
            return self.routes.float().softmax(1)
        taps = torch.tensor(self.taps, device=self.queries.device)
        return nn.functional.one_hot(taps, self.n_state).float()

    def forward(self, states: list[Tensor]) -> Tensor:
        """The queries' states at every depth, each (B, Q, M) -> rungs (L, B, Q, caption_dim)."""
        # Where each row of A is a single 1, it picks a state, and there is nothing to multiply.
        tapped = torch.stack([states[i] for i in self.taps])       # (L, B, Q, M), or of all T
        if self.routes is not None:
            A = self.matrix()                                      # (L, T)
            tapped = torch.einsum("lt,tbqm->lbqm", A, tapped.float())
        return self.connector(tapped.to(self.queries.dtype))       # (L, B, Q, caption_dim)
