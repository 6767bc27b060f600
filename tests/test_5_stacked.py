"""Models trained as one are those trained one by one: losses, gradients, steps, pictures."""
import copy

import pytest
import torch

import sample
from engine import fast
from engine.stacked import Learner, Stack, read_prefix, signature
from ladder import Ladder
from tbac import flow_matching
from tests.conftest import relative

PROMPTS = ["a dog", "", "a red circle left of a blue square", "a dog"]
# In one stack; models of another shape are in another one.
STACKS = {
    "wirings": [dict(wiring=wiring) for wiring in ("ladder", "final", "mean", "first")],
    "routed": [dict(wiring="routed")] * 2,
    "per-block": [dict(wiring=wiring, connector="per-block") for wiring in ("ladder", "final")],
    "alone": [dict(n_query=4)],
    "more queries": [dict(n_query=5), dict(n_query=5, wiring="final")],
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def members(model, specs):
    """Models that differ in ladder and DiT, and share the rest."""
    c, found = model.config, []
    for seed, spec in enumerate(specs):
        spec = dict(n_query=c.n_query) | spec
        n_query = spec.pop("n_query")
        one = copy.copy(model)
        one._modules = dict(model._modules)
        one.ladder = Ladder(n_query, c.mllm.dim, c.dit.caption_dim, c.mllm.n_layer, c.dit.n_layer,
                            **spec)
        one.ladder.init_weights(seeded(seed))
        one.dit = copy.deepcopy(model.dit)
        with torch.no_grad():
            for p in one.dit.parameters():
                p += 0.01 * torch.randn(p.shape, generator=seeded(seed))
        found.append(one)
    return found


def stacked(model, singles):
    learners = [Learner(copy.deepcopy(one.ladder), copy.deepcopy(one.dit)) for one in singles]
    assert len({signature(learner) for learner in learners}) == 1
    return Stack(model.config, model.mllm, learners)


def drawn_at_random(model, n):
    """Latents for all, times and noise for each of n models."""
    shape = sample.latent_shape(model.config)
    x0 = torch.randn(len(PROMPTS), *shape, generator=seeded(1))
    t = torch.rand(n, len(PROMPTS), generator=seeded(2))
    eps = torch.randn(n, *x0.shape, generator=seeded(3))
    return x0, t, eps


def stack_losses(stack, x0, t, eps):
    prefix = read_prefix(stack.mllm, PROMPTS, stack.config.max_prompt, stack.n_layer)
    x_t, v = flow_matching(x0.repeat(stack.n, 1, 1, 1), t.flatten(), eps.flatten(0, 1))
    return stack.losses(prefix, x_t.view_as(eps), t, v.view_as(eps))


@pytest.mark.parametrize("specs", STACKS.values(), ids=STACKS)
def test_losses_and_gradients_are_those_of_single_models(tiny, specs):
    singles = members(tiny, specs)
    stack = stacked(tiny, singles)
    x0, t, eps = drawn_at_random(tiny, len(singles))
    found = stack_losses(stack, x0, t, eps)
    found.mean(1).sum().backward()
    for i, one in enumerate(singles):
        loss = one.loss(x0, PROMPTS, t=t[i], eps=eps[i])
        loss.mean().backward()
        assert relative(found[i], loss) < 1e-6
        own = dict(one.named_parameters())
        for name, p in stack.params.items():
            # A key's bias changes no softmax: its gradient is rounding.
            if not name.endswith("cross.k.bias"):
                want = own[name].grad
                assert relative(p.grad[i].view_as(want), want) < 1e-5, name


def test_models_of_a_stack_do_not_touch_each_other(tiny):
    """What one learns has no gradient from another's loss."""
    stack = stacked(tiny, members(tiny, STACKS["wirings"]))
    stack_losses(stack, *drawn_at_random(tiny, stack.n))[1].sum().backward()
    for name, p in stack.params.items():
        others = p.grad[[0, 2, 3]]
        assert torch.equal(others, torch.zeros_like(others)), name
    assert stack.params["ladder.queries"].grad[1].norm() > 0


def test_what_is_captured_is_what_is_computed_without(tiny, monkeypatch):
    """As on a GPU, but for the graph itself: recorded with copies, called with the parameters."""
    stack = stacked(tiny, members(tiny, STACKS["wirings"]))
    x0, t, eps = drawn_at_random(tiny, stack.n)
    want = stack_losses(stack, x0, t, eps)
    want.sum().backward()
    grads = {name: p.grad.clone() for name, p in stack.params.items()}
    for p in stack.params.values():
        p.grad = None
    recorded = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda f, given: recorded.append(given) or f)
    prefix = read_prefix(stack.mllm, PROMPTS, stack.config.max_prompt, stack.n_layer)
    stack.capture(prefix, torch.zeros_like(eps), torch.zeros_like(t), torch.zeros_like(eps))
    places = {p.data_ptr() for p in stack.params.values()}
    assert not places & {tensor.data_ptr() for tensor in recorded[0]}
    found = stack_losses(stack, x0, t, eps)
    found.sum().backward()
    assert torch.equal(found, want)
    assert all(torch.equal(p.grad, grads[name]) for name, p in stack.params.items())


def test_models_of_other_shapes_are_told_apart(tiny):
    found = {signature(Learner(one.ladder, one.dit))
             for specs in STACKS.values() for one in members(tiny, specs)}
    assert len(found) == len(STACKS)


@pytest.mark.parametrize("specs", ["wirings", "alone"])
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_drawn_pictures_are_those_of_single_models(tiny, path, specs):
    singles = members(tiny, STACKS[specs])
    stack = stacked(tiny, singles)
    texts = [PROMPTS[0], PROMPTS[2]]
    eps = torch.randn(2, *sample.latent_shape(tiny.config), generator=seeded())
    *_, last = sample.denoise(stack, texts * stack.n, eps=eps.repeat(stack.n, 1, 1, 1), steps=3,
                              conditioning=stack.conditioning(texts))
    for one, found in zip(singles, last.x_t.chunk(stack.n)):
        if path == "fast":
            fast.enable(one)
        *_, want = sample.denoise(one, texts, eps=eps, steps=3)
        assert relative(found, want.x_t) < 1e-5


def test_the_prefix_does_not_depend_on_who_else_is_read(tiny):
    """Equal prompts once, each row in its place."""
    ids = []
    embed = tiny.mllm.embed
    tiny.mllm.embed = lambda batch: ids.append(batch.ids) or embed(batch)
    prefix = read_prefix(tiny.mllm, PROMPTS, 256)
    assert len(ids[0]) == 3
    k, v = prefix.layers[1]
    assert torch.equal(k[0], k[3]) and torch.equal(v[0], v[3]) and not torch.equal(k[0], k[1])
    alone = read_prefix(tiny.mllm, PROMPTS[2:3], 256)
    n = int(alone.attention_mask.sum())
    assert relative(k[2, :, -n:], alone.layers[1][0][0, :, -n:]) < 1e-5
