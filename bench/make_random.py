"""Writes random weights in the three public layouts (qwen/, sana/, tbac/) at a chosen size, one
shard at a time.

    pip install torch transformers==4.51.3 diffusers==0.34.0 accelerate
    python bench/make_random.py OUT --size mid          about 0.25 GB in float32
    python bench/make_random.py OUT --size full --dtype bf16     the released sizes, 11.4 GB

For measuring speed, memory and conversion without any download: names, shapes and files are those
of the public checkpoints, the numbers are noise (std 0.02, norms 1). The tokenizer is the tiny one
of the tests, with its special-token ids in config.json.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

SIZES = {
    "mid": dict(
        dim=512,
        layers=18,
        heads=8,
        kv=2,
        mlp=1408,
        mrope=[8, 12, 12],
        vocab=8192,
        vdepth=8,
        vdim=320,
        vheads=4,
        vmlp=856,
        full=[3, 7],
        blocks=10,
        heads_dit=14,
        cross=4,
        cross_dim=112,
        caption=512,
        widths=(32, 64, 128, 128, 256, 256),
        queries=64,
    ),
    "full": dict(
        dim=2048,
        layers=36,
        heads=16,
        kv=2,
        mlp=11008,
        mrope=[16, 24, 24],
        vocab=151936,
        vdepth=32,
        vdim=1280,
        vheads=16,
        vmlp=3420,
        full=[7, 15, 23, 31],
        blocks=20,
        heads_dit=70,
        cross=20,
        cross_dim=112,
        caption=2304,
        widths=(128, 256, 512, 512, 1024, 1024),
        queries=64,
    ),
}
p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
p.add_argument("out", type=pathlib.Path)
p.add_argument("--size", choices=SIZES, default="mid")
p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
a = p.parse_args()
c, dtype = SIZES[a.size], {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
tiny = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "tiny"
shutil.copytree(
    tiny / "qwen",
    a.out / "qwen",
    ignore=shutil.ignore_patterns("*.safetensors*"),
    dirs_exist_ok=True,
)
old = json.loads((tiny / "qwen" / "config.json").read_text())
ids = {k: v for k, v in old.items() if k.endswith("token_id") and v is not None}
qwen = Qwen2_5_VLConfig(
    vocab_size=c["vocab"],
    hidden_size=c["dim"],
    intermediate_size=c["mlp"],
    num_hidden_layers=c["layers"],
    num_attention_heads=c["heads"],
    num_key_value_heads=c["kv"],
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    use_sliding_window=False,
    rope_scaling={"type": "default", "rope_type": "default", "mrope_section": c["mrope"]},
    torch_dtype="float32",
    vision_config=dict(
        depth=c["vdepth"],
        hidden_size=c["vdim"],
        intermediate_size=c["vmlp"],
        num_heads=c["vheads"],
        in_chans=3,
        in_channels=3,
        out_hidden_size=c["dim"],
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        temporal_patch_size=2,
        tokens_per_second=2,
        window_size=112,
        fullatt_block_indexes=c["full"],
        hidden_act="silu",
        model_type="qwen2_5_vl",
    ),
    **ids,
)
n = len(c["widths"])
inner = ("ResBlock",) * (n - 3) + ("EfficientViTBlock",) * 3
scales = ((),) * (n - 3) + ((5,),) * 3
with torch.device("meta"):
    parts = {
        "mllm": Qwen2_5_VLForConditionalGeneration(qwen),
        "dit": SanaTransformer2DModel(
            num_attention_heads=c["heads_dit"],
            attention_head_dim=32,
            num_layers=c["blocks"],
            num_cross_attention_heads=c["cross"],
            cross_attention_head_dim=c["cross_dim"],
            cross_attention_dim=32 * c["heads_dit"],
            caption_channels=c["caption"],
            mlp_ratio=2.5,
            sample_size=16,
            interpolation_scale=None,
        ),
        "vae": AutoencoderDC(
            latent_channels=32,
            encoder_block_types=inner,
            decoder_block_types=inner,
            encoder_block_out_channels=c["widths"],
            decoder_block_out_channels=c["widths"],
            encoder_layers_per_block=(2,) * (n - 3) + (3,) * 3,
            decoder_layers_per_block=(3,) * n,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
    }
DPMSolverMultistepScheduler(
    algorithm_type="dpmsolver++",
    flow_shift=3.0,
    use_flow_sigmas=True,
    prediction_type="flow_prediction",
).save_pretrained(a.out / "sana" / "scheduler")
for name, folder in (("dit", "transformer"), ("vae", "vae")):
    parts[name].save_config(a.out / "sana" / folder)
qwen.save_pretrained(a.out / "qwen")
(a.out / "tbac").mkdir(parents=True, exist_ok=True)
shapes = {
    k: {n: tuple(t.shape) for n, t in m.state_dict().items() if n != "lm_head.weight"}
    for k, m in parts.items()
}
g = torch.Generator().manual_seed(0)


def tensor(name, shape):
    if len(shape) == 1 and "norm" in name and not name.endswith("bias"):
        return torch.ones(shape, dtype=dtype)
    return (0.02 * torch.randn(shape, generator=g)).to(dtype)


def write(folder, tensors, shard_bytes=2 << 30):
    """tensors: iterable of (name, tensor); writes numbered shards and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    shard, size, files = {}, 0, []

    def flush():
        nonlocal shard, size
        if shard:
            f = folder / f"part-{len(files)}.safetensors"
            save_file(shard, str(f))
            files.append((f, list(shard)))
            shard, size = {}, 0

    for k, t in tensors:
        shard[k] = t
        size += t.numel() * t.element_size()
        if size > shard_bytes:
            flush()
    flush()
    where = {}
    for i, (f, names) in enumerate(files):
        new = folder / (f"model-{i + 1:05d}-of-{len(files):05d}.safetensors")
        f.rename(new)
        where |= dict.fromkeys(names, new.name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


def everything():
    for k, s in shapes["mllm"].items():
        yield (
            f"model.mllm_backbone.{k}",
            tensor(k, (s[0] + c["queries"] + 2, *s[1:]) if k == "model.embed_tokens.weight" else s),
        )
    w, cap = c["dim"], c["caption"]
    for k, s in {
        "0.weight": (cap, w),
        "0.bias": (cap,),
        "2.weight": (cap, cap),
        "2.bias": (cap,),
    }.items():
        yield f"model.connector.{k}", tensor(k, s)
    yield "model.connector.3.weight", torch.full((cap,), 5.5**0.5, dtype=dtype)
    for k, s in shapes["dit"].items():
        yield f"model.transformer.{k}", tensor(k, s)
    for k, s in shapes["vae"].items():
        yield f"vae.{k}", tensor(k, s)


write(a.out / "tbac", everything())
cfg = json.loads((tiny / "tbac" / "config.json").read_text()) | {
    "num_metaqueries": c["queries"],
    "in_channels": 32,
    "input_size": 16,
    "vae_downsample_f": 2 ** (n - 1),
}
(a.out / "tbac" / "config.json").write_text(json.dumps(cfg, indent=1))
print(
    {k: f"{sum(torch.Size(s).numel() for s in v.values()) / 1e6:.1f}M" for k, v in shapes.items()},
    "in",
    a.out,
)
