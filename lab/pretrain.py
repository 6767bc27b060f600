"""How the toy's parts were made: what stands in for the years of pretraining behind the real ones. `train.py` runs these stages.

    vit    the MLLM's ViT learns to name what each of its tokens shows (a stand-in for its captions by the billion)
    mllm   the whole MLLM learns to caption, to answer, to say what an edit would give, and to sum up what it has read
    dcae   the autoencoder learns to reconstruct
    dit    the DiT learns to draw from a list of things (a stand-in for the captions that SANA was pretrained on)

Each has examples of its own from toy.py, a loss, and perhaps a module that is thrown away afterwards. A loss takes the model, that module,
rows of (example, its own random.Random) and the options, and gives the losses (B,) and the times t (B,) of these rows, or None.
"""
import dataclasses
import math
import os
import random

import torch
import torch.nn.functional as F
from torch import nn

from engine import data
from toy import language, world
from dcae import DCAEConfig
from dit import DiTConfig
from mllm import ASK, DRAW, SPECIAL, MLLMConfig, Row, Tokenizer, chat, mrope_positions
from tbac import TBAC, TBACConfig
from vit import ViTConfig, patchify

TOY = TBACConfig(
    mllm=MLLMConfig(vocab_size=640, n_layer=8, dim=128, n_head=4, n_kv_head=2, head_dim=32, mlp_dim=384, rope_theta=100.0, rope_sections=(2, 5, 9),
                    vision=ViTConfig(n_layer=4, dim=96, n_head=3, mlp_dim=256, patch=8, window=32, full_attention=(1, 3), area=64 * 64)),
    dit=DiTConfig(n_layer=6, n_head=6, cross_n_head=6, channels=16, caption_dim=128),
    dcae=DCAEConfig(widths=(16, 32, 64, 128), encoder_layers=(0, 1, 1, 1), decoder_layers=(1, 1, 1, 1), attention_stages=1, latent_channels=16),
    n_query=16, size=64, image_guidance=3.0)                                    # 1.5 loses more of the picture: evaluate.py ablate settings


