"""How the toy's parts are taught: what stands in for the pretraining of the real ones.

    vit    the MLLM's ViT learns to name what each of its tokens shows (a stand-in for captions by
           the billion)
    mllm   the whole MLLM learns to caption, to answer, to say what an edit would give, and to sum
           up what it has read
    dcae   the autoencoder learns to reconstruct
    dit    the DiT learns to draw what is told in the code of stage mllm (a stand-in for the
           captions that SANA was pretrained on)

    python -m lab.pretrain --stage vit  --out runs/vit
    python -m lab.pretrain --stage dcae --model runs/vit  --out runs/dcae
    python -m lab.pretrain --stage mllm --model runs/dcae --out runs/mllm
    python -m lab.pretrain --stage dit  --model runs/mllm --out runs/dit

`python -m lab.make` runs them all, and the paper's stages after them. Each stage has its own
examples, a loss, and perhaps an auxiliary head that no model keeps; the loop is train.py's. A stage
without --model starts from a fresh toy. (The losses of vit and mllm are means over the rows
of one process, and the noise of dcae is scaled by the spread of that process's latents: with more
processes they differ a little.)

Dimension key: B examples, R packed rows, U units, S tokens of a row, M MLLM width, N marked tokens.
"""
import dataclasses
import pathlib
import random
from collections.abc import Callable

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from dcae import DCAEConfig
from dit import DiTConfig
from engine.data import times_and_noise
from engine.fast import encode_in_parts, pack_mask
from engine.files import check_headers, new_file, write_text
from engine.loading import load_weights
from engine.options import parse
from engine.pictures import to_pixels
from engine.stream import first_examples
from lab import sheets
from mllm import (
    ASK,
    DRAW,
    MLLM,
    SPECIAL,
    Batch,
    MLLMConfig,
    Prompt,
    Tokenizer,
    chat,
    mrope_positions,
)
from tbac import TBAC, TBACConfig, flow_matching
from toy import language, world
from train import Task, adamw, set_size
from train import main as run_stage
from vit import ViTConfig, patchify

# --------------------------------------------------------------------------- sizes and options

TOY = TBACConfig(
    mllm=MLLMConfig(
        vocab_size=640, n_layer=8, dim=128, n_head=4, n_kv_head=2, head_dim=32, mlp_dim=384,
        rope_theta=100.0, rope_sections=(2, 5, 9),
        vision=ViTConfig(n_layer=4, dim=96, n_head=3, mlp_dim=256, patch=8, window=32,
                         full_attention=(1, 3), area=64 * 64)),
    dit=DiTConfig(n_layer=6, n_head=6, cross_n_head=6, channels=16, caption_dim=128),
    dcae=DCAEConfig(widths=(16, 32, 64, 128), encoder_layers=(0, 1, 1, 1),
                    decoder_layers=(1, 1, 1, 1), attention_stages=1, latent_channels=16),
    n_query=16, size=64,
    # With less it edits less well: python -m lab.ablate settings
    guidance=6.5, image_guidance=6.5)

COMMON = dict(lr=2e-3, batch=32, warmup=100, weight_decay=0.01, clip=1.0, ema=0.998, size=64,
              save_every=250, sheet_every=500, data=["toy"], min_lr_ratio=0.02)
PRESETS = {"toy": {
    "vit": COMMON | dict(steps=1500),
    # AdamW's default memory of squared gradients (0.999) learns more slowly here.
    "mllm": COMMON | dict(steps=12000, betas=[0.9, 0.98]),
    "dcae": COMMON | dict(steps=2000),
    "dit": COMMON | dict(steps=7000, batch=48, lr=3e-3),
}}
# What stage mllm learns besides captions and answers: see SummaryTokens, mark_words and, for the
# study, in place of the first, tokenize_conversation.
AUX = ("summary", "pointing", "gist")


def options(argv=None):
    return parse(argv, __doc__, PRESETS, own=own_options)


def own_options(add) -> None:
    add("--aux", nargs="*", choices=AUX, default=AUX[:2], help="what stage mllm learns besides "
        "captions and answers: attributes at summary tokens, at words that point; or to write from "
        "what tokens behind the prompt have kept of it (--aux alone: nothing; default: summary "
        "pointing)")


