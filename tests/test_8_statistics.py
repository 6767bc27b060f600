"""The study's statistics where the truth is known: how often intervals cover it, how often chance
alone is called a difference, and that both depend on what they should."""
import numpy as np
import pytest

from lab import statistics

SIXTHS = np.repeat(range(6), 16)


def differences(rng, truth, seeds, of_seeds, of_prompts):
    """What a study sees: two right-or-wrong pictures of each seed and prompt, whose chances differ
    by `truth`, by the seed and by the prompt -> (seeds, prompts) of -1, 0, 1"""
    shift = truth + of_seeds * rng.normal(size=(seeds, 1)) + of_prompts * rng.normal(size=(1, 96))
    chance = 0.5 + np.stack([shift, -shift]) / 2
    first, second = rng.random((2, seeds, 96)) < chance
    return first.astype(float) - second


@pytest.mark.parametrize("seeds, of_seeds, of_prompts", [
    (5, 0.08, 0.0), (5, 0.04, 0.1), (5, 0.0, 0.0), (16, 0.08, 0.05),
])
def test_intervals_cover_the_truth_and_chance_is_no_difference(seeds, of_seeds, of_prompts):
    """Of 95 % intervals about 95 %, of tests at 5 % about 5 %; where there is little but the rest,
    a bit more and fewer. 400 studies: two standard errors are 2.2 points."""
    rng = np.random.default_rng(0)
    covered, called = 0, 0
    for i in range(400):
        table = differences(rng, 0.0, seeds, of_seeds, of_prompts)
        found = statistics.estimate(table, SIXTHS, i, 400)
        covered += found.low <= 0 <= found.high
        called += found.p < 0.05
    assert covered + called == 400
    assert 0.925 <= covered / 400 <= 0.99
    assert called / 400 <= 0.075


def test_the_variance_is_that_of_the_mean():
    """As it is over many studies, whose seeds, prompts and rest are known; by a bootstrap of 2000
    and by the mean squares alone."""
    rng = np.random.default_rng(5)
    S, P, sigma = 16, 96, np.array([0.05, 0.2, 0.5])
    truth = (sigma ** 2 / [S, P, S * P]).sum() ** 0.5
    errors, formulas = [], []
    for i in range(60):
        table = (sigma[0] * rng.normal(size=(S, 1)) + sigma[1] * rng.normal(size=(1, P))
                 + sigma[2] * rng.normal(size=(S, P)) + SIXTHS)
        found = statistics.estimate(table, SIXTHS, i)
        (of_seeds, of_prompts, of_rest), df = statistics.mean_squares(table, SIXTHS)
        formulas.append((of_seeds + of_prompts - of_rest) ** 0.5)
        errors.append((found.high - found.low) / 2)
    assert np.mean(formulas) == pytest.approx(truth, rel=0.05)
    # Half an interval is 2.0 to 2.1 errors, with 20 to 90 degrees of freedom.
    assert 1.95 < np.mean(errors) / truth < 2.15
    assert list(df) == [15, 90, 15 * 90]


def test_how_categories_differ_is_no_error():
    """Easy and hard ones: neither the interval nor its degrees of freedom know of it."""
    table = np.random.default_rng(6).normal(size=(5, 96))
    one, other = (statistics.estimate(table + level * SIXTHS, SIXTHS) for level in (0, 10))
    assert other.high - other.low == pytest.approx(one.high - one.low)


def test_a_difference_is_found_when_it_is_there():
    rng = np.random.default_rng(1)
    found = [statistics.estimate(differences(rng, 0.1, 16, 0.04, 0.05), SIXTHS, i, 400)
             for i in range(100)]
    assert np.mean([estimate.p < 0.05 for estimate in found]) > 0.9
    assert abs(np.mean([estimate.mean for estimate in found]) - 0.1) < 0.01
    assert all(estimate.low < estimate.mean < estimate.high for estimate in found)


def test_what_leaves_the_seeds_out_calls_chance_a_difference():
    """Why both are drawn again: with the seeds' mean as one row, every fourth study is wrong."""
    rng = np.random.default_rng(2)
    called = 0
    for i in range(200):
        table = differences(rng, 0.0, 5, 0.12, 0.0)
        called += statistics.estimate(table.mean(0, keepdims=True), SIXTHS, i, 200).p < 0.05
    assert called / 200 > 0.25


def test_a_mean_of_categories_counts_each_once():
    table = np.concatenate([np.ones((2, 30)), np.zeros((2, 10))], 1)
    found = statistics.estimate(table, [0] * 30 + [1] * 10)
    assert found == statistics.Estimate(0.5, 0.5, 0.5, 0.0, 0.5)
    assert statistics.estimate(np.zeros((3, 8))).p == 1


