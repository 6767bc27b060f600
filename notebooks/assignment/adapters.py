"""The only glue between your files and the tests: one function for each thing that you write.

Write your own files beside this one (attention.py, flow.py, ...; not under a name of the
repository's, such as dit.py), import them here, and replace each `raise NotImplementedError` by a
call. What each function must give stands in handout.md; the docstrings repeat the shapes. Weights
come as a dict of tensors under the names of the shipped file: copy them into modules of yours, or
use them as they are. A linear layer's weight is (out, in).

    from flow import flow_matching as my_flow_matching
    ...
    def flow_matching(x0, t, eps):
        return my_flow_matching(x0, t, eps)

Dimension key: B batch, N places of the latents, Q queries, S tokens, D DiT width, M MLLM width,
C latent channels, L blocks of the DiT, H heads, K head dim, U units of a picture, W windows.
"""

# --------------------------------------------------------------------------------- part 1: flow

def flow_matching(x0, t, eps):
    """x0, eps (B, C, h, w), t (B,) -> x_t, v, both (B, C, h, w)."""
    raise NotImplementedError


def loss(velocity, x0, t, eps):
    """velocity: a function of x (B, C, h, w) and time (B,) in 0..1000 -> (B, C, h, w); the others
    as above -> (B,), the loss of each row."""
    raise NotImplementedError


def schedule(steps, shift):
    """-> (steps + 1,) times in float64, from almost 1 down to 0."""
    raise NotImplementedError


def clean_latents(x_t, v, t):
    """x_t, v (B, C, h, w), t a number -> the x0 that they point to, (B, C, h, w)."""
    raise NotImplementedError


def euler(x, v, t, t_next):
    """x at time t and the velocity v there, (B, C, h, w); two numbers -> x at time t_next."""
    raise NotImplementedError


# ---------------------------------------------------------------- part 2: guidance and sampling

def guide(null, cond, guidance):
    """Two velocities (B, C, h, w), a number -> the guided velocity."""
    raise NotImplementedError


def guide_with_image(null, image, both, guidance, image_guidance):
    """Three velocities (B, C, h, w), two numbers -> the guided velocity."""
    raise NotImplementedError


def dpm_2m(x, x0, x0_prev, times, i):
    """x at times[i], the clean latents x0 seen from there, those of the step before (or None), all
    times as a list of numbers -> x at times[i + 1]."""
    raise NotImplementedError


def denoise(velocity, eps, steps, shift, solver):
    """velocity as in `loss`, noise eps (B, C, h, w), solver "euler" or "dpm++" -> x at t = 0."""
    raise NotImplementedError


# -------------------------------------------------------------------------- part 3: the MLLM reads

def mrope_positions(ids, image_token, grids):
    """ids: a list of S ints, grids: (h, w) in units of each picture -> (3, S) whole numbers."""
    raise NotImplementedError


def to_windows(x, h, w, side):
    """x (U, n), row by row, U = h * w -> windows (W, side * side, n), valid (W, side * side)."""
    raise NotImplementedError


def from_windows(windows, h, w, side):
    """windows (W, side * side, n) -> (U, n), row by row."""
    raise NotImplementedError


# ------------------------------------------------------------------------- part 4: the DiT paints

def attention_n_by_n(q, k, v):
    """q, k, v (B, H, N, K) -> (B, H, N, K), by way of the N x N weights."""
    raise NotImplementedError


def linear_attention(q, k, v):
    """The same function without anything of N x N."""
    raise NotImplementedError


def timestep_embedding(time, n):
    """time (B,) in 0..1000 -> (B, n)."""
    raise NotImplementedError


def project_kv(rung, weights, n_head):
    """rung (B, Q, D); weights "k.weight", "k.bias", "v.weight", "v.bias" (and others)
    -> keys, values, both (B, H, Q, K)."""
    raise NotImplementedError


def cross_attention(x, keys, values, weights, n_head):
    """x (B, N, D), keys and values from `project_kv`; weights "q.weight", "q.bias", "out.weight",
    "out.bias" (and others) -> (B, N, D)."""
    raise NotImplementedError


def mix_ffn(x, size, weights):
    """x (B, N, D), size (h, w) with h * w = N; weights "inverted.weight", "inverted.bias",
    "depthwise.weight", "depthwise.bias", "pointwise.weight" -> (B, N, D)."""
    raise NotImplementedError


def adaln_block(x, modulation, keys, values, size, weights, head_dim, n_head):
    """x (B, N, D), modulation (B, 6, D), keys and values (B, H, Q, K) of the cross-attention, whose
    heads n_head counts; head_dim: of the linear attention; weights "scale_shift_table" and those of
    "attn.", "cross." and "ffn." -> (B, N, D)."""
    raise NotImplementedError


# ----------------------------------------------------------------------------- part 5: the ladder

def tap_layers(n_mllm, n_dit):
    """Numbers of layers and of blocks -> a list of n_dit ints: which state feeds block j."""
    raise NotImplementedError


def connector(states, weights):
    """states (..., Q, M); weights "0.weight", "0.bias", "2.weight", "2.bias", "3.weight"
    -> (..., Q, caption width)."""
    raise NotImplementedError


def append_queries(x, positions, queries):
    """x (S, M), positions (3, S), queries (Q, M) -> (S + Q, M), (3, S + Q)."""
    raise NotImplementedError


def rungs(states, n_query, n_dit, weights):
    """states: a list of n_mllm + 1 tensors (S + Q, M); weights of the connector
    -> (L, Q, caption width)."""
    raise NotImplementedError


def condition(rungs, weights, n_head):
    """rungs (L, B, Q, caption width); weights of the DiT: "caption.0.weight", ...,
    "blocks.0.cross.k.weight", ... -> a list of L pairs (keys, values), each (B, H, Q, K)."""
    raise NotImplementedError


# ----------------------------------------------------------------------------- part 6: all joined

def velocity(x_t, time, keys_values, weights, head_dim, n_head):
    """x_t (B, C, h, w), time (B,) in 0..1000, keys_values from `condition`, all weights of the DiT
    -> (B, C, h, w)."""
    raise NotImplementedError


def draw(given, text, picture, eps, steps, shift, guidance, image_guidance):
    """given: the frozen parts (given.py); text; picture: None or a PIL picture to edit; eps
    (1, C, h, w); the settings -> latents (1, C, h, w)."""
    raise NotImplementedError
