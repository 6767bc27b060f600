"""A row does not depend on its neighbours: padding, batch size, mixed batches; the same seed gives
the same picture. On the plain path and on the fast one."""
import pytest
import torch
from PIL import Image

import sample
from tests.conftest import relative

RED = Image.new("RGB", (300, 200), "red")
BLUE = Image.new("RGB", (150, 400), "blue")
PROMPTS = ["a red circle left of a blue square, or perhaps the other way round", "dog", "",
           "make it green"]
IMAGES = [[], [RED], [RED, BLUE], [BLUE]]


def test_a_mixed_batch_gives_the_same_rows_as_one_at_a_time(model):
    together = model.encode(PROMPTS, IMAGES)
    for b, (prompt, row) in enumerate(zip(PROMPTS, IMAGES)):
        assert relative(together[:, b:b + 1], model.encode([prompt], [row])) < 1e-5, b


def test_padding_changes_nothing(model):
    """A short prompt beside prompts of any length, without pictures."""
    alone = model.encode(["dog"])
    for other in ("", "a cat", "a circle " * 20, "a circle " * 100):
        beside = model.encode([other, "dog"])[:, 1:]
        assert relative(beside, alone) < 1e-5, other


def test_no_images_and_empty_lists_are_the_same(model):
    assert torch.equal(model.encode(PROMPTS), model.encode(PROMPTS, [[]] * 4))


def test_encoding_is_deterministic(model):
    assert torch.equal(model.encode(PROMPTS, IMAGES), model.encode(PROMPTS, IMAGES))


def test_the_order_of_several_images_matters(model):
    a, b = model.encode(["mix"] * 2, [[RED, BLUE], [BLUE, RED]]).unbind(1)
    assert relative(a, b) > 1e-3


# ------------------------------------------------------------------------------ velocity and loss

def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_velocity_from_rungs_and_from_their_keys_and_values(model):
    rungs = model.encode(PROMPTS, IMAGES)
    x_t = drawn(4, 4, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    velocity = model.velocity(x_t, t, rungs)
    assert velocity.shape == x_t.shape
    keys_values = model.dit.project_kv(rungs)
    assert torch.equal(model.velocity(x_t, t, rungs, keys_values), velocity)


def test_the_loss_is_the_mean_of_each_rows_own(model):
    x0 = drawn(4, 4, 8, 8)
    eps = drawn(4, 4, 8, 8, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    rows = model.loss(None, PROMPTS, IMAGES, t, eps, x0=x0, reduction="none")
    assert rows.shape == (4,)
    mean = model.loss(None, PROMPTS, IMAGES, t, eps, x0=x0)
    assert mean.shape == ()
    assert torch.allclose(rows.mean(), mean)
    for b in range(4):
        alone = model.loss(None, PROMPTS[b:b + 1], IMAGES[b:b + 1], t[b:b + 1], eps[b:b + 1],
                           x0=x0[b:b + 1])
        assert relative(rows[b].detach(), alone.detach()) < 1e-5, b


def test_the_loss_from_latents_is_the_loss_from_pixels(model):
    """Also where times and noise are drawn: the same generator draws the same."""
    pixels = drawn(2, 3, 32, 32).clamp(-1, 1)
    x0 = model.dcae.encode(pixels)
    prompts = ["a dog", "a cat"]

    def loss(pixels, **known):
        return model.loss(pixels, prompts, generator=torch.Generator().manual_seed(3), **known)

    assert torch.equal(loss(None, x0=x0), loss(pixels))


# ---------------------------------------------------------------------------- sampling and asking

@pytest.mark.parametrize("image_guidance", [1.0, 1.5])
def test_sampling_a_mixed_batch_gives_the_same_as_one_at_a_time(model, image_guidance):
    def last(rows):
        *_, step = sample.denoise(model, PROMPTS[rows], IMAGES[rows], steps=3, eps=eps[rows],
                                  image_guidance=image_guidance)
        return step.x_t

    eps = drawn(4, 4, 8, 8)
    together = last(slice(None))
    for b in range(4):
        one = slice(b, b + 1)
        assert relative(together[one], last(one)) < 1e-5, b


def test_answers_do_not_depend_on_the_batch(model):
    questions = ["what is it?", "a much longer question about the colour of everything"]
    images = [[RED], []]
    alone = [model.ask(question, row, 8) for question, row in zip(questions, images)]
    assert model.ask_all(questions, images, 8) == alone


def test_generation_with_a_cache_equals_reading_everything_again(tiny):
    mllm = tiny.mllm
    batch = mllm.tokenize(["what is in the image?"], [[RED]])
    ids = mllm.generate(batch, 6)[0]
    x = mllm.embed(batch)
    positions = batch.positions
    for token in ids:
        mask = batch.attention_mask.new_ones(x.shape[:2])
        logits = mllm.logits(mllm(x, positions, mask)[-1][:, -1])
        assert logits.argmax().item() == token
        x = torch.cat([x, mllm.embed_tokens(torch.tensor([[token]]))], 1)
        positions = torch.cat([positions, positions[:, :, -1:] + 1], 2)


def test_temperature_draws_from_the_generator(tiny):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return tiny.mllm.generate(batch, 12, temperature=5.0, generator=generator)

    batch = tiny.mllm.tokenize(["tell me"])
    assert draw(0) == draw(0) != draw(1)
