"""Shapes, what is true before any training, and each piece of mathematics against a second way to
compute it."""
import math

import pytest
import torch

from dit import DiT, DiTConfig, linear_attention, timestep_embedding
from ladder import CONNECTORS, WIRINGS, Ladder, tap_layers
from mllm import mrope_positions
from tests.conftest import relative
from vit import (
    RMSNorm,
    VisionAttention,
    ViT,
    ViTConfig,
    apply_rope,
    attention,
    frequencies,
    from_windows,
    smart_size,
    to_windows,
    window_index,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------- ladder

def test_the_ladder_taps_the_inputs_of_the_last_layers():
    # State 16 feeds block 0; state 36, the normed end, is not used.
    assert tap_layers(36, 20) == list(range(16, 36))
    with pytest.raises(ValueError, match="sideways"):
        tap_layers(36, 20, "sideways")
    with pytest.raises(ValueError, match="20 MLLM layers"):
        tap_layers(12, 20)


def test_the_other_wirings():
    assert tap_layers(36, 4, "final") == [36] * 4
    assert tap_layers(36, 4, "penultimate") == [35] * 4
    assert tap_layers(36, 4, "first") == [0, 1, 2, 3]
    assert tap_layers(36, 4, "reversed") == [35, 34, 33, 32]
    assert tap_layers(36, 4, "uniform") == [0, 12, 23, 35]
    assert tap_layers(36, 1, "uniform") == [0]
    shuffled = tap_layers(36, 20, "shuffled")
    assert sorted(shuffled) == list(range(16, 36)) != shuffled == tap_layers(36, 20, "shuffled")
    assert tap_layers(36, 4, "mean") == tap_layers(36, 4, "routed") == list(range(37))


FED = {
    "ladder": [3, 4],
    "final": [5, 5],
    "penultimate": [4, 4],
    "uniform": [0, 4],
    "first": [0, 1],
    "reversed": [4, 3],
    "shuffled": tap_layers(5, 2, "shuffled"),
    "mean": [2.5, 2.5],
    "routed": [1, 2.5],
}


@pytest.mark.parametrize("wiring, fed", FED.items())
def test_each_wiring_gives_each_block_its_own_state(wiring, fed):
    """State i is 1 + i throughout; block j is given the connector's output for 1 + fed[j]."""
    ladder = Ladder(3, 8, 6, 5, 2, wiring)
    ladder.init_weights()
    if wiring == "routed":
        # It starts as the mean; here block 0 has learnt to take state 1.
        assert torch.equal(ladder.routes.softmax(1), torch.full((2, 6), 1 / 6))
        ladder.routes.data[0, 1] = 50
    assert (wiring == "routed") == ("routes" in dict(ladder.named_parameters()))
    out = ladder([torch.full((1, 3, 8), 1.0 + i) for i in range(6)])
    assert out.shape == (2, 1, 3, 6)
    for j, value in enumerate(fed):
        want = ladder.connector(torch.full((1, 3, 8), 1.0 + value)).detach()
        assert relative(out[j], want) < 1e-5


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_wiring_is_a_matrix(wiring, connector):
    """rung_j = connector_j(sum over t of A[j, t] state_t), and every row of A adds up to 1."""
    ladder = Ladder(3, 8, 6, 5, 2, wiring, connector)
    ladder.init_weights(seeded())
    if wiring == "routed":
        torch.nn.init.normal_(ladder.routes, generator=seeded())
    A = ladder.matrix().detach()
    assert A.shape == (2, 6) and torch.allclose(A.sum(1), torch.ones(2))
    if wiring != "routed":
        assert torch.allclose(A @ torch.arange(6.0), torch.tensor(FED[wiring], dtype=torch.float))
    states = torch.randn(6, 1, 3, 8, generator=seeded())
    rungs = ladder(list(states))
    for j, row in enumerate(A):
        mixed = sum(weight * state for weight, state in zip(row, states))
        connect = ladder.connector[j] if connector == "per-block" else ladder.connector
        assert relative(rungs[j], connect(mixed)) < 1e-6


@pytest.mark.parametrize("named, message", [
    (dict(wiring="per-block"), "unknown wiring 'per-block', expected one of .*'ladder'"),
    (dict(connector="per_block"), "unknown connector 'per_block', expected one of .*'per-block'"),
])
def test_names_that_no_ladder_knows(named, message):
    with pytest.raises(ValueError, match=message):
        Ladder(3, 8, 6, 5, 2, **named)


def test_a_connector_per_block_differs_from_block_to_block():
    """In nothing else: as many queries, and each connector as large as the shared one."""
    shared, own = (Ladder(3, 8, 6, 5, 2, "final", connector) for connector in CONNECTORS)
    n = {name: sum(p.numel() for p in ladder.connector.parameters())
         for name, ladder in (("shared", shared), ("own", own))}
    assert n["own"] == 2 * n["shared"]
    own.init_weights(seeded())
    first, second = own([torch.ones(1, 3, 8)] * 6)
    assert relative(first, second) > 0.1


def test_every_wiring_runs_from_prompt_to_rungs(model):
    """A ladder put into a model brings its own number of queries."""
    mllm, dit = model.config.mllm, model.config.dit
    assert list(WIRINGS) == list(FED)
    for wiring in WIRINGS:
        model.ladder = Ladder(4, mllm.dim, dit.caption_dim, mllm.n_layer, dit.n_layer, wiring)
        model.ladder.init_weights(seeded())
        rungs = model.encode(["a dog", "a cat"])
        assert rungs.shape == (dit.n_layer, 2, 4, dit.caption_dim)


def test_starting_values_are_smaller_the_more_inputs_there_are(tiny):
    """And what writes to the residual stream the deeper the stack."""
    tiny.mllm.init_weights(seeded())
    for layers in (tiny.mllm.layers, tiny.mllm.vision.blocks):
        mlp = layers[0].mlp
        for weight, depth in ((mlp.gate.weight, 1), (mlp.down.weight, 2 * len(layers))):
            want = (weight.shape[1] * depth) ** -0.5
            assert weight.std().item() == pytest.approx(want, rel=0.1)


# ----------------------------------------------------------------------------------------- DiT

SMALL_DIT = dict(n_head=2, head_dim=8, cross_n_head=2, channels=4, caption_dim=6)


def test_first_velocity_is_zero_and_every_block_attends_to_its_rung():
    g = seeded()
    dit = DiT(DiTConfig(n_layer=3, **SMALL_DIT))
    dit.init_weights(g)
    x = torch.randn(2, 4, 3, 5, generator=g)
    time = torch.tensor([10.0, 900.0])
    rungs = torch.randn(3, 2, 7, 6, generator=g)
    assert torch.equal(dit(x, time, dit.project_kv(rungs)), torch.zeros(2, 4, 3, 5))
    # With another last layer it is not 0, but knows nothing of the rungs yet.
    torch.nn.init.normal_(dit.proj_out.weight, generator=g)
    at_first = dit(x, time, dit.project_kv(rungs))
    assert at_first.any() and torch.equal(at_first, dit(x, time, dit.project_kv(rungs + 1)))
    # Off the zeros: now a change of any one rung must show.
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=g)
    before = dit(x, time, dit.project_kv(rungs))
    assert before.shape == x.shape
    for j in range(3):
        other = rungs.clone()
        other[j] += 1
        assert relative(dit(x, time, dit.project_kv(other)), before) > 1e-4, j