def toy_tokenizer(file):
    """A byte-level BPE with Qwen's special tokens, trained on the toy world's own text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    t = tokenizers.Tokenizer(models.BPE())
    t.normalizer, t.decoder = normalizers.NFC(), decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=TOY.mllm.vocab_size, special_tokens=[f"<|{n}|>" for n in SPECIAL], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([chat(text, (), system) for system in (ASK, DRAW) for text in language.corpus(10000, 0)], trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")                                   # several processes may do this at once
    t.save(str(new))
    os.replace(new, file)
    return Tokenizer(file)


class Facts(nn.Module):
    """Hidden states tell facts of a thing: which colour, which shape, how large, ... Each kind of fact has classes of its own, so that what is
    learned of colours holds for all shapes, also for a pair never seen beside another thing."""
    KINDS = {"colour": [*world.COLOURS, "nothing"], "shape": [*world.SHAPES, "nothing"], "size": [*world.SIZES], "spot": [*world.SPOTS],
             "column": [*range(8)], "row": [*range(8)], "side": [*world.OPPOSITE, "none"], "background": [*world.BACKGROUNDS], "changed": [False, True]}

    def __init__(self, config):
        super().__init__()
        self.head = nn.Linear(config.mllm.dim, sum(map(len, self.KINDS.values())))

    @staticmethod
    def of(thing, scene, exact):
        """-> {kind: class} of what is known of a thing, or of a bare place (colour and shape "nothing"). exact: in eighths of the side, too."""
        known = dict(colour=thing.colour, shape=thing.shape, spot=world.spot(thing), background=scene.background)
        known |= dict(column=int(8 * thing.x), row=int(8 * thing.y)) if exact else {}
        return known | (dict(size=thing.size) if thing.size else {})

    def indices(self, told):
        """[{kind: class}] -> (N, kinds) class indices, -100 for what is not known."""
        return torch.tensor([[classes.index(t[kind]) if kind in t else -100 for kind, classes in self.KINDS.items()] for t in told])

    def forward(self, hidden, told):
        """hidden (depths, N, M), told: N times {kind: class} -> the mean over kinds of the mean cross-entropy of what is known."""
        which = self.indices(told).to(hidden.device).expand(len(hidden), -1, -1)                      # (depths, N, kinds)
        logits = self.head(F.rms_norm(hidden, hidden.shape[-1:])).float().split(list(map(len, self.KINDS.values())), -1)
        losses = []
        for x, k in zip(logits, which.unbind(-1)):                                                    # (depths, N, classes), (depths, N)
            known = (k >= 0).sum().clamp(min=1)                                                       # of a kind that nobody knows the loss is 0
            losses.append(F.cross_entropy(x.flatten(0, 1), k.flatten(), reduction="sum") / known)
        return sum(losses) / len(losses)


class Names(Facts):
    """The stand-in for the captions that Qwen2.5-VL's ViT was pretrained on: every vision token tells which thing it shows, where in the picture
    that is, and how large. From answers alone the ViT learns colours long before shapes and places."""

    def shown(self, scene, h, w):
        """Row by row, the nearest thing whose box reaches well into the unit, else the bare place. -> h * w times {kind: class}"""
        for y, x in (((row + 0.5) / h, (column + 0.5) / w) for row in range(h) for column in range(w)):
            distance = {t: max(abs(t.x - x), abs(t.y - y)) for t in scene.things}                      # below a thing's radius: in its box
            near = [t for t in scene.things if distance[t] < t.radius + 0.35 / w]
            yield self.of(min(near, key=distance.get) if near else world.Thing("nothing", "nothing", "", x, y), scene, exact=True)


def vit_loss(model, extra, rows, a):
    """What each merged unit shows."""
    c, scenes = model.config.mllm.vision, [scene for scene, _ in rows]
    pictures = [patchify(world.render(s, a.size), c) for s in scenes]
    h, w = (n // c.merge for n in pictures[0][1])
    told = [facts for s in scenes for facts in extra.shown(s, h, w)]                                   # B * U
    return extra(model.mllm.see(pictures)[None], told).expand(len(rows)), None


def became(scene, target):
    """What each thing of a scene is after an edit, column by column: itself, changed, or None; then what is new. Each with whether it is another
    than before. So each keeps its place in the list, and who tells the facts of the third need not count how many before it have gone."""
    kept = {t: t for t in target.things if t in scene.things}
    after = kept if len(scene.things) != len(target.things) else dict(zip(scene.things, target.things))
    return [(after.get(t), after.get(t) != t) for t in world.columns(scene)] + [(t, True) for t in target.things if t not in after.values()]


def conversation(rng, i):
    """-> (system prompt, scene to show or None, [(question, answer), ...], what a drawing of it shows, or None: its things, each with whether an
    edit has changed it, and their scene). 96 with pictures, then 32 without: rows of a batch are alike."""
    scene, kind = world.sample_scene(rng), rng.random()
    if i // 32 % 4 == 3 and kind < 0.5:                                         # a caption, in any words -> what it says, in order
        text, said = language.request(scene, rng)
        things = [(t, False) for t in sorted(scene.things, key=lambda t: text.find(t.name))]          # as the text names them
        return DRAW, None, [(text, f"{said}, on a {scene.background} background")], (things, scene)
    if i // 32 % 4 == 3:                                                        # a scene in words, and questions about it
        (question, answer), *turns = [language.question(scene, rng, seen=False)[:2] for _ in range(4)]
        return ASK, None, [(f"{language.caption(scene, rng)}. {question}", answer), *turns], None
    if kind < 0.35:                                                             # a picture, and questions about it
        return ASK, scene, [language.question(scene, rng)[:2] for _ in range(5)], None
    if kind < 0.4:
        return DRAW, scene, [("", language.describe(scene))], (became(scene, scene), scene)
    scene = world.sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))              # a picture and an instruction -> what it would give
    order, target, _ = language.edit(scene, rng)
    return DRAW, scene, [(order, language.describe(target))], (became(scene, target), target)


class Blanks(Facts):
    """A large MLLM sums up what it has read in any token that follows; a small one learns it here. After a prompt to draw come tokens that mean
    nothing, random vectors: four for each thing in turn. Each tells its thing's facts (a guess where the text does not say), at every depth
    from DEPTH on: in a large MLLM the middle layers, too, know what they have read."""
    DEPTH, n = 3, 16                                                            # entering layer 3 of 8; as many as the toy has queries

    def shown(self, things, scene, exact):
        """things: [(thing or None, changed)] of a scene. Yields for each blank {kind: class}, four for each thing, "nothing" for None and the
        blanks left over."""
        for i in range(self.n):
            k = 4 * i // self.n
            thing, changed = things[k] if k < len(things) else (None, False)
            if not thing:
                yield dict(colour="nothing", shape="nothing", background=scene.background, changed=changed)
                continue
            told, others = self.of(thing, scene, exact) | dict(changed=changed), [t for t in scene.things if t != thing]
            if len(others) < 2 and thing.name not in (t.name for t in others):
                told["side"] = (world.relation(thing, others[0]) if others else None) or "none"
            yield told

    def vectors(self, rng, n, like):
        """(n, M), as small as queries are at their start."""
        return 0.02 * torch.randn(n, like.shape[-1], generator=torch.Generator().manual_seed(rng.getrandbits(60))).to(like)


def mllm_loss(model, extra, rows, a):
    """Cross-entropy of the answers, several questions per picture. Every answer counts the same, however long: the loss of "red" must not
    drown in that of descriptions, since it alone asks which colour belongs to which shape. Of the prompts to draw two thirds are followed by
    blanks instead of an answer, which tell facts; and so do words that point at a thing in the picture (grounding, as Qwen2.5-VL learns it from
    boxes and points): "make the circle red" needs to know which of the things that is before any blank can ask whether it is its own."""
    mllm, tok, c = model.mllm, model.mllm.tokenizer, model.config.mllm.vision
    batch, weights, blank, pointing = [], [], [], []
    for b, ((system, scene, turns, drawn), rng) in enumerate(rows):
        patches = [patchify(world.render(scene, a.size), c)] if scene else []
        grids, ids, weight = [(h // c.merge, w // c.merge) for _, (h, w) in patches], [], []
        units, blanks = [h * w for h, w in grids], bool(drawn) and rng.random() < 2 / 3
        for i, (question, answer) in enumerate(turns):
            ask = chat(question, units, system) if i == 0 else f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            for end, thing in language.mentions(question, scene) if scene else ():
                before = len(tok.encode(ask[:ask.rindex(question) + end]))
                pointing.append((b, len(ids) + before - 1, extra.of(thing, scene, exact=True)))
            for text, counts in ((ask, 0), ("<|vision_start|>" if blanks else answer + "<|im_end|>", 0 if blanks else 1)):
                piece = tok.encode(text)
                ids, weight = ids + piece, weight + [counts / len(piece)] * len(piece)
        if blanks:
            told = extra.shown(*drawn, exact=bool(scene))
            blank += [(b, len(ids) + i, facts) for i, facts in enumerate(told)]
            ids, weight = ids + [tok.special["endoftext"]] * extra.n, weight + [0] * extra.n
        batch.append(Row(ids, mrope_positions(ids, tok.special["image_pad"], grids), patches)), weights.append(weight)
    lengths, batch = [len(row.ids) for row in batch], mllm.pad(batch)
    S = batch.ids.shape[1]
    place = lambda marks: ([b for b, _, _ in marks], [S - lengths[b] + at for b, at, _ in marks])      # padding is on the left
    x = mllm.read(batch).clone()                                                                      # (B, S, M)
    if blank:
        x[place(blank)] = extra.vectors(rows[0][1], len(blank), x)
    states = mllm(x, batch.positions, batch.real)                                                     # of each depth (B, S, M)
    weight = torch.tensor([[0] * (S - len(w)) + w for w in weights], device=a.device)[:, 1:]          # (B, S - 1) of the tokens to predict
    logits = mllm.logits(states[-1][:, :-1][weight > 0]).float()                                      # (answer tokens, vocab)
    losses = F.cross_entropy(logits, batch.ids[:, 1:][weight > 0], reduction="none") * weight[weight > 0]
    loss = losses.sum() / weight.sum().clamp(min=1)                                                   # all rows may end in blanks
    for marks in (blank, pointing):
        if marks:
            loss = loss + extra(torch.stack([state[place(marks)] for state in states[extra.DEPTH:]]), [facts for *_, facts in marks])
    return loss.expand(len(rows)), None


def dcae_loss(model, extra, rows, a):
    """L1 + L2 on pixels and L1 on their differences to the next pixel (edges); a little noise makes near latents mean near pictures."""
    scenes, rngs = zip(*rows)
    x = data.to_pixels([world.render(s, a.size) for s in scenes], a.device, getattr(torch, a.dtype))
    z = model.dcae.encode(x)
    z = z + 0.1 * z.detach().std() * data.noise(rngs, z.shape[1:], a.device)[1].to(z.dtype)
    miss = (model.dcae.decode(z) - x).float()
    mean = lambda x: x.flatten(1).mean(1)
    edges = mean(miss.diff(dim=2).abs()) + mean(miss.diff(dim=3).abs())
    return mean(miss.abs()) + mean(miss.pow(2)) + edges / 2, None


def unit_latents(folder, a):
    """Afterwards gives the autoencoder the scaling factor at which its latents have a standard deviation of 1, as SANA's have."""
    model, rng = TBAC.load(folder, a.device), random.Random(a.seed)
    x = data.to_pixels([world.render(world.sample_scene(rng), a.size) for _ in range(256)], a.device)
    with torch.no_grad():
        std = model.dcae.encode(x).std().item() / model.config.dcae.scaling_factor
    model.config = dataclasses.replace(model.config, dcae=dataclasses.replace(model.config.dcae, scaling_factor=1 / std))
    model.save(folder)


