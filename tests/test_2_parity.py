"""The same numbers as the released code, on the tiny checkpoint (bars: 1e-5 for every forward and gradient, 5e-5 after sampling)."""
import dataclasses
import json

import pytest
import torch

import sample
from dcae import DCAEConfig
from dit import DiTConfig
from mllm import DRAW, MLLMConfig
from tbac import TBAC, TBACConfig
from tests.conftest import CASES, ROOT, relative
from vit import ViTConfig
from weights_convert import public_names

Q = 8                                                               # the tiny checkpoint's queries


def prepared(tiny, prompts, images):
    return tiny.mllm.prepare(prompts, images, DRAW, then="<|vision_start|>")


@pytest.mark.parametrize("case", CASES)
def test_ids_mask_positions_are_equal(tiny, golden, recorded, case):
    batch = prepared(tiny, *recorded[0][case])
    assert torch.equal(batch.ids, golden[f"{case}.input_ids"][:, :-Q - 2])         # the recorded rows go on with queries and two more
    assert torch.equal(batch.real.long(), golden[f"{case}.attention_mask"][:, :-Q - 2])
    assert torch.equal(batch.positions, golden[f"{case}.position_ids"][:, :, :-Q - 2])


@pytest.mark.parametrize("case", ["edit", "edit_multi"])
def test_patches_and_vision_tokens(tiny, golden, recorded, case):
    pictures = prepared(tiny, *recorded[0][case]).pictures
    patches = torch.cat([p for p, _ in pictures])
    assert [[1, *grid] for _, grid in pictures] == golden[f"{case}.image_grid_thw"].tolist()
    assert relative(patches[::61], golden[f"{case}.pixel_values.every61"]) < 1e-5
    assert abs(patches.double().sum() / golden[f"{case}.pixel_values.sum"] - 1) < 1e-5
    assert relative(tiny.mllm.see(pictures)[::7], golden[f"{case}.vision_tokens.every7"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_at_every_depth(tiny, golden, recorded, case):
    batch = prepared(tiny, *recorded[0][case])
    x = torch.cat([tiny.mllm.read(batch), tiny.ladder.queries.expand(len(batch.ids), -1, -1)], 1)
    real = golden[f"{case}.attention_mask"][:, :-2].bool()
    states = torch.stack(tiny.mllm(x, golden[f"{case}.position_ids"][:, :, :-2], real))
    for i, state in enumerate(states):
        assert relative(state[:, -Q:], golden[f"{case}.hidden_states.tail"][i, :, :Q]) < 1e-5, i
    every, seen = golden[f"{case}.hidden_states.every29"], real[:, ::29]            # what padding holds is nobody's business
    n = min(every.shape[2], seen.shape[1])
    assert relative(states[:, :, ::29][:, :, :n][:, seen[:, :n]], every[:, :, :n][:, seen[:, :n]]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_rungs_velocity_loss_gradients(tiny, golden, recorded, case):
    prompts, images = recorded[0][case]
    rungs = tiny.encode(prompts, images)
    assert relative(rungs, golden[f"{case}.rungs"]) < 1e-5
    assert relative(tiny.velocity(golden[f"{case}.x"], golden[f"{case}.t"] / 1000, rungs), golden[f"{case}.velocity"]) < 1e-5
    loss = tiny.loss(golden[f"{case}.target"], prompts, images, golden[f"{case}.sigma"], golden[f"{case}.noise"])
    assert relative(loss, golden[f"{case}.loss"]) < 1e-5
    loss.backward()
    for name, p in {"queries": tiny.ladder.queries, "connector.0.weight": tiny.ladder.connector[0].weight,
                    "connector.3.weight": tiny.ladder.connector[3].weight, "dit.first_block.attn2.to_k": tiny.dit.blocks[0].cross.k.weight}.items():
        assert relative(p.grad, golden[f"{case}.grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_autoencoder(tiny, golden, case):
    assert relative(tiny.dcae.encode(golden[f"{case}.target"]), golden[f"{case}.latents"]) < 1e-5
    assert relative(tiny.dcae.decode(golden[f"{case}.latents"]), golden[f"{case}.decoded"]) < 1e-5


@pytest.mark.parametrize("name", ["t2i.sample6", "t2i.sample20", "edit.sample6", "edit.sample20", "edit_multi.sample6"])
def test_sampled_latents_and_pictures(tiny, golden, recorded, name):
    (prompts, images), settings = recorded[0][name.split(".")[0]], recorded[1][name]
    *_, last = sample.denoise(tiny, prompts, images, eps=golden[f"{name}.noise"], **settings)
    times = sample.schedule(settings["steps"]).float()
    assert torch.allclose(times, golden[f"{name}.sigmas"], atol=1e-6)
    assert torch.equal((1000 * sample.schedule(settings["steps"])[:-1]).int().float(), golden[f"{name}.timesteps"])
    assert relative(last.x_t, golden[f"{name}.latents"]) < 5e-5
    image = (tiny.dcae.decode(last.x_t) / 2 + 0.5).clamp(0, 1)                       # recorded in [0, 1]
    assert relative(image, golden[f"{name}.image"]) < 5e-5


@pytest.mark.parametrize("name, picture", [("ask_text", None), ("ask_image", "wide")])
def test_greedy_answers_are_equal(tiny, golden, recorded, name, picture):
    images = [recorded[2](picture)] if picture else []
    batch = tiny.mllm.prepare(["what is in the image?"], [images])
    assert torch.equal(batch.ids, golden[f"{name}.input_ids"])
    logits = tiny.mllm.logits(tiny.mllm(tiny.mllm.read(batch), batch.positions, batch.real)[-1])
    assert relative(logits[:, -4:], golden[f"{name}.logits.last4"]) < 1e-5
    ids = golden[f"{name}.generated"][0, batch.ids.shape[1]:].tolist()
    assert tiny.mllm.generate(batch, len(ids)) == [ids]
    assert tiny.ask("what is in the image?", images, len(ids)) == tiny.mllm.tokenizer.decode(ids).strip()


# ---- full size, on the meta device: names, shapes, counts

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return TBAC(TBACConfig())


def manifest(name):
    return json.loads((ROOT / "tests" / "fixtures" / "manifests" / f"{name}.json").read_text())


def public_shapes(model, part, prefix=None):
    own = model.state_dict()
    shapes = {public: list(own[ours].shape) for public, ours in public_names(model, part, prefix).items()}
    conv = next((k for k in shapes if k.endswith("visual.patch_embed.proj.weight")), None)
    return shapes | ({conv: [1280, 3, 2, 14, 14]} if conv else {})                   # a linear layer of ours, the same numbers in a row


@pytest.mark.parametrize("part, name, tensors", [("mllm", "qwen2_5_vl_3b_instruct", 824), ("dit", "sana_1600m_512px_transformer", 396),
                                                 ("dcae", "sana_1600m_512px_vae", 375)])
def test_full_size_backbones(full, part, name, tensors):
    assert len(manifest(name)) == tensors
    assert public_shapes(full, part, "") == manifest(name)


def test_full_size_checkpoint(full):
    released = manifest("tbac_uniimage_3b")
    ours = {}
    for part in ("mllm", "ladder", "dit", "dcae"):
        ours |= public_shapes(full, part)
    ours["model.mllm_backbone.model.embed_tokens.weight"][0] += full.config.n_query + 2
    assert ours == released and len(ours) == 1600
    count = sum(torch.Size(s).numel() for s in released.values())
    assert count == 5_681_505_091
    assert sum(p.numel() for p in full.parameters()) == count - 2 * 2048             # all but the two unused rows


def test_parameter_counts(full):
    count = {part: sum(p.numel() for p in getattr(full, part).parameters()) for part in ("mllm", "ladder", "dit", "dcae")}
    assert [round(count[p] / 1e9, 4) for p in ("mllm", "dit", "dcae")] == [3.7546, 1.6045, 0.3123]
    assert sum(p.numel() for p in full.trainable()) == count["ladder"] + count["dit"]


def test_config_survives_json(full):
    other = dataclasses.replace(TBACConfig(), mllm=MLLMConfig(n_layer=4, vision=ViTConfig(window=56)), dit=DiTConfig(n_layer=2),
                                dcae=DCAEConfig(widths=(8, 8)))
    for config in (TBACConfig(), other):
        assert TBACConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
