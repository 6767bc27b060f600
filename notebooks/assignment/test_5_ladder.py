"""Part 5: the ladder."""
from notebooks.assignment.grading import Wrong, length, problem, two


@problem(
    3,
    one_later="states[i] enters layer i, so the last block is fed states[n_mllm - 1]. Yours is one "
              "too far: states[n_mllm] is the normed end, which the ladder does not use.",
    first_layers="The last n_dit layers are tapped, yours are the first.",
    final="Yours gives every block the normed end. That is MetaQuery's wiring, which the ladder "
          "replaces.",
    reversed="The first block is fed the earliest of the tapped states. Yours the latest.",
    spread="Yours spreads the taps over the whole depth. They are the last n_dit, side by side.",
)
def test_5a_tap_layers(adapters, case):
    return {f"{m} layers, {n} blocks": a_list_of_ints(adapters.tap_layers(m, n))
            for m, n in ((36, 20), (8, 6), (6, 6))}


def a_list_of_ints(found):
    """What picks from a list of states is an int."""
    if not isinstance(found, list):
        hint = " Is there a `return`?" if found is None else ""
        kind = type(found).__name__
        raise Wrong(f"5a tap_layers: a list of n_dit ints. Yours is a {kind}.{hint}")
    kinds = {type(i).__name__ for i in found}
    if kinds - {"int"}:
        raise Wrong(f"5a tap_layers: a list of ints. Yours holds {', '.join(sorted(kinds))}.")
    return found


@problem(
    3,
    weight_transposed="A layer's weight is (out, in): x @ weight.T, or F.linear(x, weight, bias). "
                      "Yours multiplies by the weight as it stands (both are square here).",
    exact_gelu="The GELU is the one by tanh: F.gelu(x, approximate=\"tanh\"). Yours is the exact "
               "one.",
    no_norm="An RMSNorm follows the second layer.",
    layer_norm="The norm does not take the mean away: RMSNorm, not LayerNorm.",
    no_gain="The norm has a gain, \"3.weight\".",
    default_eps="The norm's eps is 1e-5. PyTorch's own, which yours has, is smaller.",
    smaller_eps="The norm's eps is 1e-5. Yours is 1e-6.",
    eps_outside="The norm's eps stands under the root. Yours is added to the root.",
)
def test_5b_connector(adapters, case):
    return {"rung": adapters.connector(case["states"], case["weights"])}


@problem(
    3,
    queries_first="The queries come last: in a causal model only what stands last has read all.",
    by_index="The queries' positions go on from the last token's + 1. Yours go on from the number "
             "of tokens, which is larger after a picture.",
    repeated="The first query stands one position behind the last token. Yours has its position "
             "once more.",
    from_zero="The queries' positions go on behind the prompt's. Yours begin at 0.",
    standing_still="Each query has a position of its own, as text has.",
)
def test_5c_append_queries(adapters, case):
    found = adapters.append_queries(case["x"], case["positions"], case["queries"])
    x, positions = two(found, "5c append_queries", "x and positions")
    return {"x": x, "positions": positions}


@problem(
    3,
    first_tokens="The queries are the last n_query tokens of a state. Yours are the first.",
    one_later="states[i] enters layer i: block j is fed states[n_mllm - n_dit + j]. Yours is one "
              "further.",
    same_for_all="Each block has a state of its own. Yours has the last one for all.",
    final="Yours feeds every block the normed end, states[n_mllm]. That is MetaQuery's wiring, "
          "which the ladder replaces.",
    no_connector="Each tapped state passes the connector.",
    reversed="Rung 0 comes from the earliest of the tapped states. Yours go the other way.",
)
def test_5d_rungs(adapters, case):
    return {"rungs": adapters.rungs(list(case["states"]), 4, 3, case["weights"])}


@problem(
    4,
    first_block_for_all="Each block has keys and values of its own: \"blocks.j.cross.k.weight\". "
                        "Yours come from block 0's weights for all.",
    last_rung_for_all="Block j has rung j. Yours has the last rung for all.",
    reversed="Block j has rung j. Yours go the other way.",
    no_caption="The rungs pass the DiT's caption projection first, \"caption.0\" to "
               "\"caption.3\".",
    no_caption_norm="The caption projection ends with an RMSNorm, \"caption.3.weight\".",
    keys_values_swapped="Keys first, then values.",
)
def test_5e_condition(adapters, case):
    pairs = adapters.condition(case["rungs"], case["weights"], 2)
    n = len(case["rungs"])
    if not isinstance(pairs, list | tuple) or len(pairs) != n:
        raise Wrong(f"5e condition: a list of L = {n} pairs (keys, values), one for each block. "
                    f"Yours is a {type(pairs).__name__}{length(pairs)}.")
    found = {}
    for j, pair in enumerate(pairs):
        keys, values = two(pair, f"5e condition, block {j}", "keys and values")
        found |= {f"keys of block {j}": keys, f"values of block {j}": values}
    return found
