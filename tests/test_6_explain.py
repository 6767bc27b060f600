"""--explain looks and does not touch: the same pictures and answers, no hook left, and no more kept
for more steps."""
from dataclasses import replace

import pytest
import torch
from PIL import Image

import mllm
import sample
from engine import explain
from tests.conftest import ROOT


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def drawn(model, kept=None, **settings):
    """Latents of "a dog", watched if there is something to keep it in."""
    generator = torch.Generator().manual_seed(0)
    steps = sample.denoise(model, ["a dog"], generator=generator, **settings)
    if kept is not None:
        steps = kept.watch(model.dit, steps)
    *_, last = steps
    return last.x_t


def size(kept):
    """Numbers kept."""
    latents = sum(step.x_t.numel() + step.x0.numel() for step in kept.steps)
    return latents + sum(mean.value.numel() for mean in [*kept.attention, *kept.added])


def values(means):
    return torch.stack([mean.value for mean in means])


# ---------------------------------------------------------------------------------- a drawing

def test_a_watched_drawing_is_the_same_and_no_hook_stays(tiny):
    kept = explain.Drawn(3)
    assert torch.equal(drawn(tiny, kept, steps=3), drawn(tiny, steps=3))
    assert hooks(tiny) == 0
    steps = kept.watch(tiny.dit, sample.denoise(tiny, ["a dog"], steps=3))
    next(steps)
    assert hooks(tiny) == 2 * len(tiny.dit.blocks)
    # Somebody lost interest.
    steps.close()
    assert hooks(tiny) == 0


def test_the_attention_is_the_softmax_of_the_row_asked_for(tiny):
    """One step without guidance by hand: the mean of a single step is that step."""
    kept, eps = explain.Drawn(1), torch.randn(1, 4, 8, 8)
    drawn(tiny, kept, steps=1, eps=eps)
    seen = []
    look = lambda _, args, y: seen.append(y[0].mean(0))
    handles = [block.cross.softmax.register_forward_hook(look) for block in tiny.dit.blocks]
    with torch.no_grad():
        t = int(1000 * sample.schedule(1)[0]) / 1000
        tiny.velocity(eps, torch.tensor([t]), tiny.encode(["a dog"]))
    for handle in handles:
        handle.remove()
    attention = values(kept.attention)                                 # (L, N, Q)
    assert attention.shape == (4, 64, 8)
    assert torch.allclose(attention, torch.stack(seen), atol=1e-5)
    assert torch.allclose(attention.sum(2), torch.ones(4, 64))
    assert (values(kept.added) >= 0).all()


def test_what_is_kept_does_not_grow_with_steps(tiny):
    few, many = explain.Drawn(8), explain.Drawn(40)
    drawn(tiny, few, steps=8)
    drawn(tiny, many, steps=40)
    assert size(few) == size(many)
    assert [step.i for step in many.steps][::7] == [0, 39]
    assert many.attention[0].n == 40
    assert torch.allclose(many.attention[0].value.sum(1), torch.ones(64))


def test_the_maps_of_a_moment_are_its_own_and_add_up(tiny):
    """Of one step they are the mean over steps, slot by slot; on a grid that does not grow."""
    kept = explain.Drawn(1)
    drawn(tiny, kept, steps=1)
    (attention, added), = kept.maps
    assert attention.shape == (4, 8, 8, 8) and added.shape == (4, 8, 8)
    assert torch.allclose(attention.flatten(2).transpose(1, 2), values(kept.attention))
    assert torch.allclose(added.flatten(1), values(kept.added))
    kept = explain.Drawn(2)
    drawn(tiny, kept, steps=2, size=(64, 128))
    attention, added = kept.maps[-1]
    assert attention.shape == (4, 8, 8, 16) and added.shape == (4, 8, 16)
    assert torch.allclose(attention.sum(1), torch.ones(4, 8, 16))
    of_both = torch.stack([added for _, added in kept.maps]).mean()
    assert torch.allclose(of_both, values(kept.added).mean())


def test_a_ladder_that_adds_nothing_yet_can_be_explained(tiny):
    """As before training, when cross-attention is zero; two pictures, one token large."""
    for block in tiny.dit.blocks:
        torch.nn.init.zeros_(block.cross.out.weight)
        torch.nn.init.zeros_(block.cross.out.bias)
    kept = explain.Drawn(1)
    picture, = tiny.decode(drawn(tiny, kept, steps=1, size=4))
    rungs = tiny.encode([""])[:, 0]
    page = explain.drawing(tiny, "", [picture] * 5, picture, rungs, kept)
    assert page.width == 1500
    assert (values(kept.added) == 0).all()


# ------------------------------------------------------------------------------- what was read

