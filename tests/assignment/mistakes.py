"""Common wrong answers to the assignment: for each problem, by name, which adapters are replaced
and by what. What comes out of them is recorded, and what the tests say of each is tested.

Most are the right answer with a knob turned: its default is right.
"""
import itertools
import math
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from tests.assignment import adapters as right

# --------------------------------------------------------------------------------- part 1: flow

def per_row(t):
    return t.view(-1, 1, 1, 1)


def ends_swapped(x0, t, eps):
    return per_row(t) * x0 + (1 - per_row(t)) * eps, eps - x0


def other_velocity(velocity):
    def flow(x0, t, eps):
        x_t, _ = right.flow_matching(x0, t, eps)
        return x_t, velocity(x0, eps)

    return dict(flow_matching=flow)


def time_on_the_last_axis(x0, t, eps):
    return (1 - t) * x0 + t * eps, eps - x0


def loss(scale=1000, error=torch.square, reduce=lambda e: e.flatten(1).mean(1),
         target=lambda x0, eps: eps - x0, fed=lambda x_t, x0: x_t, whole=lambda time: time):
    def of_rows(velocity, x0, t, eps):
        x_t, _ = right.flow_matching(x0, t, eps)
        return reduce(error(velocity(fed(x_t, x0), whole(scale * t)) - target(x0, eps)))

    return dict(loss=of_rows)


def shifted(t, s):
    return s * t / (1 + (s - 1) * t)


def schedule(start=0.999, end=0.0, more=1, shift=lambda s: s, factor=1, dtype=torch.float64):
    def times(steps, s):
        t = torch.linspace(start, end, steps + 1, dtype=dtype)
        return factor * shifted(t, shift(s))[:steps + more]

    return dict(schedule=times)


def clean(step):
    return dict(clean_latents=lambda x_t, v, t: x_t + step(t) * v)


def euler(step):
    return dict(euler=lambda x, v, t, t_next: x + step(t, t_next) * v)


FLOW = {
    "1a_flow_matching": {
        "ends_swapped": dict(flow_matching=ends_swapped),
        "velocity_reversed": other_velocity(lambda x0, eps: x0 - eps),
        "noise_as_target": other_velocity(lambda x0, eps: eps),
        "pair_swapped": dict(flow_matching=lambda *args: right.flow_matching(*args)[::-1]),
        "time_on_the_last_axis": dict(flow_matching=time_on_the_last_axis),
    },
    "1b_loss": {
        "time_unscaled": loss(scale=1),
        "time_whole": loss(whole=torch.floor),
        "sum_of_squares": loss(reduce=lambda e: e.flatten(1).sum(1)),
        "mean_over_batch": loss(reduce=torch.mean),
        "absolute_error": loss(error=torch.abs),
        "target_is_data": loss(target=lambda x0, eps: x0),
        "target_reversed": loss(target=lambda x0, eps: x0 - eps),
        "fed_data": loss(fed=lambda x_t, x0: x0),
    },
    "1c_schedule": {
        "no_shift": schedule(shift=lambda s: 1),
        "shift_inverted": schedule(shift=lambda s: 1 / s),
        "ascending": schedule(start=0.0, end=0.999),
        "steps_many_times": schedule(more=0),
        "starts_at_one": schedule(start=1.0),
        "factor_after_shift": schedule(start=1.0, factor=0.999),
    },
    "1d_clean_latents": {
        "plus": clean(lambda t: t),
        "rest_of_the_way": clean(lambda t: t - 1),
        "whole_velocity": clean(lambda t: -1),
    },
    "1e_euler": {
        "backwards": euler(lambda t, t_next: t - t_next),
        "to_the_end": euler(lambda t, t_next: -t),
        "time_as_step": euler(lambda t, t_next: t_next),
    },
}


# ---------------------------------------------------------------- part 2: guidance and sampling

def three_channels(null, cond, g):
    v = cond.clone()
    v[:, :3] = right.guide(null, cond, g)[:, :3]
    return v


def vp_lambda(t):
    return math.log(math.sqrt(1 - t * t) / t)


def dpm(lam=lambda t: math.log((1 - t) / t), second=True, factor=0.5,
        slope=lambda h, h_prev: h / h_prev, ratio=lambda t, t_next: t_next / t,
        signal=lambda t: 1 - t, factor_of_x0=lambda h: -math.expm1(-h), last_is_x0=True):
    """The right step, with a knob for each mistake."""
    def step(x, x0, x0_prev, times, i):
        t, t_next = times[i], times[i + 1]
        if t_next == 0:
            return x0 if last_is_x0 else x0 * torch.nan
        h = lam(t_next) - lam(t)
        if second and x0_prev is not None:
            h_prev = lam(t) - lam(times[i - 1])
            x0 = x0 + factor * slope(h, h_prev) * (x0 - x0_prev)
        return ratio(t, t_next) * x + signal(t_next) * factor_of_x0(h) * x0

    return step


