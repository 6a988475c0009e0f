"""What two sources of continuations are worth, learnt from the tokens that the target emits.

`Reliability` makes the counts of a suffix source a sub-distribution: how often is the next token one of those that
followed the same last m tokens before? It is the escape probability of prediction by partial matching (PPM; Cleary and
Witten 1984), by m. `SourceWeights` is the mixture's w: prior odds by m, learnt over all requests, times the evidence of
the request's own tokens, by Bayes' rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from .mixture import Given

PRIOR, DECAY = 8.0, 0.99
"""Weight of what is assumed at the start, in observations, and factor on earlier observations at each one."""

FORGETTING = 0.8
"""Factor on the logarithm of a request's evidence at each step, since texts turn from copies into something new."""

FLOOR = 0.02
"""Least weight of either source."""

ELSEWHERE = 0.1
"""A token that a source's tree does not have is given so much of what the tree leaves over."""

LEAST = 0.001
"""Least probability that a source is said to have given to a token."""

FIRST_GAIN, LATEST_GAIN, RETURN = 1.0, 0.1, 0.001
"""Accepted tokens that a drafter adds, at first; weight of the latest step in the mean; and share of the way back that
the mean goes in each step without the drafter, so that it is asked again now and then."""


class Reliability:
    """By m from 1 to `longest`, which stands for all longer matches as well."""

    def __init__(self, longest: int) -> None:
        # The rule of succession: after m tokens that were as before, the next one is with (m + 1) / (m + 2).
        self._hits = [PRIOR * (match + 1) / (match + 2) for match in range(longest + 1)]
        self._tries = [PRIOR] * (longest + 1)

    def of(self, match: int) -> float:
        match = min(match, len(self._tries) - 1)
        return self._hits[match] / self._tries[match]

    def by_depth(self, match: int, depth: int) -> list[float]:
        """[depth + 1]: that so many tokens after a match of m tokens are as before; each makes the match longer."""
        rates = [hits / tries for hits, tries in zip(self._hits, self._tries)]
        ahead = rates[match : match + depth]
        ahead += rates[-1:] * (depth - len(ahead))
        return list(accumulate(ahead, mul, initial=1.0))

    def observe(self, match: int, given: Sequence[Given]) -> None:
        """given: of the source's tree after a match of m tokens, for the tokens that came."""
        for place, each in enumerate(given, match):
            place = min(place, len(self._tries) - 1)
            self._hits[place] = DECAY * self._hits[place] + (each.probability > 0)
            self._tries[place] = DECAY * self._tries[place] + 1


class SourceWeights:
    """w by the length of the suffix source's match and by a request's evidence, a logarithm that starts at 0."""

    def __init__(self, longest: int) -> None:
        self._first = [PRIOR / 2] * (longest + 1)
        self._total = [PRIOR] * (longest + 1)

    def weight(self, match: int, evidence: float) -> float:
        """Of the first source, from FLOOR to 1 - FLOOR."""
        prior = self._first[match] / self._total[match]
        return min(max(posterior(prior, evidence), FLOOR), 1 - FLOOR)

    def observe(self, match: int, evidence: float, ratio: float) -> float:
        """The request's evidence after tokens with this `log_ratio`."""
        responsibility = posterior(self.weight(match, evidence), ratio)
        self._first[match] = DECAY * self._first[match] + responsibility
        self._total[match] = DECAY * self._total[match] + 1
        # Within what the floor leaves, so that a text that turns is followed at once.
        most = math.log(1 / FLOOR - 1)
        return min(max(FORGETTING * evidence + ratio, -most), most)


class DrafterGains:
    """Accepted tokens that a drafter adds to those of the suffix source, the mean by the length of its match."""

    def __init__(self, longest: int) -> None:
        self._mean = [FIRST_GAIN] * (longest + 1)

    def of(self, match: int) -> float:
        return self._mean[match]

    def observe(self, match: int, drafted: Sequence[Given], found: Sequence[Given]) -> None:
        """drafted, found: of both trees after a match of m tokens, for the tokens that came."""
        gain = max(_num_had(drafted) - _num_had(found), 0)
        self._mean[match] += LATEST_GAIN * (gain - self._mean[match])

    def observe_without(self, match: int) -> None:
        """A step without the drafter."""
        self._mean[match] += RETURN * (FIRST_GAIN - self._mean[match])


def _num_had(given: Sequence[Given]) -> int:
    return sum(each.probability > 0 for each in given)


def posterior(prior: float, evidence: float) -> float:
    """Bayes' rule; evidence: the logarithm of the likelihoods' ratio."""
    return prior / (prior + (1 - prior) * math.exp(-evidence))


def log_ratio(first: Sequence[Given], second: Sequence[Given]) -> float:
    """Logarithm of the ratio of the probabilities that two sources gave to the tokens, as far as both trees reach."""
    return sum(math.log(_likelihood(one) / _likelihood(other)) for one, other in zip(first, second))


def _likelihood(given: Given) -> float:
    return max(given.probability or ELSEWHERE * (1 - given.mass), LEAST)