def test_cross_attention_softmax_can_be_hooked():
    dit = DiT(DiTConfig(n_layer=1, **SMALL_DIT))
    dit.init_weights()
    seen = []
    dit.blocks[0].cross.softmax.register_forward_hook(lambda m, args, out: seen.append(out))
    dit(torch.randn(1, 4, 3, 5), torch.ones(1), dit.project_kv(torch.randn(1, 1, 7, 6)))
    assert seen[0].shape == (1, 2, 15, 7)
    assert torch.allclose(seen[0].sum(-1), torch.ones(1, 2, 15))


def test_linear_attention_equals_its_n_by_n_form():
    q, k, v = torch.randn(3, 2, 4, 50, 8, generator=seeded(), dtype=torch.float64)
    weights = q.relu() @ k.relu().transpose(2, 3)                   # (B, H, N, N)
    want = weights / weights.sum(-1, keepdim=True) @ v
    assert relative(linear_attention(q, k, v).double(), want) < 1e-5


def test_timestep_embedding_is_cosines_then_sines():
    e = timestep_embedding(torch.tensor([250.0]), 4)[0]
    want = [math.cos(250), math.cos(2.5), math.sin(250), math.sin(2.5)]
    assert torch.allclose(e, torch.tensor(want), atol=1e-4)
    assert torch.allclose(frequencies(2, 1e4, "cpu"), torch.tensor([1.0, 0.01]))


