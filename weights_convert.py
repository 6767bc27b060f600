"""Public weights to ours and back, strict both ways: every tensor of the source has a place here, and every place is filled.

    python weights_convert.py --qwen DIR --sana DIR --tbac DIR --out DIR       the released model
    python weights_convert.py --qwen DIR --sana DIR --out DIR                  a fresh ladder between the public backbones
    python weights_convert.py --export DIR --out DIR                           ours to the released checkpoint's layout

DIR: a Hugging Face folder of Qwen2.5-VL (config.json, tokenizer.json; its weights only without --tbac), a diffusers folder of SANA
(transformer/, vae/), the released TBAC-UniImage checkpoint. Tensors pass through one at a time, so memory stays near one shard.
"""
import argparse
import json
import pathlib
import re
import shutil
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dcae import DCAEConfig
from dit import DiTConfig
from mllm import MLLMConfig, Tokenizer
from tbac import TBAC, TBACConfig, expect, read_json, read_tensors, replacing, weight_files, write_shards
from vit import ViTConfig

# Our module (or parameter) -> the public one. A {} is an index, the same on both sides.
QWEN = {
    "embed": "model.embed_tokens", "norm": "model.norm", "vision.patch_embed": "visual.patch_embed.proj",
    **{f"layers.{{}}.{a}": f"model.layers.{{}}.{b}" for a, b in {
        "norm1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
        "attn.out": "self_attn.o_proj", "norm2": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}.items()},
    **{f"vision.blocks.{{}}.{a}": f"visual.blocks.{{}}.{b}" for a, b in {
        "norm1": "norm1", "attn.qkv": "attn.qkv", "attn.out": "attn.proj", "norm2": "norm2",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}.items()},
    "vision.merger.norm": "visual.merger.ln_q", "vision.merger.fc1": "visual.merger.mlp.0", "vision.merger.fc2": "visual.merger.mlp.2",
}
SANA = {
    "patch_embed": "patch_embed.proj", "time_embed.fc1": "time_embed.emb.timestep_embedder.linear_1",
    "time_embed.fc2": "time_embed.emb.timestep_embedder.linear_2", "time_embed.modulation": "time_embed.linear",
    "caption.0": "caption_projection.linear_1", "caption.2": "caption_projection.linear_2", "caption.3": "caption_norm",
    **{f"blocks.{{}}.{a}": f"transformer_blocks.{{}}.{b}" for a, b in {
        "modulation": "scale_shift_table", "attn.q": "attn1.to_q", "attn.k": "attn1.to_k", "attn.v": "attn1.to_v", "attn.out": "attn1.to_out.0",
        "cross.q": "attn2.to_q", "cross.k": "attn2.to_k", "cross.v": "attn2.to_v", "cross.out": "attn2.to_out.0",
        "ffn.inverted": "ff.conv_inverted", "ffn.depth": "ff.conv_depth", "ffn.point": "ff.conv_point"}.items()},
    "modulation": "scale_shift_table", "proj_out": "proj_out",
}
DC_AE = {
    **{f"{half}.stages.{{}}.{{}}.{a}": f"{half}.{stages}.{{}}.{{}}.{b}" for half, stages in (("encoder", "down_blocks"), ("decoder", "up_blocks"))
       for a, b in {
           "conv": "conv", "conv1": "conv1", "conv2": "conv2", "norm": "norm",
           "attn.q": "attn.to_q", "attn.k": "attn.to_k", "attn.v": "attn.to_v", "attn.near": "attn.to_qkv_multiscale.0.proj_in",
           "attn.mix": "attn.to_qkv_multiscale.0.proj_out", "attn.out": "attn.to_out", "attn.norm": "attn.norm_out",
           "mlp.widen": "conv_out.conv_inverted", "mlp.depthwise": "conv_out.conv_depth", "mlp.narrow": "conv_out.conv_point",
           "mlp.norm": "conv_out.norm"}.items()},
    **{n: n for n in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.norm_out", "decoder.conv_out")},
}
CONNECTOR = {"connector.0": "0", "connector.2": "2", "connector.3": "3"}
PARTS = {"mllm": ("model.mllm_backbone.", QWEN), "ladder": ("model.connector.", CONNECTOR),
         "dit": ("model.transformer.", SANA), "dcae": ("vae.", DC_AE)}
IGNORED = {"lm_head.weight": "the language head is the embedding table itself (tied)"}


def public_name(name, templates):
    """One of our tensor names -> its public name, by the template of the parameter itself or of its module."""
    indexes, template = re.findall(r"(?<=\.)\d+(?=\.)", name), re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
    for n, kept in ((name, []), (template, indexes)):
        module, _, leaf = n.rpartition(".")
        if n in templates:
            return templates[n].format(*kept)
        if module in templates:
            return f"{templates[module].format(*kept)}.{leaf}"
    raise ValueError(f"no public name for {name}")


def public_names(model, part, prefix=None):
    """{public name: our full name} of one part of a model. The queries have none: they are rows of the embedding table."""
    released, templates = PARTS[part]
    prefix = released if prefix is None else prefix
    return {prefix + public_name(n, templates): f"{part}.{n}" for n in getattr(model, part).state_dict() if n != "queries"}


def to_ours(name, t, config):
    """Yields (our name, tensor): the same tensor but for two. Rows above the vocabulary are the queries (two more are unused),
    and a convolution that never overlaps is a linear layer."""
    if name == "mllm.embed.weight":
        vocab, last = config.mllm.vocab_size, config.mllm.vocab_size + config.n_query
        yield name, t[:vocab]
        if len(t) > vocab:
            yield "ladder.queries", t[vocab:last]
    else:
        yield name, t.flatten(1) if name == "mllm.vision.patch_embed.weight" else t


# ------------------------------------------------------------------------------------------------------------- configs

def must_be(d, file, **expected):
    for key, value in expected.items():
        if d.get(key, value) != value:
            raise ValueError(f"{file}: {key} = {d[key]!r} is not supported, only {value!r}")


def read_config(qwen, sana, tbac=None):
    """The public config files -> TBACConfig. ValueError for anything that this code does not build."""
    try:
        return config_of(qwen, sana, tbac)
    except KeyError as e:
        raise ValueError(f"a config.json of {qwen}, {sana} or {tbac} has no {e}") from None


def config_of(qwen, sana, tbac):
    m = read_json(qwen / "config.json")
    m |= m.pop("text_config", {}) | dict(model_type=m["model_type"])        # newer files keep the decoder's part there
    must_be(m, "qwen config", model_type="qwen2_5_vl", tie_word_embeddings=True, use_sliding_window=False, rms_norm_eps=1e-6)
    v, heads = m["vision_config"], m["num_attention_heads"]
    vision = ViTConfig(n_layer=v["depth"], dim=v["hidden_size"], n_head=v["num_heads"], mlp_dim=v["intermediate_size"], patch=v["patch_size"],
                       frames=v["temporal_patch_size"], merge=v["spatial_merge_size"], window=v["window_size"],
                       full_attention=tuple(v["fullatt_block_indexes"]), area=256 * 28 * 28)
    mllm = MLLMConfig(vocab_size=m["vocab_size"], n_layer=m["num_hidden_layers"], dim=m["hidden_size"], n_head=heads,
                      n_kv_head=m["num_key_value_heads"], head_dim=m["hidden_size"] // heads, mlp_dim=m["intermediate_size"],
                      rope_theta=m["rope_theta"], rope_sections=tuple(m["rope_scaling"]["mrope_section"]), vision=vision)
    d = read_json(sana / "transformer" / "config.json")
    must_be(d, "sana transformer config", patch_size=1, attention_bias=False, qk_norm=None, guidance_embeds=False, interpolation_scale=None,
            timestep_scale=1.0, norm_elementwise_affine=False, norm_eps=1e-6, out_channels=d["in_channels"],
            cross_attention_dim=d["num_attention_heads"] * d["attention_head_dim"])
    dit = DiTConfig(n_layer=d["num_layers"], n_head=d["num_attention_heads"], head_dim=d["attention_head_dim"],
                    cross_n_head=d["num_cross_attention_heads"], mlp_ratio=d["mlp_ratio"], channels=d["in_channels"],
                    caption_dim=d["caption_channels"])
    a = read_json(sana / "vae" / "config.json")
    widths, inner = a["encoder_block_out_channels"], a["encoder_block_types"].count("EfficientViTBlock")
    kinds = ["ResBlock"] * (len(widths) - inner) + ["EfficientViTBlock"] * inner
    scales = [[]] * (len(widths) - inner) + [[5]] * inner
    must_be(a, "sana vae config", encoder_block_types=kinds, decoder_block_types=kinds, encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales, decoder_block_out_channels=widths, downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu")
    dcae = DCAEConfig(widths=tuple(widths), encoder_layers=tuple(a["encoder_layers_per_block"]),
                      decoder_layers=tuple(a["decoder_layers_per_block"]), attention_stages=inner, latent_channels=a["latent_channels"],
                      head_dim=a["attention_head_dim"], scaling_factor=a["scaling_factor"])
    t = read_json(tbac / "config.json") if tbac else {}
    return TBACConfig(mllm=mllm, dit=dit, dcae=dcae, n_query=t.get("num_metaqueries", 64), size=d["sample_size"] * dcae.factor,
                      max_prompt=t.get("max_input_text_tokens", 256))


# ---------------------------------------------------------------------------------------------------------- conversion

def source_tensors(qwen, sana, tbac, model):
    """Yields (file, public name, tensor, our name or None if the name is unknown), from the released checkpoint or the backbones."""
    whole = [(tbac, {k: v for part in PARTS for k, v in public_names(model, part).items()})]
    parts = [(qwen, public_names(model, "mllm", "")), (sana / "transformer", public_names(model, "dit", "")),
             (sana / "vae", public_names(model, "dcae", ""))]
    for folder, names in whole if tbac else parts:
        for file in weight_files(folder):
            for name, t in read_tensors(file):
                if name not in IGNORED:
                    yield file, name, t, names.get(name)


def convert(qwen, sana, tbac, out, dtype=None, seed=0):
    """Public folders -> a folder that TBAC.load reads. dtype: torch.dtype, default as stored. -> TBACConfig."""
    config = read_config(qwen, sana, tbac)
    with torch.device("meta"):
        model = TBAC(config)
    left = model.state_dict()

    def tensors():
        for file, public, t, ours in source_tensors(qwen, sana, tbac, model):
            for name, piece in to_ours(ours, t, config):
                expect(left, name, piece, file, public)
                yield name, piece.to(dtype)
        if not tbac:
            ladder = config.ladder()
            ladder.init_weights(torch.Generator().manual_seed(seed))
            for name, t in ladder.state_dict(prefix="ladder.").items():
                del left[name]
                yield name, t.to(dtype)
        if left:
            raise ValueError(f"{tbac or f'{qwen}, {sana}'}: {len(left)} tensors are missing, the first ones {list(left)[:3]}")
    if not (qwen / "tokenizer.json").is_file():
        raise ValueError(f"{qwen} has no tokenizer.json")
    Tokenizer(qwen / "tokenizer.json")
    with replacing(out) as new:
        write_shards(new, tqdm(tensors(), "convert", len(left), mininterval=1))
        with safe_open(weight_files(new)[0], "pt") as f:
            stored = f.get_tensor(next(iter(f.keys()))).dtype
        shutil.copyfile(qwen / "tokenizer.json", new / "tokenizer.json")
        (new / "config.json").write_text(json.dumps(asdict(config) | {"dtype": str(stored).removeprefix("torch.")}, indent=1))
    return config


def export(folder, out, dtype=None):
    """A folder of ours -> the released layout: shards, index, and the config entries that TBAC-UniImage's code reads."""
    config = TBACConfig.from_dict(read_json(folder / "config.json"))
    if config.wiring != "top":
        raise ValueError(f"{folder} has a ladder wired as {config.wiring!r}; the released code knows the paper's only")
    with torch.device("meta"):
        model = TBAC(config)
    public = {ours: name for part in PARTS for name, ours in public_names(model, part).items()}
    queries = []
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            queries += [f.get_tensor("ladder.queries")] if "ladder.queries" in set(f.keys()) else []
    if len(queries) != 1:
        raise ValueError(f"{folder} has no ladder.queries")
    v = config.mllm.vision

    def tensors():
        for file in weight_files(folder):
            for name, t in read_tensors(file):
                if name == "ladder.queries":                                    # they go into the table
                    continue
                if name not in public:
                    raise ValueError(f"{file}: tensor {name} has no public name, or stands there twice")
                if name == "mllm.embed.weight":
                    t = torch.cat([t, queries[0].to(t.dtype), t.new_zeros(2, t.shape[1])])          # the released table's two unused rows
                if name == "mllm.vision.patch_embed.weight":
                    t = t.view(-1, 3, v.frames, v.patch, v.patch)
                yield public.pop(name), t.to(dtype)
        if public:
            raise ValueError(f"{folder}: {len(public)} tensors are missing, the first ones {list(public)[:3]}")
    with replacing(out) as new:
        where = write_shards(new, tqdm(tensors(), "export", len(public), mininterval=1))
        (new / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))
        facts = {"model_type": "tbacuniimage", "architectures": ["TBACUniImage"], "loss_type": "flow", "num_metaqueries": config.n_query,
                 "max_input_text_tokens": config.max_prompt, "in_channels": config.dit.channels,
                 "input_size": config.size // config.dcae.factor, "vae_downsample_f": config.dcae.factor}
        (new / "config.json").write_text(json.dumps(facts, indent=1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--qwen", "--sana", "--tbac", "--export", "--out"):
        p.add_argument(name, type=pathlib.Path, metavar="DIR", required=name == "--out")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="store tensors so (default: as they are)")
    a = p.parse_args()
    if not a.export and not (a.qwen and a.sana):
        p.error("give --qwen and --sana (and --tbac for the released weights), or --export")
    dtype = a.dtype and getattr(torch, a.dtype)
    try:
        if any(folder and folder.resolve() == a.out.resolve() for folder in (a.qwen, a.sana, a.tbac, a.export)):
            raise ValueError(f"--out {a.out} is one of the folders to read, and would be lost: give another one")
        if a.export:
            export(a.export, a.out, dtype)
        else:
            convert(a.qwen, a.sana, a.tbac, a.out, dtype)
    except (ValueError, OSError, SafetensorError) as e:
        raise SystemExit(f"error: {e}") from None
    print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
