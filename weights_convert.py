"""Public weights to ours and back, strict both ways: every tensor of the source has a place here,
and every place is filled.

    python weights_convert.py --qwen DIR --sana DIR --tbac DIR --out DIR  the released model
    python weights_convert.py --qwen DIR --sana DIR --out DIR             backbones, a new ladder
    python weights_convert.py --export DIR --out DIR                      back to released layout

DIR: a Hugging Face folder of Qwen2.5-VL (config.json, tokenizer.json; its weights only without
--tbac), a diffusers folder of SANA (transformer/, vae/), the released TBAC-UniImage checkpoint.
Tensors pass through one at a time, so memory stays near one shard.
"""
import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dcae import DCAEConfig
from dit import DiTConfig
from engine.files import (
    check_tensor,
    read_json,
    read_tensors,
    replacing,
    weight_files,
    write_shards,
)
from mllm import MLLMConfig, Tokenizer
from tbac import TBAC, TBACConfig
from vit import ViTConfig

# ---------------------------------------------------------------------------- the map of names
#
# One line for each module (or single parameter): our name, then the public one. A {} stands for an
# index (of a layer, a block, a stage), the same on both sides. The tensors of a module, such as
# weight and bias, are called the same on both sides. An example, a tensor of the MLLM's layer 7:
#
#     layers.7.attn.q.weight   <->   model.layers.7.self_attn.q_proj.weight

QWEN = {
    "embed_tokens":                   "model.embed_tokens",
    "layers.{}.norm1":                "model.layers.{}.input_layernorm",
    "layers.{}.attn.q":               "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k":               "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v":               "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.out":             "model.layers.{}.self_attn.o_proj",
    "layers.{}.norm2":                "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate":             "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up":               "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down":             "model.layers.{}.mlp.down_proj",
    "norm":                           "model.norm",

    "vision.patch_embed":             "visual.patch_embed.proj",
    "vision.blocks.{}.norm1":         "visual.blocks.{}.norm1",
    "vision.blocks.{}.attn.qkv":      "visual.blocks.{}.attn.qkv",
    "vision.blocks.{}.attn.out":      "visual.blocks.{}.attn.proj",
    "vision.blocks.{}.norm2":         "visual.blocks.{}.norm2",
    "vision.blocks.{}.mlp.gate":      "visual.blocks.{}.mlp.gate_proj",
    "vision.blocks.{}.mlp.up":        "visual.blocks.{}.mlp.up_proj",
    "vision.blocks.{}.mlp.down":      "visual.blocks.{}.mlp.down_proj",
    "vision.merger.norm":             "visual.merger.ln_q",
    "vision.merger.fc1":              "visual.merger.mlp.0",
    "vision.merger.fc2":              "visual.merger.mlp.2",
}

SANA = {
    "patch_embed":                    "patch_embed.proj",
    "time_embed.fc1":                 "time_embed.emb.timestep_embedder.linear_1",
    "time_embed.fc2":                 "time_embed.emb.timestep_embedder.linear_2",
    "time_embed.modulation":          "time_embed.linear",
    "caption.0":                      "caption_projection.linear_1",
    "caption.2":                      "caption_projection.linear_2",
    "caption.3":                      "caption_norm",
    "blocks.{}.scale_shift_table":    "transformer_blocks.{}.scale_shift_table",
    "blocks.{}.attn.q":               "transformer_blocks.{}.attn1.to_q",
    "blocks.{}.attn.k":               "transformer_blocks.{}.attn1.to_k",
    "blocks.{}.attn.v":               "transformer_blocks.{}.attn1.to_v",
    "blocks.{}.attn.out":             "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.cross.q":              "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross.k":              "transformer_blocks.{}.attn2.to_k",
    "blocks.{}.cross.v":              "transformer_blocks.{}.attn2.to_v",
    "blocks.{}.cross.out":            "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.ffn.inverted":         "transformer_blocks.{}.ff.conv_inverted",
    "blocks.{}.ffn.depthwise":        "transformer_blocks.{}.ff.conv_depth",
    "blocks.{}.ffn.pointwise":        "transformer_blocks.{}.ff.conv_point",
    "scale_shift_table":              "scale_shift_table",
    "proj_out":                       "proj_out",
}