def build(args) -> TBAC:
    """The model in --model, what learns in float32, or a fresh toy."""
    only_there = ("fsdp", "take", "wiring", "connector", "queries", "cache_latents")
    if any(getattr(args, name) for name in only_there) or args.shift != 1:
        raise ValueError("--fsdp, --take, --wiring, --connector, --queries, --cache-latents and "
                         "--shift are for train.py")
    if args.stage != "dcae" and args.data != ["toy"]:
        raise ValueError(f"--data {' '.join(args.data)}: only stage dcae learns from pictures of "
                         "one's own, the others need to know what a picture shows: --data toy")
    if args.model:
        learns = TASKS[args.stage].learns
        dtype = {part.split(".")[0]: torch.float32 for part in learns}
        model = TBAC.load(args.model, args.device, dtype)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        model = TBAC(TOY, toy_tokenizer(args.out / "tokenizer.json"))
        for part in (model.mllm, model.ladder, model.dit):
            part.init_weights(generator)
        # Drawn on the CPU: every device starts from the same weights.
        model = model.to(args.device)
    if args.stage in ("dcae", "dit"):
        set_size(model, args.size)
    return model


def toy_tokenizer(file) -> Tokenizer:
    """A byte-level BPE with Qwen's special tokens, trained on the toy world's own text. Unlike
    Qwen's it knows lower case only, so "RED CIRCLE" is nothing new to it."""
    t = tokenizers.Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    t.decoder = decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOY.mllm.vocab_size, special_tokens=[f"<|{name}|>" for name in SPECIAL],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = language.corpus(10000, 0)
    t.train_from_iterator([chat(text, (), system) for system in (ASK, DRAW) for text in corpus],
                          trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once.
    write_text(file, t.to_str(pretty=True))
    return Tokenizer(file)


# ------------------------------------------------------------------------------------ optimizer

class Together:
    """Several optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups, self.state = [], {}
        for optimizer in optimizers:
            self.param_groups += optimizer.param_groups
            for group in optimizer.param_groups:
                # The same objects: what is put in here is in the optimizer.
                self.state |= {p: optimizer.state[p] for p in group["params"]}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def muon(params: dict[str, nn.Parameter], args) -> Together:
    """Muon (kellerjordan.github.io/posts/muon) for the weight matrices, AdamW for the rest. An
    update of Muon is the momentum with all its singular values made equal, so that rare directions
    are learnt as fast as common ones. The table of embeddings is looked up, not multiplied through,
    and stays with AdamW, as heads do; so do, by their names, the ViT's first layer and the DiT's
    time embedding. (Its tables of offsets, scale_shift_table, have two dimensions and count as
    matrices.)"""
    def is_matrix(name: str, p: nn.Parameter) -> bool:
        return p.dim() == 2 and "embed" not in name and not name.startswith("aux_head.")

    matrices = [p for name, p in params.items() if is_matrix(name, p)]
    others = {name: p for name, p in params.items() if not is_matrix(name, p)}
    # Its updates are as large as AdamW's are, so both take one learning rate.
    return Together(
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay,
                         adjust_lr_fn="match_rms_adamw"),
        adamw(others, args))


# ------------------------------------------------------------------------ attributes of a thing

class AttributeCode(nn.Module):
    """A code for what is known of a thing: a vector for each class of each attribute (colour,
    shape, size, ...), so that what is learnt of colours holds for all shapes, also for a pair that
    was never seen beside another thing. Hidden states tell a class if they point its vector's way:
    a linear head, which learns along. And the sum of the vectors of all that is known is much like
    a state that tells just this: so the DiT can be told without an MLLM."""

    CLASSES = {
        "colour": [*world.COLOURS, "nothing"],
        "shape": [*world.SHAPES, "nothing"],
        "size": [*world.SIZES],
        "spot": [*world.SPOTS],
        "column": [*range(8)],
        "row": [*range(8)],
        "side": [*world.OPPOSITE, "none"],
        "background": [*world.BACKGROUNDS],
        "changed": [False, True],
    }

    def __init__(self, config: TBACConfig):
        super().__init__()
        self.head = nn.Linear(config.mllm.dim, sum(map(len, self.CLASSES.values())))

    @staticmethod
    def of(thing, scene, exact: bool) -> dict:
        """-> {attribute: class} of what is known of a thing, or of a bare place (colour and shape
        "nothing"). exact: its place in eighths of the side, too."""
        labels = dict(colour=thing.colour, shape=thing.shape, spot=world.spot(thing),
                      background=scene.background)
        if exact:
            labels |= dict(column=int(8 * thing.x), row=int(8 * thing.y))
        if thing.size:
            labels["size"] = thing.size
        return labels

    def indices(self, labels: list[dict]) -> Tensor:
        """[{attribute: class}] -> class indices (N, attributes), -100 for what is not known."""
        rows = []
        for known in labels:
            rows.append([classes.index(known[attribute]) if attribute in known else -100
                         for attribute, classes in self.CLASSES.items()])
        return torch.tensor(rows)

    @property
    def sizes(self) -> list[int]:
        return [len(classes) for classes in self.CLASSES.values()]

    def encode(self, labels: list[list[dict]]) -> Tensor:
        """B times N times {attribute: class} -> (B, N, M), a sum of vectors each, normed; 0 where
        nothing is known."""
        which = torch.stack([self.indices(row) for row in labels])     # (B, N, attributes)
        # The class of what is not known is a column that is left out again.
        hot = [F.one_hot(i.clamp(min=-1) + 1, n + 1)[..., 1:]
               for i, n in zip(which.unbind(-1), self.sizes)]
        # What all classes of an attribute have in common tells none of them.
        vectors = [F.normalize(rows - rows.mean(0), dim=1)
                   for rows in self.head.weight.split(self.sizes)]
        said = torch.cat(hot, -1).to(vectors[0]) @ torch.cat(vectors)  # (B, N, M)
        return F.rms_norm(said, said.shape[-1:])

    def logits(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden (..., M) -> of each attribute (..., classes)"""
        logits = self.head(F.rms_norm(hidden, hidden.shape[-1:])).float()
        return dict(zip(self.CLASSES, logits.split(self.sizes, -1)))

    def forward(self, hidden: Tensor, labels: list[dict]) -> Tensor:
        """hidden (depths, N, M), labels: N times {attribute: class} -> the mean over attributes of
        the mean cross-entropy of what is known."""
        target = self.indices(labels).to(hidden.device)                # (N, attributes)
        target = target.expand(len(hidden), -1, -1)                    # (depths, N, attributes)
        losses = []
        for x, y in zip(self.logits(hidden).values(), target.unbind(-1)):  # (depths, N, classes)
            total = F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")
            # Of an attribute that is not known anywhere the loss is 0.
            losses.append(total / (y >= 0).sum().clamp(min=1))
        return sum(losses) / len(losses)


# --------------------------------------------------------------------------------- stage vit

class PatchNames(AttributeCode):
    """The stand-in for the captions that Qwen2.5-VL's ViT was pretrained on: every vision token
    tells which thing it shows, where in the picture that is, and how large. From answers alone the
    ViT learns colours long before shapes and places."""

    def shown(self, scene, h: int, w: int):
        """Row by row, the nearest thing whose box reaches well into the unit, else the bare place.
        Yields h * w times {attribute: class}."""
        for row in range(h):
            for column in range(w):
                x, y = (column + 0.5) / w, (row + 0.5) / h
                # From a thing's centre, along the farther axis: its box ends at its radius, and has
                # to reach 0.15 / w into the unit, whose own half is 0.5 / w.
                distance = {t: max(abs(t.x - x), abs(t.y - y)) for t in scene.things}
                near = [t for t in scene.things if distance[t] < t.radius + 0.35 / w]
                bare = world.Thing("nothing", "nothing", "", x, y)
                yield self.of(min(near, key=distance.get, default=bare), scene, exact=True)


def sample_scene(rng: random.Random, number: int, size: int):
    return world.sample_scene(rng)


def scene_to_draw(rng: random.Random, number: int, size: int):
    return language.scene_to_draw(rng)


def vit_loss(model: TBAC, code: PatchNames, rows: list, args):
    """Cross-entropy of what each unit shows."""
    c, scenes = model.config.mllm.vision, [scene for scene, _ in rows]
    pictures = [patchify(world.render(scene, args.size), c) for scene in scenes]
    h, w = (n // c.merge for n in pictures[0][1])
    labels = [known for scene in scenes for known in code.shown(scene, h, w)]       # B * U
    tokens = model.mllm.encode_images(pictures)                                     # (B * U, M)
    return code(tokens[None], labels).expand(len(rows)), None


# -------------------------------------------------------------------------------- stage mllm

@dataclasses.dataclass
class Conversation:
    """system: the system prompt; scene: the one shown, or None; turns: [(question, answer)];
    drawn: what a drawing of it shows, or None: [(thing or None, has an edit changed it?)]; target:
    the scene of these things."""
    system: str
    scene: world.Scene | None
    turns: list[tuple[str, str]]
    drawn: list | None = None
    target: world.Scene | None = None


def after_edit(scene, target) -> list:
    """What each thing of a scene is after an edit, column by column: itself, changed, or None; then
    what is new. Each with whether it has changed. So each thing keeps its slot, and removing one
    does not shift the others."""
    after = {thing: thing for thing in target.things if thing in scene.things}
    if len(scene.things) == len(target.things):
        after = dict(zip(scene.things, target.things))
    kept = [(after.get(thing), after.get(thing) != thing) for thing in world.columns(scene)]
    return kept + [(thing, True) for thing in target.things if thing not in after.values()]


def conversation(rng: random.Random, number: int, size: int) -> Conversation:
    """A good half with a picture."""
    if rng.random() < 0.45:
        return about_words(rng)
    scene, kind = world.sample_scene(rng), rng.random()
    if kind < 0.27:
        turns = [language.question(scene, rng)[:2] for _ in range(5)]
        return Conversation(ASK, scene, turns)
    if kind < 0.31:
        turns = [("", language.describe(scene))]
        return Conversation(DRAW, scene, turns, after_edit(scene, scene), scene)
    # A picture and an instruction -> what it would give.
    scene, order, target, _ = language.scene_to_edit(rng)
    turns = [(order, language.describe(target))]
    return Conversation(DRAW, scene, turns, after_edit(scene, target), target)


def about_words(rng: random.Random) -> Conversation:
    scene = language.scene_to_draw(rng)
    if rng.random() < 0.7:
        # A caption, in any words -> what it says, its things in the order of the text.
        text, said = language.request(scene, rng)
        things = language.in_order(text, scene.things)
        turns = [(text, f"{said}, on a {scene.background} background")]
        # "Two circles": summary tokens could only guess the colours.
        all_told = all(thing.name in said for thing in things)
        drawn = [(thing, False) for thing in things] if all_told else None
        return Conversation(DRAW, None, turns, drawn, scene)
    # A scene in words, and questions about it.
    asked = [language.question(scene, rng, seen=False)[:2] for _ in range(4)]
    (question, answer), *turns = asked
    first = f"{language.caption(scene, rng)}. {question}", answer
    return Conversation(ASK, None, [first, *turns])


# Of made-up words.
SYLLABLES = [a + b + c for a in ("", *"bdfghklmnprstvw") for b in "aeiou" for c in ("", *"lnrst")]


def with_chatter(text: str, rng: random.Random) -> str:
    """Every eighth text with made-up words in front or behind: people say more than the toy knows,
    which shall not throw it off."""
    if not text or rng.random() < 7 / 8:
        return text
    lengths = [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
    chatter = " ".join("".join(rng.choices(SYLLABLES, k=n)) for n in lengths)
    parts = (chatter, text) if rng.random() < 0.5 else (text, chatter)
    return rng.choice((" ", ", ", ": ")).join(parts)


class SummaryTokens(AttributeCode):
    """The assumption behind the toy: a large MLLM sums up what it has read in any token that
    follows, at many depths. A small one is taught to. After a prompt to draw come tokens without a
    meaning, random vectors, four for each thing in turn. Their states encode the attributes of that
    thing (a guess where the text does not say) at every depth from DEPTH on."""

    DEPTH = 3                           # the state that enters layer 3 of 8
    n = 16                              # as many as the toy has queries

    def shown(self, drawn: list, scene, exact: bool):
        """Yields for each token {attribute: class}, four for each thing; "nothing" for None and the
        tokens left over."""
        for i in range(self.n):
            k = 4 * i // self.n
            thing, changed = drawn[k] if k < len(drawn) else (None, False)
            if thing is None:
                yield dict(colour="nothing", shape="nothing", background=scene.background,
                           changed=changed)
            else:
                yield self.of(thing, scene, exact) | self.side(thing, scene) | dict(changed=changed)

    @staticmethod
    def side(thing, scene) -> dict:
        """At which side of the only other thing it stands: "none" if it is alone, or at no clear
        one. Not known beside several others, or beside one of its own name."""
        others = [t for t in scene.things if t != thing]
        if len(others) > 1 or thing.name in (t.name for t in others):
            return {}
        relation = world.relation(thing, others[0]) if others else None
        return dict(side=relation or "none")

    def rungs(self, model: TBAC, told: list[list[dict]]) -> Tensor:
        """What the DiT would hear if the MLLM told exactly this, and at all depths the same
        -> (L, B, Q, caption_dim). (The toy's captions are as wide as its MLLM.)"""
        said = self.encode(told).to(model.dit.proj_out.weight.dtype)
        return said.expand(model.config.dit.n_layer, -1, -1, -1)

    def scenes(self, states: list[Tensor]) -> list[world.Scene]:
        """The queries' states at some depths from DEPTH on, each (B, Q, M) -> the scenes that they
        tell together: of each thing the likeliest attributes, by all its tokens. Exact places are
        the middles of eighths."""
        logits = self.logits(torch.stack(states))                      # (depths, B, Q, classes)
        by_thing = {name: x.log_softmax(-1).mean(0).unflatten(1, (4, -1)).mean(2)
                    for name, x in logits.items()}                     # (B, 4, classes)
        by_thing["background"] = by_thing["background"].mean(1, keepdim=True).expand(-1, 4, -1)
        found = []
        for b in range(len(states[0])):
            told = [{name: self.CLASSES[name][x[b, k].argmax()] for name, x in by_thing.items()}
                    for k in range(4)]
            things = [world.Thing(t["shape"], t["colour"], t["size"], (t["column"] + 0.5) / 8,
                                  (t["row"] + 0.5) / 8)
                      for t in told if "nothing" not in (t["shape"], t["colour"])]
            found.append(world.Scene(tuple(things), told[0]["background"]))
        return found

    def vectors(self, rng: random.Random, n: int, like: Tensor) -> Tensor:
        """(n, M), as small as queries are at their start."""
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        return 0.02 * torch.randn(n, like.shape[-1], generator=generator).to(like)


@dataclasses.dataclass
class Marked:
    """A conversation, tokenized: a weight for each token to predict; marks: [(its place among the
    tokens, {attribute: class})] of summary tokens and of words that point at a thing; unseen:
    [(some tokens, what they do not see of what precedes them)], slices."""
    prompt: Prompt
    weight: list[float]
    summary: list
    pointing: list
    unseen: list


def tokenize_conversation(model: TBAC, code: SummaryTokens, talk: Conversation,
                          rng: random.Random, args) -> Marked:
    """Of the conversations that end in a drawing three quarters are followed by summary tokens in
    place of the answer. Or, as gist tokens (Mu et al. 2023, arXiv 2304.08467), by the same tokens
    and the answer, which sees them and not what precedes them: so they come to hold it, and nothing
    says how, nor at which depths."""
    tok, c = model.mllm.tokenizer, model.config.mllm.vision
    pictures = [patchify(world.render(talk.scene, args.size), c)] if talk.scene else []
    grids = [(h // c.merge, w // c.merge) for _, (h, w) in pictures]
    units = [h * w for h, w in grids]
    told = "summary" in args.aux and bool(talk.drawn)
    gist = "gist" in args.aux and talk.system == DRAW
    summed_up = (told or gist) and rng.random() < 3 / 4
    ids, weight, pointing = [], [], []
    for i, (question, answer) in enumerate(talk.turns):
        question = with_chatter(question, rng)
        text = next_turn(question) if i else chat(question, units, talk.system)
        asked = tok.encode(text)
        said = tok.encode("<|vision_start|>" if summed_up else answer + "<|im_end|>")
        if i and len(ids) + len(asked) + len(said) > PACKED_LENGTH:
            break
        if "pointing" in args.aux:
            pointing += mark_words(tok, code, talk.scene, question, text, len(ids))
        ids += asked + said
        # Every answer counts the same, however long.
        weight += [0.0] * len(asked) + [0.0 if summed_up else 1 / len(said)] * len(said)
    summary, unseen = [], []
    if summed_up:
        summary, unseen = add_summary(tok, code, talk, ids, weight, told)
    positions = mrope_positions(ids, tok.special["image_pad"], grids)
    return Marked(Prompt(ids, positions, pictures), weight, summary, pointing, unseen)


def add_summary(tok: Tokenizer, code: SummaryTokens, talk: Conversation, ids: list, weight: list,
                told: bool) -> tuple[list, list]:
    """Adds summary tokens. told: these are asked what the drawing shows; else they are followed by
    the answer, which does not see what precedes them. -> marks and unseen, as of Marked"""
    n = len(ids)
    ids += [tok.special["endoftext"]] * code.n
    weight += [0.0] * code.n
    labels, unseen = [{}] * code.n, []
    if told:
        labels = code.shown(talk.drawn, talk.target, exact=bool(talk.scene))
    else:
        said = tok.encode(talk.turns[0][1] + "<|im_end|>")
        unseen = [(slice(len(ids), len(ids) + 1 + len(said)), slice(0, n))]
        ids += [tok.special["vision_end"], *said]
        weight += [0.0] + [1 / len(said)] * len(said)
    return [(n + i, known) for i, known in enumerate(labels)], unseen


def next_turn(question: str) -> str:
    return f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def mark_words(tok: Tokenizer, code, scene, question: str, text: str, offset: int) -> list:
    """Words that point at a thing in the picture tell its attributes (grounding, as Qwen2.5-VL
    learns it from boxes and points): marks at the tokens in which they end. "Make the circle red"
    needs to know which thing that is before any summary token can ask whether it is its own."""
    marks = []
    for end, thing in language.mentions(question, scene) if scene else ():
        before = len(tok.encode(text[:text.rindex(question) + end]))
        marks.append((offset + before - 1, code.of(thing, scene, exact=True)))
    return marks


# Tokens of a packed row. Of a conversation, later turns that do not fit into one are left out.
PACKED_LENGTH = 192


def pack(marked: list[Marked]) -> list[list[Marked]]:
    """Conversations that share a row, of PACKED_LENGTH tokens at most: each, the longest first,
    goes where it leaves the least room. Padded to the longest one, half of a batch would be
    padding."""
    rows, room = [], []
    for talk in sorted(marked, key=lambda talk: -len(talk.prompt.ids)):
        n = len(talk.prompt.ids)
        fits = [i for i, free in enumerate(room) if free >= n]
        if not fits:
            rows.append([])
            room.append(PACKED_LENGTH)
            fits = [len(rows) - 1]
        best = min(fits, key=room.__getitem__)
        rows[best].append(talk)
        room[best] -= n
    return rows


def join(mllm: MLLM, rows: list[list[Marked]]) -> tuple[Batch, Tensor, list[Marked]]:
    """Packed rows -> Batch, whose attention_mask (R, 1, S, S) says who attends to whom: each token
    to its own conversation, up to itself; weights (R, S); and each row as one Marked."""
    joined, owners = [], []
    for talks in rows:
        nothing = Prompt([], torch.empty(3, 0, dtype=torch.long), [])
        whole, owner = Marked(nothing, [], [], [], []), []
        for k, talk in enumerate(talks, 1):
            offset = len(owner)
            owner += [k] * len(talk.prompt.ids)
            whole.weight += talk.weight
            whole.summary += [(offset + place, known) for place, known in talk.summary]
            whole.pointing += [(offset + place, known) for place, known in talk.pointing]
            whole.unseen += [tuple(slice(offset + part.start, offset + part.stop) for part in parts)
                             for parts in talk.unseen]
        prompts = [talk.prompt for talk in talks]
        whole.prompt.ids = [id for prompt in prompts for id in prompt.ids]
        whole.prompt.positions = torch.cat([prompt.positions for prompt in prompts], 1)
        whole.prompt.pictures = [picture for prompt in prompts for picture in prompt.pictures]
        joined.append(whole)
        owners.append(owner)
    batch = mllm.left_pad([row.prompt for row in joined])
    S = batch.ids.shape[1]
    padded = [[0.0] * (S - len(row.weight)) + row.weight for row in joined]
    weight = torch.tensor(padded, device=batch.ids.device)
    mask = hide(pack_mask(owners, batch.ids), joined)
    return dataclasses.replace(batch, attention_mask=mask), weight, joined


def hide(mask: Tensor, joined: list[Marked]) -> Tensor:
    """Who attends to whom (R, 1, S, S), and not to what is unseen."""
    for row, seen in zip(joined, mask[:, 0]):
        # Padding is on the left.
        n = len(row.prompt.ids)
        for tokens, hidden in row.unseen:
            seen[-n:, -n:][tokens, hidden] = False
    return mask


def mllm_loss(model: TBAC, code: SummaryTokens, rows: list, args):
    """Cross-entropy of the answers, several questions per picture, plus that of the attributes at
    the marked tokens. Every answer counts the same: the loss of "red" must not drown in that of
    descriptions, since it alone asks which colour belongs to which shape."""
    mllm = model.mllm
    marked = [tokenize_conversation(model, code, talk, rng, args) for talk, rng in rows]
    batch, weight, joined = join(mllm, pack(marked))
    S = batch.ids.shape[1]
    summary, summary_labels = places(joined, "summary", S)
    pointing, pointing_labels = places(joined, "pointing", S)

    x = mllm.embed(batch).clone()                                      # (R, S, M)
    if summary_labels:
        x[summary] = code.vectors(rows[0][1], len(summary_labels), x)
    states = mllm(x, batch.positions, batch.attention_mask)            # of each depth (R, S, M)

    weight = weight[:, 1:]                                             # (R, S - 1), to predict
    counts = weight > 0
    logits = mllm.logits(states[-1][:, :-1][counts]).float()           # (answer tokens, vocab)
    losses = F.cross_entropy(logits, batch.ids[:, 1:][counts], reduction="none")
    # All conversations may end in summary tokens.
    loss = (losses * weight[counts]).sum() / weight.sum().clamp(min=1)
    for place, labels in ((summary, summary_labels), (pointing, pointing_labels)):
        if labels:
            deep = torch.stack([state[place] for state in states[code.DEPTH:]])
            loss = loss + code(deep, labels)
    return loss.expand(len(rows)), None


# The code of stage mllm, beside its model.
CODE = "code.safetensors"


def keep_code(run) -> None:
    """For stage dit, and for whoever wants to read what the queries say (lab/inside.py:told)."""
    mean = {name: run.state.ema[f"aux_head.{name}"].detach().contiguous()
            for name in run.helper.state_dict()}
    with new_file(run.args.out / CODE) as file:
        file.write(save(mean))


def places(joined: list[Marked], kind: str, S: int) -> tuple[tuple[list, list], list[dict]]:
    """The marks of all rows -> their rows and columns in the padded batch (padding is on the left),
    and their labels."""
    rows, columns, labels = [], [], []
    for r, row in enumerate(joined):
        for place, known in getattr(row, kind):
            rows.append(r)
            columns.append(S - len(row.prompt.ids) + place)
            labels.append(known)
    return (rows, columns), labels


# -------------------------------------------------------------------------------- stage dcae

def dcae_loss(model: TBAC, code: nn.Module, rows: list, args):
    """L1 + L2 on pixels and L1 on their differences to the next pixel (edges); a little noise makes
    near latents mean near pictures."""
    def mean(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    examples, rngs = zip(*rows)
    pictures = [sheets.picture_of(example, args.size) for example in examples]
    x = to_pixels(pictures, args.device, getattr(torch, args.dtype))
    z = model.dcae.encode(x)
    _, eps = times_and_noise(rngs, z.shape[1:], args.device)
    z = z + 0.1 * z.detach().std() * eps.to(z.dtype)
    error = (model.dcae.decode(z) - x).float()
    edges = mean(error.diff(dim=2).abs()) + mean(error.diff(dim=3).abs())
    return mean(error.abs()) + mean(error.pow(2)) + edges / 2, None


def unit_latents(run) -> None:
    """Afterwards gives the autoencoder the scaling factor at which its latents have a standard
    deviation of 1, as SANA's have."""
    args = run.args
    model = TBAC.load(args.out, args.device)
    examples = first_examples(run.reader, 256)
    pictures = [sheets.picture_of(example, args.size) for example in examples]
    pixels = to_pixels(pictures, args.device, model.dcae.encoder.conv_in.weight.dtype)
    c = model.config.dcae
    with torch.no_grad():
        std = encode_in_parts(model.dcae, pixels).float().std().item() / c.scaling_factor
    dcae = dataclasses.replace(c, scaling_factor=1 / std)
    model.config = dataclasses.replace(model.config, dcae=dcae)
    model.save(args.out)


# --------------------------------------------------------------------------------- stage dit

def as_told(code: SummaryTokens, scene, rng: random.Random, args) -> list[dict]:
    """A scene as the DiT hears of it: nothing now and then, which guidance needs; every fourth time
    all of it, as of a picture; every fifth with sides and spots; else without. Captions seldom tell
    these, so the DiT learns to arrange things by itself. That a thing was changed means nothing to
    it."""
    drawn = [(thing, rng.random() < 0.5) for thing in scene.things]
    told = list(code.shown(drawn, scene, exact=rng.random() < 0.25))
    if rng.random() < args.cond_drop:
        return [{} for _ in told]
    if "column" not in told[0] and rng.random() < 0.73:
        return [{name: label[name] for name in label.keys() - {"spot", "side"}} for label in told]
    return told


def dit_loss(model: TBAC, code: SummaryTokens, rows: list, args):
    """Flow matching on what is told of the scene."""
    scenes, rngs = zip(*rows)
    pictures = [world.render(scene, args.size) for scene in scenes]
    with torch.no_grad():
        pixels = to_pixels(pictures, args.device, getattr(torch, args.dtype))
        x0 = model.dcae.encode(pixels).float()                         # (B, C, h, w)
    rungs = code.rungs(model, [as_told(code, scene, rng, args) for scene, rng in rows])
    t, eps = times_and_noise(rngs, x0.shape[1:], args.device)
    x_t, v = flow_matching(x0, t, eps)
    error = model.velocity(x_t, t, rungs).float() - v
    return error.pow(2).flatten(1).mean(1), t


# ------------------------------------------------------------------------------------- stages

def task(learns: str, loss, sheet, code=None, make=sample_scene) -> Task:
    """Heads live on the model's device and are no part of it."""
    def helper(model: TBAC, args) -> nn.Module:
        return code(model, args).to(args.device) if code else nn.Module()

    return Task((learns,), loss, {"toy": make}, build, helper, sheet, muon)


def fresh(code) -> Callable:
    return lambda model, args: code(model.config)


def learnt_code(model: TBAC, args) -> SummaryTokens:
    """The code that the MLLM in --model has learnt to speak."""
    file = pathlib.Path(args.model or "") / CODE
    if not file.exists():
        raise ValueError(f"{file} is missing: the code that stage mllm writes beside its model")
    code = SummaryTokens(model.config)
    check_headers(code, [file], file)
    load_weights(code, [file], "cpu")
    return code.requires_grad_(False)


TASKS = {
    "vit": task("mllm.vision", vit_loss, sheets.vit, fresh(PatchNames)),
    "mllm": task("mllm", mllm_loss, sheets.mllm, fresh(SummaryTokens), conversation),
    "dcae": task("dcae", dcae_loss, sheets.dcae),
    "dit": task("dit", dit_loss, sheets.dit, learnt_code, scene_to_draw),
}
FINISH = {"dcae": unit_latents, "mllm": keep_code}


def main() -> None:
    args = options()
    run_stage(args, TASKS[args.stage], FINISH.get(args.stage))


if __name__ == "__main__":
    main()
