"""Public weights to ours and back, strict both ways: every tensor of the source has a place here,
and every place is filled.

    python weights_convert.py --qwen DIR --sana DIR --tbac DIR --out DIR  the released model
    python weights_convert.py --qwen DIR --sana DIR --out DIR             backbones, a new ladder
    python weights_convert.py --export DIR --out DIR                      back to released layout

DIR: a Hugging Face folder of Qwen2.5-VL (config.json, tokenizer.json), a diffusers folder of SANA
(transformer/, vae/), the released TBAC-UniImage checkpoint. With --tbac only the configs and the
tokenizer of the first two are read, without it their weights, too. Tensors pass through one at a
time, so memory stays near one shard.
"""
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dcae import DCAEConfig
from dit import DiTConfig
from engine import command
from engine.checks import CONFIG, shown
from engine.files import (
    check_finite,
    check_new_folder,
    check_none_missing,
    check_stored,
    check_tensor,
    read_json,
    read_tensors,
    replacing,
    stored_tensors,
    weight_files,
    write_shards,
)
from engine.int8 import in_int8, stored_layers
from engine.loading import read_tokenizer
from mllm import MLLMConfig
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
# The released table ends with rows that nothing reads.
UNUSED_ROWS = 2
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
#
# Our key, then the public one. engine/checks.py says what a value may be.

QWEN_CONFIG = {
    "vocab_size":     "vocab_size",
    "n_layer":        "num_hidden_layers",
    "dim":            "hidden_size",
    "n_head":         "num_attention_heads",
    "n_kv_head":      "num_key_value_heads",
    "mlp_dim":        "intermediate_size",
    "rope_theta":     "rope_theta",
    "rope_sections":  "rope_scaling.mrope_section",
}
QWEN_VISION_CONFIG = {
    "n_layer":        "vision_config.depth",
    "dim":            "vision_config.hidden_size",
    "n_head":         "vision_config.num_heads",
    "mlp_dim":        "vision_config.intermediate_size",
    "patch":          "vision_config.patch_size",
    "frames":         "vision_config.temporal_patch_size",
    "merge":          "vision_config.spatial_merge_size",
    "window":         "vision_config.window_size",
    "full_attention": "vision_config.fullatt_block_indexes",
}
SANA_CONFIG = {
    "n_layer":        "num_layers",
    "n_head":         "num_attention_heads",
    "head_dim":       "attention_head_dim",
    "cross_n_head":   "num_cross_attention_heads",
    "mlp_ratio":      "mlp_ratio",
    "channels":       "in_channels",
    "caption_dim":    "caption_channels",
}
DC_AE_CONFIG = {
    "widths":         "encoder_block_out_channels",
    "encoder_layers": "encoder_layers_per_block",
    "decoder_layers": "decoder_layers_per_block",
    "latent_channels": "latent_channels",
    "head_dim":       "attention_head_dim",
    "scaling_factor": "scaling_factor",
}
RELEASED_CONFIG = {
    "n_query":        "num_metaqueries",
    "max_prompt":     "max_input_text_tokens",
}


def lookup(found, key: str, file: Path):
    """The value of "a" or "a.b" in a config. ValueError if it has none."""
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"{file} has no {key}")
        found = found[name]
    return found


def read_keys(found, names: dict[str, str], kinds: dict, file: Path) -> dict:
    """names: {our key: public key} -> {our key: value}, each checked. ValueError with the file's
    own key for one that is missing or makes no sense."""
    return {ours: kinds[ours].check(lookup(found, public, file), f"{file}: {public}")
            for ours, public in names.items()}


def must_be(found, file: Path, expected: dict, optional: tuple = ()) -> None:
    """ValueError where a config has another value than the one that this code builds. optional:
    keys that some files lack, and that mean the same there."""
    for key, value in expected.items():
        if key in optional and isinstance(found, dict) and key not in found:
            continue
        stored = lookup(found, key, file)
        # In Python 1 == True, in JSON it is not.
        if stored != value or isinstance(stored, bool) != isinstance(value, bool):
            raise ValueError(f"{file}: {key} = {shown(stored)} is not supported, only {value!r}")