# A block of the autoencoder, the same in both halves.
DC_AE_BLOCK = {
    "conv":                           "conv",
    "conv1":                          "conv1",
    "conv2":                          "conv2",
    "norm":                           "norm",
    "attn.q":                         "attn.to_q",
    "attn.k":                         "attn.to_k",
    "attn.v":                         "attn.to_v",
    "attn.near":                      "attn.to_qkv_multiscale.0.proj_in",
    "attn.mix":                       "attn.to_qkv_multiscale.0.proj_out",
    "attn.out":                       "attn.to_out",
    "attn.norm":                      "attn.norm_out",
    "mlp.widen":                      "conv_out.conv_inverted",
    "mlp.depthwise":                  "conv_out.conv_depth",
    "mlp.narrow":                     "conv_out.conv_point",
    "mlp.norm":                       "conv_out.norm",
}
DC_AE = {
    "encoder.conv_in":                "encoder.conv_in",
    "encoder.conv_out":               "encoder.conv_out",
    "decoder.conv_in":                "decoder.conv_in",
    "decoder.norm_out":               "decoder.norm_out",
    "decoder.conv_out":               "decoder.conv_out",
    **{"encoder.stages.{}.{}." + ours: "encoder.down_blocks.{}.{}." + public
       for ours, public in DC_AE_BLOCK.items()},
    **{"decoder.stages.{}.{}." + ours: "decoder.up_blocks.{}.{}." + public
       for ours, public in DC_AE_BLOCK.items()},
}

CONNECTOR = {
    "connector.0":                    "0",
    "connector.2":                    "2",
    "connector.3":                    "3",
}

# Part of our model -> its prefix in the released checkpoint, its map.
PARTS = {
    "mllm":   ("model.mllm_backbone.", QWEN),
    "ladder": ("model.connector.", CONNECTOR),
    "dit":    ("model.transformer.", SANA),
    "dcae":   ("vae.", DC_AE),
}
IGNORED = {"lm_head.weight": "the language head is the embedding table itself (tied)"}


def public_name(name: str, templates: dict[str, str]) -> str:
    """One of our tensor names -> its public name, by the line of the parameter itself or of its
    module. ValueError if the map has neither."""
    index = r"(?<=\.)\d+(?=\.)"
    indexes = re.findall(index, name)
    template = re.sub(index, "{}", name)
    # First the name as it is, for lines that spell an index out ("caption.0"); then with {}.
    for key, kept in ((name, []), (template, indexes)):
        if key in templates:
            return templates[key].format(*kept)
        module, _, leaf = key.rpartition(".")
        if module in templates:
            return templates[module].format(*kept) + "." + leaf
    raise ValueError(f"no public name for {name}")


def public_names(model: TBAC, part: str, prefix: str | None = None) -> dict[str, str]:
    """{public name: our full name} of one part of a model. prefix: of the public names, default as
    in the released checkpoint. The queries have none: they are rows of the embedding table."""
    released, templates = PARTS[part]
    prefix = released if prefix is None else prefix
    names = {}
    for name in getattr(model, part).state_dict():
        if name != "queries":
            names[prefix + public_name(name, templates)] = f"{part}.{name}"
    return names


# ------------------------------------------------------------------------------ public configs

def must_be(found: dict, file: Path, **expected) -> None:
    """ValueError where a config has another value than the one that this code builds."""
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise ValueError(f"{file}: {key} = {found[key]!r} is not supported, only {value!r}")


def read_config(qwen: Path, sana: Path, tbac: Path | None = None) -> TBACConfig:
    """The public config files -> TBACConfig. ValueError for anything that this code does not
    build."""
    try:
        mllm = mllm_config(qwen / "config.json")
        dit, latent_size = dit_config(sana / "transformer" / "config.json")
        dcae = dcae_config(sana / "vae" / "config.json")
        released = read_json(tbac / "config.json") if tbac else {}
    except KeyError as e:
        raise ValueError(f"a config.json of {qwen}, {sana} or {tbac} has no {e}") from None
    return TBACConfig(
        mllm=mllm,
        dit=dit,
        dcae=dcae,
        n_query=released.get("num_metaqueries", 64),
        size=latent_size * dcae.factor,
        max_prompt=released.get("max_input_text_tokens", 256),
    )


def mllm_config(file: Path) -> MLLMConfig:
    """Qwen2.5-VL's config.json."""
    c = read_json(file)
    # Newer files have the decoder's part in a section of its own, with its own model_type.
    c |= c.pop("text_config", {}) | {"model_type": c["model_type"]}
    must_be(c, file, model_type="qwen2_5_vl", tie_word_embeddings=True, use_sliding_window=False,
            rms_norm_eps=1e-6)
    v = c["vision_config"]
    vision = ViTConfig(
        n_layer=v["depth"],
        dim=v["hidden_size"],
        n_head=v["num_heads"],
        mlp_dim=v["intermediate_size"],
        patch=v["patch_size"],
        frames=v["temporal_patch_size"],
        merge=v["spatial_merge_size"],
        window=v["window_size"],
        full_attention=tuple(v["fullatt_block_indexes"]),
        area=256 * 28 * 28,
    )
    return MLLMConfig(
        vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"],
        dim=c["hidden_size"],
        n_head=c["num_attention_heads"],
        n_kv_head=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        rope_theta=c["rope_theta"],
        rope_sections=tuple(c["rope_scaling"]["mrope_section"]),
        vision=vision,
    )


