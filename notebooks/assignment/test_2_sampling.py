"""Part 2: guidance, a second-order solver, and the loop."""
import torch

from notebooks.assignment.grading import Wrong, check_times, problem


@problem(
    3,
    ends_swapped="Start at null and go towards cond. Yours starts at cond and goes towards null.",
    one_too_strong="Yours starts at cond: cond + g (cond - null). Here g = 1 means no guidance, so "
                   "start at null. (Papers that write 1 + w have w = g - 1.)",
    three_channels="All channels are guided. Yours guides the first three only (a mistake that "
                   "went from one public code into many).",
    no_guidance="That is cond itself, as if g were 1.",
)
def test_2a_guide(adapters, case):
    return {"v": adapters.guide(case["null"], case["cond"], 4.5)}


@problem(
    4,
    scales_swapped="`image_guidance` belongs to the step from null to image, `guidance` to the "
                   "step from image to both. Yours has them swapped.",
    text_from_null="The text's step starts at image: both - image. Yours is both - null, and "
                   "counts the picture twice.",
    image_left_out="Yours is two-way guidance between null and both: the row with the picture "
                   "alone takes no part.",
    starts_at_image="Start at null. Yours starts at image, and goes the step from null to it "
                    "once more.",
)
def test_2b_guide_with_image(adapters, case):
    v = adapters.guide_with_image(case["null"], case["image"], case["both"], 4.5, 1.5)
    return {"v": v}


@problem(
    5,
    first_order="x0_prev changes nothing: you have the first-order step. In the middle of a step "
                "x0 is further along its slope.",
    half_missing="The slope is followed to the middle of the step only: half of h.",
    ratio_inverted="The slope is (x0 - x0_prev) / h_prev, and half of h is added: the ratio is "
                   "h / h_prev. Yours is h_prev / h.",
    slope_reversed="The slope goes from x0_prev to x0, and on beyond x0: x0 + ..., with "
                   "(x0 - x0_prev).",
    lambda_reversed="lambda = log((1 - t) / t), signal over noise, so that it grows as the noise "
                    "goes. Yours is log(t / (1 - t)), or you have exp(h) for exp(-h).",
    other_path="Here the signal is 1 - t. Yours is sqrt(1 - t^2), that of diffusion with a "
               "preserved variance.",
    signal_and_noise_swapped="x is multiplied by the ratio of noises, t_next / t. Yours is the "
                             "ratio of signals.",
    factor_reversed="The factor of x0 is 1 - exp(-h). Yours is exp(-h) - 1.",
    ratio_missing="The slope is (x0 - x0_prev) / h_prev. Yours adds half of x0 - x0_prev: "
                  "h / h_prev is missing.",
    both_factors_swapped="x is multiplied by t_next / t, x0 by (1 - t_next). Yours are "
                         "(1 - t_next) / (1 - t) and t_next: here t is the noise, 1 - t the "
                         "signal.",
    last_not_finite="At t_next = 0 lambda is infinite. Do not compute it: the answer there is x0.",
)
def test_2c_dpm_2m(adapters, case):
    times = case["times"].tolist()
    x, x0, x0_prev = case["x"], case["x0"], case["x0_prev"]
    return {
        "first step": adapters.dpm_2m(x, x0, None, times, 0),
        "step in the middle": adapters.dpm_2m(x, x0, x0_prev, times, 2),
        "last step": adapters.dpm_2m(x, x0, x0_prev, times, len(times) - 2),
    }


def network(x, time):
    check_times(time, x, "2d denoise")
    if time.dtype != torch.float32:
        raise Wrong("2d denoise: the network is fed its times as float32. Yours are "
                    f"{time.dtype}.")
    return x - torch.tanh(2 * x + time.view(-1, 1, 1, 1) / 500)


@problem(
    4,
    time_unscaled="The network is fed 1000 t, yours was fed t.",
    time_with_fraction="The network is fed the whole part of 1000 t, as in the released sampler: "
                       "int(1000 * t). Yours has the fraction.",
    time_rounded="The network is fed int(1000 * t), and int() cuts off. Yours rounds.",
    whole_times="Only the network is fed the whole part. The solver goes on with t itself: yours "
                "with whole thousandths.",
    slope_forgotten="dpm++ gives what euler gives. Its first-order step is Euler's (on this path, "
                    "exactly): either x0_prev stays None, or it is set to the new x0 before the "
                    "step, so that both are the same.",
    shift_forgotten="The schedule has no shift.",
)
def test_2d_denoise(adapters, case):
    return {
        "euler": adapters.denoise(network, case["eps"], 6, 3.0, "euler"),
        "dpm++": second_order(adapters, case["eps"]),
    }


def second_order(adapters, eps):
    """lambda of the step before the first one is that of times[-1], 0."""
    try:
        return adapters.denoise(network, eps, 6, 3.0, "dpm++")
    except ZeroDivisionError:
        raise Wrong("2d denoise, dpm++: something is divided by 0.\n  In the first step x0_prev is "
                    "None: store x0 there after the step, not before it. In the last one t_next "
                    "is 0: lambda is not computed.") from None
