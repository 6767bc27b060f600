"""Is a difference between two kinds of models real? Runs differ by seed, scores by prompt, and both
have to be drawn again to say how far a mean can be trusted.

A table of differences (S seeds, P prompts) is d[s, p] = truth + seed_s + prompt_p + rest_sp. The
bootstrap draws seeds and, within each category, prompts again, of n always n - 1 (Rao and Wu 1988).
So its variance is that of the mean, but for the rest, which it counts three times (Owen 2007, "The
pigeonhole bootstrap"): twice is too much. Few seeds know their own variance badly: the quantile is
Student's, with degrees of freedom by Satterthwaite 1946. tests/test_8_statistics.py holds coverage
and false positives where the truth is known.

Dimension key: S seeds, P prompts, C categories.
"""
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and p: how often chance alone is as far from 0, either way.
    at_most: the farther end of the 90 % interval; differences beyond it, either way, are refuted
    at 5 %."""
    mean: float
    low: float
    high: float
    p: float
    at_most: float

    def json(self) -> dict:
        interval = [self.low, self.high]
        return dict(mean=self.mean, interval=interval, p=self.p, at_most=self.at_most)


def weights(rng, n_draw: int, n: int, size: int) -> np.ndarray:
    """`size` times n_draw of n drawn with replacement -> how often each, as a share (size, n)."""
    return rng.multinomial(n_draw, np.full(n, 1 / n), size) / n_draw


def resampled_means(table: np.ndarray, groups: np.ndarray, rng, n: int) -> np.ndarray:
    """n means of categories' means, seeds and prompts drawn again -> (n,)"""
    S, P = table.shape
    # With one seed there is no other to draw.
    seeds = weights(rng, max(1, S - 1), S, n)                                   # (n, S)
    prompts = np.zeros((n, P))
    names = np.unique(groups)
    for name in names:
        own = np.flatnonzero(groups == name)
        prompts[:, own] = weights(rng, max(1, len(own) - 1), len(own), n) / len(names)
    return ((seeds @ table) * prompts).sum(1)


def mean_square(x: np.ndarray, df: int) -> float:
    """0 where there are no degrees of freedom: then nothing differs from its mean."""
    return float((x ** 2).sum()) / max(1, df)