def read_config(qwen: Path, sana: Path, tbac: Path | None = None) -> TBACConfig:
    """The public config files -> TBACConfig. ValueError for anything that this code does not
    build."""
    dcae = dcae_config(sana / "vae" / "config.json")
    dit, latent_size = dit_config(sana / "transformer" / "config.json")
    config = TBACConfig(
        mllm=mllm_config(qwen / "config.json"),
        dit=dit,
        dcae=dcae,
        size=latent_size * dcae.factor,
    )
    if tbac:
        file = tbac / "config.json"
        released = read_json(file)
        config = replace(config, **read_keys(released, RELEASED_CONFIG, CONFIG, file))
        fixed = released_config(config)
        must_be(released, file, fixed, optional=tuple(fixed))
    # from_dict checks the rules that join several of the files.
    return TBACConfig.from_dict(config.to_dict(), f"{qwen}, {sana}")


def mllm_config(file: Path) -> MLLMConfig:
    """Qwen2.5-VL's config.json."""
    c = read_json(file)
    # Newer files have the decoder's part in a section of its own, with its own model_type.
    if isinstance(c, dict) and isinstance(c.get("text_config"), dict):
        c = c | c["text_config"] | {"model_type": c.get("model_type")}
    must_be(c, file, {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "vision_config.hidden_act": "silu",
    }, optional=("use_sliding_window",))
    own = CONFIG["mllm"]
    vision = read_keys(c, QWEN_VISION_CONFIG, own["vision"], file)
    decoder = read_keys(c, QWEN_CONFIG, own, file)
    if decoder["dim"] % decoder["n_head"]:
        raise ValueError(f"{file}: hidden_size = {decoder['dim']}, expected a multiple of "
                         f"num_attention_heads = {decoder['n_head']}")
    return MLLMConfig(**decoder, head_dim=decoder["dim"] // decoder["n_head"],
                      vision=ViTConfig(**vision))


def dit_config(file: Path) -> tuple[DiTConfig, int]:
    """SANA's transformer/config.json -> config, side of the latents that it was trained at."""
    c = read_json(file)
    config = DiTConfig(**read_keys(c, SANA_CONFIG, CONFIG["dit"], file))
    must_be(c, file, {
        "patch_size": 1,
        "attention_bias": False,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "out_channels": config.channels,
        "cross_attention_dim": config.dim,
        "qk_norm": None,
        "guidance_embeds": False,
        "interpolation_scale": None,
        "timestep_scale": 1.0,
    }, optional=("qk_norm", "guidance_embeds", "interpolation_scale", "timestep_scale"))
    return config, read_keys(c, {"size": "sample_size"}, CONFIG, file)["size"]


def dcae_config(file: Path) -> DCAEConfig:
    """SANA's vae/config.json."""
    c = read_json(file)
    found = read_keys(c, DC_AE_CONFIG, CONFIG["dcae"], file)
    types = lookup(c, "encoder_block_types", file)
    inner = types.count("EfficientViTBlock") if isinstance(types, list) else 0
    outer = len(found["widths"]) - inner
    kinds = ["ResBlock"] * outer + ["EfficientViTBlock"] * inner
    scales = [[]] * outer + [[5]] * inner
    must_be(c, file, {
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "decoder_block_out_channels": list(found["widths"]),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
    })
    return DCAEConfig(**found, attention_stages=inner)


# ------------------------------------------------------------------------------ public to ours

