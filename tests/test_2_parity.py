"""The same numbers as the released code, on the tiny checkpoint (bars: 1e-5 for every forward and
gradient, 5e-5 after sampling), on the plain path and on the fast one."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from dcae import DCAEConfig
from dit import DiTConfig
from mllm import DRAW, MLLMConfig
from tbac import TBAC, TBACConfig
from tests.conftest import CASES, ROOT, relative
from vit import ViTConfig, patchify
from weights_convert import public_names

# The tiny checkpoint's queries. In the recorded rows, they and two more tokens follow the prompt.
Q = 8


def tokenized(model, prompts, images):
    return model.mllm.tokenize(prompts, images, DRAW, answer_start="<|vision_start|>")


@pytest.mark.parametrize("case", CASES)
def test_ids_mask_positions_are_equal(tiny, golden, recorded, case):
    batch = tokenized(tiny, *recorded[0][case])
    n = Q + 2
    assert torch.equal(batch.ids, golden[f"{case}.input_ids"][:, :-n])
    assert torch.equal(batch.attention_mask.long(), golden[f"{case}.attention_mask"][:, :-n])
    assert torch.equal(batch.positions, golden[f"{case}.position_ids"][:, :, :-n])


@pytest.mark.parametrize("case", ["edit", "edit_multi"])
def test_patches_and_vision_tokens(model, golden, recorded, case):
    pictures = tokenized(model, *recorded[0][case]).pictures
    patches = torch.cat([p for p, _ in pictures])
    assert [[1, *grid] for _, grid in pictures] == golden[f"{case}.image_grid_thw"].tolist()
    assert relative(patches[::61], golden[f"{case}.pixel_values.every61"]) < 1e-5
    assert abs(patches.double().sum() / golden[f"{case}.pixel_values.sum"] - 1) < 1e-5
    tokens = model.mllm.encode_images(pictures)
    assert relative(tokens[::7], golden[f"{case}.vision_tokens.every7"]) < 1e-5


# (width, height): the grid, the sum of all numbers, and their sum with weights 1, 2, ..., 96, 0, as
# transformers 4.51.3 gives them. (It refuses a side below 28 pixels.)
ODD_PICTURES = {
    (60, 29): ((24, 48), 250994.93795803632, 12041852.812118076),
    (31, 639): ((146, 8), 257792.21074187523, 12411769.48676047),
    (639, 31): ((8, 146), 257785.64909617137, 12367647.854554502),
}


@pytest.mark.parametrize("size, recorded", ODD_PICTURES.items())
def test_patches_of_odd_pictures(tiny, size, recorded):
    width, height = size
    values = np.arange(width * height * 3).reshape(height, width, 3) * 7 % 256
    image = Image.fromarray(values.astype(np.uint8))
    patches, grid = patchify(image, tiny.mllm.config.vision)
    patches = patches.double().flatten()
    weights = torch.arange(1, len(patches) + 1) % 97
    assert grid == recorded[0]
    assert patches.sum().item() == pytest.approx(recorded[1], rel=1e-6)
    assert (patches * weights).sum().item() == pytest.approx(recorded[2], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_at_every_depth(model, golden, recorded, case):
    prompts, images = recorded[0][case]
    want = golden[f"{case}.hidden_states.tail"][:, :, :Q]                      # (depths, B, Q, M)
    states = model.query_states(prompts, images)
    assert len(states) == len(want)
    for i, state in enumerate(states):
        assert relative(state, want[i]) < 1e-5, i

    # With the recorded positions and mask: every 29th position, too, where it is not padding.
    batch = tokenized(model, prompts, images)
    queries = model.ladder.queries.expand(len(batch.ids), -1, -1)
    x = torch.cat([model.mllm.embed(batch), queries], 1)                       # (B, S + Q, M)
    mask = golden[f"{case}.attention_mask"][:, :-2].bool()
    states = model.mllm(x, golden[f"{case}.position_ids"][:, :, :-2], mask)
    states = torch.stack(states)                                               # (depths, B, ...)
    for i, state in enumerate(states):
        assert relative(state[:, -Q:], want[i]) < 1e-5, i
    every29 = golden[f"{case}.hidden_states.every29"]
    valid = mask[:, ::29]
    n = min(every29.shape[2], valid.shape[1])
    valid = valid[:, :n]
    found = states[:, :, ::29][:, :, :n]
    assert relative(found[:, valid], every29[:, :, :n][:, valid]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_rungs_velocity_loss_gradients(model, golden, recorded, case):
    prompts, images = recorded[0][case]
    known = {name.removeprefix(f"{case}."): t for name, t in golden.items()}
    rungs = model.encode(prompts, images)
    assert relative(rungs, known["rungs"]) < 1e-5
    velocity = model.velocity(known["x"], known["t"] / 1000, rungs)
    assert relative(velocity, known["velocity"]) < 1e-5
    x0 = model.dcae.encode(known["target"])
    loss = model.loss(x0, prompts, images, known["sigma"], known["noise"]).mean()
    assert relative(loss, known["loss"]) < 1e-5
    loss.backward()
    parameters = {
        "queries": model.ladder.queries,
        "connector.0.weight": model.ladder.connector[0].weight,
        "connector.3.weight": model.ladder.connector[3].weight,
        "dit.first_block.attn2.to_k": model.dit.blocks[0].cross.k.weight,
    }
    for name, p in parameters.items():
        assert relative(p.grad, known[f"grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_autoencoder(tiny, golden, case):
    latents = golden[f"{case}.latents"]
    assert relative(tiny.dcae.encode(golden[f"{case}.target"]), latents) < 1e-5
    assert relative(tiny.dcae.decode(latents), golden[f"{case}.decoded"]) < 1e-5


RUNS = ["t2i.sample6", "t2i.sample20", "edit.sample6", "edit.sample20", "edit_multi.sample6"]


@pytest.mark.parametrize("name", RUNS)
def test_sampled_latents_and_pictures(model, golden, recorded, name):
    prompts, images = recorded[0][name.split(".")[0]]
    settings = recorded[1][name]
    *_, last = sample.denoise(model, prompts, images, eps=golden[f"{name}.noise"], **settings)
    times = sample.schedule(settings["steps"])
    assert torch.allclose(times.float(), golden[f"{name}.sigmas"], atol=1e-6)
    assert torch.equal((1000 * times[:-1]).int().float(), golden[f"{name}.timesteps"])
    assert relative(last.x_t, golden[f"{name}.latents"]) < 5e-5
    # Recorded in [0, 1].
    image = (model.dcae.decode(last.x_t) / 2 + 0.5).clamp(0, 1)
    assert relative(image, golden[f"{name}.image"]) < 5e-5


@pytest.mark.parametrize("name, picture", [("ask_text", None), ("ask_image", "wide")])
def test_greedy_answers_are_equal(model, golden, recorded, name, picture):
    question, mllm = "what is in the image?", model.mllm
    images = [recorded[2](picture)] if picture else []
    batch = mllm.tokenize([question], [images])
    assert torch.equal(batch.ids, golden[f"{name}.input_ids"])
    states = mllm(mllm.embed(batch), batch.positions, batch.attention_mask)
    logits = mllm.logits(states[-1])
    assert relative(logits[:, -4:], golden[f"{name}.logits.last4"]) < 1e-5
    ids = golden[f"{name}.generated"][0, batch.ids.shape[1]:].tolist()
    assert mllm.generate(batch, len(ids)) == [ids]
    assert model.ask(question, images, len(ids)) == mllm.tokenizer.decode(ids).strip()


# ---- full size, on the meta device: names, shapes, counts

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return TBAC(TBACConfig())


def manifest(name):
    file = ROOT / "tests" / "fixtures" / "manifests" / f"{name}.json"
    return json.loads(file.read_text())


def public_shapes(model, part, prefix=None):
    own = model.state_dict()
    names = public_names(model, part, prefix)
    shapes = {public: list(own[ours].shape) for public, ours in names.items()}
    # Of ours it is a linear layer: the same numbers in a row.
    for name in shapes:
        if name.endswith("visual.patch_embed.proj.weight"):
            shapes[name] = [1280, 3, 2, 14, 14]
    return shapes


@pytest.mark.parametrize("part, name, tensors", [
    ("mllm", "qwen2_5_vl_3b_instruct", 824),
    ("dit", "sana_1600m_512px_transformer", 396),
    ("dcae", "sana_1600m_512px_vae", 375)])
def test_full_size_backbones(full, part, name, tensors):
    assert len(manifest(name)) == tensors
    assert public_shapes(full, part, "") == manifest(name)


def test_full_size_checkpoint(full):
    released = manifest("tbac_uniimage_3b")
    ours = {}
    for part in ("mllm", "ladder", "dit", "dcae"):
        ours |= public_shapes(full, part)
    # The released embedding table also holds the queries, and two rows that nothing uses.
    ours["model.mllm_backbone.model.embed_tokens.weight"][0] += full.config.n_query + 2
    assert ours == released
    assert len(ours) == 1600
    count = sum(torch.Size(shape).numel() for shape in released.values())
    assert count == 5_681_505_091
    assert sum(p.numel() for p in full.parameters()) == count - 2 * 2048


def test_parameter_counts(full):
    def count(parameters):
        return sum(p.numel() for p in parameters)

    sizes = [count(part.parameters()) for part in (full.mllm, full.dit, full.dcae)]
    assert [round(n / 1e9, 4) for n in sizes] == [3.7546, 1.6045, 0.3123]


def test_config_survives_json(full):
    other = dataclasses.replace(
        TBACConfig(), mllm=MLLMConfig(n_layer=4, vision=ViTConfig(window=56)),
        dit=DiTConfig(n_layer=2),
        dcae=DCAEConfig(widths=(32, 64), encoder_layers=(0, 1), decoder_layers=(1, 1),
                        attention_stages=1))
    for config in (TBACConfig(), other):
        stored = json.dumps(config.to_dict())
        assert TBACConfig.from_dict(json.loads(stored)) == config