class Things(nn.Module):
    """The stand-in for SANA's own text encoder: one vector per thing, with colour + shape + size + place added up, and one for
    the background."""

    def __init__(self, config):
        super().__init__()
        width = config.dit.caption_dim
        words = [*world.COLOURS, *world.SHAPES, *world.SIZES, *world.BACKGROUNDS, "nothing"]
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


def dit_loss(model, extra, rows, a):
    """Flow matching on what the things say, the same for every block; a tenth hears nothing, which guidance needs."""
    scenes, rngs = zip(*rows)
    with torch.no_grad():
        x0 = model.dcae.encode(data.to_pixels([world.render(s, a.size) for s in scenes], a.device, getattr(torch, a.dtype)))
    rungs = extra([None if r.random() < a.drop else s for s, r in rows]).expand(model.config.dit.n_layer, -1, -1, -1)
    t, eps = data.noise(rngs, x0.shape[1:], a.device)
    return model.flow_losses(x0, rungs, t, eps), t


def scene(rng, number):
    return world.sample_scene(rng)


LOSS = {"vit": vit_loss, "mllm": mllm_loss, "dcae": dcae_loss, "dit": dit_loss}
EXTRA = {"vit": Names, "mllm": Blanks, "dit": Things}                         # thrown away afterwards
EXAMPLE = dict.fromkeys(LOSS, scene) | {"mllm": conversation}
