"""The solvers against known answers, with the network replaced by formulas."""
import dataclasses
import shutil
import types

import pytest
import torch
from PIL import Image

import sample


def follow(x0_of, x, times, solver):
    """The solver along x0_of(x, t), from x at times[0] to times[-1]."""
    times, before = times.tolist(), None
    for i, t in enumerate(times[:-1]):
        x0 = x0_of(x, t)
        x, before = sample.SOLVERS[solver](x, x0, before, times, i), x0
    return x


def test_schedule():
    t = sample.schedule(10, shift=1.0)
    assert t.shape == (11,) and t[0] == 0.999 and t[-1] == 0 and (t.diff() < 0).all()
    assert torch.allclose(sample.schedule(10, 3.0), 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("solver", sample.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_velocity_is_followed_exactly(solver, steps):
    """A straight path from eps to data: x_t = (1 - t) data + t eps, so x0 is the same everywhere."""
    data, eps = torch.randn(2, 5, dtype=torch.float64)
    times = sample.schedule(steps)
    t = times[0]
    assert torch.allclose(follow(lambda x, t: data, (1 - t) * data + t * eps, times, solver), data)


def error(times, solver, std=0.5):
    """Data N(0, std^2), where E[x0 | x_t] and the path are known: x_t is proportional to the standard deviation at t."""
    spread = lambda t: ((1 - t) ** 2 * std ** 2 + t ** 2) ** 0.5
    x0_of = lambda x, t: x * (1 - t) * std ** 2 / spread(t) ** 2
    x = torch.tensor(1.3, dtype=torch.float64)
    return abs(follow(x0_of, x, times, solver) - x * spread(times[-1]) / spread(times[0])).item()


@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_a_gaussian_ends_where_it_must(solver):
    assert error(sample.schedule(400), solver) < 0.01


def test_dpm_2m_converges_faster_than_euler():
    """With half the step Euler's error halves (order 1), that of 2M falls to a quarter (order 2). Away from t = 0 and 1, where
    lambda is infinite and no order is promised."""
    steps = {n: torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64) for n in (20, 40, 80, 160)}
    fall = {solver: [error(steps[n], solver) / error(steps[2 * n], solver) for n in (20, 40, 80)] for solver in sample.SOLVERS}
    assert all(1.8 < r < 2.2 for r in fall["euler"]) and all(3.5 < r < 4.5 for r in fall["dpm++"]), fall
    assert error(sample.schedule(20), "dpm++") < error(sample.schedule(20), "euler")


def test_guidance():
    null, image, both = torch.randn(3, 2, 4, 3, 3)
    assert torch.equal(sample.guide((null, both), 1.0, 9.0), null + (both - null))
    assert torch.allclose(sample.guide((null, both), 3.0, 9.0), null + 3 * (both - null))
    assert torch.allclose(sample.guide((null, image, both), 3.0, 1.5), null + 1.5 * (image - null) + 3 * (both - image))


def test_a_model_may_have_an_image_guidance_of_its_own(tiny, monkeypatch):
    """Used where nothing else is said; the released value is 1.5."""
    eps, red = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [[Image.new("RGB", (32, 32), "red")]]
    last = lambda **how: [*sample.denoise(tiny, ["a dog"], red, eps=eps, steps=2, **how)][-1].x_t
    at = {g: last(image_guidance=g) for g in (1.0, 1.5, 3.0)}
    assert torch.equal(last(), at[1.5]) and not torch.equal(at[1.5], at[3.0])
    for own, found in at.items():
        monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, image_guidance=own))
        assert torch.equal(last(), found)


def test_guidance_one_is_the_model_itself_and_all_channels_take_part(tiny):
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    *_, last = sample.denoise(tiny, ["a dog"], eps=eps, steps=1, guidance=1.0)
    rungs = tiny.encode(["a dog"])
    t = sample.schedule(1)[0].item()
    want = eps - t * tiny.velocity(eps, torch.tensor([int(1000 * t) / 1000]), rungs)
    assert torch.allclose(last.x0, want, atol=1e-5)
    *_, strong = sample.denoise(tiny, ["a dog"], eps=eps, steps=1, guidance=9.0)
    assert ((strong.x0 - last.x0).abs().amax((0, 2, 3)) > 0).all()


def test_every_step_is_yielded(tiny):
    steps = list(sample.denoise(tiny, ["a dog"], steps=5, generator=torch.Generator().manual_seed(0)))
    assert [s.i for s in steps] == list(range(5)) and steps[-1].t == 0
    assert torch.equal(steps[-1].x_t, steps[-1].x0)
    picture, = sample.generate(tiny, ["a dog"], steps=5, generator=torch.Generator().manual_seed(0))
    assert picture.tobytes() == sample.decode(tiny, steps[-1].x_t)[0].tobytes() and picture.size == (32, 32)


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps = 0"), (dict(solver="heun"), "heun"), (dict(size=30), "30x30"), (dict(size=0), "0x0"), (dict(size=(32, 20.5)), "20.5")])
def test_bad_settings_are_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        next(sample.denoise(tiny, ["a dog"], **settings))


def test_size_is_height_and_width(tiny):
    picture, = sample.generate(tiny, ["a dog"], steps=1, size=(32, 48))
    assert picture.size == (48, 32)
    assert sample.parse_size("48x32") == (32, 48) and sample.parse_size("512") == 512
    with pytest.raises(ValueError, match="banana"):
        sample.parse_size("banana")


def test_black_null_image_has_the_same_size(tiny, recorded):
    seen = []
    stub = types.SimpleNamespace(encode=lambda prompts, images: seen.append((prompts, images)))
    _, k = sample.conditions(stub, ["x", "y"], [[recorded[2]("wide")], []], 1.5, "bad")
    (prompts, images), = seen
    assert k == 3 and prompts == ["bad"] * 4 + ["x", "y"] and [len(row) for row in images] == [1, 0, 1, 0, 1, 0]
    assert images[0][0].size == (640, 360) and images[0][0].getextrema() == ((0, 0),) * 3


def test_pictures_of_one_prompt_share_what_was_heard(tiny, monkeypatch):
    """The MLLM reads once for all of them, and the pictures are the ones that they are by themselves."""
    generator = lambda: torch.Generator().manual_seed(0)
    alone, = sample.generate(tiny, ["a dog"], steps=2, generator=generator())
    heard = sample.conditions(tiny, ["a dog"], None, 1.5, "")
    monkeypatch.setattr(type(tiny), "encode", None)
    shared, = sample.generate(tiny, ["a dog"], steps=2, generator=generator(), heard=heard)
    assert shared.tobytes() == alone.tobytes()


def picture_of(model):
    return sample.generate(model, ["a dog"], steps=2, generator=torch.Generator().manual_seed(0))


def test_without_a_compiler_it_draws_all_the_same(tiny, monkeypatch):
    def broken(f, **_):
        def call(*_):
            raise RuntimeError("no compiler here")
        return call
    before = picture_of(tiny)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no compiler here"):
        sample.compile_parts(tiny, lambda: picture_of(tiny))
    assert picture_of(tiny)[0].tobytes() == before[0].tobytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_parts_give_the_same_numbers(tiny):
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run = lambda: list(sample.denoise(tiny, ["a dog"], steps=3, eps=eps))[-1].x_t
    plain = run()
    sample.compile_parts(tiny, run)
    assert tiny.dit._compiled_call_impl is not None
    assert ((run() - plain).norm() / plain.norm()).item() < 1e-5
