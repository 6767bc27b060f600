"""The repository's own functions, plugged into the assignment. (Part 6 is compared with the whole
model, so here its pieces are joined once more.)"""
import torch
from PIL import Image

import dit
import ladder
import mllm
import sample
import tbac
import vit

# --------------------------------------------------------------------------------- part 1: flow

flow_matching = tbac.flow_matching


def loss(velocity, x0, t, eps):
    x_t, v = flow_matching(x0, t, eps)
    return (velocity(x_t, 1000 * t) - v).pow(2).flatten(1).mean(1)


schedule = sample.schedule


def clean_latents(x_t, v, t):
    """A step of Euler's all the way to t = 0."""
    return euler(x_t, v, t, 0.0)


def euler(x, v, t, t_next):
    return sample.euler(x, x - t * v, None, [t, t_next], 0)


# ---------------------------------------------------------------- part 2: guidance and sampling

def guide(null, cond, guidance):
    return sample.guide([null, cond], guidance, 1.0)


def guide_with_image(null, image, both, guidance, image_guidance):
    return sample.guide([null, image, both], guidance, image_guidance)


dpm_2m = sample.dpm_2m


def denoise(velocity, x, steps, shift, solver):
    """The loop of sample.denoise, for any velocity."""
    times = schedule(steps, shift).tolist()
    x0_prev = None
    for i, t in enumerate(times[:-1]):
        v = velocity(x, torch.full((len(x),), int(1000 * t)).float())
        x0 = x - t * v
        x = sample.SOLVERS[solver](x, x0, x0_prev, times, i)
        x0_prev = x0
    return x


# -------------------------------------------------------------------------- part 3: the MLLM reads

mrope_positions = mllm.mrope_positions


def window_config(side):
    """Units are single patches of one pixel."""
    return vit.ViTConfig(patch=1, merge=1, window=side)


def to_windows(x, h, w, side):
    index, valid = vit.window_index((h, w), window_config(side))
    windows = vit.to_windows(x[None], index, 1)[0].unflatten(0, (-1, side * side))
    return windows, valid


def from_windows(windows, h, w, side):
    index, valid = vit.window_index((h, w), window_config(side))
    return vit.from_windows(windows.flatten(0, 1)[None], index, valid)[0]


# ------------------------------------------------------------------------- part 4: the DiT paints

def attention_n_by_n(q, k, v):
    """The repository has the other form only; its weights, from one key at a time."""
    one = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return dit.linear_attention(q, k, one) @ v


linear_attention = dit.linear_attention
timestep_embedding = dit.timestep_embedding


def filled(module, weights):
    """The module with these weights, all of its own and no others."""
    module.load_state_dict(weights)
    return module.requires_grad_(False)


def of_prefix(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()
            if name.startswith(prefix)}


def sizes(dim, head_dim, n_head, hidden=0, **more):
    return dit.DiTConfig(n_head=dim // head_dim, head_dim=head_dim, cross_n_head=n_head,
                         mlp_ratio=hidden / dim, **more)


def cross(weights, n_head):
    dim = len(weights["k.weight"])
    return filled(dit.CrossAttention(sizes(dim, dim, n_head)), weights)


def project_kv(rung, weights, n_head):
    return cross(weights, n_head).project_kv(rung)


def cross_attention(x, keys, values, weights, n_head):
    return cross(weights, n_head)(x, keys, values)


def mix_ffn(x, size, weights):
    dim, hidden = weights["pointwise.weight"].shape[:2]
    ffn = filled(dit.MixFFN(sizes(dim, dim, 1, hidden)), weights)
    return ffn(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


def adaln_block(x, modulation, keys, values, size, weights, head_dim, n_head):
    dim, hidden = weights["ffn.pointwise.weight"].shape[:2]
    block = filled(dit.Block(sizes(dim, head_dim, n_head, hidden)), weights)
    return block(x, modulation, keys, values, size)


# ----------------------------------------------------------------------------- part 5: the ladder

tap_layers = ladder.tap_layers


def climbed(states, weights, n_mllm, n_dit):
    """Every state of (Q, M) -> rungs (L, Q, caption width)."""
    width, dim = weights["0.weight"].shape
    made = ladder.Ladder(1, dim, width, n_mllm, n_dit)
    filled(made.connector, weights)
    return made([state[None] for state in states])[:, 0].detach()


def connector(states, weights):
    return climbed([states] * 2, weights, 1, 1)[0]


def append_queries(x, positions, queries):
    """As in TBAC.query_states."""
    after = positions[:, -1:] + torch.arange(1, len(queries) + 1)
    return torch.cat([x, queries]), torch.cat([positions, after], 1)


def rungs(states, n_query, n_dit, weights):
    return climbed([state[-n_query:] for state in states], weights, len(states) - 1, n_dit)


def whole_dit(weights, head_dim, n_head):
    width, dim = weights["caption.0.weight"].shape[::-1]
    hidden = weights["blocks.0.ffn.pointwise.weight"].shape[1]
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    config = sizes(dim, head_dim, n_head, hidden, n_layer=n_layer, caption_dim=width,
                   channels=weights["patch_embed.weight"].shape[1])
    return filled(dit.DiT(config), weights)


def condition(rungs, weights, n_head):
    """A whole DiT, of whose weights only those are filled that `project_kv` reads."""
    width, dim = weights["caption.0.weight"].shape[::-1]
    made = dit.DiT(sizes(dim, dim // n_head, n_head, dim, n_layer=len(rungs), caption_dim=width))
    filled(made.caption, of_prefix(weights, "caption."))
    for j, block in enumerate(made.blocks):
        filled(block.cross, of_prefix(weights, f"blocks.{j}.cross."))
    return made.project_kv(rungs)


# ----------------------------------------------------------------------------- part 6: all joined

def velocity(x_t, time, keys_values, weights, head_dim, n_head):
    return whole_dit(weights, head_dim, n_head)(x_t, time, keys_values)


def rungs_of(given, text, picture):
    c = given.config
    ids, grids = given.tokenize(text, picture)
    x = given.embed(ids, picture, to_windows, from_windows)
    positions = mrope_positions(ids, given.image_token, grids)
    x, positions = append_queries(x, positions, given.ladder["queries"])
    states = given.read(x, positions)
    return rungs(states, c.n_query, c.dit.n_layer, of_prefix(given.ladder, "connector."))


def requests(given, text, picture):
    """(text, picture) of each row that guidance compares."""
    if picture is None:
        return [("", None), (text, None)]
    return [("", Image.new("RGB", picture.size)), ("", picture), (text, picture)]


def draw(given, text, picture, eps, steps, shift, guidance, image_guidance):
    c = given.config.dit
    rows = requests(given, text, picture)
    made = torch.stack([rungs_of(given, *row) for row in rows], 1)
    keys_values = condition(made, given.dit, c.cross_n_head)
    model = whole_dit(given.dit, c.head_dim, c.cross_n_head)

    def guided(x, time):
        k = len(rows)
        v = model(torch.cat([x] * k), time.repeat(k), keys_values).chunk(k)
        return sample.guide(v, guidance, image_guidance)

    return denoise(guided, eps, steps, shift, "dpm++")

