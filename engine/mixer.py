"""The mixer: each rung from one of two prompts, and the pictures that this gives.

A cell is a block and a slot of queries; a choice says of every cell whether its queries come from
prompt A or from prompt B. The noise is the same for all choices, so whatever differs between two
pictures comes from the cells in which their choices differ.

Dimension key: L rungs = blocks, S slots, Q queries, k rows that guidance compares,
D caption_dim.
"""
import torch
from torch import Tensor

# Slots of neighbouring queries: few enough to be told apart on a page.
MAX_SLOTS = 8


def slots(n_query: int, most: int = MAX_SLOTS) -> list[range]:
    """The queries as at most so many groups of neighbours, as equal as they can be."""
    n = min(n_query, most)
    bounds = [n_query * i // n for i in range(n + 1)]
    return [range(start, end) for start, end in zip(bounds, bounds[1:])]


# -------------------------------------------------------------------------------------- choices

def exchange(n_block: int, n_slot: int, block: int | None = None,
             slot: int | None = None) -> Tensor:
    """The choice (L, S) that takes one cell from B (True), and all others from A (False). None: the
    block in every slot, or the slot in every block; both None: everything."""
    choice = torch.zeros(n_block, n_slot, dtype=torch.bool)
    rows = slice(None) if block is None else block
    columns = slice(None) if slot is None else slot
    choice[rows, columns] = True
    return choice


def single_exchanges(rungs: Tensor) -> dict[str, Tensor]:
    """For rungs (L, ..., Q, D), the choices worth a look in advance, by name: "" is A alone, "all"
    is B alone; "block 2" or "slot 2" takes that one from B, "not block 2" or "not slot 2"
    everything but that one."""
    n_block, n_slot = len(rungs), len(slots(rungs.shape[-2]))
    singles = {f"block {j}": exchange(n_block, n_slot, block=j) for j in range(n_block)}
    singles |= {f"slot {s}": exchange(n_block, n_slot, slot=s) for s in range(n_slot)}
    everything = exchange(n_block, n_slot)
    ends = {"": ~everything, "all": everything}
    return ends | singles | {f"not {name}": ~choice for name, choice in singles.items()}


# --------------------------------------------------------------------------------------- mixing

def mix(a: Tensor, b: Tensor, choice: Tensor) -> Tensor:
    """Rungs (L, ..., Q, D) of A and of B -> those that the choice (L, S) takes, cell by cell.

    ValueError where the two are not of one shape, or the choice does not fit them.
    """
    if a.shape != b.shape:
        raise ValueError(f"rungs of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be mixed: "
                         "expected both of one model")
    n_block, n_query = a.shape[0], a.shape[-2]
    sizes = [len(slot) for slot in slots(n_query)]
    if choice.dtype != torch.bool or choice.shape != (n_block, len(sizes)):
        raise ValueError(f"a choice of shape {tuple(choice.shape)} and {choice.dtype}: expected "
                         f"({n_block}, {len(sizes)}), true or false for each block and slot")
    per_query = choice.repeat_interleave(torch.tensor(sizes), dim=1)       # (L, Q)
    middle = [1] * (a.dim() - 3)
    per_query = per_query.view(n_block, *middle, n_query, 1).to(a.device)
    return torch.where(per_query, b, a)                                    # (L, ..., Q, D)


def mixed_rows(a: Tensor, b: Tensor, choice: Tensor) -> Tensor:
    """What guidance compares for one picture, rungs (L, k, Q, D) of A and of B, whose last row is
    the prompt's. Only that row is mixed: what guidance compares it with stays A's."""
    own = mix(a[:, -1], b[:, -1], choice)                                  # (L, Q, D)
    return torch.cat([a[:, :-1], own[:, None]], 1)                         # (L, k, Q, D)
