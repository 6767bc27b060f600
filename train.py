"""Training, top to bottom: options, examples, one loss per stage, optimizer, loop.

The toy world's parts are made like the real ones, one stage after the other:

    vit    the MLLM's ViT learns to name what each of its tokens shows (a stand-in for its captions by the billion)
    mllm   the whole MLLM learns to caption, to answer, and to say what an edit would give; frozen from then on
    dcae   the autoencoder learns to reconstruct; frozen from then on
    dit    the DiT learns to draw from a list of things (a stand-in for the captions that SANA was pretrained on)
    t2i    the paper's step: only queries, connector and DiT learn, from captions
    edit   the same, half of the examples now with a picture and an instruction

    python train.py --stage vit --out runs/vit
    python train.py --stage mllm --model runs/vit --out runs/mllm
    python train.py --stage t2i --model runs/dit --take mllm=runs/mllm --out runs/t2i

Every step draws its examples and its noise from (seed, step) alone: a resumed run needs nothing but the step number.
"""
import argparse
import dataclasses
import json
import math
import pathlib
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
from dcae import DCAEConfig
from dit import DiTConfig
from mllm import ASK, DRAW, MLLMConfig, Tokenizer, ViTConfig, chat, mrope_positions, patchify
from tbac import TBAC, TBACConfig, replacing

STAGES = {  # what each stage trains, and the toy's numbers
    "vit": dict(parts=("mllm.vision",), steps=3000, batch=32, lr=2e-3),
    "mllm": dict(parts=("mllm",), steps=7000, batch=32, lr=2e-3),
    "dcae": dict(parts=("dcae",), steps=2000, batch=32, lr=2e-3),
    "dit": dict(parts=("dit",), steps=3000, batch=48, lr=1e-3),
    "t2i": dict(parts=("ladder", "dit"), steps=6000, batch=48, lr=1e-3),
    "edit": dict(parts=("ladder", "dit"), steps=6000, batch=48, lr=1e-3),
}
TOY = TBACConfig(
    mllm=MLLMConfig(vocab_size=640, n_layer=8, dim=128, n_head=4, n_kv_head=2, head_dim=32, mlp_dim=384, rope_theta=100.0, rope_sections=(2, 5, 9),
                    vision=ViTConfig(n_layer=4, dim=96, n_head=3, mlp_dim=256, patch=8, window=32, full_attention=(1, 3), area=64 * 64)),
    dit=DiTConfig(n_layer=6, n_head=6, cross_n_head=6, channels=16, caption_dim=128),
    dcae=DCAEConfig(widths=(16, 32, 64, 128), encoder_layers=(0, 1, 1, 1), decoder_layers=(1, 1, 1, 1), attention_stages=1, latent_channels=16),
    n_query=16, size=64)


TOY_FOLDER = pathlib.Path(__file__).parent / "assets" / "toy"


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", choices=STAGES, default="t2i")
    p.add_argument("--model", default=None, help="folder to start from (default: assets/toy for t2i and edit, else a fresh toy)")
    p.add_argument("--take", nargs="*", default=[], metavar="PART=FOLDER", help="take a part (mllm, dcae, dit, ladder) from another folder")
    p.add_argument("--out", default=None, help="folder for the trained model and the training state (default: runs/STAGE)")
    p.add_argument("--steps", type=int, default=None), p.add_argument("--batch", type=int, default=None)
    p.add_argument("--lr", type=float, default=None, help="peak learning rate, after warm-up; a cosine to a tenth of it follows")
    p.add_argument("--warmup", type=int, default=200, help="steps")
    p.add_argument("--weight-decay", type=float, default=0.01), p.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the weights' running mean; that mean is what is saved")
    p.add_argument("--drop", type=float, default=0.1, help="share of examples without their text, without their image, without both")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="to compute in; trained weights stay float32")
    p.add_argument("--seed", type=int, default=0), p.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    p.add_argument("--resume", action="store_true", help="go on from the state in --out")
    a = p.parse_args()
    preset = STAGES[a.stage]
    a.steps, a.batch, a.lr = a.steps or preset["steps"], a.batch or preset["batch"], a.lr or preset["lr"]
    a.out = pathlib.Path(a.out or f"runs/{a.stage}")
    if a.model is None and a.stage in ("t2i", "edit"):
        a.model = str(TOY_FOLDER)
    return a


