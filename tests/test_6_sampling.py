"""The solvers against known answers, with the network replaced by formulas; and what the network is
given at each step."""
import dataclasses
import types

import pytest
import torch
from PIL import Image

import sample
from engine import command
from tbac import TBACConfig


def seeded():
    return torch.Generator().manual_seed(0)


def noise():
    return torch.randn(1, 4, 8, 8, generator=seeded())


def follow(x0_of, x, times, solver):
    """The solver along x0_of(x, t), from x at times[0] to times[-1]."""
    times = times.tolist()
    x0_prev = None
    for i, t in enumerate(times[:-1]):
        x0 = x0_of(x, t)
        x = sample.SOLVERS[solver](x, x0, x0_prev, times, i)
        x0_prev = x0
    return x


# -------------------------------------------------------------------------- schedule and solvers

def test_schedule():
    t = sample.schedule(10, shift=1.0)
    assert t.shape == (11,)
    assert t[0] == 0.999
    assert t[-1] == 0
    assert (t.diff() < 0).all()
    assert torch.allclose(sample.schedule(10, 3.0), 3 * t / (1 + 2 * t))


# A model that says 0, without a network.
STILL = types.SimpleNamespace(
    config=TBACConfig(size=32), ladder=types.SimpleNamespace(queries=torch.zeros(1)),
    dit=types.SimpleNamespace(project_kv=lambda rungs: None),
    velocity=lambda x, *_: torch.zeros_like(x))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 12.0])
def test_times_are_shifted_exactly_once(steps, shift):
    """By the formula, each time by itself; and the solver goes through these and no others."""
    want = []
    for i in range(steps + 1):
        t = 0.999 * (1 - i / steps)
        want.append(shift * t / (1 + (shift - 1) * t))
    assert sample.schedule(steps, shift).tolist() == pytest.approx(want, abs=1e-12)
    reached = [step.t for step in sample.denoise(STILL, ["dog"], steps=steps, shift=shift,
                                                 conditioning=(None, 2))]
    assert reached == pytest.approx(want[1:], abs=1e-12)


@pytest.mark.parametrize("steps", [6, 20, 50])
def test_the_dit_is_fed_the_solvers_times_as_whole_numbers(model, monkeypatch, steps):
    """Exactly int(1000 t), of the very t that the solver goes on from, for every row."""
    fed = []
    used = []

    def solver(x, x0, x0_prev, times, i):
        used.append(times[i])
        return sample.euler(x, x0, x0_prev, times, i)

    monkeypatch.setitem(sample.SOLVERS, "watched", solver)
    model.dit.register_forward_pre_hook(lambda m, args: fed.append(args[1]))
    reached = [step.t for step in sample.denoise(model, ["a dog"], steps=steps, solver="watched")]
    times = sample.schedule(steps).tolist()
    assert used == times[:-1]
    assert reached == times[1:]
    assert all(time.dtype == torch.float32 for time in fed)
    assert [time.tolist() for time in fed] == [[int(1000 * t)] * 2 for t in times[:-1]]


@pytest.mark.parametrize("solver", sample.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_velocity_is_followed_exactly(solver, steps):
    """A straight path from eps to data, x_t = (1 - t) data + t eps: x0 is the same everywhere."""
    data, eps = torch.randn(2, 5, dtype=torch.float64)
    times = sample.schedule(steps)
    t = times[0]
    x_t = (1 - t) * data + t * eps
    assert torch.allclose(follow(lambda x, t: data, x_t, times, solver), data)


def error(times, solver, std=0.5):
    """Data N(0, std^2), where E[x0 | x_t] and the path are known: x_t is proportional to the
    standard deviation at t."""
    def spread(t):
        return ((1 - t) ** 2 * std ** 2 + t ** 2) ** 0.5

    def x0_of(x, t):
        return x * (1 - t) * std ** 2 / spread(t) ** 2

    x = torch.tensor(1.3, dtype=torch.float64)
    want = x * spread(times[-1]) / spread(times[0])
    return abs(follow(x0_of, x, times, solver) - want).item()


@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_a_gaussian_ends_where_it_must(solver):
    assert error(sample.schedule(400), solver) < 0.01


def test_dpm_2m_converges_faster_than_euler():
    """With half the step Euler's error halves (order 1), that of 2M falls to a quarter (order 2).
    Away from t = 0 and 1, where lambda is infinite and no order is promised."""
    fall = {}
    for solver in sample.SOLVERS:
        errors = [error(torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64), solver)
                  for n in (20, 40, 80, 160)]
        fall[solver] = [coarse / fine for coarse, fine in zip(errors, errors[1:])]
    assert all(1.8 < ratio < 2.2 for ratio in fall["euler"]), fall
    assert all(3.5 < ratio < 4.5 for ratio in fall["dpm++"]), fall
    assert error(sample.schedule(20), "dpm++") < error(sample.schedule(20), "euler")


# -------------------------------------------------------------------------------------- guidance

def test_guidance():
    null, image, both = torch.randn(3, 2, 4, 3, 3)
    assert torch.equal(sample.guide((null, both), 1.0, 9.0), null + (both - null))
    assert torch.allclose(sample.guide((null, both), 3.0, 9.0), null + 3 * (both - null))
    want = null + 1.5 * (image - null) + 3 * (both - image)
    assert torch.allclose(sample.guide((null, image, both), 3.0, 1.5), want)