def loop(scale=1000, whole=int, step=right.dpm_2m, shift=lambda s: s, kept=lambda t: t,
         dtype=torch.float32, stored_before=False):
    def denoise(velocity, x, steps, s, solver):
        times, x0_prev = [kept(t) for t in right.schedule(steps, shift(s)).tolist()], None
        for i, t in enumerate(times[:-1]):
            v = velocity(x, torch.full((len(x),), float(whole(scale * t))).to(dtype))
            x0 = x - t * v
            if stored_before:
                x0_prev = x0
            if solver == "euler":
                x = right.euler(x, v, t, times[i + 1])
            else:
                x = step(x, x0, x0_prev, times, i)
            x0_prev = x0
        return x

    return dict(denoise=denoise)


SAMPLING = {
    "2a_guide": {
        "ends_swapped": dict(guide=lambda null, cond, g: cond + g * (null - cond)),
        "one_too_strong": dict(guide=lambda null, cond, g: cond + g * (cond - null)),
        "three_channels": dict(guide=three_channels),
        "no_guidance": dict(guide=lambda null, cond, g: cond),
    },
    "2b_guide_with_image": {name: dict(guide_with_image=f) for name, f in {
        "scales_swapped": lambda n, i, b, g, gi: n + g * (i - n) + gi * (b - i),
        "text_from_null": lambda n, i, b, g, gi: n + gi * (i - n) + g * (b - n),
        "image_left_out": lambda n, i, b, g, gi: n + g * (b - n),
        "starts_at_image": lambda n, i, b, g, gi: i + gi * (i - n) + g * (b - i),
    }.items()},
    "2c_dpm_2m": {name: dict(dpm_2m=f) for name, f in {
        "first_order": dpm(second=False),
        "half_missing": dpm(factor=1),
        "ratio_inverted": dpm(slope=lambda h, h_prev: h_prev / h),
        "ratio_missing": dpm(slope=lambda h, h_prev: 1),
        "slope_reversed": dpm(factor=-0.5),
        "lambda_reversed": dpm(lam=lambda t: math.log(t / (1 - t))),
        "other_path": dpm(lam=vp_lambda),
        "signal_and_noise_swapped": dpm(ratio=lambda t, t_next: (1 - t_next) / (1 - t)),
        "both_factors_swapped": dpm(ratio=lambda t, t_next: (1 - t_next) / (1 - t),
                                    signal=lambda t: t),
        "factor_reversed": dpm(factor_of_x0=lambda h: math.expm1(-h)),
        "last_not_finite": dpm(last_is_x0=False),
    }.items()},
    "2d_denoise": {
        "time_unscaled": loop(scale=1, whole=float),
        "time_with_fraction": loop(whole=float),
        "time_rounded": loop(whole=round),
        "whole_times": loop(kept=lambda t: int(1000 * t) / 1000),
        "slope_forgotten": loop(step=dpm(second=False)),
        "shift_forgotten": loop(shift=lambda s: 1.0),
    },
}


# -------------------------------------------------------------------------- part 3: the MLLM reads

