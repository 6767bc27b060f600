"""The mixer: each cell comes from the prompt that was asked for, and nothing else differs."""
import pytest
import torch

import sample
from engine import mixer


def rungs_of(model, prompt):
    """(L, k, Q, D), and k"""
    return sample.encode_for_guidance(model, [prompt], None, 1.5, "")


@pytest.mark.parametrize("n_query", [1, 7, 8, 16, 20, 64])
def test_slots_hold_every_query_once(n_query):
    found = mixer.slots(n_query)
    assert [q for slot in found for q in slot] == list(range(n_query))
    sizes = {len(slot) for slot in found}
    assert len(found) == min(n_query, 8) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shape", [(4, 10, 3), (4, 2, 10, 3)])
def test_each_cell_comes_from_the_prompt_asked_for(shape):
    """Query by query, by hand."""
    a, b = torch.randn(shape), torch.randn(shape)
    choice = torch.rand(4, 8) < 0.5
    mixed = mixer.mix(a, b, choice)
    for j in range(4):
        for s, slot in enumerate(mixer.slots(10)):
            source = b if choice[j, s] else a
            for q in slot:
                assert torch.equal(mixed[j, ..., q, :], source[j, ..., q, :])


def test_only_the_prompts_row_is_mixed_and_rows_stand_as_denoise_reads_them():
    a, b = torch.randn(4, 3, 16, 5), torch.randn(4, 3, 16, 5)
    choices = list(mixer.single_exchanges(a).values())
    for choice in choices:
        rows = mixer.mixed_rows(a, b, choice)                              # (L, k, Q, D)
        assert torch.equal(rows[:, :2], a[:, :2])
        assert torch.equal(rows[:, 2], mixer.mix(a[:, 2], b[:, 2], choice))


def test_the_choices_in_advance_are_each_single_exchange_and_its_opposite():
    found = mixer.single_exchanges(torch.zeros(6, 2, 16, 3))
    different = {str(choice.tolist()) for choice in found.values()}
    assert len(found) == len(different) == 2 * (6 + 8) + 2
    assert not found[""].any() and found["all"].all()
    assert found["block 2"].nonzero().tolist() == [[2, s] for s in range(8)]
    assert found["slot 5"].nonzero().tolist() == [[j, 5] for j in range(6)]
    assert torch.equal(found["not slot 5"], ~found["slot 5"])
    assert mixer.exchange(6, 8, 1, 3).nonzero().tolist() == [[1, 3]]


def test_the_ends_of_the_mixer_are_the_two_prompts_own_pictures(tiny):
    """And each exchange is drawn by its name."""
    (a, k), (b, _) = rungs_of(tiny, "a dog"), rungs_of(tiny, "two cats")
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    choices = mixer.single_exchanges(a)

    def mixed(name):
        rungs = mixer.mixed_rows(a, b, choices[name])
        *_, last = sample.denoise(tiny, [""], conditioning=(rungs, k), eps=eps, steps=2)
        return last.x_t

    for name, prompt in (("", "a dog"), ("all", "two cats")):
        *_, last = sample.denoise(tiny, [prompt], eps=eps, steps=2)
        assert torch.allclose(mixed(name), last.x_t, atol=1e-5)
    assert not torch.allclose(mixed("block 0"), mixed(""), atol=1e-3)
    settings = dict(guidance=4.5, image_guidance=1.5, negative="", solver="dpm++", steps=2,
                    size=None)
    request = sample.as_request(tiny, "a dog", [], settings)
    pictures = dict(sample.draw_exchanges(tiny, request, 0, "two cats"))
    assert list(pictures) == list(choices)
    for name, picture in pictures.items():
        assert picture.tobytes() == tiny.decode(mixed(name))[0].tobytes(), name


@pytest.mark.parametrize("b, choice, message", [
    (torch.zeros(4, 9, 3), torch.zeros(4, 8, dtype=torch.bool), "cannot be mixed"),
    (torch.zeros(4, 8, 3), torch.zeros(3, 8, dtype=torch.bool), r"expected \(4, 8\)"),
    (torch.zeros(4, 8, 3), torch.zeros(4, 8), "true or false"),
])
def test_what_does_not_fit_is_said(b, choice, message):
    with pytest.raises(ValueError, match=message):
        mixer.mix(torch.zeros(4, 8, 3), b, choice)
