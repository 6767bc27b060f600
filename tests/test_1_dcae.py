"""DC-AE: shapes, its attention against the quadratic form, small and extreme pictures against the
public library, its only error."""
import pytest
import torch
from safetensors.torch import load_file

from bench.odd_maps import SIZES, odd_pictures
from dcae import DCAE, DCAEConfig
from engine import fast
from tests.conftest import TINY, relative


def test_shapes(tiny):
    assert tiny.dcae.encode(torch.zeros(2, 3, 8, 12)).shape == (2, 4, 2, 3)
    six_stages = DCAE(DCAEConfig(widths=(8, 8, 16, 16, 32, 32), encoder_layers=(1,) * 6,
                                 decoder_layers=(1,) * 6, head_dim=8))
    assert six_stages.config.factor == DCAEConfig().factor == 32
    latents = six_stages.encode(torch.zeros(1, 3, 64, 32))
    assert latents.shape == (1, 32, 2, 1)
    assert six_stages.decode(latents).shape == (1, 3, 64, 32)


def test_linear_attention_equals_its_quadratic_form(tiny):
    block = tiny.dcae.encoder.stages[2][0].attn
    seen = {}
    handles = []
    for name, module in block.named_children():
        keep = lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        handles.append(module.register_forward_hook(keep))
    x = torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(0))
    block(x)
    for handle in handles:
        handle.remove()
    qkv = torch.cat([seen["near"][0], seen["mix"][1]], dim=1)          # (B, 6D, h, w)
    q, k, v = qkv.flatten(2).unflatten(1, (4, 3, 32)).unbind(2)        # (B, 2H, K, N) each
    scores = k.relu().transpose(-1, -2) @ q.relu()                     # (B, 2H, N, N)
    weights = scores / (scores.sum(dim=2, keepdim=True) + 1e-15)       # (B, 2H, N, N)
    out = (v @ weights).flatten(1, 2)                                  # (B, 2D, N)
    assert relative(seen["out"][0], out.transpose(1, 2)) < 1e-5


def test_pictures_are_encoded_a_few_at_a_time(tiny):
    """By engine/fast.py: at most 512 x 512 pixels at once, in another memory layout, with the same
    result."""
    fast.enable(tiny)
    x = torch.rand(3, 3, 512, 256, generator=torch.Generator().manual_seed(0))
    sizes = []
    tiny.dcae.encoder.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    together = tiny.dcae.encode(x)
    assert sizes == [2, 1]
    alone = torch.cat([tiny.dcae.encoder(one[None]) for one in x])
    assert relative(together, alone * tiny.dcae.config.scaling_factor) < 1e-6


def test_a_wrong_size_is_named(tiny):
    with pytest.raises(ValueError, match=r"multiples of 4, got \(32, 30\)"):
        tiny.dcae.encode(torch.zeros(1, 3, 32, 30))


# ----------------------------------------------------------------------- against the public library

@pytest.fixture(scope="module")
def library():
    """What bench/record_dcae.py wrote: latents, pixels decoded from them, and how far the library's
    own bfloat16 is from them."""
    return load_file(TINY / "dcae.safetensors")


@pytest.mark.parametrize("size", SIZES, ids=["4", "32", "33"])
@pytest.mark.parametrize("name", ["black", "white", "board", "point", "noise"])
@pytest.mark.parametrize("path", [fast.disable, fast.enable], ids=["plain", "fast"])
def test_few_positions_and_pictures_at_the_limits(tiny, library, size, name, path):
    """As many positions as where the library changes the form of its attention, one more, and few;
    in float32 to 1e-5, in bfloat16 about as near as the library itself is."""
    dcae = path(tiny).dcae
    x = odd_pictures(size)[name]
    key = f"{size[0]}x{size[1]}.{name}"
    latents, pixels, rounding = (library[f"{key}.{what}"]
                                 for what in ("latents", "pixels", "bfloat16"))
    scale = dcae.config.scaling_factor
    assert relative(dcae.encode(x) / scale, latents) < 1e-5
    assert relative(dcae.decode(latents * scale), pixels) < 1e-5
    dcae.to(torch.bfloat16)
    found = (dcae.encode(x.bfloat16()).float() / scale,
             dcae.decode((latents * scale).bfloat16()).float())
    for seen, want, of_library in zip(found, (latents, pixels), rounding.tolist()):
        assert seen.isfinite().all()
        assert relative(seen, want) < 2 * of_library + 0.002