# ---------------------------------------------------------------------------------------------------------------- model

def toy_tokenizer(file):
    """A byte-level BPE with Qwen's special tokens, trained on the toy world's own text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    t = tokenizers.Tokenizer(models.BPE())
    t.normalizer, t.decoder = normalizers.NFC(), decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [f"<|{n}|>" for n in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")]
    trainer = trainers.BpeTrainer(vocab_size=TOY.mllm.vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([chat(text, (), system) for system in (ASK, DRAW) for text in data.corpus(10000, 0)], trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    t.save(str(file))
    return Tokenizer(file)


def build(a):
    """-> the model in float32, modules that only this stage needs, and the parameters that it trains, by name."""
    if a.model:
        model = TBAC.load(a.model, a.device, torch.float32)
    else:
        generator = torch.Generator().manual_seed(a.seed)
        model = TBAC(TOY, toy_tokenizer(a.out / "tokenizer.json")).to(a.device)
        for part in (model.mllm, model.ladder, model.dit):
            part.init_weights(generator)
    for part, folder in (take.split("=") for take in a.take):
        other = TBAC.load(folder, a.device, torch.float32)
        setattr(model, part, getattr(other, part))
        if part != "ladder":
            model.config = dataclasses.replace(model.config, **{part: getattr(other.config, part)})
    extra = {"vit": Names, "dit": Things}.get(a.stage, lambda config: nn.Module())(model.config).to(a.device)
    model.requires_grad_(False)
    trained = {f"{part}.{n}": p for part in STAGES[a.stage]["parts"] for n, p in model.get_submodule(part).named_parameters()}
    for p in trained.values():
        p.requires_grad_(True)
    return model, extra, trained | {f"extra.{n}": p for n, p in extra.named_parameters()}


# --------------------------------------------------------------------------------------------- examples and losses, by stage

def to_pixels(images, device, dtype=torch.float32):
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2)
    return x.to(device, dtype) / 127.5 - 1


def conversation(rng, picture):
    """-> (system prompt, scene to show or None, [(question, answer), ...]), from a fresh scene."""
    scene, kind = data.sample_scene(rng), rng.random()
    if not picture and kind < 0.5:                                              # a caption, in any words -> what it says, in order
        return DRAW, None, [(data.caption(scene, rng), f"{data.plain(data.ordered(scene))}, on a {scene.background} background")]
    if not picture:                                                             # a scene in words, and questions about it
        (question, answer), *turns = [data.question(scene, rng, seen=False)[:2] for _ in range(4)]
        return ASK, None, [(f"{data.caption(scene, rng)}. {question}", answer), *turns]
    if kind < 0.6:                                                              # a picture, and questions about it
        return ASK, scene, [data.question(scene, rng)[:2] for _ in range(5)]
    if kind < 0.7:
        return DRAW, scene, [("", data.describe(scene))]
    scene = data.sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))              # a picture and an instruction -> what it would give
    order, target, _ = data.edit(scene, rng)
    return DRAW, scene, [(order, data.describe(target))]


class Names(nn.Module):
    """The stand-in for the captions that Qwen2.5-VL's ViT was pretrained on: every vision token tells which thing it shows, where in the picture
    that is, and how large; or which background. Learned in stage `vit` and thrown away after it; from answers alone the ViT learns colours
    long before shapes and places."""

    def __init__(self, config):
        super().__init__()
        self.names = [f"{c} {s}" for c in data.COLOURS for s in data.SHAPES] + list(data.BACKGROUNDS)
        self.spots, self.sizes = list(data.SPOTS), list(data.SIZES)
        self.head = nn.Linear(config.mllm.dim, len(self.names + self.spots + self.sizes))

    def shown(self, scene, h, w):
        """Row by row, the nearest thing whose box reaches well into the unit, else the background. -> h * w triples of class indices"""
        for y, x in (((row + 0.5) / h, (column + 0.5) / w) for row in range(h) for column in range(w)):
            far = [(max(abs(t.x - x), abs(t.y - y)), t) for t in scene.things]
            near = [(d, t) for d, t in far if d < t.radius + 0.35 / w]
            t = min(near, key=lambda pair: pair[0])[1] if near else data.Thing("", "", "", x, y)
            yield self.names.index(t.name if near else scene.background), self.spots.index(data.spot(t)), self.sizes.index(t.size) if near else -100

    def forward(self, tokens):
        """(N, M) -> logits of name, spot and size"""
        return self.head(tokens).float().split([len(self.names), len(self.spots), len(self.sizes)], 1)


def vit_loss(model, extra, rng, a, generator):
    """Cross-entropy of what each merged unit shows."""
    c, scenes = model.config.mllm.vision, [data.sample_scene(rng) for _ in range(a.batch)]
    pictures = [patchify(data.render(s, model.config.size), c) for s in scenes]
    h, w = (n // c.merge for n in pictures[0][1])
    shown = torch.tensor([row for s in scenes for row in extra.shown(s, h, w)], device=a.device)       # (B * U, 3)
    return sum(F.cross_entropy(logits, which) for logits, which in zip(extra(model.mllm.see(pictures)), shown.T))


def mllm_loss(model, extra, rng, a, generator):
    """Cross-entropy of the answers' tokens, several questions per picture. A step has pictures in all rows or in none: less padding."""
    mllm, tok = model.mllm, model.mllm.tokenizer
    c, pad = mllm.config.vision, tok.special["image_pad"]
    rows, positions, pictures, answers, picture = [], [], [], [], rng.random() < 0.5
    for _ in range(a.batch):
        system, scene, turns = conversation(rng, picture)
        patches = [patchify(data.render(scene, model.config.size), c)] if scene else []
        grids = [(h // c.merge, w // c.merge) for _, (h, w) in patches]
        ids, is_answer = [], []
        for i, (question, answer) in enumerate(turns):
            ask = chat(question, [h * w for h, w in grids], system) if i == 0 else \
                f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            for text, learned in ((ask, False), (answer + "<|im_end|>", True)):
                piece = tok.encode(text)
                ids, is_answer = ids + piece, is_answer + [learned] * len(piece)
        rows.append(ids), answers.append(is_answer), positions.append(mrope_positions(ids, pad, grids))
        pictures += patches
    batch = mllm.pad(rows, positions, pictures)
    learned = torch.zeros_like(batch.real)
    for row, is_answer in zip(learned, answers):
        row[len(row) - len(is_answer):] = torch.tensor(is_answer)
    hidden = mllm(mllm.read(batch), batch.positions, batch.real)[-1]            # (B, S, M)
    logits = mllm.logits(hidden[:, :-1][learned[:, 1:]])                        # (answer tokens, vocab)
    return F.cross_entropy(logits.float(), batch.ids[:, 1:][learned[:, 1:]])


def dcae_loss(model, extra, rng, a, generator):
    """L1 + L2 on pixels and L1 on their differences to the next pixel (edges); a little noise makes near latents mean near pictures."""
    x = to_pixels([data.render(data.sample_scene(rng), model.config.size) for _ in range(a.batch)], a.device, model.dit.proj_out.weight.dtype)
    z = model.dcae.encode(x)
    noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    miss = (model.dcae.decode(z + 0.1 * z.detach().std() * noise) - x).float()
    edges = miss.diff(dim=2).abs().mean() + miss.diff(dim=3).abs().mean()
    return miss.abs().mean() + miss.pow(2).mean() + edges / 2


class Things(nn.Module):
    """The stand-in for SANA's own text encoder: one vector per thing, with colour + shape + size + place added up, and one for
    the background. Learned in stage `dit` and thrown away after it."""

    def __init__(self, config):
        super().__init__()
        width = config.dit.caption_dim
        words = [*data.COLOURS, *data.SHAPES, *data.SIZES, *data.BACKGROUNDS, "nothing"]
        self.index = {w: i for i, w in enumerate(words)}
        self.table, self.place = nn.Embedding(len(words), width), nn.Linear(16, width)

    def forward(self, scenes):                                                  # list of scenes or None -> (B, 5, width)
        dev, ids, xy = self.table.weight.device, [], []
        for s in scenes:
            things = s.things if s else ()
            row = [[self.index[w] for w in (t.colour, t.shape, t.size)] for t in things]
            row += [[self.index[s.background if s else "nothing"]] * 3] + [[self.index["nothing"]] * 3] * (4 - len(things))
            ids.append(row), xy.append([(t.x, t.y) for t in things] + [(0, 0)] * (5 - len(things)))
        angle = torch.tensor(xy, device=dev)[..., None] * math.pi * 2 ** torch.arange(4, device=dev)         # (B, 5, 2, 4)
        place = torch.cat([angle.sin(), angle.cos()], -1).flatten(2).to(self.table.weight.dtype)            # (B, 5, 16)
        return self.table(torch.tensor(ids, device=dev)).sum(2) + self.place(place)


def dit_loss(model, extra, rng, a, generator):
    """Flow matching on what the things say, the same for every block; a tenth hears nothing, which guidance needs."""
    scenes = [data.sample_scene(rng) for _ in range(a.batch)]
    x = to_pixels([data.render(s, model.config.size) for s in scenes], a.device, model.dit.proj_out.weight.dtype)
    rungs = extra([None if rng.random() < a.drop else s for s in scenes]).expand(model.config.dit.n_layer, -1, -1, -1)
    with torch.no_grad():
        x0 = model.dcae.encode(x)
    return model.flow_loss(x0, rungs, generator=generator)


def t2i_example(rng, a, size):
    """-> (prompt, [], picture)"""
    scene = data.sample_scene(rng)
    return "" if rng.random() < a.drop else data.caption(scene, rng), [], data.render(scene, size)


def edit_example(rng, a, size):
    """-> (instruction, [source], target). The drop of ARCHITECTURE.md section 6: text, both, or the image (a black one), a tenth each."""
    scene = data.sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))
    order, target, _ = data.edit(scene, rng)
    source, r = data.render(scene, size), rng.random()
    if a.drop <= r < 3 * a.drop:
        source = source.point(lambda _: 0)
    return "" if r < 2 * a.drop else order, [source], data.render(target, size)


