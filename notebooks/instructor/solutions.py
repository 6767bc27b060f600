"""Answers to the notebooks' exercises, one way each; try them yourself first.

Answer i of a notebook goes where it says `answer_i = None`. tests/test_a_notebooks.py puts them
into the checks that are given there.
"""
import math

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------- 1_flow

def guidance_in_one_call(model, x, t, labels, g):
    """Both halves of the batch at once; the strengths as a column."""
    both = torch.cat([torch.full_like(labels, -1), labels])
    null, cond = model(torch.cat([x, x]), t, both).chunk(2)
    return null + g[:, None] * (cond - null)


def heun(velocity, x, t, s):
    v = velocity(x, t)
    end = x + (s - t) * v
    return x + (s - t) * (v + velocity(end, s)) / 2


def floor_of_the_loss(std, t):
    """Var v - Cov(v, x_t)^2 / Var x_t with v = eps - x0: the numerator becomes std^2."""
    return std ** 2 / ((1 - t) ** 2 * std ** 2 + t ** 2)


# ---------------------------------------------------------------------------------------- 2_latents

def squares_into_channels(x, channels):
    """Row and column within the square become axes behind the channel's; then runs of channels."""
    x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))                  # (B, D, H/2, 2, W/2, 2)
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)                      # (B, 4D, H/2, W/2)
    return x.unflatten(1, (channels, -1)).mean(2)


def factor_of_batches(batches):
    """Count, sum and sum of squares are enough, and add up over batches."""
    n = sum(batch.numel() for batch in batches)
    mean = sum(batch.double().sum().item() for batch in batches) / n
    square = sum(batch.double().pow(2).sum().item() for batch in batches) / n
    return 1 / math.sqrt(square - mean ** 2)


def wrong_clock(t, s):
    """t' / (1 - t') = t / ((1 - t) s): a shift by 1 / s."""
    return t / (t + s * (1 - t))


# ------------------------------------------------------------------------------------------- 3_mllm

def one_layer(q, k, v, real):
    """Nothing later, nothing that is padding, but itself in any case; each key head as often as it
    has query heads."""
    S = q.shape[2]
    mask = torch.ones(S, S).tril().bool() & real[:, None] | torch.eye(S).bool()    # (B, S, S)
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, 1)
    v = v.repeat_interleave(shared, 1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])            # (B, H, S, S)
    return scores.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v


def windows_as_mask(h, w, side):
    """Each unit's window, by a number; fewer than w windows stand in a row."""
    rows = torch.arange(h).repeat_interleave(w)
    columns = torch.arange(w).repeat(h)
    window = rows // side * w + columns // side
    return window[:, None] == window


def turned(x, positions, sections, theta):
    """One row of frequencies for all pairs; the section only says which position they turn with."""
    pairs = x.shape[-1] // 2
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    angle = positions[axis].permute(1, 2, 0) * theta ** (-torch.arange(pairs) / pairs)
    angle = angle[:, None]                                             # (B, 1, S, K/2)
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# -------------------------------------------------------------------------------------------- 4_dit

def everyone_but_oneself(q, k, v):
    """Both sums over all places, less what the place itself adds to them."""
    q, k = q.relu(), k.relu()
    own = (q * k).sum(3, keepdim=True)                                 # (B, H, N, 1)
    sums = q @ (k.transpose(2, 3) @ v)                                 # (B, H, N, K)
    total = q @ k.sum(2, keepdim=True).transpose(2, 3)                 # (B, H, N, 1)
    return (sums - own * v) / (total - own)


def exact_ratio(N, K):
    """Explicit: N x K by K x N, N x N by N x K. Linear: K x N by N x K, N x K by K x K, and for
    the divisor N x K by K x 1. So 2 N^2 K / (2 N K^2 + N K)."""
    return 2 * N / (2 * K + 1)


def adaln_in_the_weights(weight, bias, shift, scale, gate):
    """1 + scale goes to the columns, the gate to the rows; the shift passes the weight and, with
    the bias, the gate. In training every row of a batch has a time, and so weights, of its own."""
    return gate[:, None] * weight * (1 + scale), gate * (weight @ shift + bias)


# ----------------------------------------------------------------------------------------- 5_ladder