@pytest.mark.parametrize("name, released, others", [
    ("guidance", 4.5, (1.0, 2.0)), ("image_guidance", 1.5, (1.0, 3.0))])
def test_a_model_may_have_guidance_of_its_own(tiny, monkeypatch, name, released, others):
    """Used where nothing else is said."""
    eps = noise()
    red = [[Image.new("RGB", (32, 32), "red")]]

    def last(**guidance):
        *_, step = sample.denoise(tiny, ["a dog"], red, eps=eps, steps=2, **guidance)
        return step.x_t

    at = {g: last(**{name: g}) for g in (released, *others)}
    assert torch.equal(last(), at[released])
    assert not torch.equal(at[released], at[others[-1]])
    for own, found in at.items():
        config = dataclasses.replace(tiny.config, **{name: own})
        monkeypatch.setattr(tiny, "config", config)
        assert torch.equal(last(), found)


def test_guidance_one_is_the_model_itself_and_all_channels_take_part(tiny):
    eps = noise()
    *_, last = sample.denoise(tiny, ["a dog"], eps=eps, steps=1, guidance=1.0)
    rungs = tiny.encode(["a dog"])
    t = sample.schedule(1)[0].item()
    want = eps - t * tiny.velocity(eps, torch.tensor([int(1000 * t) / 1000]), rungs)
    assert torch.allclose(last.x0, want, atol=1e-5)
    *_, strong = sample.denoise(tiny, ["a dog"], eps=eps, steps=1, guidance=9.0)
    assert ((strong.x0 - last.x0).abs().amax((0, 2, 3)) > 0).all()


def test_black_null_image_has_the_same_size(recorded):
    seen = []
    stub = types.SimpleNamespace(encode=lambda prompts, images: seen.append((prompts, images)))
    wide = recorded[2]("wide")
    _, k = sample.encode_for_guidance(stub, ["x", "y"], [[wide], []], 1.5, "bad")
    (prompts, images), = seen
    assert k == 3
    assert prompts == ["bad"] * 4 + ["x", "y"]
    assert [len(row) for row in images] == [1, 0, 1, 0, 1, 0]
    assert images[0][0].size == (640, 360)
    assert images[0][0].getextrema() == ((0, 0),) * 3


# -------------------------------------------------------------------------------------- sampling

def test_every_step_is_yielded(tiny):
    steps = list(sample.denoise(tiny, ["a dog"], steps=5, generator=seeded()))
    assert [step.i for step in steps] == list(range(5))
    assert steps[-1].t == 0
    assert torch.equal(steps[-1].x_t, steps[-1].x0)
    picture, = sample.generate(tiny, ["a dog"], steps=5, generator=seeded())
    decoded, = tiny.decode(steps[-1].x_t)
    assert picture.tobytes() == decoded.tobytes()
    assert picture.size == (32, 32)


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps = 0"), (dict(solver="heun"), "heun"), (dict(size=30), "30x30"),
    (dict(size=0), "0x0"), (dict(size=(32, 20.5)), "20.5")])
def test_bad_settings_are_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        next(sample.denoise(tiny, ["a dog"], **settings))


def test_size_is_height_and_width(tiny):
    picture, = sample.generate(tiny, ["a dog"], steps=1, size=(32, 48))
    assert picture.size == (48, 32)
    assert command.size("48x32") == (32, 48)
    assert command.size("512") == 512


@pytest.mark.parametrize("prompts, images, said", [
    ("a dog", None, "expected a list of prompts"), ([], None, "expected a list of prompts"),
    (["a dog", "a cat"], [[]], "2 prompts but 1 lists"),
    (["a dog"], [Image.new("RGB", (8, 8))], "a list of images for each prompt"),
])
def test_what_is_no_list_of_prompts_is_refused(tiny, prompts, images, said):
    """A string is a list of letters, too."""
    with pytest.raises(ValueError, match=said):
        sample.generate(tiny, prompts, images, steps=1)


@pytest.mark.parametrize("part", ["ladder", "dit"])
def test_parts_of_other_dtypes_draw_and_learn_together(tiny, part):
    tiny.to(torch.bfloat16)
    getattr(tiny, part).float()
    assert len(sample.generate(tiny, ["a dog"], steps=1, generator=seeded())) == 1
    assert tiny.loss(torch.zeros(1, 4, 8, 8), ["a dog"], generator=seeded()).isfinite()


def test_pictures_of_one_prompt_share_the_conditioning(tiny, monkeypatch):
    """The MLLM reads once for all of them, and the pictures are the ones that they are by
    themselves."""
    alone, = sample.generate(tiny, ["a dog"], steps=2, generator=seeded())
    conditioning = sample.encode_for_guidance(tiny, ["a dog"], None, 1.5, "")
    monkeypatch.setattr(type(tiny), "encode", None)
    shared, = sample.generate(tiny, ["a dog"], steps=2, generator=seeded(),
                              conditioning=conditioning)
    assert shared.tobytes() == alone.tobytes()
