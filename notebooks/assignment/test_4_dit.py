"""Part 4: what a block of the DiT is made of."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from notebooks.assignment.grading import Wrong, check_shape, problem, two, worth

ATTENTION = dict(
    softmax="The weights are relu(q) . relu(k), divided by their sum. Yours are a softmax.",
    no_relu="q and k pass a ReLU first, so that no weight is negative. Yours do not.",
    relu_on_q_only="Both q and k pass the ReLU. In yours, k does not.",
    relu_of_product="ReLU of q and of k, then the product. Yours is the ReLU of the product q . k.",
    no_division="The weights of a query are divided by their sum.",
    sum_over_queries="For each query its weights over all keys add up to 1. Yours add up to 1 for "
                     "each key: the sum goes along the other axis.",
    not_a_number="A query that is nowhere positive has only weights of 0, and 0 / 0 is not a "
                 "number: add 1e-15 to the sum.",
)


@problem(3, **ATTENTION)
def test_4a_attention_n_by_n(adapters, case):
    return {"y": adapters.attention_n_by_n(case["q"], case["k"], case["v"])}


@problem(
    4,
    **ATTENTION,
    causal="Every place attends to all places. Yours attends to those up to itself: the sums are "
           "running ones.",
    total_of_all_queries="The divisor is each query's own: relu(q_n) . (sum of relu(k_m)). Yours "
                         "is one number for all queries.",
)
def test_4b_linear_attention(adapters, case):
    return {"y": adapters.linear_attention(case["q"], case["k"], case["v"])}


class Made(TorchDispatchMode):
    """Counts the numbers of all tensors that are made."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@worth(2)
def test_4c_no_n_by_n(adapters):
    """First it must be right."""
    test_4b_linear_attention(adapters)
    n, size = 1024, 8
    q, k, v = torch.randn(3, 1, 2, n, size, generator=torch.Generator().manual_seed(0))
    with Made() as seen:
        adapters.linear_attention(q, k, v)
    if seen.numbers >= n * n:
        raise Wrong(
            f"4c: for {n} places of size {size}, tensors of {seen.numbers} numbers in all were "
            f"made; q has {q.numel()}.\n  N x N has {n * n} for each head. Sum over the keys "
            f"first: relu(k)^T v is only {size} x {size}, and the brackets of (q k^T) v may move.")


@problem(
    2,
    sines_first="Cosines first, then sines.",
    interleaved="All cosines, then all sines. Yours alternate.",
    last_frequency="The exponent is i / (n / 2), so the last frequency stays above 1/10000. Yours "
                   "divides by n / 2 - 1.",
    exponent_halved="The exponent is i / (n / 2), i = 0 ... n / 2 - 1. Yours divides by n.",
    frequencies_rise="Frequencies fall from 1 to almost 1/10000. Yours rise.",
)
def test_4d_timestep_embedding(adapters, case):
    return {"embedding": adapters.timestep_embedding(case["time"], 16)}


@problem(
    4,
    no_scale="The scores are divided by sqrt(K) before the softmax.",
    scale_by_width="The scores are divided by the square root of K, the size of a head. Yours are "
                   "divided by that of D.",
    softmax_over_places="The softmax goes over the Q queries: each place's weights add up to 1. "
                        "Yours goes over the places.",
    heads_interleaved="The first K channels are the first head. Yours takes every H-th channel: "
                      "split D into (H, K), not into (K, H).",
    heads_not_put_back="After attention the axes are (B, H, N, K): put H behind N again before the "
                       "heads are joined.",
    keys_values_swapped="Keys and values are swapped.",
    weight_transposed="A layer's weight is (out, in): x @ weight.T, or F.linear(x, weight, bias). "
                      "Yours multiplies by the weight as it stands.",
    no_bias="The biases are missing.",
    no_out="The last linear layer (out) is missing.",
)
def test_4e_cross_attention(adapters, case):
    x, rung, weights = case["x"], case["rung"], case["weights"]
    keys, values = two(adapters.project_kv(rung, weights, 3), "4e project_kv", "keys and values")
    check_shape(keys, (2, 3, 5, 4), "4e project_kv, keys (B, H, Q, K)")
    check_shape(values, (2, 3, 5, 4), "4e project_kv, values (B, H, Q, K)")
    return {
        "keys": keys,
        "values": values,
        "y": adapters.cross_attention(x, keys, values, weights, 3),
    }


@problem(
    3,
    gate_swapped="The second half is the gate and passes the SiLU; the first half is multiplied as "
                 "it is. Yours are swapped.",
    no_first_silu="There is a SiLU between the first convolution and the depthwise one, too.",
    no_gate_silu="The gate passes a SiLU before it is multiplied.",
    size_swapped="x goes row by row: (h, w), as `size` says. Yours is (w, h).",
    places_and_channels_mixed="(B, N, D) becomes (B, D, h, w) by a transpose and a reshape. "
                              "Yours is a reshape alone, which mixes places and channels.",
    mixed_going_in="On the way in a view stands where a transpose was meant: (B, N, D) becomes "
                   "(B, D, N) by a transpose, and only then (B, D, h, w).",
    mixed_coming_out="On the way out a view stands where a transpose was meant: (B, D, h, w) "
                     "becomes (B, D, N), and (B, N, D) only by a transpose.",
    edge_repeated="The 3 x 3 convolution has padding 1, with zeros. Yours repeats the edge.",
)
def test_4f_mix_ffn(adapters, case):
    return {"y": adapters.mix_ffn(case["x"], (3, 4), case["weights"])}


@problem(
    6,
    no_table="The block's own table is added to the modulation first.",
    scale_without_one="Modulation is x (1 + scale) + shift. Yours is x scale + shift.",
    shift_and_scale_swapped="The order of the six is shift, scale, gate, then the same for the "
                            "feed-forward. Yours takes scale first.",
    by_kind="The order of the six is shift, scale, gate of the attention, then of the "
            "feed-forward. Yours takes both shifts, both scales, both gates.",
    halves_swapped="The first three of the six are the attention's, the last three the "
                   "feed-forward's. Yours are the other way round.",
    no_gates="What attention and feed-forward give is multiplied by its gate before it is added.",
    no_first_gate="What the self-attention gives is multiplied by g_1 before it is added. In yours "
                  "it is not.",
    no_second_gate="What the feed-forward gives is multiplied by g_2 before it is added. In yours "
                   "it is not.",
    cross_normed="Cross-attention reads x as it stands. Yours reads it behind a LayerNorm.",
    cross_last="Cross-attention comes before the feed-forward. Yours comes last.",
    cross_modulated="Cross-attention reads x as it stands, without norm and modulation (as in "
                    "SANA).",
    cross_gated="Cross-attention is added as it is, without a gate.",
    norm_eps="The LayerNorm's eps is 1e-6. Yours is 1e-5, which is PyTorch's default.",
    no_norm="Each modulation follows a LayerNorm (eps 1e-6, without weights).",
    norm_of_the_first="The feed-forward's LayerNorm is of x as the two attentions have left it. "
                      "Yours is of the x that came in.",
    no_residual="Each of the three is added to x. Yours replaces it.",
    cross_first="Self-attention first, then cross-attention, then the feed-forward.",
    heads_of_cross="The self-attention has D / head_dim heads. Yours has n_head of them, which is "
                   "the cross-attention's number.",
)
def test_4g_adaln_block(adapters, case):
    keys, values = case["keys"], case["values"]
    y = adapters.adaln_block(case["x"], case["modulation"], keys, values, (2, 3), case["weights"],
                             4, 2)
    return {"y": y}
