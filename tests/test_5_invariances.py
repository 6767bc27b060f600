"""A row does not depend on its neighbours: padding, batch size, mixed batches; the same seed gives
the same picture. On the plain path and on the fast one."""
import pytest
import torch
from PIL import Image

import sample
from tbac import TBAC
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


def test_the_loss_of_a_row_is_its_own(model):
    x0 = drawn(4, 4, 8, 8)
    eps = drawn(4, 4, 8, 8, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    rows = model.loss(x0, PROMPTS, IMAGES, t, eps)
    assert rows.shape == (4,)
    for b in range(4):
        one = slice(b, b + 1)
        alone = model.loss(x0[one], PROMPTS[one], IMAGES[one], t[one], eps[one])
        assert relative(rows[one].detach(), alone.detach()) < 1e-5, b


def test_times_and_noise_that_are_not_given_are_drawn(model):
    """The same generator draws the same: first the times, in (0, 1], then the noise."""
    x0 = drawn(2, 4, 8, 8)
    prompts = ["a dog", "a cat"]
    found = model.loss(x0, prompts, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    t = 1 - torch.rand(2, generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    assert torch.equal(found, model.loss(x0, prompts, t=t, eps=eps))


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


def test_an_answer_comes_piece_by_piece(tiny, monkeypatch):
    question = "what is it?"
    pieces = list(tiny.stream_answer(question, [RED], 12))
    assert len(pieces) > 2 and "".join(pieces) == tiny.ask(question, [RED], 12)
    # Characters of several tokens come whole, and no space comes before it is known what follows.
    ids = [[id] for id in tiny.mllm.tokenizer.encode(" größe, 5 字 and 🦒 ")]
    monkeypatch.setattr(tiny.mllm, "next_tokens", lambda *_: map(torch.tensor, ids))
    pieces = list(tiny.stream_answer(question))
    assert "".join(pieces) == "größe, 5 字 and 🦒"
    assert not any("\ufffd" in piece or piece.endswith(" ") for piece in pieces)


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


def test_a_question_leaves_nothing_behind(tiny_folder, model):
    """A with a picture, B without, A again: as three fresh models answer."""
    def answer(model, question, row):
        return model.mllm.generate(model.mllm.tokenize([question], [row]), 12)

    asked = (("what is it?", [RED]), ("how many?", []), ("what is it?", [RED]))
    answers = [answer(model, *request) for request in asked]
    fresh = [answer(TBAC.load(tiny_folder), *request) for request in asked]
    assert answers == fresh and answers[0] != answers[1]


def test_long_answers_to_a_short_and_a_long_prompt_in_one_batch(model):
    """Of 1 and of 200 words, over 40 new tokens."""
    def generate(texts):
        return model.mllm.generate(model.mllm.tokenize(texts), 40)

    texts = ["dog", "a circle " * 100]
    together = generate(texts)
    assert together == generate(texts[:1]) + generate(texts[1:])
    assert max(len(answer) for answer in together) == 40


@pytest.mark.parametrize("size", [(27, 29), (60, 29), (31, 639), (1, 1)])
def test_pictures_of_odd_sizes_are_read(model, size):
    """Of few pixels, thin, or of one pixel; alone and beside another."""
    image = Image.new("RGB", size, "green")
    alone = model.encode(["make it red"], [[image]])
    assert alone.isfinite().all()
    beside = model.encode(["make it red", "dog"], [[image], [BLUE]])
    assert relative(beside[:, :1], alone) < 1e-5


def test_an_answer_ends_at_either_token_and_reading_with_the_last_row(tiny, monkeypatch):
    mllm, read = tiny.mllm, []
    special = mllm.tokenizer.special
    said = [[5, special["im_end"], 7, 7, 7], [6, 7, special["endoftext"], 8, 8]]

    def logits(x):
        read.append(x)
        ids = torch.tensor([row[len(read) - 1] for row in said])
        return torch.nn.functional.one_hot(ids, 512).float()

    monkeypatch.setattr(mllm, "logits", logits)
    assert mllm.generate(mllm.tokenize(["a", "b"]), 5) == [[5], [6, 7]]
    assert len(read) == 3


def test_a_cut_prompt_has_no_half_character_at_its_end(tiny):
    tokenizer = tiny.mllm.tokenizer
    for n in range(1, len(tokenizer.encode("🦒🦒🦒"))):
        with pytest.warns(UserWarning, match="prompt cut"):
            # Of four tokens each.
            assert tokenizer.truncate("🦒🦒🦒", n) == "🦒" * (n // 4)


def test_angles_are_float32_in_a_model_of_another_dtype(tiny):
    """In bfloat16, positions above 256 would be rounded."""
    batch = tiny.mllm.tokenize(["a circle " * 200], [[RED]])
    grid = batch.pictures[0][1]
    text, vision = tiny.mllm.rope_angles(batch.positions), tiny.mllm.vision.angles(grid, "cpu")
    tiny.to(torch.bfloat16)
    assert batch.positions.max() > 256
    assert torch.equal(tiny.mllm.rope_angles(batch.positions), text)
    assert torch.equal(tiny.mllm.vision.angles(grid, "cpu"), vision)
    assert text.dtype == vision.dtype == torch.float32