def dit_config(file: Path) -> tuple[DiTConfig, int]:
    """SANA's transformer/config.json -> config, side of the latents that it was trained at."""
    c = read_json(file)
    must_be(c, file, patch_size=1, attention_bias=False, qk_norm=None, guidance_embeds=False,
            interpolation_scale=None, timestep_scale=1.0, norm_elementwise_affine=False,
            norm_eps=1e-6, out_channels=c["in_channels"],
            cross_attention_dim=c["num_attention_heads"] * c["attention_head_dim"])
    config = DiTConfig(
        n_layer=c["num_layers"],
        n_head=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        cross_n_head=c["num_cross_attention_heads"],
        mlp_ratio=c["mlp_ratio"],
        channels=c["in_channels"],
        caption_dim=c["caption_channels"],
    )
    return config, c["sample_size"]


def dcae_config(file: Path) -> DCAEConfig:
    """SANA's vae/config.json."""
    c = read_json(file)
    widths = c["encoder_block_out_channels"]
    inner = c["encoder_block_types"].count("EfficientViTBlock")
    outer = len(widths) - inner
    kinds = ["ResBlock"] * outer + ["EfficientViTBlock"] * inner
    scales = [[]] * outer + [[5]] * inner
    must_be(c, file, encoder_block_types=kinds, decoder_block_types=kinds,
            encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
            decoder_block_out_channels=widths, downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu")
    return DCAEConfig(
        widths=tuple(widths),
        encoder_layers=tuple(c["encoder_layers_per_block"]),
        decoder_layers=tuple(c["decoder_layers_per_block"]),
        attention_stages=inner,
        latent_channels=c["latent_channels"],
        head_dim=c["attention_head_dim"],
        scaling_factor=c["scaling_factor"],
    )


# ------------------------------------------------------------------------------ public to ours

def convert(qwen: Path, sana: Path, tbac: Path | None, out: Path,
            dtype: torch.dtype | None = None, seed: int = 0) -> TBACConfig:
    """Public folders -> a folder that TBAC.load reads. dtype: default as stored; seed: of a fresh
    ladder."""
    config = read_config(qwen, sana, tbac)
    with torch.device("meta"):
        model = TBAC(config)
    tokenizer = qwen / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{qwen} has no tokenizer.json")
    # ValueError now, not after hours, if it is another one than ours.
    Tokenizer(tokenizer)

    tensors = converted(qwen, sana, tbac, model, dtype, seed)
    with replacing(out) as new:
        write_shards(new, tqdm(tensors, "convert", len(model.state_dict()), mininterval=1))
        shutil.copyfile(tokenizer, new / "tokenizer.json")
        values = asdict(config) | {"dtype": stored_dtype(new)}
        (new / "config.json").write_text(json.dumps(values, indent=1))
    return config


def converted(qwen: Path, sana: Path, tbac: Path | None, model: TBAC,
              dtype: torch.dtype | None, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for every tensor of our model; a fresh ladder without `tbac`."""
    missing = model.state_dict()
    for file, public, tensor, ours in source_tensors(qwen, sana, tbac, model):
        for name, piece in to_ours(ours, tensor, model.config):
            check_tensor(missing, name, piece, file, public)
            yield name, piece.to(dtype or piece.dtype)
    if not tbac:
        ladder = model.config.build_ladder()
        ladder.init_weights(torch.Generator().manual_seed(seed))
        for name, tensor in ladder.state_dict(prefix="ladder.").items():
            del missing[name]
            yield name, tensor.to(dtype or tensor.dtype)
    if missing:
        raise ValueError(f"{tbac or f'{qwen}, {sana}'}: {len(missing)} tensors are missing, "
                         f"the first ones {list(missing)[:3]}")


def source_tensors(qwen: Path, sana: Path, tbac: Path | None,
                   model: TBAC) -> Iterator[tuple[Path, str, Tensor, str | None]]:
    """Yields (file, public name, tensor, our name or None if the name is unknown), from the
    released checkpoint or from the backbones."""
    if tbac:
        names = {}
        for part in PARTS:
            names |= public_names(model, part)
        sources = [(tbac, names)]
    else:
        sources = [
            (qwen, public_names(model, "mllm", "")),
            (sana / "transformer", public_names(model, "dit", "")),
            (sana / "vae", public_names(model, "dcae", "")),
        ]
    for folder, names in sources:
        for file in weight_files(folder):
            for name, tensor in read_tensors(file):
                if name not in IGNORED:
                    yield file, name, tensor, names.get(name)


def to_ours(name: str | None, tensor: Tensor, config: TBACConfig) -> Iterator[tuple]:
    """Yields (our name, tensor): the same tensor but for two. Rows of the embedding table above the
    vocabulary are the queries (two more are unused), and a convolution whose patches never overlap
    is a linear layer."""
    if name == "mllm.embed_tokens.weight":
        vocab = config.mllm.vocab_size
        yield name, tensor[:vocab]
        if len(tensor) > vocab:
            yield "ladder.queries", tensor[vocab:vocab + config.n_query]
    elif name == "mllm.vision.patch_embed.weight":
        yield name, tensor.flatten(1)
    else:
        yield name, tensor


def stored_dtype(folder: Path) -> str:
    """The dtype of a folder's first tensor, such as "bfloat16"."""
    with safe_open(weight_files(folder)[0], "pt") as f:
        first = next(iter(f.keys()))
        return str(f.get_tensor(first).dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------ ours to public

def export(folder: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """A folder of ours -> the released layout: shards, index, and the config entries that
    TBAC-UniImage's code reads."""
    config = TBACConfig.from_dict(read_json(folder / "config.json"))
    if config.wiring != "ladder":
        raise ValueError(f"{folder} is wired as {config.wiring!r}; "
                         "the released code knows the paper's ladder only")
    with torch.device("meta"):
        model = TBAC(config)
    names = {}
    for part in PARTS:
        for public, ours in public_names(model, part).items():
            names[ours] = public

    tensors = exported(folder, config, read_queries(folder), dict(names), dtype)
    with replacing(out) as new:
        where = write_shards(new, tqdm(tensors, "export", len(names), mininterval=1))
        index = {"metadata": {}, "weight_map": where}
        (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (new / "config.json").write_text(json.dumps(released_config(config), indent=1))


def read_queries(folder: Path) -> Tensor:
    """The ladder's queries. They are needed before the rest: they go into the embedding table."""
    found = []
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            if "ladder.queries" in list(f.keys()):
                found.append(f.get_tensor("ladder.queries"))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} tensors ladder.queries, expected 1")
    return found[0]


def exported(folder: Path, config: TBACConfig, queries: Tensor, names: dict[str, str],
             dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yields (public name, tensor) for every tensor of ours, and removes each from `names`, {our
    name: public name}."""
    v = config.mllm.vision
    for file in weight_files(folder):
        for name, tensor in read_tensors(file):
            if name == "ladder.queries":
                continue
            if name not in names:
                raise ValueError(f"{file}: tensor {name} has no public name, or stands there twice")
            if name == "mllm.embed_tokens.weight":
                # The released table ends with two rows that nothing reads.
                unused = tensor.new_zeros(2, tensor.shape[1])
                tensor = torch.cat([tensor, queries.to(tensor.dtype), unused])
            if name == "mllm.vision.patch_embed.weight":
                tensor = tensor.view(-1, 3, v.frames, v.patch, v.patch)
            yield names.pop(name), tensor.to(dtype or tensor.dtype)
    if names:
        raise ValueError(f"{folder}: {len(names)} tensors are missing, "
                         f"the first ones {list(names)[:3]}")


def released_config(config: TBACConfig) -> dict:
    return {
        "model_type": "tbacuniimage",
        "architectures": ["TBACUniImage"],
        "loss_type": "flow",
        "num_metaqueries": config.n_query,
        "max_input_text_tokens": config.max_prompt,
        "in_channels": config.dit.channels,
        "input_size": config.size // config.dcae.factor,
        "vae_downsample_f": config.dcae.factor,
    }


# -------------------------------------------------------------------------------- command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--qwen", "--sana", "--tbac", "--export", "--out"):
        parser.add_argument(name, type=Path, metavar="DIR", required=name == "--out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="store tensors in this type (default: as they are)")
    args = parser.parse_args()
    if not args.export and not (args.qwen and args.sana):
        parser.error("give --qwen and --sana (and --tbac for the released weights), or --export")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        for folder in (args.qwen, args.sana, args.tbac, args.export):
            if folder and folder.resolve() == args.out.resolve():
                raise ValueError(f"--out {args.out} is one of the folders to read, and would be "
                                 "lost: give another one")
        if args.export:
            export(args.export, args.out, dtype)
        else:
            convert(args.qwen, args.sana, args.tbac, args.out, dtype)
    except (ValueError, OSError, SafetensorError) as e:
        raise SystemExit(f"error: {e}") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
