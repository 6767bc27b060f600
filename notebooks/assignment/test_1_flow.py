"""Part 1: between data and noise."""
import torch

from notebooks.assignment.grading import check_times, problem, two


@problem(
    4,
    ends_swapped="t = 0 is data and t = 1 is noise. Yours starts at the noise: t x0 + (1 - t) eps.",
    velocity_reversed="v points from data to noise: eps - x0. Yours is x0 - eps.",
    noise_as_target="v is the derivative of x_t with respect to t, which is eps - x0. Yours is eps "
                    "alone, the target of DDPM.",
    pair_swapped="x_t first, then v. Yours come the other way round.",
    time_on_the_last_axis="Each row of the batch has its own t. Yours went along the last axis, "
                          "which happens to be as long as the batch: give t the shape "
                          "(B, 1, 1, 1).",
)
def test_1a_flow_matching(adapters, case):
    found = adapters.flow_matching(case["x0"], case["t"], case["eps"])
    x_t, v = two(found, "1a flow_matching", "x_t and v")
    return {"x_t": x_t, "v": v}


def network(x, time):
    """Something that depends on both, and has the shape of a velocity."""
    check_times(time, x, "1b loss")
    return torch.sin(x + time.view(-1, 1, 1, 1) / 250)


@problem(
    4,
    time_unscaled="The network is fed 1000 t, yours was fed t.",
    time_whole="In training the network is fed 1000 t as it is. Yours was fed its whole part.",
    sum_of_squares="The mean over a row's numbers, not their sum: else the loss grows with the "
                   "picture.",
    mean_over_batch="One loss for each row, (B,): yours is the mean of all rows already.",
    absolute_error="The squared error. Yours is the absolute one.",
    target_is_data="The network gives a velocity. Yours compares it with x0.",
    target_reversed="The target is eps - x0. Yours is x0 - eps.",
    fed_data="The network is fed x_t. Yours was fed x0, and has nothing to learn from.",
)
def test_1b_loss(adapters, case):
    return {"losses": adapters.loss(network, case["x0"], case["t"], case["eps"])}


@problem(
    3,
    no_shift="The shift is missing: every t becomes s t / (1 + (s - 1) t).",
    shift_inverted="A shift above 1 moves times towards the noise, t = 1. Yours moves them towards "
                   "the data: s and 1 / s are swapped.",
    ascending="We go from noise to data: from almost 1 down to 0.",
    steps_many_times="`steps` steps have steps + 1 ends.",
    starts_at_one="The first t is 0.999 (before the shift), not 1: at t = 1 the state says nothing "
                  "of the data.",
    factor_after_shift="0.999 is the first t before the shift. Yours shifts the times from 1 to 0, "
                       "and then multiplies all of them by 0.999.",
)
def test_1c_schedule(adapters, case):
    return {f"{steps} steps, shift {shift:g}": adapters.schedule(steps, shift)
            for steps, shift in ((4, 1.0), (5, 3.0))}


@problem(
    2,
    plus="x_t = x0 + t v, so v is to be taken away.",
    rest_of_the_way="(1 - t) v leads from x_t to the noise. To the data it is t v.",
    whole_velocity="x_t - v: x_t is only t v away from the data.",
)
def test_1d_clean_latents(adapters, case):
    return {"x0": adapters.clean_latents(case["x_t"], case["v"], 0.7)}


@problem(
    2,
    backwards="t_next is below t, so t_next - t is negative. Yours goes towards the noise: "
              "t - t_next.",
    to_the_end="That is the clean x0, the whole way: one step goes from t to t_next only.",
    time_as_step="The step is t_next - t. Yours is t_next long.",
)
def test_1e_euler(adapters, case):
    return {"x_next": adapters.euler(case["x_t"], case["v"], 0.7, 0.55)}
