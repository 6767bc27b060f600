"""engine/fast.py: the fast path gives the numbers of the plain one, and does less for them."""
import functools
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

import sample
from engine import distributed, fast
from mllm import Prompt
from tbac import TBAC
from tests.conftest import relative

RED = Image.new("RGB", (300, 200), "red")
BLUE = Image.new("RGB", (150, 400), "blue")
LONG = "a red circle left of a blue square, or perhaps the other way round"

# name -> prompts, and None or a list of images for each
ROWS = {
    "ragged texts": ([LONG, "dog", "", "a cat", "a dog on a hill"], None),
    "mixed images": ([LONG, "dog", "", "make it green"], [[], [RED], [RED, BLUE], [BLUE]]),
    "duplicates": (["a dog", "a cat", "a dog", "a dog", "mix", "mix", "a cat"],
                   [[], [], [], [RED], [RED, BLUE], [RED.copy(), BLUE], [RED.copy()]]),
}
PARTS = ("ladder.queries", "ladder.connector", "dit")


@pytest.fixture(params=ROWS)
def rows(request):
    return ROWS[request.param]


def enable(model, max_pack_len):
    """`fast.enable` with packs of another length."""
    fast.enable(model)
    model.query_states.keywords["max_pack_len"] = max_pack_len
    return model


def loss_and_gradients(model, prompts, images):
    """The loss, and the gradient of each part as one vector."""
    g = torch.Generator().manual_seed(0)
    shape = (len(prompts), 4, 8, 8)
    x0 = torch.randn(shape, generator=g)
    eps = torch.randn(shape, generator=g)
    t = torch.linspace(0.1, 1, len(prompts))
    model.zero_grad()
    loss = model.loss(x0, prompts, images, t, eps).mean()
    loss.backward()
    gradients = {}
    for part in PARTS:
        own = [p.grad.flatten() for name, p in model.named_parameters() if name.startswith(part)]
        gradients[part] = torch.cat(own)
    return loss.detach(), gradients


# ------------------------------------------------------------------------------ the same numbers

@pytest.mark.parametrize("max_pack_len", [1, 200, 10_000])
def test_values_are_those_of_the_plain_path(tiny, rows, max_pack_len):
    """One prompt in a pack, a few, all of them; with the prefix read beforehand, as in training, or
    together with the queries."""
    with torch.no_grad():
        plain = tiny.encode(*rows)
    enable(tiny, max_pack_len)
    with torch.no_grad():
        assert relative(tiny.encode(*rows), plain) < 1e-5
    with_graph = tiny.encode(*rows)
    assert with_graph.requires_grad
    assert relative(with_graph.detach(), plain) < 1e-5


def test_every_depth_is_that_of_the_plain_path(tiny, rows):
    plain = tiny.query_states(*rows)
    found = fast.enable(tiny).query_states(*rows)
    assert len(found) == len(plain) == tiny.config.mllm.n_layer + 1
    for i, (a, b) in enumerate(zip(found, plain)):
        assert relative(a, b) < 1e-5, i


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("max_pack_len", [1, 200, 10_000])
def test_gradients_are_those_of_the_plain_path(tiny, rows, max_pack_len, grad_checkpoint):
    loss, plain = loss_and_gradients(tiny, *rows)
    enable(tiny, max_pack_len)
    if grad_checkpoint:
        distributed.checkpoint_blocks(tiny)
    fast_loss, gradients = loss_and_gradients(tiny, *rows)
    assert relative(fast_loss, loss) < 1e-5
    for part in PARTS:
        assert plain[part].norm() > 0
        assert relative(gradients[part], plain[part]) < 1e-5, part


def test_gradient_checkpointing_changes_nothing_on_the_plain_path(tiny, rows):
    loss, gradients = loss_and_gradients(tiny, *rows)
    distributed.checkpoint_blocks(tiny)
    again, checkpointed = loss_and_gradients(tiny, *rows)
    assert relative(again, loss) < 1e-5
    for part in PARTS:
        assert relative(checkpointed[part], gradients[part]) < 1e-5, part


@pytest.mark.parametrize("images", [[[], [RED]], [[RED], []], [[], [RED], [], [RED]]])
def test_a_picture_in_a_later_row_is_in_its_pack_alone(tiny, images):
    """Rows with a picture and rows without, in either order, begin alike up to the picture."""
    prompts = ["make it green", LONG, "dog", "make it green"][:len(images)]
    want = tiny.encode(prompts, images)
    found = fast.enable(tiny).encode(prompts, images)
    for row, (a, b) in enumerate(zip(found.unbind(1), want.unbind(1))):
        assert relative(a, b) < 1e-5, row


def test_weights_with_channels_last_are_trained_and_saved_like_others(tiny_folder, tmp_path):
    """Their layout in memory is not part of a file."""
    saved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = TBAC.load(tiny_folder).to(memory_format=layout)
        loss, _ = loss_and_gradients(model, ["a dog", "dog"], [[], [RED]])
        torch.optim.SGD(model.trainable(), lr=0.1).step()
        model.save(tmp_path / str(layout))
        again = TBAC.load(tmp_path / str(layout))
        for name, tensor in again.state_dict().items():
            assert tensor.is_contiguous() and torch.equal(tensor, model.state_dict()[name]), name
        saved.append((loss, again.state_dict()))
    (a_loss, a), (b_loss, b) = saved
    assert relative(a_loss, b_loss) < 1e-5
    assert all(relative(b[name], tensor) < 1e-5 for name, tensor in a.items() if tensor.any())