# -------------------------------------------------------------- attention, rope and positions

def test_attention_equals_pytorchs():
    g = seeded()
    q = torch.randn(2, 6, 5, 8, generator=g)
    k = torch.randn(2, 2, 9, 8, generator=g)
    v = torch.randn(2, 2, 9, 8, generator=g)
    mask = torch.rand(2, 1, 5, 9, generator=g) > 0.3
    mask[..., 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask)
    assert relative(attention(q, k, v, mask), want) < 1e-6


def test_rope_is_a_rotation_of_complex_numbers():
    x = torch.randn(2, 3, 7, 8, generator=seeded())
    angle = torch.rand(7, 4) * 6
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(7, 4), angle)
    assert relative(apply_rope(x, angle), torch.cat([z.real, z.imag], -1)) < 1e-6


def test_mrope_positions_of_text_then_picture_then_text():
    # A picture of 2 x 3 merged units after two tokens.
    ids = [1, 2, 99, 99, 99, 99, 99, 99, 3, 4]
    t, h, w = mrope_positions(ids, 99, [(2, 3)]).tolist()
    assert t == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert h == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert w == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------------------- ViT

SMALL_VIT = ViTConfig(n_layer=1, dim=16, n_head=2, mlp_dim=8, patch=2, window=12,
                      full_attention=())