def mean_squares(table: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the variance of the mean as seeds show it, as prompts show it (within their category) and
    as the rest does, (3,), which the first two hold as well; and their degrees of freedom (3,)."""
    S, P = table.shape
    names = np.unique(groups)
    by_seed = np.zeros(S)
    of_prompts = of_rest = 0.0
    for name in names:
        own = table[:, groups == name]                                      # (S, its prompts)
        n = own.shape[1]
        rest = own - own.mean(0) - own.mean(1, keepdims=True) + own.mean()
        by_seed += own.mean(1) / len(names)
        of_prompts += mean_square(own.mean(0) - own.mean(), n - 1) / n
        of_rest += mean_square(rest, (S - 1) * (n - 1)) / (S * n)
    of_seeds = mean_square(by_seed - by_seed.mean(), S - 1) / S
    found = np.array([of_seeds, of_prompts / len(names) ** 2, of_rest / len(names) ** 2])
    df = np.array([S - 1, P - len(names), (S - 1) * (P - len(names))])
    return found, np.maximum(1, df)


def student(df: float, n: int = 20_001) -> tuple[np.ndarray, np.ndarray]:
    """Values t and how often |T| is below them. With t = sqrt(df) tan(a) the density is that of
    cos(a)^(df - 1)."""
    angle = np.linspace(0, np.pi / 2, n)
    density = np.cos(angle) ** (df - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sqrt(df) * np.tan(angle), below / below[-1]


def estimate(table, groups=None, seed: int = 0, n: int = RESAMPLES) -> Estimate:
    """table (seeds, prompts), groups (prompts,): the category of each prompt (default: one for
    all) -> the mean of the categories' means."""
    table = np.asarray(table, float)
    groups = np.zeros(table.shape[1], int) if groups is None else np.asarray(groups)
    by_prompt = table.mean(0)
    mean = float(np.mean([by_prompt[groups == name].mean() for name in np.unique(groups)]))
    variance = resampled_means(table, groups, np.random.default_rng(seed), n).var()
    parts, df = mean_squares(table, groups)
    # Of the rest two are too many; where there is nothing else, a third is left.
    variance = max(variance - 2 * parts[2], variance / 3)
    error = variance ** 0.5
    # All alike, but for rounding.
    if error < 1e-12:
        return Estimate(mean, mean, mean, float(mean == 0), abs(mean))
    values, below = student(max(1.0, variance ** 2 / (parts ** 2 / df).sum()))
    reach, inner = (float(x) for x in np.interp((0.95, 0.9), below, values) * error)
    p = float(1 - np.interp(abs(mean) / error, values, below))
    return Estimate(mean, mean - reach, mean + reach, p, abs(mean) + inner)


def gap(first: np.ndarray, second: np.ndarray, first_groups: np.ndarray,
        second_groups: np.ndarray, **how) -> Estimate:
    """The mean of some prompts minus that of others, by the same seeds: tables (seeds, prompts) and
    the categories of their prompts. So seeds are drawn for both at once, prompts for each. As
    above, a mean is that of its categories' means."""
    n_first, n_second = len(np.unique(first_groups)), len(np.unique(second_groups))
    n = n_first + n_second
    # A mean of all categories, with one sign for these and the other for those.
    table = np.concatenate([n / n_first * first, -n / n_second * second], 1)
    groups = [f"first {name}" for name in first_groups]
    groups += [f"second {name}" for name in second_groups]
    return estimate(table, groups, **how)


def holm(p: dict, of: int | None = None) -> dict:
    """Holm's correction: {name: p} -> {name: p that all of them together may be judged by}. of: how
    many there are, if more than these (which then count as the largest)."""
    of = of or len(p)
    corrected = {}
    largest = 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (of - i) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def verdict(found: Estimate, smallest: float, p: float | None = None) -> str:
    """In words, by p (default: the estimate's own; of many comparisons the corrected one) and by
    the smallest difference that matters: is the difference beyond doubt smaller? (Two one-sided
    tests at 5 %, Schuirmann 1987.)"""
    too_small = found.at_most < smallest
    if (found.p if p is None else p) < 0.05:
        direction = "more" if found.mean > 0 else "less"
        return f"{direction}, by less than matters" if too_small else direction
    return "no difference that matters" if too_small else "open"


def products(table: np.ndarray) -> np.ndarray:
    """Sums of the products of two cells of a table (A, B): a cell and itself, two of one row, two
    of one column, two that share neither."""
    own = (table ** 2).sum()
    row = (table.sum(1) ** 2).sum() - own
    column = (table.sum(0) ** 2).sum() - own
    return np.array([own, row, column, table.sum() ** 2 - row - column - own])


def shares(values: np.ndarray) -> dict[str, float]:
    """values (A, B): what depends on one thing (rows) and on another (columns), NaN where it is not
    known -> of its variance the share of each, and of the rest. NaN where too little is known.

    Two cells of one row have in common what is the row's, and so on: the means of their products
    are the components of variance, whatever is missing.
    """
    known = ~np.isnan(values)
    nothing = dict.fromkeys(("rows", "columns", "rest"), float("nan"))
    if known.sum() < 2:
        return nothing
    count = products(known.astype(float))
    if count.min() <= 0:
        return nothing
    centred = np.where(known, values - values[known].mean(), 0.0)
    own, row, column, neither = products(centred) / count
    parts = dict(rows=max(0.0, row - neither), columns=max(0.0, column - neither),
                 rest=max(0.0, own - row - column + neither))
    total = sum(parts.values())
    return {name: float(part / total) if total else 0.0 for name, part in parts.items()}