def test_disable_gives_the_plain_path_back(tiny):
    def methods():
        return tiny.query_states, tiny.mllm.encode_images

    rows = ROWS["mixed images"]
    plain = methods()
    before = tiny.encode(*rows)
    assert fast.enable(tiny) is tiny
    assert all(isinstance(method, functools.partial) for method in methods())
    assert fast.disable(tiny) is tiny
    assert methods() == plain
    assert torch.equal(tiny.encode(*rows), before)
    # Twice is as good as once.
    fast.disable(tiny)
    assert methods() == plain


@pytest.mark.parametrize("switch", [fast.enable, fast.disable])
def test_every_linear_layer_is_pytorchs_own(tiny, switch):
    """Whatever has a matrix is nn.Linear itself, no subclass, or the embedding table."""
    switch(tiny)
    modules = [*tiny.modules(), *tiny.config.build_ladder().modules()]
    with_matrix = [m for m in modules if getattr(m, "weight", None) is not None
                   and m.weight.dim() == 2]
    assert len(with_matrix) > 50
    assert {type(m) for m in with_matrix} == {nn.Linear, nn.Embedding}
    assert not any(type(m) is not nn.Linear for m in modules if isinstance(m, nn.Linear))


# ------------------------------------------------------------------------------------- less work

@pytest.fixture
def read(tiny):
    """A function: prompts, images -> how many tokens the decoder reads, how many pictures the ViT
    sees."""
    tokens = []
    pictures = []
    tiny.mllm.layers[0].register_forward_hook(
        lambda m, args, out: tokens.append(out.shape[0] * out.shape[1]))
    tiny.mllm.vision.register_forward_hook(lambda m, args, out: pictures.append(len(out)))

    def call(*rows):
        tokens.clear()
        pictures.clear()
        tiny.encode(*rows)
        return sum(tokens), sum(pictures)

    return call


def test_nothing_is_read_twice(tiny, read):
    """Equal rows are one row, a picture in two rows goes through the ViT once, and what rows begin
    with in common is read once."""
    fast.enable(tiny)
    one, _ = read(["a dog"])
    other, _ = read(["a cat, perhaps"])
    assert read(["a dog"] * 4) == (one, 0)
    # The system prompt and what surrounds it.
    together, _ = read(["a dog", "a cat, perhaps"])
    assert one + other - together > 40
    alone, _ = read(["a dog"], [[RED]])
    both, seen = read(["a dog", "a cat, perhaps"], [[RED], [RED.copy()]])
    assert seen == 1
    assert both < 1.2 * alone
    _, seen = read([""] * 2, [[RED, BLUE], [BLUE, RED]])
    assert seen == 2


def test_no_long_pack_of_texts_pads_those_with_pictures(tiny, read):
    fast.enable(tiny)
    texts = [f"a dog and {i} cats" for i in range(24)]
    images = [[Image.new("RGB", (64, 64), (i, 0, 0))] for i in range(24)]
    apart = read(texts)[0] + read(texts, images)[0]
    assert read(2 * texts, [[]] * 24 + images)[0] < 1.2 * apart


def test_the_plain_path_reads_every_row_and_every_picture(tiny, read):
    one, _ = read(["a dog"])
    assert read(["a dog"] * 4) == (4 * one, 0)
    _, seen = read([""] * 2, [[RED, BLUE], [BLUE, RED]])
    assert seen == 4


def test_who_attends_to_whom_in_a_pack(tiny):
    """Two prompts that begin alike in one pack, a third in another: x marks what a token (down)
    attends to."""
    P = torch.arange(9).expand(3, 9)
    one, two, three = (Prompt(ids, P[:, :len(ids)], [])
                       for ids in ([1, 2, 3], [1, 2, 4, 5], [6]))
    batch, mask = fast.join_packs(tiny.mllm, [[one, two], [three]], n_query=1)
    assert batch.ids[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert batch.ids[1, 5].item() == 6
    assert batch.attention_mask[1].tolist() == [False] * 5 + [True] * 2
    drawn = ["".join(".x"[seen] for seen in row) for row in mask[0, 0].tolist()]
    assert drawn == [
        "x......",
        "xx.....",
        # 3 of the first prompt
        "xxx....",
        # 4 5 of the second
        "xx.x...",
        "xx.xx..",
        # what comes after the first, after the second
        "xxx..x.",
        "xx.xx.x",
    ]
    assert mask[1, 0, 5:].tolist() == [[False] * 5 + [True, False], [False] * 5 + [True, True]]
    assert batch.positions[0].tolist() == [[0, 1, 2, 2, 3, 3, 4], [1] * 5 + [0, 1]]


# --------------------------------------------------------------------------------------- compile

def picture_of(model):
    generator = torch.Generator().manual_seed(0)
    return sample.generate(model, ["a dog"], steps=2, generator=generator)


def test_without_a_compiler_it_draws_all_the_same(tiny, monkeypatch):
    def broken(f, **_):
        def call(*_):
            raise RuntimeError("no compiler here")
        return call

    before = picture_of(tiny)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no compiler here"):
        fast.compile_parts(tiny, lambda: picture_of(tiny))
    assert picture_of(tiny)[0].tobytes() == before[0].tobytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_parts_give_the_same_numbers(tiny):
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw():
        *_, last = sample.denoise(tiny, ["a dog"], steps=3, eps=eps)
        return last.x_t

    plain = draw()
    fast.compile_parts(tiny, draw)
    assert tiny.dit._compiled_call_impl is not None
    assert relative(draw(), plain) < 1e-5