def ladder_loss(model, extra, rng, a, generator):
    """The paper's step: flow matching on the rungs."""
    kinds = [edit_example if a.stage == "edit" and rng.random() < 0.5 else t2i_example for _ in range(a.batch)]
    prompts, images, targets = zip(*(kind(rng, a, model.config.size) for kind in kinds))
    return model.loss(to_pixels(targets, a.device, model.dit.proj_out.weight.dtype), prompts, images, generator=generator)


LOSS = {"vit": vit_loss, "mllm": mllm_loss, "dcae": dcae_loss, "dit": dit_loss, "t2i": ladder_loss, "edit": ladder_loss}


# ------------------------------------------------------------------------------------------------------------ optimizer

def learning_rate(step, a):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    progress = (step - a.warmup) / max(1, a.steps - a.warmup)
    return a.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


class State:
    """What a resumed run needs: float32 masters of the trained parameters, their running mean, AdamW's moments, the step."""

    def __init__(self, trained, a):
        self.params, self.step = trained, 0
        self.master = {n: p.detach().float().clone() for n, p in trained.items()}
        self.ema = {n: m.clone() for n, m in self.master.items()}
        decay, other = ([m for m in self.master.values() if (m.dim() > 1) == matrix] for matrix in (True, False))
        groups = [dict(params=decay, weight_decay=a.weight_decay), dict(params=other, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=a.lr)

    def update(self, a):
        """The gradients of the computing copy -> one optimizer step on the masters -> back into the copy."""
        for n, p in self.params.items():
            self.master[n].grad, p.grad = None if p.grad is None else p.grad.float(), None
        norm = nn.utils.clip_grad_norm_(list(self.master.values()), a.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, a)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            decay = min(a.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.ema.values()), list(self.master.values()), 1 - decay)
            for n, p in self.params.items():
                p.copy_(self.master[n])
        return norm

    def save(self, file):
        tensors = {f"master.{n}": t for n, t in self.master.items()} | {f"ema.{n}": t for n, t in self.ema.items()}
        for n, m in self.master.items():
            tensors |= {f"{k}.{n}": v for k, v in self.optimizer.state.get(m, {}).items()}
        save_file(tensors, file, metadata={"step": str(self.step)})

    def load(self, file):
        with safe_open(file, "pt") as f:
            self.step = int(f.metadata()["step"])
            for n, m in self.master.items():
                m.copy_(f.get_tensor(f"master.{n}")), self.ema[n].copy_(f.get_tensor(f"ema.{n}"))
                self.optimizer.state[m] = {k: f.get_tensor(f"{k}.{n}").to("cpu" if k == "step" else m.device)
                                           for k in ("step", "exp_avg", "exp_avg_sq")}
                with torch.no_grad():
                    self.params[n].copy_(m)


