"""Shapes, what is true before any training, and each piece of mathematics against a second way to compute it."""
import math

import pytest
import torch

from dit import DiT, DiTConfig, linear_attention, timestep_embedding
from ladder import Ladder, rungs
from mllm import mrope_positions
from tests.conftest import relative
from vit import VisionAttention, ViT, ViTConfig, apply_rope, attention, frequencies, smart_size, window_order


def test_the_ladder_taps_the_inputs_of_the_last_layers():
    assert rungs(36, 20) == list(range(16, 36))                     # state 16 feeds block 0; state 36, the normed end, is not used
    with pytest.raises(ValueError, match="sideways"):
        rungs(36, 20, "sideways")
    with pytest.raises(ValueError, match="20 MLLM layers"):
        rungs(12, 20)


def test_the_other_wirings():
    assert rungs(36, 4, "last") == [36] * 4 and rungs(36, 4, "penultimate") == [35] * 4 and rungs(36, 4, "first") == [0, 1, 2, 3]
    assert rungs(36, 4, "reversed") == [35, 34, 33, 32] and rungs(36, 4, "uniform") == [0, 12, 23, 35] and rungs(36, 1, "uniform") == [0]
    shuffled = rungs(36, 20, "shuffled")
    assert sorted(shuffled) == list(range(16, 36)) != shuffled == rungs(36, 20, "shuffled")
    assert rungs(36, 4, "mean") == rungs(36, 4, "routed") == list(range(37))


@pytest.mark.parametrize("how, fed", [("top", [3, 4]), ("last", [5, 5]), ("penultimate", [4, 4]), ("uniform", [0, 4]), ("first", [0, 1]),
                                      ("reversed", [4, 3]), ("shuffled", rungs(5, 2, "shuffled")), ("mean", [2.5, 2.5]), ("routed", [1, 2.5])])
def test_each_wiring_gives_each_block_its_own_state(how, fed):
    """State i is 1 + i throughout; what block j hears is the connector of 1 + fed[j]."""
    ladder = Ladder(3, 8, 6, 5, 2, how)
    ladder.init_weights()
    if how == "routed":
        assert torch.equal(ladder.routes.softmax(1), torch.full((2, 6), 1 / 6))     # it starts as the mean
        ladder.routes.data[0, 1] = 50                               # now block 0 has learnt to hear state 1
    assert (how == "routed") == ("routes" in dict(ladder.named_parameters()))
    out = ladder([torch.full((1, 3, 8), 1.0 + i) for i in range(6)])
    assert out.shape == (2, 1, 3, 6)
    for j, value in enumerate(fed):
        assert relative(out[j], ladder.connector(torch.full((1, 3, 8), 1.0 + value)).detach()) < 1e-5


def test_every_wiring_runs_from_prompt_to_rungs(tiny):
    for how in ("top", "last", "penultimate", "uniform", "first", "reversed", "shuffled", "mean", "routed"):
        tiny.ladder = Ladder(4, tiny.config.mllm.dim, tiny.config.dit.caption_dim, tiny.config.mllm.n_layer, tiny.config.dit.n_layer, how)
        tiny.ladder.init_weights(torch.Generator().manual_seed(0))
        assert tiny.encode(["a dog", "a cat"]).shape == (tiny.config.dit.n_layer, 2, 4, tiny.config.dit.caption_dim)


def test_first_velocity_is_zero_and_every_block_hears_its_rung():
    g = torch.Generator().manual_seed(0)
    dit = DiT(DiTConfig(n_layer=3, n_head=2, head_dim=8, cross_n_head=2, channels=4, caption_dim=6))
    dit.init_weights(g)
    x, time, captions = torch.randn(2, 4, 3, 5, generator=g), torch.tensor([10.0, 900.0]), torch.randn(3, 2, 7, 6, generator=g)
    assert torch.equal(dit(x, time, dit.condition(captions)), torch.zeros(2, 4, 3, 5))
    for p in dit.parameters():                                      # off the zeros: now a change of any one rung must show
        torch.nn.init.normal_(p, std=0.2, generator=g)
    before = dit(x, time, dit.condition(captions))
    assert before.shape == x.shape
    for j in range(3):
        other = captions.clone()
        other[j] += 1
        assert relative(dit(x, time, dit.condition(other)), before) > 1e-4, j