def rungs(mllm, x, positions, mask, queries, A, connector):
    """The queries stand last, their positions go on, nobody masks them; of each state only their
    part is kept. A mixes inside the connector."""
    B, Q = len(x), len(queries)
    x = torch.cat([x, queries.expand(B, -1, -1)], 1)                   # (B, S + Q, M)
    after = positions[:, :, -1:] + torch.arange(1, Q + 1)              # (3, B, Q)
    mask = torch.cat([mask, mask.new_ones(B, Q)], 1)
    states = mllm(x, torch.cat([positions, after], 2), mask)
    states = torch.stack([state[:, -Q:] for state in states])          # (N + 1, B, Q, M)
    return connector(torch.einsum("lt,tbqm->lbqm", A, states))         # (L, B, Q, D)


def paired_interval(ladder, final):
    """What a seed does to both cancels in the difference."""
    differences = [a - b for a, b in zip(ladder, final)]
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    half = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[n] * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def learnable_routes(A):
    """The logarithm undoes the softmax; 1e-6 in place of 0 is small, and can still grow."""
    return A.clamp(min=1e-6).log()


# --------------------------------------------------------------------------------------- 6_training

def accumulated_step(loss, passes, optimizer, clip):
    """Passes of one size: the mean of all rows is the mean of the passes' means. Each backward
    frees its graph and adds to the gradients; clip once, when all are there."""
    learns = optimizer.param_groups[0]["params"]
    total = 0.0
    for rows in passes:
        mean = loss(rows).mean() / len(passes)
        mean.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_(learns, clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def guarded(losses):
    """NaN compares as False, so ask whether a loss is finite first. Refused ones leave the mean as
    it is."""
    taken, mean = [], None
    for loss in losses:
        take = math.isfinite(loss) and (mean is None or loss <= 20 * mean)
        if take:
            mean = loss if mean is None else 0.99 * mean + 0.01 * loss
        taken.append(take)
    return taken


def dropped(r, p):
    """[0, p) the text, [p, 2p) both, [2p, 3p) the picture."""
    return r >= 2 * p, not p <= r < 3 * p


# ---------------------------------------------------------------------------------------- 7_inspect

def contributions(cross, x, keys, values):
    """The module's own steps, with the sum over queries left out; `out` without its bias is
    linear, so it may be applied to each part."""
    q = cross.heads(cross.q(x))                                        # (B, H, N, K)
    weights = (q @ keys.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    weights = weights.permute(3, 0, 1, 2)[..., None]                   # (Q, B, H, N, 1)
    each = weights * values.permute(2, 0, 1, 3)[:, :, :, None]         # (Q, B, H, N, K)
    return each.transpose(2, 3).flatten(3) @ cross.out.weight.T        # (Q, B, N, D)


def up_the_ladder(a, b):
    """All pictures of the first row, then those of the next; the last L + 1 columns are the
    prompt's."""
    pictures = len(a) + 1
    mixed = a.repeat_interleave(pictures, 1)
    for n in range(pictures):
        mixed[:n, n - pictures] = b[:n, -1]
    return mixed


def probe(x, y, x_test):
    mean, deviation = x.mean(0), x.std(0) + 1e-6

    def features(rows):
        return F.pad((rows - mean) / deviation, (0, 1), value=1.0)

    X = features(x)
    gram = X.T @ X
    penalty = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    W = torch.linalg.solve(gram + penalty, X.T @ F.one_hot(y).to(X.dtype))
    return (features(x_test) @ W).argmax(1)


# ---------------------------------------------------------------------------------------- 8_weights

def needed_to_draw(name, n_layer):
    """No pictures are read and none encoded; the last state tapped enters the last layer, so that
    layer and the norm behind it never run."""
    unused = (
        "model.mllm_backbone.visual.",
        f"model.mllm_backbone.model.layers.{n_layer - 1}.",
        "model.mllm_backbone.model.norm.",
        "vae.encoder.",
    )
    return not name.startswith(unused)


def other_tensors(table, patches, V, Q):
    """A patch is flattened as the convolution's axes stand: channel, frame, row, column."""
    return table[:V], table[V:V + Q], patches.flatten(1)


# States 0 and 1 agree, from state 2 on they differ: states[i] enters layer i.
BROKEN_LAYER = 1


ANSWERS = {
    "1_flow": [guidance_in_one_call, heun, floor_of_the_loss],
    "2_latents": [squares_into_channels, factor_of_batches, wrong_clock],
    "3_mllm": [one_layer, windows_as_mask, turned],
    "4_dit": [everyone_but_oneself, exact_ratio, adaln_in_the_weights],
    "5_ladder": [rungs, paired_interval, learnable_routes],
    "6_training": [accumulated_step, guarded, dropped],
    "7_inspect": [contributions, up_the_ladder, probe],
    "8_weights": [needed_to_draw, other_tensors, BROKEN_LAYER],
}