def window_of_units(h, w):
    """The row-major number of the window that each unit is in, for windows of 3 x 3 units."""
    rows = torch.arange(h)[:, None] // 3
    columns = torch.arange(w) // 3
    return (rows * -(-w // 3) + columns).flatten()


@pytest.mark.parametrize("h, w", [(5, 7), (6, 6), (1, 1), (1, 10), (4, 3)])
def test_every_unit_comes_back_from_its_window(h, w):
    """Also where the windows do not divide the grid. A patch is known by its number."""
    index, valid = window_index((2 * h, 2 * w), SMALL_VIT)
    assert index.shape == valid.shape == (-(-h // 3) * -(-w // 3), 9)
    patches = torch.arange(4 * h * w).expand(2, -1)[..., None]                 # (B, P, 1)
    windows = to_windows(patches, index, 4)                                    # (B, W * 36, 1)
    units = windows.unflatten(1, (-1, 4))                                      # (B, W * 9, 4, 1)
    assert torch.equal(from_windows(units, index, valid).flatten(1, 2), patches)
    # Each window holds what belongs to it, row by row.
    for i, (row, real) in enumerate(zip(index, valid)):
        own = (window_of_units(h, w) == i).nonzero()[:, 0]
        assert torch.equal(row[real], own)


def test_window_attention_equals_masked_full_attention():
    """On a grid that the windows do not divide: edge windows are smaller, and nothing may attend to
    their filling."""
    grid = (10, 14)
    vit = ViT(SMALL_VIT, 8)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=seeded(p.numel()))
    patches = torch.randn(2, 140, 24, generator=seeded())
    # Units of 2 x 2 patches; a window for each patch, in merge order.
    window = window_of_units(5, 7).repeat_interleave(4)
    x = vit.patch_embed(patches)
    angle = vit.angles(grid, "cpu")
    block = vit.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    same = window[:, None] == window
    y = attention(apply_rope(q, angle), apply_rope(k, angle), v, same[None, None])
    x = x + block.attn.out(y.transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    want = vit.merger(x.unflatten(1, (-1, 4)))
    got = vit(patches, grid)
    assert got.shape == (2, 35, 8)
    assert relative(got, want) < 1e-5
    index, valid = window_index(grid, SMALL_VIT)
    assert index.shape == (6, 9)
    assert sorted(index[valid].tolist()) == list(range(35))


def test_a_far_patch_reaches_a_window_in_the_first_layer_with_full_attention():
    """And not before. Windows of 3 x 3 units; layers 0, 1 and 3 stay inside of them."""
    c = ViTConfig(n_layer=4, dim=16, n_head=2, mlp_dim=8, patch=2, window=12, full_attention=(2,))
    torch.manual_seed(0)
    vit = ViT(c, 8)
    grid = (12, 12)
    patches = torch.randn(1, 144, 3 * c.frames * c.patch ** 2, generator=seeded())
    far = patches.clone()
    # The last one: bottom right.
    far[:, -1] += 1
    entered = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    out, out_far = vit(patches, grid), vit(far, grid)
    # The first window's patches, 9 units of 4, stand first in both forms.
    first = [x.reshape(-1, c.dim)[:36] for x in entered]
    same = [torch.equal(a, b) for a, b in zip(first[:4], first[4:])]
    # On entering layers 0, 1, 2 and 3.
    assert same == [True, True, True, False]
    assert not torch.equal(out[:, 0], out_far[:, 0])


def test_vision_attention_without_padding_needs_no_mask():
    layer = VisionAttention(8, 2)
    x = torch.randn(1, 5, 8)
    angle = torch.rand(1, 5, 2)
    valid = torch.tensor([[True] * 4 + [False]])
    want = layer(x[:, :4], angle[:, :4], valid[:, :4])
    assert relative(layer(x, angle, valid)[:, :4], want) < 1e-6


@pytest.mark.parametrize("width, height, want", [
    (640, 360, (588, 336)), (512, 512, (448, 448)), (28, 28, (448, 448)), (448, 448, (448, 448)),
    (800, 800, (448, 448)), (1184, 666, (588, 336)), (1600, 1600, (448, 448))])
def test_smart_size(width, height, want):
    assert smart_size(width, height, 28, 256 * 28 * 28) == want


def test_a_picture_too_thin_is_an_error():
    with pytest.raises(ValueError, match="2001x10"):
        smart_size(2001, 10, 28, 256 * 28 * 28)


def test_the_norm_rounds_before_its_gain():
    """In bfloat16, as in Qwen2.5-VL; nn.RMSNorm rounds after it."""
    g, norm = seeded(), RMSNorm(32).bfloat16()
    x = torch.randn(64, 32, generator=g).bfloat16()
    torch.nn.init.normal_(norm.weight, generator=g)
    exact = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    assert torch.equal(norm(x), norm.weight * exact.bfloat16())
    assert not torch.equal(norm(x), (norm.weight * exact).bfloat16())


def test_a_thin_picture_keeps_a_unit_on_its_short_side():
    """At the toy's area."""
    assert smart_size(640, 20, 16, 4096) == (352, 16)
    assert smart_size(20, 640, 16, 4096) == (16, 352)


def test_the_shuffled_wiring_is_always_the_same():
    assert tap_layers(36, 20, "shuffled") == [28, 29, 17, 24, 31, 22, 35, 20, 23, 21, 25, 19, 18,
                                              27, 33, 16, 30, 32, 34, 26]