def test_cross_attention_softmax_can_be_hooked():
    dit = DiT(DiTConfig(n_layer=1, n_head=2, head_dim=8, cross_n_head=2, channels=4, caption_dim=6))
    dit.init_weights()
    seen = []
    dit.blocks[0].cross.softmax.register_forward_hook(lambda m, args, out: seen.append(out))
    dit(torch.randn(1, 4, 3, 5), torch.ones(1), dit.condition(torch.randn(1, 1, 7, 6)))
    assert seen[0].shape == (1, 2, 15, 7) and torch.allclose(seen[0].sum(-1), torch.ones(1, 2, 15))


def test_linear_attention_equals_its_n_by_n_form():
    q, k, v = torch.randn(3, 2, 4, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = q.relu() @ k.relu().transpose(2, 3)                   # (B, H, N, N)
    assert relative(linear_attention(q, k, v).double(), weights / weights.sum(-1, keepdim=True) @ v) < 1e-5


def test_attention_equals_pytorchs():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    mask = torch.rand(2, 1, 5, 9, generator=g) > 0.3
    mask[..., 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask)
    assert relative(attention(q, k, v, mask), want) < 1e-6


def test_rope_is_a_rotation_of_complex_numbers():
    x, angle = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0)), torch.rand(7, 4) * 6
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(7, 4), angle)
    assert relative(apply_rope(x, angle), torch.cat([z.real, z.imag], -1)) < 1e-6


def test_mrope_positions_of_text_then_picture_then_text():
    ids = [1, 2, 99, 99, 99, 99, 99, 99, 3, 4]                      # a picture of 2 x 3 merged units after two tokens
    t, h, w = mrope_positions(ids, 99, [(2, 3)]).tolist()
    assert t == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert h == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert w == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


def test_window_attention_equals_masked_full_attention():
    """On a grid that the windows do not divide: edge windows are smaller, and their filling must not be seen."""
    c, grid = ViTConfig(n_layer=1, dim=16, n_head=2, mlp_dim=8, patch=2, window=12, full_attention=()), (10, 14)
    vit = ViT(c, 8)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    patches = torch.randn(2, 140, 24, generator=torch.Generator().manual_seed(0))
    unit = torch.arange(35).view(5, 7)                              # units of 2 x 2 patches, windows of 3 x 3 units
    window_of_unit = (unit // 7 // 3) * 3 + unit % 7 // 3
    window = window_of_unit.flatten().repeat_interleave(4)          # per patch, in merge order
    x, angle = vit.patch_embed(patches), vit.angles(grid, "cpu")
    block = vit.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    y = attention(apply_rope(q, angle), apply_rope(k, angle), v, (window[:, None] == window)[None, None])
    x = x + block.attn.out(y.transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    want = vit.merger(x.unflatten(1, (-1, 4)))
    got = vit(patches, grid)
    assert got.shape == (2, 35, 8) and relative(got, want) < 1e-5
    order, real = window_order(grid, c)
    assert order.shape == (6, 9) and sorted(order[real].tolist()) == list(range(35))


def test_vision_attention_without_padding_needs_no_mask():
    layer = VisionAttention(8, 2)
    x, angle, real = torch.randn(1, 5, 8), torch.rand(1, 5, 2), torch.tensor([[True] * 4 + [False]])
    assert relative(layer(x, angle, real)[:, :4], layer(x[:, :4], angle[:, :4], real[:, :4])) < 1e-6


@pytest.mark.parametrize("width, height, want", [(640, 360, (588, 336)), (512, 512, (448, 448)), (28, 28, (448, 448)), (448, 448, (448, 448)),
                                                 (800, 800, (448, 448)), (1184, 666, (588, 336)), (1600, 1600, (448, 448))])
def test_smart_size(width, height, want):
    assert smart_size(width, height, 28, 256 * 28 * 28) == want


def test_a_picture_too_thin_is_an_error():
    with pytest.raises(ValueError, match="2001x10"):
        smart_size(2001, 10, 28, 256 * 28 * 28)


def test_timestep_embedding_is_cosines_then_sines():
    e = timestep_embedding(torch.tensor([250.0]), 4)[0]
    want = [math.cos(250), math.cos(2.5), math.sin(250), math.sin(2.5)]
    assert torch.allclose(e, torch.tensor(want), atol=1e-4)
    assert torch.allclose(frequencies(2, 1e4, "cpu"), torch.tensor([1.0, 0.01]))
