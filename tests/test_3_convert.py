"""Conversion is strict both ways, streams, and comes back bit for bit."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.files import read_tensors, weight_files
from tbac import TBAC
from tests.conftest import TINY, run
from weights_convert import convert, export, read_config


def tensors(folder):
    found = {}
    for file in weight_files(folder):
        found |= dict(read_tensors(file))
    return found


def test_round_trip_is_bit_identical(tiny_folder, tmp_path):
    done = run("weights_convert.py", "--export", tiny_folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    there = tensors(TINY / "tbac")
    back = tensors(tmp_path)
    assert there.keys() == back.keys()
    for name, t in there.items():
        assert t.shape == back[name].shape
        assert t.dtype == back[name].dtype
        if name.endswith("embed_tokens.weight"):
            # 512 tokens and 8 queries; nothing reads the two rows after them.
            assert torch.equal(t[:520], back[name][:520]), name
        else:
            assert torch.equal(t, back[name]), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == back.keys()
    assert {f.name for f in weight_files(tmp_path)} == set(index.values())
    assert json.loads((tmp_path / "config.json").read_text())["num_metaqueries"] == 8


def test_a_source_is_not_lost_to_the_result(tiny_folder, tmp_path):
    shutil.copytree(TINY / "tbac", tmp_path / "tbac")
    shutil.copytree(tiny_folder, tmp_path / "ours")
    public = ("--qwen", TINY / "qwen", "--sana", TINY / "sana", "--tbac", tmp_path / "tbac")
    for args in ((*public, "--out", tmp_path / "tbac"),
                 ("--export", tmp_path / "ours", "--out", tmp_path / "tbac" / ".." / "ours")):
        done = run("weights_convert.py", *args)
        assert done.returncode == 1
        assert "one of the folders to read" in done.stderr
    assert tensors(tmp_path / "tbac").keys() == tensors(TINY / "tbac").keys()
    assert tensors(tmp_path / "ours").keys() == tensors(tiny_folder).keys()


def test_an_export_reads_one_folder(tiny_folder, tmp_path):
    for part in ("--qwen", "--sana", "--tbac"):
        done = run("weights_convert.py", "--export", tiny_folder, part, TINY / part.strip("-"),
                   "--out", tmp_path / "out")
        assert done.returncode == 2 and "--export reads one folder" in done.stderr
        assert not (tmp_path / "out").exists()


def test_export_knows_the_released_wiring_only(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "ours")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | dict(wiring="final")))
    with pytest.raises(ValueError, match="wired as 'final'"):
        export(tmp_path / "ours", tmp_path / "out")
    own = config | dict(connector="per-block")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="connector per-block"):
        export(tmp_path / "ours", tmp_path / "out")
    export(tiny_folder, tmp_path / "half", torch.bfloat16)
    assert {t.dtype for t in tensors(tmp_path / "half").values()} == {torch.bfloat16}
    for file in weight_files(tmp_path / "half"):
        assert file.stat().st_mode & 0o444 == 0o444


def test_fresh_ladder_on_the_public_backbones(tiny_folder, tmp_path):
    """The Qwen and SANA folders alone: backbones as they are, queries and connector new. The hub's
    second copies in half precision lie beside SANA's weights."""
    shutil.copytree(TINY / "qwen", tmp_path / "qwen")
    shutil.copytree(TINY / "sana", tmp_path / "sana")
    for file in (tmp_path / "sana").glob("*/*.safetensors"):
        shutil.copyfile(file, file.with_suffix(".fp16.safetensors"))
    prefix = "model.mllm_backbone."
    qwen = {}
    for name, t in tensors(TINY / "tbac").items():
        if name.startswith(prefix):
            qwen[name.removeprefix(prefix)] = t
    table = qwen["model.embed_tokens.weight"][:512]
    qwen["model.embed_tokens.weight"] = table.clone()
    # Tied: ignored with that reason.
    qwen["lm_head.weight"] = table.clone()
    save_file(qwen, tmp_path / "qwen" / "model.safetensors")

    done = run("weights_convert.py", "--qwen", tmp_path / "qwen", "--sana", tmp_path / "sana",
               "--out", tmp_path / "a", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    model = TBAC.load(tmp_path / "a")
    released = TBAC.load(tiny_folder)
    assert model.dit.proj_out.weight.dtype == torch.bfloat16
    assert model.config.n_query == 64
    assert torch.equal(model.mllm.embed_tokens.weight,
                       released.mllm.embed_tokens.weight.bfloat16())
    scale = torch.full((48,), 5.5 ** 0.5).bfloat16()
    assert torch.equal(model.ladder.connector[3].weight.float(), scale.float())
    assert model.encode(["a dog"]).shape == (4, 1, 64, 48)


def damaged(tmp_path, change):
    """A copy of the released layout, one tensor file changed by `change(tensors)`."""
    shutil.copytree(TINY / "tbac", tmp_path / "tbac")
    file = weight_files(tmp_path / "tbac")[1]
    found = load_file(file)
    change(found)
    save_file(found, file)
    return tmp_path / "tbac"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("vae.decoder.conv_out.bias"), "missing.*dcae.decoder.conv_out.bias"),
    (lambda t: t.update(extra=torch.zeros(2)), "tensor 'extra' is not part"),
    (lambda t: t.update({"vae.decoder.conv_out.bias": torch.zeros(4)}),
     r"conv_out.bias has shape \(4,\), expected \(3,\)"),
    (lambda t: t["vae.decoder.conv_out.bias"].fill_(float("nan")),
     "conv_out.bias has values that are not finite"),
])
def test_bad_tensors_are_named_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert(TINY / "qwen", TINY / "sana", damaged(tmp_path, change), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_config_that_is_not_built_here_is_refused(tmp_path):
    shutil.copytree(TINY / "sana", tmp_path / "sana")
    file = tmp_path / "sana" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"qk_norm": "rms_norm_across_heads"}))
    with pytest.raises(ValueError, match="qk_norm"):
        convert(TINY / "qwen", tmp_path / "sana", TINY / "tbac", tmp_path / "out")


def test_the_decoder_may_have_a_config_of_its_own(tmp_path):
    """As newer files have it; and a file that lacks something is named."""
    flat = json.loads((TINY / "qwen" / "config.json").read_text())
    common = ("model_type", "vision_config", "tie_word_embeddings")
    own = {k: v for k, v in flat.items() if k not in common}
    nested = {k: flat[k] for k in common if k in flat}
    nested["text_config"] = own | dict(model_type="qwen2_5_vl_text")
    (tmp_path / "config.json").write_text(json.dumps(nested))
    read = lambda qwen: read_config(qwen, TINY / "sana", TINY / "tbac")
    assert read(tmp_path) == read(TINY / "qwen")
    del own["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(nested | dict(text_config=own)))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*num_attention_heads"):
        read(tmp_path)
