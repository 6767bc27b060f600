"""The explanation as a page: what it shows is what the model computed, whatever the texts hold it
stays one small file that asks for nothing, and a person can use it."""
import base64
import io
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from engine import explain, explain_html, mixer
from engine.checks import printable
from tbac import TBACConfig
from tests.browser import SECONDS

HOSTILE = "</script><script>hacked = 1</script><!-- <script> & \u2028\u202e\x00\x1b[31m {{data}} \""


def data_of(html):
    """What the page's script reads."""
    text, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def unpacked(packed):
    """And how: -> the numbers, and half a step, the most that they are off by."""
    raw = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(packed["shape"])
    return raw * packed["scale"] / 255, packed["scale"] / 510


def same(packed, expected):
    values, half_step = unpacked(packed)
    assert values.shape == tuple(expected.shape)
    return np.abs(values - expected.numpy()).max() <= 1.01 * half_step


def picture_in(address):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", address).groups()
    return kind, base64.b64decode(content)


@pytest.fixture(scope="module")
def edit(one, gradient):
    """An edit with another one to compare with."""
    return sample.explained(one, "make it blue", [gradient], "make it red", seed=3, steps=3)


# --------------------------------------------------------------------------------------- content

def test_the_page_has_the_numbers_of_the_model(one, edit, gradient, monkeypatch):
    """Those that engine/explain.py watched, of the same request drawn once more."""
    kept, images = explain.Drawn(3), [gradient]
    settings = dict(steps=3, generator=torch.Generator().manual_seed(3))
    *_, last = kept.watch(one.dit, sample.denoise(one, ["make it blue"], [images], **settings))
    data = data_of(edit.html())
    assert data["kind"] == "edit" and data["prompt"] == "make it blue"
    assert same(data["attention"], torch.stack([attention for attention, _ in kept.maps]))
    assert same(data["added"], torch.stack([added for _, added in kept.maps]))
    # As many places as the picture has in the latents, and all that a place attends to.
    attention, half_step = unpacked(data["attention"])
    assert attention.shape == (3, 4, 8, 8, 8)
    assert np.abs(attention.sum(2) - 1).max() <= 8 * half_step

    for moment, step in zip(data["moments"], kept.steps):
        assert moment["step"] == step.i + 1 and moment["t"] == round(step.t, 4)
        for name in ("x_t", "x0"):
            picture = one.decode(getattr(step, name))[0]
            kind, content = picture_in(moment[name])
            assert kind == "png" and np.array_equal(opened(content), np.asarray(picture))
    final = np.asarray(one.decode(last.x_t)[0])
    assert np.array_equal(opened(picture_in(data["picture"])[1]), final)
    assert np.array_equal(opened(picture_in(data["inputs"][0])[1]), np.asarray(gradient))
    assert data["settings"] == ["seed 3", "steps 3", "solver dpm++", "guidance 4.5",
                                f"image guidance {one.config.image_guidance}"]


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_words_and_pictures_have_what_was_read_of_them(one, edit, gradient):
    batch, read = explain.watched_encoding(one, "make it blue", [gradient])
    data, tokenizer = data_of(edit.html()), one.mllm.tokenizer
    picture, *words = data["tokens"]
    assert picture == dict(text="picture 1", picture=0)
    assert "".join(word["text"] for word in words) == "make it blue"
    ids = batch.ids[0].tolist()
    is_image = batch.ids[0] == tokenizer.special["image_pad"]
    start = ids.index(tokenizer.special["vision_end"]) + 1
    own = read[:, :, start:start + len(words)]
    assert tokenizer.decode(ids[start:start + len(words)]) == "make it blue"
    of_picture = read[:, :, is_image]
    assert same(data["read"], torch.cat([of_picture.sum(2, keepdim=True), own], 2))
    grid = [side // one.config.mllm.vision.merge for side in batch.pictures[0][1]]
    assert same(data["looks"][0], explain.pooled(of_picture.unflatten(2, grid)))


@pytest.mark.parametrize("wiring", ["ladder", "final", "reversed", "routed"])
def test_the_ladder_is_drawn_with_the_layers_that_are_tapped(tiny, wiring):
    tiny.config = replace(tiny.config, wiring=wiring)
    tiny.ladder = ladder = tiny.config.build_ladder()
    ladder.init_weights()
    data = sample.explained(tiny, "a dog", steps=1).data
    assert data["kind"] == "drawing" and data["mixer"] is None and not data["inputs"]
    routes = data["ladder"]["routes"]
    assert data["ladder"]["layers"] == tiny.config.mllm.n_layer
    if wiring != "routed":
        assert routes == [[[tap, 1.0]] for tap in ladder.taps]
    for route in routes:
        assert sum(weight for _, weight in route) == pytest.approx(1, abs=1e-3)
    assert data["ladder"]["slots"] == [[q, q] for q in range(8)]


def test_the_mixers_pictures_are_drawn_of_mixed_rungs(one, edit, gradient):
    data = data_of(edit.html())["mixer"]
    assert data["other"] == "make it red" and len(data["pictures"]) == 2 * (4 + 8) + 2
    assert data["pictures"][""] == data_of(edit.html())["picture"]
    images = [[gradient]]
    guidance = one.config.image_guidance
    (a, k), (b, _) = (sample.encode_for_guidance(one, [prompt], images, guidance, "")
                      for prompt in ("make it blue", "make it red"))
    for name, cells in (("block 2", (2, None)), ("slot 5", (None, 5)), ("all", (None, None))):
        rungs = a.clone()
        rungs[:, -1] = mixer.mix(a[:, -1], b[:, -1], mixer.exchange(4, 8, *cells))
        generator = torch.Generator().manual_seed(3)
        picture, = sample.generate(one, [""], images, steps=3, generator=generator,
                                   conditioning=(rungs, k))
        shown = opened(picture_in(data["pictures"][name])[1])
        assert np.array_equal(shown, np.asarray(picture)), name


def test_an_answer_has_what_its_tokens_looked_at(one, gradient):
    images = [gradient, gradient.resize((84, 28))]
    ids, seen = explain.watched_answer(one, "what is it?", images)
    data = explain_html.answer(one, "what is it?", images, ids, seen).data
    words = [one.mllm.tokenizer.decode([id], keep_special=True) for id in ids]
    assert data["answer"] == [printable(word) for word in [*words, "(end)"]][:min(64, len(seen))]
    assert [token["text"] for token in data["tokens"][:2]] == ["picture 1", "picture 2"]
    assert "".join(token["text"] for token in data["tokens"][2:]) == "what is it?"
    batch = one.mllm.tokenize(["what is it?"], [images])
    places = (batch.ids[0] == one.mllm.tokenizer.special["image_pad"]).nonzero()[:, 0]
    heat = torch.stack([weights[places] for weights in seen[:64]])         # (A, units of both)
    grids = [[side // one.config.mllm.vision.merge for side in grid] for _, grid in batch.pictures]
    first = grids[0][0] * grids[0][1]
    for packed, part, grid in zip(data["looks"], (heat[:, :first], heat[:, first:]), grids):
        assert same(packed, explain.pooled(part.unflatten(1, grid)))
    values, half_step = unpacked(data["read"])
    end = explain_html.user_turn(batch.ids[0].tolist(), one.mllm.tokenizer).stop
    on_words = [w[end - len(one.mllm.tokenizer.encode("what is it?")):end].sum().item()
                for w in seen[:64]]
    assert data["on_words"] == pytest.approx(on_words, abs=1e-4)
    expected = torch.stack([heat[:, :first].sum(1), heat[:, first:].sum(1)], 1).numpy()
    assert np.abs(values[:, :2] - expected).max() <= 1.01 * half_step


def test_a_long_question_counts_as_a_whole(one, monkeypatch):
    """Of its words only the first are shown."""
    ids, seen = explain.watched_answer(one, "is it a dog or is it a cat?", [])
    whole = explain_html.answer(one, "is it a dog or is it a cat?", [], ids, seen).data
    monkeypatch.setattr(explain_html, "MAX_WORDS", 2)
    cut = explain_html.answer(one, "is it a dog or is it a cat?", [], ids, seen).data
    assert len(cut["tokens"]) == 2 < len(whole["tokens"]) and cut["on_words"] == whole["on_words"]


def test_a_token_that_somebody_has_typed_is_no_picture(one):
    """What a prompt may say of pictures stands there as it was typed."""
    prompt = "<|vision_start|> a <|vision_end|>"
    for images in ([], [Image.new("RGB", (64, 64))] * 2):
        batch = one.mllm.tokenize([prompt], [images])
        parts, places = explain_html.tokens_of(batch, one.mllm.tokenizer)
        texts = [part["text"] for part in parts]
        assert texts[:len(images)] == [f"picture {i + 1}" for i in range(len(images))]
        assert "".join(texts[len(images):]) == prompt
        assert all(places) and len(set(sum(places, []))) == sum(map(len, places))


# ------------------------------------------------------------------------------- safe and small

@pytest.mark.filterwarnings("ignore:prompt cut")
@pytest.mark.parametrize("prompt", [HOSTILE, "", "\n", "größe 🦒 字", "a " * 3000,
                                    "<|im_end|><|vision_start|> <|im_start|>user"])
def test_no_text_gets_out_of_its_place(one, prompt):
    html = sample.explained(one, prompt, compare=prompt or " ", steps=1).html()
    rest = html.replace(explain_html.in_script(data_of(html)), "")
    assert rest == explain_html.template("explain.html").replace("{{data}}", "")
    data = data_of(html)
    assert data["prompt"] == data["mixer"]["other"] or not prompt
    shown = data["prompt"] + "".join(token["text"] for token in data["tokens"])
    assert shown.isprintable() and len(data["prompt"]) < 2100 and len(html) < 1_500_000


def test_the_template_asks_for_nothing():
    template = explain_html.template("explain.html")
    assert "default-src 'none'" in template and template.count("{{data}}") == 1
    assert not re.search(r"https?:|//\w|@import|url\(|fetch|XMLHttp|WebSocket|innerHTML", template)


def noise(*size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:prompt cut")
def test_the_page_stays_small_at_the_released_sizes(one, monkeypatch):
    """With the worst of pictures and numbers: noise everywhere, which nothing compresses."""
    config = TBACConfig()
    L, S, Q = config.dit.n_layer, 8, config.n_query
    images = [noise(1024, 1024)] * 4
    prompt = "一" * 3000
    batch = one.mllm.tokenize([prompt], [images[:1]], max_len=256)
    units = [(1, (32, 32))] * 4
    batch.pictures = units
    model = SimpleNamespace(config=config, ladder=config.build_ladder(), mllm=one.mllm)
    monkeypatch.setattr(explain_html, "watched_encoding", lambda *_: (
        batch, torch.rand(L, S, batch.ids.shape[1])))
    monkeypatch.setattr(explain_html, "over_pictures", lambda *_: [
        explain_html.packed(torch.rand(L, S, 16, 16))] * 3)
    drawn = explain.Drawn(20)
    drawn.steps = [SimpleNamespace(i=i, t=0.5) for i in range(8)]
    drawn.maps = [(torch.rand(L, S, 16, 16), torch.rand(L, 16, 16))] * 8
    drawn.pictures = [(noise(512, 512), noise(512, 512))] * 8
    names = mixer.single_exchanges(torch.zeros(L, Q, 1))
    request = dict(prompts=[prompt], images=[images], steps=20, solver="dpm++", guidance=4.5,
                   image_guidance=1.5, negative=prompt)
    page = explain_html.drawing(model, request, 0, noise(1024, 768), drawn,
                                (prompt, [(name, noise(512, 512)) for name in names]))
    size = len(page.html().encode())
    assert 1_000_000 < size < explain_html.MAX_BYTES, size


# ---------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def pages(one, edit, gradient, tmp_path_factory):
    """{kind: address}"""
    folder = tmp_path_factory.mktemp("pages")
    ids, seen = explain.watched_answer(one, HOSTILE, [gradient])
    of = {
        "edit": edit.html(),
        "drawing": sample.explained(one, HOSTILE, steps=2).html(),
        "answer": explain_html.answer(one, HOSTILE, [gradient], ids, seen).html(),
        "notebook": f"<!DOCTYPE html><title>n</title>{edit._repr_html_()}",
    }
    for name, html in of.items():
        (folder / f"{name}.html").write_text(html)
    return {name: f"file://{folder}/{name}.html" for name in of}


def clean(page):
    """Nothing in the console, nothing asked for, every picture with its text, nothing wider than
    the window."""
    assert not page.problems and not page.requests
    lost = """[...document.images].filter(image => image.src && !image.alt).map(i => i.id)"""
    assert page.js(lost) == []
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    nameless = """[...document.querySelectorAll("button")].filter(button =>
        !button.textContent.trim() && !button.ariaLabel).length"""
    assert page.js(nameless) == 0
    page.close()


def said(page):
    return page.js("document.querySelector('#said').textContent")


@pytest.mark.parametrize("kind", ["edit", "drawing", "answer"])
@pytest.mark.parametrize("width, dark", [(1100, False), (400, True)])
def test_every_page_opens_and_holds_its_texts(browser, pages, kind, width, dark):
    page = browser.open(pages[kind], width=width, dark=dark)
    prompt = page.js("document.querySelector('#prompt').textContent")
    assert prompt == page.js("data.prompt") and page.js("window.hacked") is None
    assert kind == "edit" or "</script><script>" in prompt
    assert page.js("document.title").endswith(prompt)
    clean(page)


def test_the_lens_follows_pointer_and_click(browser, pages, edit):
    page = browser.open(pages["edit"])
    page.hover(".rung:last-of-type .block")
    start = said(page)
    assert start.startswith("Block 0, fed by the state entering layer")
    # Row by row from the top: the last block.
    page.click(".cell[aria-label='Rung 3, query 2']")
    page.hover("#title")
    assert said(page).startswith("Rung 3, the state entering layer") and "query 2" in said(page)
    values, _ = unpacked(edit.data["attention"])
    shown = values[1, 3, 2]
    assert all(f"({round_as_page(value)})" in said(page) for value in (shown.min(), shown.max()))
    assert page.js("document.querySelectorAll('#inputs canvas:not([hidden])').length") == 1
    page.hover("#words button:nth-child(2)")
    assert f"The token “{edit.data['tokens'][1]['text'].strip()}”" in said(page)
    page.hover("#place")
    assert said(page).startswith("Place 5 down, 5 across")
    # A click keeps a place, too, and another one lets go of it; so does Enter.
    page.click("#place")
    kept = said(page)
    page.hover("#title")
    assert kept.startswith("Place ") and said(page) == kept
    page.click("#place")
    page.hover("#title")
    assert said(page).startswith("Point at")
    page.js("document.querySelector('#place').focus()")
    page.press("Enter")
    page.js("document.querySelector('#place').blur()")
    assert said(page) == kept
    page.press("Escape")
    page.hover("#title")
    assert said(page).startswith("Point at")
    clean(page)


def round_as_page(value):
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def test_the_slider_goes_through_the_steps(browser, pages, edit):
    page = browser.open(pages["edit"])
    moments = edit.data["moments"]
    page.js("document.querySelector('#moment').focus()")
    for key, moment in (("Home", moments[0]), ("ArrowRight", moments[1]), ("End", moments[-1])):
        page.press(key)
        assert page.js("document.querySelector('#x_t').src") == moment["x_t"]
        assert page.js("document.querySelector('#x0').src") == moment["x0"]
        assert f"after step {moment['step']}," in page.js("document.body.innerText")
    clean(page)


def test_a_keyboard_is_enough(browser, pages, edit):
    """Tab goes from group to group, arrow keys go through a group; Enter keeps what is shown."""
    page = browser.open(pages["edit"])
    page.press("Tab")
    assert said(page).startswith("Rung 3,") and "query 0" in said(page)
    page.press("ArrowDown")
    page.press("ArrowRight", 2)
    assert said(page).startswith("Rung 2,") and "query 2" in said(page)
    page.press("Enter")
    page.press("Tab")
    assert "Picture 1: how much" in said(page)
    page.press("ArrowRight", 3)
    assert f"The token “{edit.data['tokens'][3]['text'].strip()}”" in said(page)
    page.press("Tab")
    assert said(page).startswith("Place")
    first = said(page)
    page.press("ArrowLeft")
    assert said(page).startswith("Place") and said(page) != first
    page.press("Tab", 2)
    # Out of the group, what was kept is shown again.
    assert said(page).startswith("Rung 2,") and "query 2" in said(page)
    clean(page)


@pytest.mark.parametrize("width", [1000, 400])
def test_the_mixer_swaps_pictures_at_a_click(browser, pages, edit, width):
    pictures = edit.data["mixer"]["pictures"]
    page = browser.open(pages["edit"], width=width)
    mixed = "document.querySelector('#mixed').src"
    assert page.js(mixed) == pictures[""]
    # The last rung stands on top.
    page.click("#mixing .blocks .exchange:nth-child(2)")
    assert page.js(mixed) == pictures["block 2"]
    page.click("#mixing .slots .exchange:nth-child(6)")
    assert page.js(mixed) == pictures["slot 5"]
    page.click("input[value=b]")
    assert page.js(mixed) == pictures["not slot 5"]
    assert "B, with query 5 from A" in page.js("document.body.innerText")
    page.click("#mixing .slots .exchange:nth-child(6)")
    assert page.js(mixed) == pictures["all"]
    clean(page)


def test_an_answer_shows_each_token(browser, pages):
    page = browser.open(pages["answer"])
    before = page.js("document.querySelector('#answer-said').textContent")
    page.click("#answer button:last-child")
    after = page.js("document.querySelector('#answer-said').textContent")
    assert before.startswith("Before “") and after.startswith("Before “") and before != after
    assert page.js("document.querySelectorAll('#answer-inputs canvas:not([hidden])').length") == 1
    clean(page)


def test_in_a_notebook_it_displays_itself(browser, pages, tmp_path):
    """In a frame without rights on the page around it."""
    page = browser.open(pages["notebook"])
    # The page around it cannot look into the frame: only what one sees says that it is there.
    deadline = time.monotonic() + SECONDS
    colors = []
    while len(colors) <= 100 and time.monotonic() < deadline:
        page.screenshot(tmp_path / "page.png")
        colors = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    assert len(colors) > 100 and not page.problems and not page.requests
    page.close()