def save(model, state, frozen, a):
    """Into --out: the model with the mean weights, and the state to resume from."""
    ema = {n: t for n, t in state.ema.items() if not n.startswith("extra.")}
    model.save(a.out, state=frozen | ema)
    with replacing(a.out / "state") as new:
        state.save(new / "state.safetensors")


# ----------------------------------------------------------------------------------------------------------------- loop

def training_loop(model, extra, state, a):
    """Yields (step, loss, gradient norm) after every step."""
    while state.step < a.steps:
        rng = random.Random(f"{a.seed} {a.stage} {state.step}")
        generator = torch.Generator(a.device).manual_seed(rng.getrandbits(63))
        loss = LOSS[a.stage](model, extra, rng, a, generator)
        loss.backward()
        norm = state.update(a)
        yield state.step, loss.item(), norm.item()


def unit_latents(model, a):
    """The scaling factor that gives the autoencoder's latents a standard deviation of 1, as SANA's has."""
    rng = random.Random(a.seed)
    x = to_pixels([data.render(data.sample_scene(rng), model.config.size) for _ in range(256)], a.device, torch.float32)
    with torch.no_grad():
        std = model.dcae.encode(x).std().item() / model.config.dcae.scaling_factor
    c = dataclasses.replace(model.config, dcae=dataclasses.replace(model.config.dcae, scaling_factor=1 / std))
    model.config, model.dcae.config = c, c.dcae


def main():
    a = options()
    torch.manual_seed(a.seed)
    model, extra, trained = build(a)
    frozen = model.state_dict()                                                 # float32, and so it stays on disk
    state = State(trained, a)
    if a.resume:
        state.load(a.out / "state" / "state.safetensors")
    model.to(getattr(torch, a.dtype)), extra.to(getattr(torch, a.dtype))
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "options.json").write_text(json.dumps(vars(a), indent=1, default=str))
    mean, start = None, time.time()
    with tqdm(total=a.steps, initial=state.step, desc=a.stage, mininterval=2) as bar, open(a.out / "log.jsonl", "a") as log:
        for step, loss, norm in training_loop(model, extra, state, a):
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            bar.update(), bar.set_postfix(loss=f"{mean:.4f}", norm=f"{norm:.2f}", refresh=False)
            log.write(json.dumps(dict(step=step, loss=round(loss, 5), norm=round(norm, 4), seconds=round(time.time() - start, 1))) + "\n")
            if step % a.save_every == 0 or step == a.steps:
                log.flush(), save(model, state, frozen, a)
    if a.stage == "dcae":
        model = TBAC.load(a.out, a.device, torch.float32)
        unit_latents(model, a)
        model.save(a.out)


if __name__ == "__main__":
    main()
