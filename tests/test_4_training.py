"""Frozen is frozen; what trains, trains; the loss is what the analysis says at the start and falls on one batch."""
import argparse

import pytest
import torch

import data
import train
from tbac import TBAC
from tests.conftest import run


def pixels(n, g):
    return torch.rand(n, 3, 32, 32, generator=g) * 2 - 1


def test_frozen_parts_stay_bit_identical_and_the_others_move(tiny):
    g, before = torch.Generator().manual_seed(0), {n: t.clone() for n, t in tiny.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny.trainable(), lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        tiny(pixels(2, g), ["a red circle", "two blue squares"], generator=g).backward()
        optimizer.step(), optimizer.zero_grad()
    for name, t in tiny.state_dict().items():
        assert torch.equal(t, before[name]) == name.startswith(("mllm.", "dcae.")), name
    assert all(p.grad is None for n, p in tiny.named_parameters() if n.startswith(("mllm.", "dcae.")))
    assert {id(p) for p in tiny.trainable()} == {id(p) for p in tiny.parameters() if p.requires_grad}


def test_first_loss_is_the_power_of_the_target(tiny):
    """An untrained DiT says 0, so the loss is the mean square of eps - x0."""
    tiny.dit.init_weights(), tiny.ladder.init_weights()
    g = torch.Generator().manual_seed(0)
    x, eps = pixels(2, g), torch.randn(2, 4, 8, 8, generator=g)
    want = (eps - tiny.dcae.encode(x)).pow(2).mean()
    assert torch.allclose(tiny.loss(x, ["a", "b"], eps=eps, generator=g), want)


def test_time_runs_from_data_to_noise(tiny):
    """The box in tbac.py: x_t = (1 - t) x0 + t eps, target eps - x0, the network fed 1000 t."""
    g, seen = torch.Generator().manual_seed(0), []
    x0, eps, t = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.25, 1.0])
    tiny.dit.forward = lambda x, time, conditions: seen.append((x, time)) or torch.zeros_like(x)
    loss = tiny.flow_loss(x0, tiny.encode(["a", "b"]), t, eps)
    (x_t, time), = seen
    assert torch.equal(time, torch.tensor([250.0, 1000.0]))
    assert torch.allclose(x_t[0], 0.75 * x0[0] + 0.25 * eps[0]) and torch.equal(x_t[1], eps[1])
    assert torch.allclose(loss, (eps - x0).pow(2).mean())


def test_gradients_equal_those_of_one_pass_with_a_graph(tiny):
    """`encode` reads the prefix without a graph; the whole sequence in one pass, with one, must give the same gradients."""
    prompts, g = ["a red circle left of a blue square", "dog"], torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, 8, 48, generator=g)
    (tiny.encode(prompts) * weight).sum().backward()
    got = tiny.ladder.queries.grad.clone()
    tiny.zero_grad()
    batch = tiny.mllm.prepare(prompts, None, train.DRAW, then="<|vision_start|>")
    x = torch.cat([tiny.mllm.read(batch), tiny.ladder.queries.expand(2, -1, -1)], 1)
    places = torch.cat([batch.positions, batch.positions[:, :, -1:] + torch.arange(1, 9)], 2)
    states = tiny.mllm(x, places, torch.cat([batch.real, batch.real.new_ones(2, 8)], 1))
    (tiny.ladder([s[:, -8:] for s in states]) * weight).sum().backward()
    assert ((got - tiny.ladder.queries.grad).norm() / got.norm()) < 1e-5


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(tiny):
    g = torch.Generator().manual_seed(0)
    x, t, eps = pixels(4, g), torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.randn(4, 4, 8, 8, generator=g)
    tiny.dit.init_weights(g), tiny.ladder.init_weights(g)
    optimizer, losses = torch.optim.AdamW(tiny.trainable(), lr=3e-3), []
    for _ in range(150):
        loss = tiny.loss(x, ["red", "green", "blue", "yellow"], t=t, eps=eps)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_every_stage_runs_and_saves_a_model(stage, tmp_path):
    done = run("train.py", "--stage", stage, "--model", train.TOY_FOLDER, "--steps", 3, "--batch", 2, "--warmup", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    model, start = TBAC.load(tmp_path), TBAC.load(train.TOY_FOLDER)
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, start.state_dict()[n])]
    for part in train.STAGES[stage]["parts"]:
        assert any(n.startswith(f"{part}.") for n in moved)
    assert all(n.startswith(tuple(f"{part}." for part in train.STAGES[stage]["parts"])) for n in moved)


def test_names_of_what_each_vision_token_shows():
    """The classes of stage `vit`: a small thing in one unit of 4 x 4, a large one in a block of units, the background elsewhere."""
    scene = data.Scene((data.Thing("circle", "red", "small", 0.375, 0.125), data.Thing("cross", "blue", "large", 0.75, 0.75)), "grey")
    names = train.Names(train.TOY)
    rows = [(names.names[i], names.spots[j], k) for i, j, k in names.shown(scene, 4, 4)]
    assert [name for name, _, _ in rows] == ["grey", "red circle", "grey", "grey"] + ["grey"] * 4 + ["grey", "grey", "blue cross", "blue cross"] * 2
    assert rows[1] == ("red circle", "top", 0) and rows[0] == ("grey", "top left", -100) and rows[10] == ("blue cross", "bottom right", 2)


def test_state_resumes_exactly(tmp_path):
    """Two steps, save, load, two more = four steps, bit for bit: data and noise come from the step's number."""
    a = argparse.Namespace(stage="dit", model=str(train.TOY_FOLDER), take=[], device="cpu", seed=0, steps=4, batch=2, lr=1e-3, warmup=1,
                           weight_decay=0.01, clip=1.0, ema=0.9, drop=0.1)

    def start():
        model, extra, trained = train.build(argparse.Namespace(**vars(a)))
        return model, extra, train.State(trained, a)
    torch.manual_seed(0)
    model, extra, state = start()
    extra_start = {n: p.clone() for n, p in extra.named_parameters()}
    loop, losses = train.training_loop(model, extra, state, a), []
    for step, loss, _ in loop:
        losses.append(loss)
        if step == 2:
            state.save(tmp_path / "state.safetensors")
    other, extra, again = start()
    assert all(p.shape == extra_start[n].shape for n, p in extra.named_parameters())
    again.load(tmp_path / "state.safetensors")
    assert [loss for _, loss, _ in train.training_loop(other, extra, again, a)] == losses[2:]
    assert all(torch.equal(x, y) for x, y in zip(state.ema.values(), again.ema.values()))