def positions(time=lambda n: torch.zeros(n, dtype=torch.long), order=(0, 1, 2), moved=(1, 1, 1),
              further=max, by_index=False, grid=lambda grids, n: grids[n]):
    def of(ids, image_token, grids):
        parts, done, position = [], 0, 0
        for n, (h, w) in enumerate(grids):
            text = ids.index(image_token, done) - done
            parts.append(torch.arange(position, position + text).expand(3, -1))
            done += text
            position = done if by_index else position + text
            rows, columns = grid(grids, n)
            place = torch.arange(h * w)
            axes = torch.stack([time(h * w), (place // columns).clamp(max=rows - 1),
                                place % columns])
            parts.append(axes[list(order)] + position * torch.tensor(moved)[:, None])
            position += further(h, w)
            done += h * w
        parts.append(torch.arange(position, position + len(ids) - done).expand(3, -1))
        return torch.cat(parts, 1)

    return dict(mrope_positions=of)


def plain_text(ids, image_token, grids):
    return torch.arange(len(ids)).expand(3, -1)


def run_as_one(ids, image_token, grids):
    """All image tokens that stand side by side, as one picture with the next grid."""
    parts, position, grids = [], 0, iter(grids)
    for is_picture, run in itertools.groupby(ids, lambda i: i == image_token):
        place = torch.arange(len(list(run)))
        h, w = next(grids) if is_picture else (len(place), 1)
        axes = [0 * place, place // w, place % w] if is_picture else [place] * 3
        parts.append(position + torch.stack(axes))
        position += max(h, w)
    return torch.cat(parts, 1)


POSITIONS = {
    "plain_text": dict(mrope_positions=plain_text),
    "time_runs": positions(time=torch.arange),
    "rows_columns_swapped": positions(order=(0, 2, 1)),
    "not_moved": positions(moved=(0, 0, 0)),
    "only_time_moved": positions(moved=(1, 0, 0)),
    "after_all_tokens": positions(further=lambda h, w: h * w),
    "after_rows_only": positions(further=lambda h, w: h),
    "no_plus_one": positions(further=lambda h, w: max(h, w) - 1),
}


def windows(order=(0, 2, 1, 3, 4), at_start=False, all_valid=False, square=True, swapped=False):
    def of(x, h, w, side):
        h, w = (w, h) if swapped else (h, w)
        down, right_ = -h % side, -w % side
        pad = (0, 0, right_, 0, down, 0) if at_start else (0, 0, 0, right_, 0, down)
        x = F.pad(x.view(h, w, -1), pad)
        valid = F.pad(torch.ones(h, w, 1), pad)
        valid = split(valid, side)[..., 0].bool()
        return split(x, side), torch.ones_like(valid) if all_valid else valid

    def split(x, side):
        if not square:
            return x.reshape(-1, side * side, x.shape[-1])
        x = x.unflatten(1, (-1, side)).unflatten(0, (-1, side))
        return x.permute(order).flatten(0, 1).flatten(1, 2)

    return dict(to_windows=of)


def out_of_windows(order=(0, 2, 1, 3, 4), cut_start=False, cut=True):
    def of(windows, h, w, side):
        rows, columns = -(-h // side), -(-w // side)
        x = windows.unflatten(1, (side, side)).unflatten(0, (rows, columns))
        if order == "columns first":
            x = windows.unflatten(1, (side, side)).unflatten(0, (columns, rows)).transpose(0, 1)
        x = x.permute((0, 2, 1, 3, 4) if isinstance(order, str) else order)
        x = x.flatten(2, 3).flatten(0, 1)
        if cut and cut_start:
            x = x[-h:, -w:]
        elif cut:
            x = x[:h, :w]
        return x.flatten(0, 1)

    return dict(from_windows=of)


def left_in_windows(windows, h, w, side):
    """The filler is left out, the order is not put right."""
    _, valid = right.to_windows(torch.zeros(h * w, 1), h, w, side)
    return windows[valid]


def never_moved(windows, h, w, side):
    return windows.flatten(0, 1)[:h * w]


def cut_after(windows, h, w, side):
    return out_of_windows(cut=False)["from_windows"](windows, h, w, side)[:h * w]


READING = {
    "3a_one_picture": POSITIONS,
    "3b_two_pictures": POSITIONS | {
        "second_by_index": positions(by_index=True),
        "first_grid_twice": positions(grid=lambda grids, n: grids[0]),
        "after_columns_only": positions(further=lambda h, w: w),
        "run_as_one": dict(mrope_positions=run_as_one),
    },
    "3c_to_windows": {
        "runs_of_units": windows(square=False),
        "columns_first": windows(order=(2, 0, 1, 3, 4)),
        "inside_transposed": windows(order=(0, 2, 3, 1, 4)),
        "filled_at_the_start": windows(at_start=True),
        "all_transposed": windows(order=(2, 0, 3, 1, 4)),
        "all_valid": windows(all_valid=True),
        "width_height_swapped": windows(swapped=True),
    },
    "3d_from_windows": {
        "left_in_windows": dict(from_windows=left_in_windows),
        "columns_first": out_of_windows(order="columns first"),
        "inside_transposed": out_of_windows(order=(0, 3, 1, 2, 4)),
        "never_moved": dict(from_windows=never_moved),
        "cut_after": dict(from_windows=cut_after),
        "filler_kept": out_of_windows(cut=False),
        "filled_at_the_start": out_of_windows(cut_start=True),
    },
}


# ------------------------------------------------------------------------- part 4: the DiT paints

def attend(on_q=F.relu, on_k=F.relu, axis=3, eps=1e-15, divide=True, mask=None, total=None):
    """By way of N x N, with a knob for each mistake."""
    def y(q, k, v):
        weights = on_q(q) @ on_k(k).transpose(2, 3)
        if mask:
            weights = mask(weights)
        if divide:
            sums = weights.sum(axis, keepdim=True)
            weights = weights / ((total(sums) if total else sums) + eps)
        return weights @ v

    return y


def softmax(q, k, v):
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3) @ v


def same(x):
    return x


ATTENTION = {
    "softmax": softmax,
    "no_relu": attend(on_q=same, on_k=same),
    "relu_on_q_only": attend(on_k=same),
    "relu_of_product": attend(on_q=same, on_k=same, mask=F.relu),
    "no_division": attend(divide=False),
    "sum_over_queries": attend(axis=2),
    "not_a_number": attend(eps=0),
}


def embedding(swap=False, divisor=lambda n: n // 2, rise=False, alternate=False):
    def of(time, n):
        i = torch.arange(n // 2).float()
        frequency = 1e4 ** -(i / divisor(n))
        angle = time[:, None] * (frequency.flip(0) if rise else frequency)
        parts = [angle.cos(), angle.sin()]
        if alternate:
            return torch.stack(parts, 2).flatten(1)
        return torch.cat(parts[::-1] if swap else parts, 1)

    return dict(timestep_embedding=of)


def cross(scale=lambda K, D: math.sqrt(K), axis=3, interleaved=False, put_back=True, swap=False,
          transposed=False, bias=True, out=True):
    def linear(x, weights, name):
        weight = weights[f"{name}.weight"]
        y = x @ (weight if transposed else weight.T)
        return y + weights[f"{name}.bias"] if bias else y

    def heads(x, n_head):
        if interleaved:
            return x.unflatten(2, (-1, n_head)).permute(0, 3, 1, 2)
        return x.unflatten(2, (n_head, -1)).transpose(1, 2)

    def project_kv(rung, weights, n_head):
        keys, values = (heads(linear(rung, weights, name), n_head) for name in "kv")
        return (values, keys) if swap else (keys, values)

    def cross_attention(x, keys, values, weights, n_head):
        if swap:
            keys, values = values, keys
        q = heads(linear(x, weights, "q"), n_head)
        scores = q @ keys.transpose(2, 3) / scale(q.shape[3], x.shape[2])
        y = scores.softmax(axis) @ values
        if put_back:
            y = y.permute(0, 2, 3, 1) if interleaved else y.transpose(1, 2)
        y = y.reshape(x.shape)
        return linear(y, weights, "out") if out else y

    return dict(project_kv=project_kv, cross_attention=cross_attention)


def ffn(swap=False, first=F.silu, gate=F.silu, turned=False, mixed_in=False, mixed_out=False,
        mode="constant"):
    def of(x, size, weights):
        h, w = size[::-1] if turned else size
        B, N, D = x.shape
        y = x.reshape(B, D, h, w) if mixed_in else x.transpose(1, 2).reshape(B, D, h, w)
        y = first(F.conv2d(y, weights["inverted.weight"], weights["inverted.bias"]))
        y = F.pad(y, (1, 1, 1, 1), mode=mode)
        depthwise = weights["depthwise.weight"]
        y = F.conv2d(y, depthwise, weights["depthwise.bias"], groups=len(depthwise))
        value, gates = y.chunk(2, 1)[::-1] if swap else y.chunk(2, 1)
        y = F.conv2d(value * gate(gates), weights["pointwise.weight"])
        return y.reshape(B, N, D) if mixed_out else y.flatten(2).transpose(1, 2)

    return dict(mix_ffn=of)


def block(order=(0, 1, 2, 3, 4, 5), table=1, one=1, gates=(True, True), norm=True, residual=1,
          parts_in_order=("attended", "crossed", "fed"), cross_modulated=False, cross_normed=False,
          cross_gated=False, norm_again=True, heads_of_cross=False, eps=1e-6):
    def of(x, modulation, keys, values, size, weights, head_dim, n_head):
        head_dim = x.shape[2] // n_head if heads_of_cross else head_dim
        six = (table * weights["scale_shift_table"] + modulation).chunk(6, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[i] for i in order)
        parts = {name: right.of_prefix(weights, f"{name}.") for name in ("attn", "cross", "ffn")}

        def modulated(x, shift, scale):
            y = F.layer_norm(x, x.shape[2:], eps=eps) if norm else x
            return y * (one + scale) + shift

        def attended(x):
            y = right.filled(right.dit.LinearAttention(right.sizes(x.shape[2], head_dim, n_head)),
                             parts["attn"])(modulated(x, shift1, scale1))
            return residual * x + (gate1 * y if gates[0] else y)

        def crossed(x):
            read = F.layer_norm(x, x.shape[2:], eps=1e-6) if cross_normed else x
            read = modulated(x, shift1, scale1) if cross_modulated else read
            y = right.cross_attention(read, keys, values, parts["cross"], n_head)
            return residual * x + (gate1 * y if cross_gated else y)

        def fed(x):
            read = x if norm_again else first
            y = right.mix_ffn(modulated(read, shift2, scale2), size, parts["ffn"])
            return residual * x + (gate2 * y if gates[1] else y)

        first = x
        steps = dict(attended=attended, crossed=crossed, fed=fed)
        for name in parts_in_order:
            x = steps[name](x)
        return x

    return dict(adaln_block=of)


DIT = {
    "4a_attention_n_by_n": {name: dict(attention_n_by_n=f) for name, f in ATTENTION.items()},
    "4b_linear_attention": {name: dict(linear_attention=f) for name, f in ATTENTION.items()} | {
        "causal": dict(linear_attention=attend(mask=torch.tril)),
        "total_of_all_queries": dict(linear_attention=attend(
            total=lambda sums: sums.sum(2, keepdim=True))),
    },
    "4d_timestep_embedding": {
        "sines_first": embedding(swap=True),
        "interleaved": embedding(alternate=True),
        "last_frequency": embedding(divisor=lambda n: n // 2 - 1),
        "exponent_halved": embedding(divisor=lambda n: n),
        "frequencies_rise": embedding(rise=True),
    },
    "4e_cross_attention": {
        "no_scale": cross(scale=lambda K, D: 1),
        "scale_by_width": cross(scale=lambda K, D: math.sqrt(D)),
        "softmax_over_places": cross(axis=2),
        "heads_interleaved": cross(interleaved=True),
        "heads_not_put_back": cross(put_back=False),
        "keys_values_swapped": cross(swap=True),
        "weight_transposed": cross(transposed=True),
        "no_bias": cross(bias=False),
        "no_out": cross(out=False),
    },
    "4f_mix_ffn": {
        "gate_swapped": ffn(swap=True),
        "no_first_silu": ffn(first=same),
        "no_gate_silu": ffn(gate=same),
        "size_swapped": ffn(turned=True),
        "places_and_channels_mixed": ffn(mixed_in=True, mixed_out=True),
        "mixed_going_in": ffn(mixed_in=True),
        "mixed_coming_out": ffn(mixed_out=True),
        "edge_repeated": ffn(mode="replicate"),
    },
    "4g_adaln_block": {
        "no_table": block(table=0),
        "scale_without_one": block(one=0),
        "shift_and_scale_swapped": block(order=(1, 0, 2, 4, 3, 5)),
        "halves_swapped": block(order=(3, 4, 5, 0, 1, 2)),
        "by_kind": block(order=(0, 2, 4, 1, 3, 5)),
        "no_gates": block(gates=(False, False)),
        "no_first_gate": block(gates=(False, True)),
        "no_second_gate": block(gates=(True, False)),
        "cross_normed": block(cross_normed=True),
        "cross_modulated": block(cross_modulated=True),
        "cross_gated": block(cross_gated=True),
        "norm_eps": block(eps=1e-5),
        "no_norm": block(norm=False),
        "norm_of_the_first": block(norm_again=False),
        "no_residual": block(residual=0),
        "cross_first": block(parts_in_order=("crossed", "attended", "fed")),
        "cross_last": block(parts_in_order=("attended", "fed", "crossed")),
        "heads_of_cross": block(heads_of_cross=True),
    },
}


# ----------------------------------------------------------------------------- part 5: the ladder

def taps(which):
    return dict(tap_layers=which)


def connector(transposed=False, approximate="tanh", norm="rms", gain=True, eps=1e-5):
    def of(states, weights):
        def linear(x, name):
            weight = weights[f"{name}.weight"]
            return x @ (weight if transposed else weight.T) + weights[f"{name}.bias"]

        x = linear(F.gelu(linear(states, "0"), approximate=approximate), "2")
        g = weights["3.weight"] if gain else torch.ones_like(weights["3.weight"])
        if norm == "none":
            return x
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        if norm == "eps outside":
            return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * g
        return F.rms_norm(x, x.shape[-1:], g, eps)

    return of


def append(first=False, start=lambda positions, S: positions[:, -1:] + 1, step=1):
    def of(x, positions, queries):
        behind = start(positions, len(x)) + step * torch.arange(len(queries))
        behind = behind.expand(3, -1)
        if first:
            return torch.cat([queries, x]), torch.cat([behind, positions], 1)
        return torch.cat([x, queries]), torch.cat([positions, behind], 1)

    return dict(append_queries=of)


def climb(part=lambda state, n: state[-n:], tapped=lambda m, n: range(m - n, m),
          project=right.connector):
    def of(states, n_query, n_dit, weights):
        chosen = [states[i] for i in tapped(len(states) - 1, n_dit)]
        return torch.stack([project(part(state, n_query), weights) for state in chosen])

    return dict(rungs=of)


def conditioned(weight_of=same, order=same, caption=right.connector, swap=False):
    def of(rungs, weights, n_head):
        found = []
        projection = right.of_prefix(weights, "caption.")
        for j, rung in enumerate(order(rungs)):
            cross = right.of_prefix(weights, f"blocks.{weight_of(j)}.cross.")
            pair = right.project_kv(caption(rung, projection), cross, n_head)
            found.append(pair[::-1] if swap else pair)
        return found

    return dict(condition=of)


LADDER = {
    "5a_tap_layers": {
        "one_later": taps(lambda m, n: list(range(m - n + 1, m + 1))),
        "first_layers": taps(lambda m, n: list(range(n))),
        "final": taps(lambda m, n: [m] * n),
        "reversed": taps(lambda m, n: list(range(m - 1, m - n - 1, -1))),
        "spread": taps(lambda m, n: right.tap_layers(m, n, "uniform")),
    },
    "5b_connector": {name: dict(connector=f) for name, f in {
        "weight_transposed": connector(transposed=True),
        "exact_gelu": connector(approximate="none"),
        "no_norm": connector(norm="none"),
        "layer_norm": connector(norm="layer"),
        "no_gain": connector(gain=False),
        "default_eps": connector(eps=None),
        "smaller_eps": connector(eps=1e-6),
        "eps_outside": connector(norm="eps outside"),
    }.items()},
    "5c_append_queries": {
        "queries_first": append(first=True),
        "by_index": append(start=lambda positions, S: S),
        "repeated": append(start=lambda positions, S: positions[:, -1:]),
        "from_zero": append(start=lambda positions, S: 0),
        "standing_still": append(step=0),
    },
    "5d_rungs": {
        "first_tokens": climb(part=lambda state, n: state[:n]),
        "one_later": climb(tapped=lambda m, n: range(m - n + 1, m + 1)),
        "same_for_all": climb(tapped=lambda m, n: [m - 1] * n),
        "final": climb(tapped=lambda m, n: [m] * n),
        "no_connector": climb(project=lambda state, weights: state),
        "reversed": climb(tapped=lambda m, n: range(m - 1, m - n - 1, -1)),
    },
    "5e_condition": {
        "first_block_for_all": conditioned(weight_of=lambda j: 0),
        "last_rung_for_all": conditioned(order=lambda rungs: rungs[-1:].expand_as(rungs)),
        "reversed": conditioned(order=lambda rungs: rungs.flip(0)),
        "no_caption": conditioned(caption=lambda rung, weights: rung),
        "no_caption_norm": conditioned(caption=connector(norm="none")),
        "keys_values_swapped": conditioned(swap=True),
    },
}

# ----------------------------------------------------------------------------- part 6: all joined

def drawing(patched=None, **changed):
    """The right drawing with other settings, or with functions of the plug replaced."""
    def draw(given, text, picture, eps, steps, shift, guidance, image_guidance):
        settings = dict(shift=shift, guidance=guidance, image_guidance=image_guidance)
        settings |= {name: change(settings) for name, change in changed.items()}
        with mock.patch.dict(vars(right), patched or {}):
            return right.draw(given, text, picture, eps, steps, **settings)

    return dict(draw=draw)


def each_row_alike(given, text, picture):
    """Two-way guidance, with the picture in both rows."""
    return [("", picture), (text, picture)]


def rows_with(null=lambda picture: Image.new("RGB", picture.size), image_text=lambda text: "",
              image_picture=same):
    """Three rows. null: makes the null prompt's picture; the others the row of the picture."""
    def requests(given, text, picture):
        black = Image.new("RGB", picture.size)
        alone = black if image_picture is None else picture
        return [("", null(picture)), (image_text(text), alone), (text, picture)]

    return drawing(patched=dict(requests=requests))


def without_pictures(given, text, picture):
    return [("", None), (text, None)]


def euler_loop(velocity, x, steps, shift, solver):
    return right_denoise(velocity, x, steps, shift, "euler")


def keys_each_step(velocity, x, steps, shift, solver):
    """Keys and values are made anew at every step (here: beside those that are used)."""
    config = right.dit.DiTConfig(n_layer=6, n_head=6, cross_n_head=6, caption_dim=128)
    other = right.dit.DiT(config)
    rungs = torch.zeros(6, 2, 16, 128)

    def slow(x, time):
        other.project_kv(rungs)
        return velocity(x, time)

    return right_denoise(slow, x, steps, shift, solver)


# As they are when nothing is replaced.
right_denoise, right_velocity = right.denoise, right.velocity
right_append_queries = right.append_queries


def other_velocity_of(change):
    """velocity, with other times or other keys and values."""
    def velocity(x_t, time, keys_values, *more):
        return right_velocity(x_t, *change(time, keys_values), *more)

    return dict(velocity=velocity)


def other_weights(**changes):
    def velocity(x_t, time, keys_values, weights, *more):
        changed = {name: change(weights[name]) for name, change in changes.items()}
        return right_velocity(x_t, time, keys_values, weights | changed, *more)

    return dict(velocity=velocity)


def other_embedding(before=F.silu, split=lambda six: six.unflatten(1, (6, -1)), at_the_end=same):
    """before: the modulation's layer; at_the_end: what is done to e there."""
    def velocity(x_t, time, keys_values, weights, head_dim, n_head):
        model = right.whole_dit(weights, head_dim, n_head)

        def embed(t):
            part = model.time_embed
            e = part.fc2(F.silu(part.fc1(right.timestep_embedding(t, 256))))
            return split(part.modulation(before(e))), at_the_end(e)[:, None]

        with mock.patch.object(model.time_embed, "forward", embed):
            return model(x_t, time, keys_values)

    return dict(velocity=velocity)


def no_norm_at_the_end(x_t, time, keys_values, weights, head_dim, n_head):
    model = right.whole_dit(weights, head_dim, n_head)
    with mock.patch.object(model.norm_out, "forward", same):
        return model(x_t, time, keys_values)


def loud_queries(x, positions, queries):
    return right_append_queries(x, positions, 2 * queries)


def without_queries(x, positions, queries):
    return x, positions


def wired(tapped):
    return drawing(patched=climb(tapped=tapped))


DRAWING = {
    "no shift": drawing(shift=lambda s: 1.0),
    "what Euler draws": drawing(patched=dict(denoise=euler_loop)),
    "no guidance": drawing(guidance=lambda s: 1.0),
    "null prompt are swapped": drawing(guidance=lambda s: 1 - s["guidance"]),
    "is fed the next one": wired(lambda m, n: range(m - n + 1, m + 1)),
    "in reverse": wired(lambda m, n: range(m - 1, m - n - 1, -1)),
    "fed the normed end": wired(lambda m, n: [m] * n),
    "state that enters the last layer": wired(lambda m, n: [m - 1] * n),
}
# Of these nothing is known but where they depart.
READ = {
    "positions that given.read": drawing(patched=append(step=0)),
    r"the right ones: look at the queries\.": drawing(patched=dict(append_queries=loud_queries)),
    "should be handed": drawing(patched=dict(append_queries=without_queries)),
    "handed is right. Look behind it": drawing(
        patched=climb(project=connector(gain=False))),
}
# By words of what is said, since nothing is recorded.
JOINED = {
    "6a_velocity": {
        "knows 1000 t": other_velocity_of(lambda time, kv: (time / 1000, kv)),
        "takes them in reverse": other_velocity_of(lambda time, kv: (time, kv[::-1])),
        "same keys and values": other_velocity_of(lambda time, kv: (time, kv[-1:] * len(kv))),
        "Shift first, then scale": other_weights(scale_shift_table=lambda t: t.flip(0)),
        r"x \(1 \+ scale\)": other_weights(
            scale_shift_table=lambda t: t - torch.tensor([[0.0], [1.0]])),
        "SiLU between e and": other_embedding(before=same),
        r"added to SiLU\(e\)": other_embedding(at_the_end=F.silu),
        r"split into \(D, 6\)": other_embedding(
            split=lambda six: six.unflatten(1, (-1, 6)).transpose(1, 2)),
        "patch_embed has a bias": other_weights(**{"patch_embed.bias": torch.zeros_like}),
        r"LayerNorm stands before \(1": dict(velocity=no_norm_at_the_end),
        "first row's for all": other_velocity_of(lambda time, kv: (time[:1].expand(2), kv)),
    },
    "6b_draw": DRAWING | READ,
    "6c_edit": DRAWING | {
        "by your windows": drawing(patched=dict(from_windows=left_in_windows)),
        "The picture is not read": drawing(patched=dict(requests=without_pictures)),
        "two-way guidance": drawing(patched=dict(requests=each_row_alike)),
        "black picture: yours has none": rows_with(null=lambda picture: None),
        "black picture: yours is white": rows_with(
            null=lambda picture: Image.new("RGB", picture.size, (255, 255, 255))),
        "Yours is of another size": rows_with(null=lambda picture: Image.new("RGB", (64, 64))),
        "Yours has the text, and a black picture": rows_with(
            image_text=same, image_picture=None),
        'For "" with the picture, given.read was not called': rows_with(image_text=same),
        "two scales of guidance are swapped": drawing(
            guidance=lambda s: s["image_guidance"], image_guidance=lambda s: s["guidance"]),
    },
    "6d_keys_and_values_once": {
        "make them once": drawing(patched=dict(denoise=keys_each_step)),
    },
}

MISTAKES = FLOW | SAMPLING | READING | DIT | LADDER


# ------------------------------------------------------------------- what is not told by numbers

def in_place(null, cond, guidance):
    return null.add_(guidance * (cond - null))


def spoilt(weights):
    """A layer that scales its weight where it stands."""
    weights["3.weight"].mul_(2)
    return weights


def last_frequency_by_exp(time, n):
    """A known mistake in other words, which round otherwise."""
    i = torch.arange(n // 2)
    angle = time[:, None] * torch.exp(-math.log(10000) * i / (n // 2 - 1))
    return torch.cat([angle.cos(), angle.sin()], 1)


def without_heads(rung, weights, n_head):
    return tuple(F.linear(rung, weights[f"{name}.weight"], weights[f"{name}.bias"])
                 for name in "kv")


def changed(name, change):
    """The right function, with something done to what it gives."""
    return {name: lambda *args: change(getattr(right, name)(*args))}


def loss_of_a_picture_of_times(velocity, x0, t, eps):
    return right.loss(lambda x, time: velocity(x, time[:, None, None, None]), x0, t, eps)


def rounded_for_two(x, h, w, side):
    """(n + 1) // side windows along n units: right for side 2 alone."""
    rows, columns = (h + 1) // side * side, (w + 1) // side * side

    def cut(x):
        x = F.pad(x.view(h, w, -1), (0, 0, 0, columns - w, 0, rows - h))
        return right.to_windows(x.flatten(0, 1), rows, columns, side)[0]

    return cut(x), cut(torch.ones(h * w, 1))[..., 0].bool()


def with_valid(change):
    return changed("to_windows", lambda made: (made[0], change(made[1])))


def queries_in_front(x, positions, queries):
    """Counted again from 0."""
    S = len(x) + len(queries)
    return torch.cat([queries, x]), torch.arange(S).expand(3, -1)


# Problem -> words of what is said, and the adapters.
REFUSED = {
    "1a_flow_matching": {
        r"two tensors, x_t and v; got NoneType. Is there": changed("flow_matching", lambda y: None),
        r"two tensors, x_t and v; got tuple of 1": changed("flow_matching", lambda y: y[:1]),
    },
    "1b_loss": {r"one for each row, \(B,\)": dict(loss=loss_of_a_picture_of_times)},
    "1c_schedule": {
        r"should be float64. Yours are torch.float32": schedule(dtype=torch.float32),
    },
    "2a_guide": {r"`null`, .* changed in place": dict(guide=in_place)},
    "2d_denoise": {
        r"as float32. Yours are torch.int64": loop(dtype=torch.int64),
        r"one for each row, \(B,\)": dict(
            denoise=lambda velocity, x, *more: velocity(x, torch.tensor(5.0))),
        r"store x0 there after the step": loop(stored_before=True, step=dpm()),
    },
    "3a_one_picture": {
        r"whole numbers \(int64\). Yours are torch.float32": changed(
            "mrope_positions", torch.Tensor.float),
    },
    "3b_two_pictures": {
        r"whole numbers \(int64\). Yours are torch.int32": changed(
            "mrope_positions", torch.Tensor.int),
    },
    "3c_to_windows": {
        r"True and False \(bool\). Yours are torch.float32": with_valid(torch.Tensor.float),
        r"valid, 4 x 6: not right.\n  Its shape is \(6, 2, 2\)": with_valid(
            lambda valid: valid.unflatten(1, (2, 2))),
        r"two tensors, windows and valid; got Tensor": changed("to_windows", lambda made: made[0]),
        r"windows, 4 x 5, side 3: not right.\n  Its shape is \(2, 9, 5\), expected \(4, 9, 5\)":
            dict(to_windows=rounded_for_two),
    },
    "4d_timestep_embedding": {
        "divides by n / 2 - 1": dict(timestep_embedding=last_frequency_by_exp),
    },
    "4e_cross_attention": {
        r"keys \(B, H, Q, K\): not right.\n  Its shape is \(2, 5, 12\), expected \(2, 3, 5, 4\)":
            dict(project_kv=without_heads),
    },
    "5a_tap_layers": {
        r"Yours is a Tensor": changed("tap_layers", torch.tensor),
        r"Yours holds float": changed("tap_layers", lambda found: [float(i) for i in found]),
    },
    "5b_connector": {
        r"`3.weight`, .* changed in place": dict(
            connector=lambda states, weights: right.connector(states, spoilt(weights))),
    },
    "5c_append_queries": {r"x: not right.\n  The queries come last": dict(
        append_queries=queries_in_front)},
    "5e_condition": {
        r"a list of L = 3 pairs .* Yours is a list of 2": changed(
            "condition", lambda pairs: pairs[:2]),
        r"Yours is a NoneType": changed("condition", lambda pairs: None),
        r"block 0: expected two tensors, keys and values; got Tensor": changed(
            "condition", lambda pairs: [keys for keys, _ in pairs]),
    },
}
