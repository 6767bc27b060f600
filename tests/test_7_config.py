"""config.json and the public configs: every key is there, is of its kind and in its range, and fits
the others; whatever else stands there is refused, with its name."""
import copy
import dataclasses
import json
import math
import re
import shutil
import time

import pytest
import torch
from PIL import Image

from engine.checks import CONFIG, FORMAT, RULES, shown
from engine.files import parse_json, read_json
from engine.limits import MAX_JSON_BYTES, MAX_JSON_DEPTH, MAX_LAYERS
from mllm import Tokenizer
from sample import TOY_FOLDER
from tbac import TBAC, TBACConfig
from tests.conftest import TINY
from weights_convert import (
    DC_AE_CONFIG,
    QWEN_CONFIG,
    QWEN_VISION_CONFIG,
    RELEASED_CONFIG,
    SANA_CONFIG,
    read_config,
)

# In the format of today, whichever the shipped folder has.
TOY = TBACConfig.from_dict(read_json(TOY_FOLDER / "config.json")).to_dict()
# What a value is replaced by.
NASTY = [None, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 1e9, 10 ** 9, 10 ** 30, "x", "1",
         "x" * 100_000, [], [[]], [1.5], ["a"], [None], [1] * 10_000, {}, {"a": 1}, True, 1.5]
GONE = object()
# The altered values that are those of another model that makes sense, for each key of the toy's.
SENSIBLE = {
    "format": [1, 2],
    "mllm.vocab_size": [1, 2], "mllm.dim": [1, 2], "mllm.mlp_dim": [1, 2],
    "mllm.n_head": [2], "mllm.n_kv_head": [1, 2],
    "mllm.rope_theta": [2, 1e9, 10 ** 9, 1.5],
    "mllm.vision.n_head": [1, 2], "mllm.vision.mlp_dim": [1, 2], "mllm.vision.patch": [1, 2],
    "mllm.vision.frames": [1, 2], "mllm.vision.merge": [1, 2], "mllm.vision.full_attention": [[]],
    "dit.n_layer": [1, 2], "dit.head_dim": [1, 2], "dit.cross_n_head": [1, 2],
    "dit.mlp_ratio": [1, 2, 1.5], "dit.caption_dim": [1, 2],
    "dcae.attention_stages": [0, 1, 2], "dcae.head_dim": [1, 2], "dcae.kernel": [1],
    "dcae.scaling_factor": [1, 2, 1.5],
    "n_query": [1, 2], "guidance": [0, 1, 2, 1.5],
    "image_guidance": [0, 1, 2, 1.5], "max_prompt": [1, 2],
}


def paths(found, prefix=()):
    """The path of each value, and of each section."""
    for key, value in found.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def altered(found, path, value):
    """A copy with another value at a path, or without it."""
    new = copy.deepcopy(found)
    section = new
    for key in path[:-1]:
        section = section[key]
    if value is GONE:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return new


def outcomes(found, read):
    """Yields (dotted path, value, what `read` made of it or its ValueError) for each path and each
    nasty value. Any other error is the test's."""
    for path in paths(found):
        for value in [*NASTY, GONE]:
            try:
                result = read(altered(found, path, value))
            except ValueError as e:
                result = e
            yield ".".join(path), value, result


def test_every_key_has_its_line():
    """Of the dataclasses and, but for the format, of the table: the same keys in the same order."""
    def keys(tree):
        return {key: keys(value) if isinstance(value, dict) else None
                for key, value in tree.items()}

    expected = keys(dataclasses.asdict(TBACConfig()))
    assert keys(CONFIG) == {"format": None} | expected
    assert TBACConfig().to_dict()["format"] == FORMAT
    known = {".".join(path) for path in paths(CONFIG)}
    assert {key for key, _, _ in RULES} <= known


def test_each_altered_value_is_refused_with_its_name():
    """Or is that of another model that makes sense; nothing ends in any other error."""
    found = list(outcomes(TOY, TBACConfig.from_dict))
    assert len(found) > 900
    passed = {}
    for path, value, result in found:
        if isinstance(result, TBACConfig):
            passed.setdefault(path, []).append(value)
            continue
        message = str(result)
        assert path in message, (path, value, message)
        assert re.search("expected|has no|unknown key|newer version|not a folder", message), message
        assert len(message) < 600, message
    # 1 == True, but True would not have been accepted.
    assert all(value is not True for values in passed.values() for value in values)
    assert passed == SENSIBLE


