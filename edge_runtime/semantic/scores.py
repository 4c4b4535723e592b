"""Sizes and likelihoods of clusters → how much the answers differ in meaning. Pure functions; entropies in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

# sums in another order differ in the last bits; rounded, equal entropies are equal, and the largest is a whole share
_DECIMALS = 12
_DECIMALS_OF_SHARES = 9


def entropy(sizes: Sequence[int]) -> float:
    """Discrete semantic entropy: of the shares of clusters of these sizes, each 1 or more; 0 for none."""
    total = sum(sizes)
    if not total:
        return 0.0
    spread = math.fsum(size * math.log(size) for size in sizes) / total
    return max(0.0, round(math.log(total) - spread, _DECIMALS))


def likelihood_shares(clusters: Sequence[Sequence[float]]) -> list[float]:
    """Each cluster's share of the likelihood of all samples, from their log-likelihoods by cluster.

    With length-normalised log-likelihoods this is P(C) of Rao–Blackwellised semantic entropy. Every sample counts, so
    that how often a meaning was drawn weighs as well as how likely its words were.
    """
    largest = max((value for values in clusters for value in values), default=0.0)
    sums = [math.fsum(math.exp(value - largest) for value in values) for values in clusters]
    total = math.fsum(sums)
    return [part / total for part in sums]


def entropy_of_shares(shares: Sequence[float]) -> float:
    """Entropy of probabilities that sum to 1."""
    return max(0.0, round(-math.fsum(share * math.log(share) for share in shares if share > 0), _DECIMALS))


def normalised(value: float, n_samples: int) -> float:
    """An entropy as a share, 0 to 1, of the most that `n_samples` can have; 0 for one sample."""
    return min(1.0, round(value / math.log(n_samples), _DECIMALS_OF_SHARES)) if n_samples > 1 else 0.0


def entropy_bounds(sizes: Sequence[int], n_left: int, *, fixed: bool) -> tuple[float, float]:
    """The least and the most that `entropy` can be after `n_left` more samples.

    `sizes` are of groups that no further sample splits. Most: each further sample means something new (x·log x is
    convex, so a sample adds least to Σ x·log x where it is alone). Least, if groups are `fixed`, so that none joins
    another: all further samples join the largest (the same convexity). If they may join, all may become one: 0.
    """
    most = entropy([*sizes, *[1] * n_left])
    if not fixed and n_left:
        return 0.0, most
    largest, *others = sorted(sizes, reverse=True) or [0]
    return entropy([size for size in (largest + n_left, *others) if size]), most