@pytest.mark.parametrize("wiring", ["ladder", "final", "first", "mean", "routed"])
def test_what_the_queries_read_is_the_models_own_attention(model, recorded, monkeypatch, wiring):
    """On both paths, and for every kind of wiring, against the softmax inside mllm.attention."""
    config = replace(model.config, wiring=wiring)
    ladder = config.build_ladder()
    ladder.load_state_dict(model.ladder.state_dict(), strict=False)
    model.ladder, model.config = ladder, config
    if wiring == "routed":
        torch.nn.init.normal_(ladder.routes)
    image, inside, attention = recorded[2]("wide"), [], mllm.attention

    def spy(q, k, v, mask):
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        inside.append(attention(q, k, one_hot, mask)[0].mean(0)[-8:, :-8])   # (Q, T)
        return attention(q, k, v, mask)

    monkeypatch.setattr(mllm, "attention", spy)
    batch, read = explain.watched_encoding(model, "make it blue", [image])
    assert hooks(model) == 0
    # Nothing has been read of what enters layer 0.
    below = torch.stack([torch.zeros_like(inside[0]), *inside])             # (states, Q, T)
    if ladder.routes is None:
        expected = below[ladder.taps]
    else:
        expected = torch.einsum("li,iqt->lqt", ladder.routes.softmax(1), below)
    # (8 queries, 8 slots.)
    assert read.shape == (4, 8, batch.ids.shape[1])
    assert torch.allclose(read, expected.detach(), atol=1e-5)


# ---------------------------------------------------------------------------------- an answer

def test_a_watched_answer_is_the_same_and_its_weights_are_the_models(tiny, recorded, monkeypatch):
    """Against the softmax inside mllm.attention itself, taken from its result for values that are
    the identity."""
    image, inside, attention = recorded[2]("wide"), [], mllm.attention

    def spy(q, k, v, mask):
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        weights = attention(q[:, :, -1:], k, one_hot, mask[:, :, -1:])  # (1, H, 1, T)
        inside.append(weights[0, :, 0].mean(0))
        return attention(q, k, v, mask)

    monkeypatch.setattr(mllm, "attention", spy)
    ids, seen = explain.watched_answer(tiny, "what is it?", [image])
    assert tiny.mllm.tokenizer.decode(ids).strip() == tiny.ask("what is it?", [image])
    assert hooks(tiny) == 0
    n = tiny.config.mllm.n_layer
    last = max(1, n // 3)
    for i, weights in enumerate(seen):
        want = torch.stack(inside[n * i + n - last:n * i + n]).mean(0)
        assert torch.allclose(weights, want, atol=1e-5)
        assert abs(weights.sum().item() - 1) < 1e-5
    assert len(ids) <= len(seen) <= len(ids) + 1


# --------------------------------------------------------------------------- the command line

@pytest.fixture
def command(monkeypatch, capsys):
    """The command line, in this process: -> what it printed."""
    def call(*args):
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, args)])
        sample.main()
        return capsys.readouterr().out
    return call


@pytest.mark.parametrize("which", ["tiny", "toy"])
def test_draw_edit_and_ask_on_the_command_line(which, command, tiny_folder, tmp_path):
    folder = tiny_folder if which == "tiny" else ROOT / "toy" / "weights"
    red = tmp_path / "red.png"
    Image.new("RGB", (60, 40), "red").save(red)

    def say(name, *args):
        out = tmp_path / f"{name}.png"
        return command(*args, "--model", folder, "--steps", 2, "--device", "cpu", "--out", out)

    draw = ["a dog"]
    edit = ["make it $5_$ blue " * 9, "--image", red, red, "--size", "32x64"]
    two = ["a dog", "--n", 2]
    for prompt, *args in (draw, edit, two):
        say("plain", prompt, *args)
        say("seen", prompt, *args, "--explain")
        assert (tmp_path / "seen.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
        assert (tmp_path / "seen-explain.html").stat().st_size < 1_500_000
        page = Image.open(tmp_path / "seen-explain.png")
        assert page.width == 1500
        assert page.text["prompt"] == prompt and page.text["seed"] == "0"
    ask = ["--ask", "what?", "--image", red]
    assert say("plain", *ask) == say("asked", *ask, "--explain")
    assert Image.open(tmp_path / "asked-explain.png").text["question"] == "what?"
    assert (tmp_path / "asked-explain.html").exists()
    assert not list(tmp_path.glob("plain-explain.*"))


@pytest.mark.parametrize("args", [["--n", "2"], ["--compile"]])
def test_an_answer_draws_no_pictures(command, tiny_folder, args):
    with pytest.raises(SystemExit, match="--ask draws none"):
        command("--model", tiny_folder, "--ask", "what?", *args)


@pytest.mark.parametrize("args, message", [
    (["--ask", "what?"], "--ask need an --image"),
    (["a dog", "--compile"], "--compile"),
    (["--ask", "what?", "--image", "a.png", "--compare", "a cat"], "--compare needs a prompt"),
])
def test_what_cannot_be_explained_is_said(command, tiny_folder, args, message):
    with pytest.raises(SystemExit, match=message):
        command("--model", tiny_folder, "--explain", *args)