@torch.no_grad()
def use(config):
    """All of a model of these sizes, once."""
    model = TBAC(config, Tokenizer(TOY_FOLDER / "tokenizer.json"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    rungs = model.encode(["a red circle"], [[Image.new("RGB", (50, 40))]])
    side = 2 * config.dcae.factor
    x0 = model.dcae.encode(torch.zeros(1, 3, side, side))
    assert model.decode(model.velocity(x0, torch.ones(1), rungs))[0].size == (side, side)
    model.ask("what?", max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:prompt cut")
def test_what_is_accepted_works():
    """The rules between keys are all there: a model of any accepted sizes draws and answers."""
    # The tokenizer's ids need their table.
    for path in SENSIBLE.keys() - {"format", "mllm.vocab_size"}:
        use(TBACConfig.from_dict(altered(TOY, path.split("."), SENSIBLE[path][-1])))


@pytest.mark.parametrize("path, value", [
    ("mllm.n_head", 3), ("mllm.head_dim", 33), ("mllm.rope_sections", [2, 5, 8]),
    ("mllm.n_layer", 5), ("mllm.vision.dim", 100), ("mllm.vision.window", 24),
    ("mllm.vision.full_attention", [3, 1]), ("mllm.vision.full_attention", [1, 4]),
    ("mllm.vision.area", 255), ("dit.cross_n_head", 5), ("dit.channels", 8),
    ("dit.mlp_ratio", 0.005), ("dcae.encoder_layers", [1, 1, 1]), ("dcae.decoder_layers", [1]),
    ("dcae.attention_stages", 5), ("dcae.widths", [16, 32, 64, 96]),
    ("dcae.widths", [8, 64, 64, 128]), ("dcae.head_dim", 24), ("dcae.kernel", 4), ("size", 60),
])
def test_keys_that_do_not_fit_each_other(path, value):
    """Each value makes sense by itself."""
    with pytest.raises(ValueError, match=r"config.json: [\w.]+ = .*, expected"):
        TBACConfig.from_dict(altered(TOY, path.split("."), value))


def test_a_model_built_in_python_obeys_the_same_rules():
    config = TBACConfig.from_dict(TOY)
    wrong = dataclasses.replace(config, dit=dataclasses.replace(config.dit, channels=4))
    with pytest.raises(ValueError, match="dit.channels = 4, expected dcae.latent_channels"):
        TBAC(wrong)


def test_a_config_of_format_1_means_what_it_meant():
    """Its ladder has one connector; with the number of today it would lack that line."""
    old = {key: value for key, value in TOY.items() if key != "connector"}
    assert TBACConfig.from_dict(old | dict(format=1)) == TBACConfig.from_dict(TOY)
    with pytest.raises(ValueError, match="has no connector"):
        TBACConfig.from_dict(old)


@pytest.mark.parametrize("change, message", [
    (dict(format=FORMAT + 1), f"format {FORMAT + 1}, .* use a newer version"),
    (dict(format=GONE), '"format": 1'),
    (dict(dit=GONE), "not a folder of this project"),
    (dict(n_qury=3), "unknown key 'n_qury': is n_query meant"),
    (dict(x=3), "unknown key 'x': known are format, mllm"),
    (dict(mllm=3), r"mllm = 3, expected an object"),
    (dict(dtype="float31"), "'float31', expected one of float32"),
    (dict(wiring="spiral"), "'spiral', expected one of ladder, final"),
])
def test_a_config_of_something_else(tmp_path, change, message):
    config = {key: value for key, value in (TOY | change).items() if value is not GONE}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        TBAC.load(tmp_path)


def test_a_model_of_a_billion_layers_is_not_begun():
    config = altered(TOY, ("mllm", "n_layer"), 10 ** 9)
    with pytest.raises(ValueError, match=f"mllm.n_layer = 1000000000, .* to {MAX_LAYERS}"):
        TBACConfig.from_dict(config)


# -------------------------------------------------------------------------------- the JSON itself

@pytest.mark.parametrize("content, message", [
    (b"[" * 200_000, "brackets within brackets"),
    (b'{"a":' * 200_000, "brackets within brackets"),
    (b'{"a": 1, "a": 2}', "'a' stands there twice"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"{", "not JSON"),
    (b"1" * 5000, "not JSON"),
    (b"", "not JSON"),
])
def test_json_that_is_damaged_is_named(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is .*{message}"):
        read_json(file)


def test_json_as_deep_as_it_may_be():
    """Brackets in text do not count, nor those that are closed again."""
    deep = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(f'{{"[[{{ \\" [": 1, "b": [{"[]," * 100}[]]}}', "it")["b"] == [[]] * 101
    assert parse_json(deep, "it")
    with pytest.raises(ValueError, match="it is not JSON: more than"):
        parse_json(f"[{deep}]", "it")


@pytest.mark.parametrize("part", ['"k{}": 1,', '\\"', "[],", "[[[]]],"])
def test_hostile_json_takes_time_in_proportion(part):
    """A megabyte of quotes or keys, never closed: some read each byte anew from each of them."""
    begin = time.monotonic()
    text = "".join(part.format(i) for i in range(2 ** 20 // len(part)))
    for start, end in (("{", '"k7": 2'), ('{"', ""), ("[", "")):
        with pytest.raises(ValueError, match="it is not JSON"):
            parse_json(start + text + end, "it")
    assert time.monotonic() - begin < 20


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    """It takes no room on the disk: all of it is a hole."""
    file = tmp_path / "config.json"
    with open(file, "wb") as f:
        f.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match=f"{file} has {MAX_JSON_BYTES + 1} bytes, expected at"):
        read_json(file)


def test_messages_are_cut_and_escaped():
    assert shown("a\x1b[2J") == r"'a\x1b[2J'"
    assert len(shown("x" * 10 ** 6)) < 300


# ------------------------------------------------------------------------------ the public configs

# File -> the keys that are read.
PUBLIC = {
    "qwen/config.json": [*QWEN_CONFIG.values(), *QWEN_VISION_CONFIG.values(), "model_type",
                         "tie_word_embeddings", "rms_norm_eps", "hidden_act", "use_sliding_window",
                         "vision_config.hidden_act"],
    "sana/transformer/config.json": [*SANA_CONFIG.values(), "patch_size", "qk_norm",
                                     "timestep_scale", "sample_size", "attention_bias",
                                     "norm_elementwise_affine", "norm_eps", "out_channels",
                                     "cross_attention_dim", "guidance_embeds",
                                     "interpolation_scale"],
    "sana/vae/config.json": [*DC_AE_CONFIG.values(), "encoder_block_types", "decoder_act_fns",
                             "decoder_block_types", "encoder_qkv_multiscales",
                             "decoder_qkv_multiscales", "decoder_block_out_channels",
                             "upsample_block_type", "decoder_norm_types"],
    "tbac/config.json": [*RELEASED_CONFIG.values(), "model_type", "vae_downsample_f",
                         "architectures", "loss_type", "in_channels", "input_size"],
}


@pytest.fixture
def public(tmp_path):
    """Copies of the public configs, and a function that reads them."""
    for name in PUBLIC:
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copyfile(TINY / name, tmp_path / name)
    return tmp_path, lambda: read_config(*(tmp_path / name for name in ("qwen", "sana", "tbac")))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configs_are_checked_in_the_same_way(public, name):
    """An altered value is refused, is not read at all, or is that of another model."""
    folder, read = public
    whole = read()
    found = json.loads((folder / name).read_text())

    def read_altered(content):
        (folder / name).write_text(json.dumps(content))
        return read()

    refused = set()
    for path, value, result in outcomes(found, read_altered):
        if isinstance(result, ValueError):
            refused.add(path)
            assert str(folder) in str(result) and len(str(result)) < 600
        elif result != whole:
            assert value in (1, 2, 1.5, 1e9, []) and value is not True, (path, value)
    assert set(PUBLIC[name]) <= refused, set(PUBLIC[name]) - refused


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", "{", "[" * 200_000])
def test_public_configs_of_something_else(public, name, content):
    folder, read = public
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=str(folder / name)):
        read()


def test_what_a_key_means_when_it_is_missing(public):
    """Not what this code happens to build: an untied head, another epsilon and other shortcuts are
    the public libraries' defaults."""
    folder, read = public
    for name, key in (("qwen/config.json", "tie_word_embeddings"),
                      ("qwen/config.json", "rms_norm_eps"),
                      ("sana/vae/config.json", "downsample_block_type"),
                      ("tbac/config.json", "num_metaqueries")):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(altered(found, (key,), GONE)))
        with pytest.raises(ValueError, match=f"{folder / name} has no {key}"):
            read()
        (folder / name).write_text(json.dumps(found))
    found = json.loads((folder / "sana/transformer/config.json").read_text())
    # As in folders from before these keys.
    for key in ("qk_norm", "guidance_embeds", "interpolation_scale", "timestep_scale"):
        del found[key]
    whole = read()
    (folder / "sana/transformer/config.json").write_text(json.dumps(found))
    assert read() == whole


# Where the tiny checkpoint has what this code has by default: literally, not from the tables.
ARRIVES = [
    ("qwen/config.json", "rope_theta", 5e5, "mllm.rope_theta"),
    ("qwen/config.json", "vision_config.patch_size", 7, "mllm.vision.patch"),
    ("qwen/config.json", "vision_config.temporal_patch_size", 1, "mllm.vision.frames"),
    ("qwen/config.json", "vision_config.spatial_merge_size", 1, "mllm.vision.merge"),
    ("qwen/config.json", "vision_config.window_size", 56, "mllm.vision.window"),
    ("sana/transformer/config.json", "mlp_ratio", 3.0, "dit.mlp_ratio"),
    ("sana/vae/config.json", "attention_head_dim", 16, "dcae.head_dim"),
    ("sana/vae/config.json", "scaling_factor", 0.5, "dcae.scaling_factor"),
    ("tbac/config.json", "max_input_text_tokens", 77, "max_prompt"),
]


@pytest.mark.parametrize("name, key, value, ours", ARRIVES)
def test_a_public_value_arrives_in_its_place(public, name, key, value, ours):
    folder, read = public
    whole = dataclasses.asdict(read())
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(altered(found, key.split("."), value)))
    assert dataclasses.asdict(read()) == altered(whole, ours.split("."), value)