@pytest.mark.parametrize("truth, of_seeds", [(0.0, 0.1), (0.2, 0.03)])
def test_the_gap_of_two_lists_of_prompts_covers_the_truth(truth, of_seeds):
    """Four categories of 24 prompts against two of 12; a seed that is good at one list is good at
    the other, and prompts of a list differ. 200 studies: two standard errors are 3.1 points."""
    rng = np.random.default_rng(8)
    groups, other_groups = np.repeat(range(4), 24), np.repeat(range(2), 12)
    covered, called, means = 0, 0, []
    for i in range(200):
        seeds = 0.5 + of_seeds * rng.normal(size=(5, 1))
        first, second = (rng.random((5, n)) < seeds + 0.1 * rng.normal(size=(1, n)) + more
                         for n, more in ((96, truth), (24, 0.0)))
        found = statistics.gap(first, second, groups, other_groups, seed=i, n=300)
        covered += found.low <= truth <= found.high
        called += found.p < 0.05
        means.append(found.mean)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert abs(np.mean(means) - truth) < 0.015
    assert 0.92 <= covered / 200 <= 0.99
    assert called / 200 <= 0.08 if truth == 0 else called / 200 > 0.7


@pytest.mark.parametrize("df, quantile", [(2, 4.303), (4, 2.776), (15, 2.131), (1000, 1.962)])
def test_student_has_the_quantiles_of_the_tables(df, quantile):
    values, below = statistics.student(df)
    assert np.interp(0.95, below, values) == pytest.approx(quantile, abs=2e-3)


def test_holm_gives_what_its_paper_gives():
    """Each p times the number of those not yet rejected, never less than the one before."""
    found = statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    # Two of four, while the others are not known.
    assert statistics.holm({"a": 0.04, "b": 0.01}, 4) == pytest.approx({"a": 0.12, "b": 0.04})
    rng = np.random.default_rng(0)
    wrong = sum(min(statistics.holm(dict(enumerate(rng.random(9)))).values()) < 0.05
                for _ in range(2000))
    assert abs(wrong / 2000 - 0.05) < 0.015


@pytest.mark.parametrize("mean, p, at_most, words", [
    (3, 0.04, 4.8, "more"), (-3, 0.04, 4.8, "less"), (1, 0.5, 3.5, "open"),
    (0.2, 0.5, 2.5, "no difference that matters"), (1, 0.04, 1.9, "more, by less than matters"),
])
def test_verdicts(mean, p, at_most, words):
    assert statistics.verdict(statistics.Estimate(mean, 0, 0, p, at_most), 3) == words


@pytest.mark.parametrize("at_most, words", [(5, "open"), (2.5, "no difference that matters")])
def test_a_verdict_goes_by_the_corrected_p(at_most, words):
    """One of many comparisons is as far from 0 as this by chance."""
    found = statistics.Estimate(2, 1, 3, 0.02, at_most)
    assert statistics.verdict(found, 3).startswith("more")
    assert statistics.verdict(found, 3, p=0.3) == words


def test_what_just_matters_is_seldom_called_too_small():
    """Of 400 studies whose truth is 10 points, the smallest that matters: at most one in twenty;
    and of those whose truth is 0 most, if their errors are small enough."""
    rng = np.random.default_rng(9)
    called = []
    for truth in (0.1, 0.0):
        words = [statistics.verdict(statistics.estimate(
            differences(rng, truth, 8, 0.04, 0.05), SIXTHS, i, 200), 0.1) for i in range(400)]
        called.append(sum(word == "no difference that matters" for word in words) / 400)
    assert called[0] <= 0.075 and called[1] > 0.8


def test_an_interval_leaves_out_0_where_p_is_below_5_percent():
    rng = np.random.default_rng(7)
    found = [statistics.estimate(0.05 + differences(rng, 0.0, 5, 0.04, 0.05), SIXTHS, i, 200)
             for i in range(60)]
    small = [estimate.p < 0.05 for estimate in found]
    assert small == [not estimate.low <= 0 <= estimate.high for estimate in found]
    assert 0 < sum(small) < 60


def test_shares_are_those_of_the_parts():
    rng = np.random.default_rng(0)
    rows, columns = 2 * rng.normal(size=(40, 1)), rng.normal(size=(1, 60))
    found = statistics.shares(rows + columns + rng.normal(size=(40, 60)))
    parts = dict(rows=rows.var(ddof=1), columns=columns.var(ddof=1), rest=1.0)
    for name, part in parts.items():
        assert found[name] == pytest.approx(part / sum(parts.values()), abs=0.02)
    assert statistics.shares(np.ones((3, 4))) == dict(rows=0, columns=0, rest=0)
    # A third of the cells unknown: noisier, no other on average. Nothing known: nothing said.
    values = rows + columns + rng.normal(size=(40, 60))
    values[rng.random((40, 60)) < 1 / 3] = np.nan
    found = statistics.shares(values)
    for name, part in parts.items():
        assert found[name] == pytest.approx(part / sum(parts.values()), abs=0.03)
    assert np.isnan(statistics.shares(np.full((3, 4), np.nan))["rows"])


def test_shares_are_those_of_the_two_way_table():
    """By mean squares, as textbooks have it for a table without gaps."""
    values = np.random.default_rng(3).normal(size=(5, 7)) + np.arange(5)[:, None]
    row, column = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = ((values - row - column + values.mean()) ** 2).sum() / (4 * 6)
    parts = [row.var(ddof=1) - rest / 7, max(0, column.var(ddof=1) - rest / 5), rest]
    assert list(statistics.shares(values).values()) == pytest.approx(np.array(parts) / sum(parts))