def convert(qwen: Path, sana: Path, tbac: Path | None, out: Path,
            dtype: torch.dtype | None = None) -> TBACConfig:
    """Public folders -> a folder that TBAC.load reads. dtype: default as stored; torch.int8 for
    most weights in 8 bits (engine/int8.py), the others in bfloat16."""
    config = read_config(qwen, sana, tbac)
    tokenizer = qwen / "tokenizer.json"
    # ValueError now, not after the weights, if the tokenizer is not one of Qwen's.
    with torch.device("meta"):
        model = TBAC(config, read_tokenizer(tokenizer))

    if dtype == torch.int8:
        tensors = in_int8(model, converted(qwen, sana, tbac, model, None))
    else:
        tensors = converted(qwen, sana, tbac, model, dtype)
    with replacing(out) as new:
        write_shards(new, tqdm(tensors, "convert", len(model.state_dict()), mininterval=1))
        shutil.copyfile(tokenizer, new / "tokenizer.json")
        config = replace(config, dtype=stored_dtype(new))
        (new / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    return config


def converted(qwen: Path, sana: Path, tbac: Path | None, model: TBAC,
              dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for every tensor of our model; a fresh ladder without `tbac`."""
    # check_tensor takes out each name as it comes; what is left at the end is missing.
    missing = model.state_dict()
    fresh = {}
    if not tbac:
        ladder = model.config.build_ladder()
        ladder.init_weights(torch.Generator().manual_seed(0))
        fresh = ladder.state_dict(prefix="ladder.")
    for name in fresh:
        del missing[name]
    for file, public, tensor, ours in source_tensors(qwen, sana, tbac, model):
        for name, piece in to_ours(ours, tensor, model.config):
            check_tensor(missing, name, piece, file, public)
            yield name, check_finite(piece.to(dtype or piece.dtype), file, public)
    check_none_missing(missing, tbac or f"{qwen}, {sana}")
    for name, tensor in fresh.items():
        yield name, tensor.to(dtype or tensor.dtype)


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
    """Yields (our name, tensor): the same tensor but for two. The released embedding table goes on
    after the vocabulary with the queries and UNUSED_ROWS, and a convolution whose patches never
    overlap is a linear layer."""
    vocab, n_query = config.mllm.vocab_size, config.n_query
    v = config.mllm.vision
    table = (vocab + n_query + UNUSED_ROWS, config.mllm.dim)
    patches = (v.dim, 3, v.frames, v.patch, v.patch)
    if name == "mllm.embed_tokens.weight" and tensor.shape == table:
        yield name, tensor[:vocab]
        yield "ladder.queries", tensor[vocab:vocab + n_query]
    elif name == "mllm.vision.patch_embed.weight" and tensor.shape == patches:
        yield name, tensor.flatten(1)
    # All others; Qwen's own table too, which has no queries. What does not fit, or has no name here
    # (None), check_tensor refuses.
    else:
        yield name, tensor


def stored_dtype(folder: Path) -> str:
    """The dtype of a folder's first tensor, such as "bfloat16", which is also what goes with
    layers in 8 bits."""
    if stored_layers(folder):
        return "bfloat16"
    first = next(iter(stored_tensors(weight_files(folder)[0]).values()))
    return str(first.dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------ ours to public

def export(folder: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """A folder of ours -> the released layout: shards, index, and the config entries that
    TBAC-UniImage's code reads."""
    file = folder / "config.json"
    config = TBACConfig.from_dict(read_json(file), file)
    if (config.wiring, config.connector) != ("ladder", "shared"):
        raise ValueError(f"{folder} is wired as {config.wiring!r}, connector {config.connector}; "
                         "the released code knows the paper's ladder only")
    if dtype == torch.int8 or stored_layers(folder):
        raise ValueError(f"--export {folder}: the released code knows no weights in 8 bits")
    with torch.device("meta"):
        model = TBAC(config)
    names = {}
    for part in PARTS:
        for public, ours in public_names(model, part).items():
            names[ours] = public

    tensors = exported(folder, model, names, dtype)
    with replacing(out) as new:
        where = write_shards(new, tqdm(tensors, "export", len(names), mininterval=1))
        index = {"metadata": {}, "weight_map": where}
        (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (new / "config.json").write_text(json.dumps(released_config(config), indent=1))


def exported(folder: Path, model: TBAC, names: dict[str, str],
             dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yields (public name, tensor) for every tensor of ours. names: {our name: public name}"""
    v = model.config.mllm.vision
    files = check_stored(model, folder)
    # The queries are needed before the rest: they go into the embedding table.
    for file in files:
        for name, tensor in read_tensors(file, only=["ladder.queries"]):
            queries = check_finite(tensor, file, name)
    for file in files:
        for name, tensor in read_tensors(file, only=names):
            if name == "mllm.embed_tokens.weight":
                unused = tensor.new_zeros(UNUSED_ROWS, tensor.shape[1])
                tensor = torch.cat([tensor, queries.to(tensor.dtype), unused])
            if name == "mllm.vision.patch_embed.weight":
                tensor = tensor.view(-1, 3, v.frames, v.patch, v.patch)
            yield names[name], check_finite(tensor.to(dtype or tensor.dtype), file, name)


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
    parser = command.Parser(description=__doc__)
    for name in ("--qwen", "--sana", "--tbac", "--export", "--out"):
        parser.add_argument(name, type=command.path, metavar="DIR", required=name == "--out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), help="store tensors in "
                        "this type (default: as they are); int8: most in 8 bits, the others in "
                        "bfloat16")
    args = parser.parse_args()
    if not args.export and not (args.qwen and args.sana):
        parser.error("give --qwen and --sana (and --tbac for the released weights), or --export")
    if args.export and (args.qwen or args.sana or args.tbac):
        parser.error("--export reads one folder: leave out --qwen, --sana and --tbac")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with command.one_line_errors():
        check_new_folder(args.out, (args.qwen, args.sana, args.tbac, args.export))
        if args.export:
            export(args.export, args.out, dtype)
        else:
            convert(args.qwen, args.sana, args.tbac, args.out, dtype)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
