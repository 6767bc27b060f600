"""A row does not depend on its neighbours: padding, batch size, mixed batches; the same seed gives the same picture."""
import copy

import pytest
import torch
from PIL import Image

import mllm
import sample
import tbac
from tests.conftest import relative

RED, BLUE = Image.new("RGB", (300, 200), "red"), Image.new("RGB", (150, 400), "blue")
PROMPTS = ["a red circle left of a blue square, or perhaps the other way round", "dog", "", "make it green"]
IMAGES = [[], [RED], [RED, BLUE], [BLUE]]


def test_a_mixed_batch_gives_the_same_rows_as_one_at_a_time(tiny):
    together = tiny.encode(PROMPTS, IMAGES)
    for b, (prompt, row) in enumerate(zip(PROMPTS, IMAGES)):
        assert relative(together[:, b:b + 1], tiny.encode([prompt], [row])) < 1e-5, b


def test_nothing_is_read_twice(tiny):
    """Equal rows are one row, a picture in two rows is seen once, and what rows begin with in common is read once."""
    tokens, pictures = [], []
    tiny.mllm.layers[0].register_forward_hook(lambda m, args, out: tokens.append(out.shape[0] * out.shape[1]))
    tiny.mllm.vision.register_forward_hook(lambda m, args, out: pictures.append(len(out)))

    def read(*args):
        tokens.clear(), pictures.clear()
        tiny.encode(*args)
        return sum(tokens), sum(pictures)
    one, other = read(["a dog"])[0], read(["a cat, perhaps"])[0]
    assert read(["a dog"] * 4) == (one, 0)
    assert one + other - read(["a dog", "a cat, perhaps"])[0] > 40                # the system prompt and what surrounds it
    alone, _ = read(["a dog"], [[RED]])
    both, seen = read(["a dog", "a cat, perhaps"], [[RED], [RED.copy()]])
    assert seen == 1 and both < 1.2 * alone
    assert read([""] * 2, [[RED, BLUE], [BLUE, RED]])[1] == 2
    texts, shown = [f"a dog and {i} cats" for i in range(24)], [[Image.new("RGB", (64, 64), (i, 0, 0))] for i in range(24)]
    apart = read(texts)[0] + read(texts, shown)[0]
    assert read(2 * texts, [[]] * 24 + shown)[0] < 1.2 * apart                # no long pack of texts pads those with pictures


def test_the_length_of_a_pack_and_what_has_a_graph_change_nothing(tiny):
    """One row per pack, a few, all in one; with the prefix read beforehand, as in training, or with the queries."""
    prompts, images = [*PROMPTS, "a cat", "a dog on a hill"], [*IMAGES, [], []]
    with torch.no_grad():
        whole = tiny.encode(prompts, images, room=10_000)
        for room in (1, 200):
            assert relative(tiny.encode(prompts, images, room), whole) < 1e-5, room
    graph = tiny.encode(prompts, images)
    assert graph.requires_grad and relative(graph.detach(), whole) < 1e-5


def test_who_sees_whom_in_a_pack(tiny):
    """Two rows that begin alike in one pack, a third in another: x marks what a token (down) sees."""
    P = torch.arange(9).expand(3, 9)
    one, two, three = (mllm.Row(ids, P[:, :len(ids)], []) for ids in ([1, 2, 3], [1, 2, 4, 5], [6]))
    batch, mask = tiny.mllm.pad_packs([[one, two], [three]], more=1)
    assert batch.ids[0, :5].tolist() == [1, 2, 3, 4, 5] and batch.ids[1, 5].item() == 6 and batch.real[1].tolist() == [False] * 5 + [True] * 2
    assert ["".join(".x"[seen] for seen in row) for row in mask[0, 0].tolist()] == [
        "x......", "xx.....", "xxx....", "xx.x...", "xx.xx..",                   # 1 2, 3 of the first row, 4 5 of the second
        "xxx..x.", "xx.xx.x"]                                                    # what comes after the first row, after the second
    assert mask[1, 0, 5:].tolist() == [[False] * 5 + [True, False], [False] * 5 + [True, True]]
    assert batch.positions[0].tolist() == [[0, 1, 2, 2, 3, 3, 4], [1] * 5 + [0, 1]]


def test_a_linear_layer_is_the_same_as_a_convolution(tiny, monkeypatch):
    assert not any(type(m) is torch.nn.Linear for m in [*tiny.modules(), *tiny.config.ladder().modules()])
    plain, x = torch.nn.Linear(48, 80), torch.randn(3, 40, 48, requires_grad=True)
    layer, called = tbac.fast(copy.deepcopy(plain)), []
    monkeypatch.setattr(tbac.F, "conv2d", lambda *a, conv=tbac.F.conv2d: called.append(1) or conv(*a))
    out = layer(x)
    assert relative(out.detach(), plain(x).detach()) < 1e-6 and len(called) == torch.backends.mkl.is_available()
    grads = [torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())) for module in (layer, plain)]
    assert all(relative(a, b) < 1e-6 for a, b in zip(*grads))
    assert layer(x[:1, :5]).shape == (1, 5, 80) and layer.double()(x.double()).dtype == torch.float64


def test_no_images_and_empty_lists_are_the_same(tiny):
    assert torch.equal(tiny.encode(PROMPTS), tiny.encode(PROMPTS, [[]] * 4))


def test_encoding_is_deterministic(tiny):
    assert torch.equal(tiny.encode(PROMPTS, IMAGES), tiny.encode(PROMPTS, IMAGES))


def test_the_order_of_several_images_matters(tiny):
    a, b = tiny.encode(["mix"] * 2, [[RED, BLUE], [BLUE, RED]]).unbind(1)
    assert relative(a, b) > 1e-3


@pytest.mark.parametrize("image_guidance", [1.0, 1.5])
def test_sampling_a_mixed_batch_gives_the_same_shownas_one_at_a_time(tiny, image_guidance):
    eps = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    *_, together = sample.denoise(tiny, PROMPTS, IMAGES, steps=3, eps=eps, image_guidance=image_guidance)
    for b in range(4):
        *_, one = sample.denoise(tiny, PROMPTS[b:b + 1], IMAGES[b:b + 1], steps=3, eps=eps[b:b + 1], image_guidance=image_guidance)
        assert relative(together.x_t[b:b + 1], one.x_t) < 1e-5, b


def test_answers_do_not_depend_on_the_batch(tiny):
    questions, images = ["what is it?", "a much longer question about the colour of everything"], [[RED], []]
    assert tiny.ask_all(questions, images, 8) == [tiny.ask(q, i, 8) for q, i in zip(questions, images)]


def test_generation_with_a_cache_equals_reading_everything_again(tiny):
    batch = tiny.mllm.prepare(["what is in the image?"], [[RED]])
    ids = tiny.mllm.generate(batch, 6)[0]
    x, places = tiny.mllm.read(batch), batch.positions
    for token in ids:
        logits = tiny.mllm.logits(tiny.mllm(x, places, batch.real.new_ones(x.shape[:2]))[-1][:, -1])
        assert logits.argmax().item() == token
        x = torch.cat([x, tiny.mllm.embed(torch.tensor([[token]]))], 1)
        places = torch.cat([places, places[:, :, -1:] + 1], 2)


def test_temperature_draws_from_the_generator(tiny):
    batch = tiny.mllm.prepare(["tell me"])
    draw = lambda seed: tiny.mllm.generate(batch, 12, temperature=5.0, generator=torch.Generator().manual_seed(seed))
    assert draw(0) == draw(0) != draw(1)
