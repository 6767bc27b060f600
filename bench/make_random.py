"""Writes a model of random weights twice, as ours and in the three public layouts, one tensor at a
time.

    python -m bench.make_random OUT --size mid                      0.5 GB in float32
    python -m bench.make_random OUT --size wide                     5.2 GB
    python -m bench.make_random OUT --size full --dtype bfloat16    11.4 GB

OUT gets ours/, and qwen/, sana/, tbac/ for the public libraries: names, shapes and files are those
of the public checkpoints (bench/sizes.py has the sizes). The disk holds all weights twice;
--layouts leaves them out.
"""
import dataclasses
import json
import pathlib
import shutil

import torch

from bench.sizes import QWEN_FILES, SIZES, empty_model, random_tensors
from engine.command import Parser
from engine.files import read_json
from weights_convert import PARTS, export, public_names, released_config

SANA_FILES = QWEN_FILES.parent / "sana"


def qwen_config(c):
    """Qwen2.5-VL's config.json: the tiny checkpoint's, with other sizes."""
    config = read_json(QWEN_FILES / "config.json")
    v = c.vision
    vision = config["vision_config"] | dict(
        depth=v.n_layer, hidden_size=v.dim, num_heads=v.n_head, intermediate_size=v.mlp_dim,
        out_hidden_size=c.dim, fullatt_block_indexes=list(v.full_attention))
    rope = config["rope_scaling"] | dict(mrope_section=list(c.rope_sections))
    return config | dict(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.mlp_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, rope_scaling=rope, vision_config=vision)


def transformer_config(c, size):
    """SANA's transformer/config.json. size: side of the latents."""
    return read_json(SANA_FILES / "transformer" / "config.json") | dict(
        num_layers=c.n_layer, num_attention_heads=c.n_head, attention_head_dim=c.head_dim,
        num_cross_attention_heads=c.cross_n_head, cross_attention_dim=c.dim,
        cross_attention_head_dim=c.dim // c.cross_n_head, caption_channels=c.caption_dim,
        mlp_ratio=c.mlp_ratio, in_channels=c.channels, out_channels=c.channels, sample_size=size)


def vae_config(c):
    """SANA's vae/config.json."""
    outer = len(c.widths) - c.attention_stages
    kinds = ["ResBlock"] * outer + ["EfficientViTBlock"] * c.attention_stages
    scales = [[]] * outer + [[c.kernel]] * c.attention_stages
    return read_json(SANA_FILES / "vae" / "config.json") | dict(
        latent_channels=c.latent_channels, attention_head_dim=c.head_dim,
        encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=list(c.widths), decoder_block_out_channels=list(c.widths),
        encoder_layers_per_block=list(c.encoder_layers),
        decoder_layers_per_block=list(c.decoder_layers),
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        scaling_factor=c.scaling_factor)


def write_layouts(config, out):
    """qwen/, sana/ and tbac/ without weights: configs, tokenizer, schedule."""
    shutil.copytree(QWEN_FILES, out / "qwen", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(SANA_FILES, out / "sana", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.safetensors*"))
    configs = {
        "qwen/config.json": qwen_config(config.mllm),
        "sana/transformer/config.json":
            transformer_config(config.dit, config.size // config.dcae.factor),
        "sana/vae/config.json": vae_config(config.dcae),
        "tbac/config.json": released_config(config),
    }
    (out / "tbac").mkdir(exist_ok=True)
    for name, values in configs.items():
        (out / name).write_text(json.dumps(values, indent=1))


def write_weights(config, out, dtype):
    """ours/, and tbac/ made from it."""
    model = empty_model(dataclasses.replace(config, dtype=dtype))
    model.save(out / "ours", tensors=random_tensors(config, getattr(torch, dtype)))
    export(out / "ours", out / "tbac")


def released_tensors(model, prefix):
    """Our weights by their public names below a prefix: no copies, but for the embedding table,
    which holds the queries and two rows that nothing reads."""
    part = next(part for part, (start, _) in PARTS.items() if start == prefix)
    own = model.state_dict()
    found = {public.removeprefix(prefix): own[ours]
             for public, ours in public_names(model, part).items()}
    if part == "mllm":
        v, queries = model.config.mllm.vision, own["ladder.queries"]
        table = found["model.embed_tokens.weight"]
        rows = [table, queries, queries.new_zeros(2, queries.shape[1])]
        found["model.embed_tokens.weight"] = torch.cat(rows)
        name = "visual.patch_embed.proj.weight"
        found[name] = found[name].view(-1, 3, v.frames, v.patch, v.patch)
    return found


def options():
    p = Parser(description=__doc__)
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--size", choices=SIZES, default="mid")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--layouts", action="store_true", help="no weights")
    return p.parse_args()


def main():
    args = options()
    config = SIZES[args.size]
    args.out.mkdir(parents=True, exist_ok=True)
    write_layouts(config, args.out)
    if not args.layouts:
        write_weights(config, args.out, args.dtype)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
