"""One tree of two sources of continuations, of one request on the host.

A source is a sub-distribution over continuations: psi(h), the probability that the text goes on with the prefix h. The
mixture w psi_1(h) + (1 - w) psi_2(h) is one, too, and psi never grows along a path. So its N largest prefixes are a
connected tree, the one with the largest expected accepted length under the mixture. A prefix of both sources is one
node. A source's tree may be pruned: what is missing counts as impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Prefixes(NamedTuple):
    """A source's tree: node i in 1..N is entry i - 1, parents before children; node 0 is the anchor."""

    tokens: Sequence[int]
    parents: Sequence[int]
    psi: Sequence[float]
    """Not larger than the parent's."""

    def along(self, tokens: Sequence[int]) -> list[Given]:
        """For `tokens`, which follow the anchor, what the source gave to each after those before it.

        Ends where the tree does, and after the first token that it does not have.
        """
        found = []
        node, above = 0, 1.0
        for token in tokens:
            child, mass = 0, 0.0
            # Children come after their parent.
            for index in range(node, len(self.parents)):
                if self.parents[index] == node:
                    mass += self.psi[index]
                    if self.tokens[index] == token:
                        child = index + 1
            if not mass:
                break
            probability = self.psi[child - 1] if child else 0.0
            found.append(Given(probability / above, mass / above))
            if not child:
                break
            node, above = child, probability
        return found


class Given(NamedTuple):
    """What a source's tree says of a token, after the tokens before it."""

    probability: float
    """0 if the tree does not have it."""
    mass: float
    """Probability of all tokens that the tree has at this place."""


NOTHING = Prefixes((), (), ())


def mix(first: Prefixes, second: Prefixes, weight: float, num_nodes: int, least: float = 0.0) -> Prefixes:
    """The `num_nodes` prefixes with the largest weight * psi_1 + (1 - weight) * psi_2, in descending order.

    Those with psi 0 or below `least` are left out.
    """
    tokens, parents = list(first.tokens), list(first.parents)
    psi = [weight * each for each in first.psi]
    if second.tokens:
        node_of = {key: node for node, key in enumerate(zip(parents, tokens), 1)}
        nodes = [0]
        for token, parent, value in zip(*second):
            key = (nodes[parent], token)
            node = node_of.get(key)
            if node is None:
                tokens.append(token)
                parents.append(key[0])
                psi.append(0.0)
                node = node_of[key] = len(tokens)
            psi[node - 1] += (1.0 - weight) * value
            nodes.append(node)
    # Stable, so that of equal ones the parent stays before its child.
    order = sorted(range(len(psi)), key=psi.__getitem__, reverse=True)[:num_nodes]
    order = [index for index in order if psi[index] > 0.0 and psi[index] >= least]
    place = {0: 0}
    for rank, index in enumerate(order, 1):
        place[index + 1] = rank
    return Prefixes(
        [tokens[index] for index in order],
        [place[parents[index]] for index in order],
        [psi[index] for index in order],
    )


def likeliest_path(prefixes: Prefixes) -> Prefixes:
    """From each node on to its child with the largest psi, for who can verify a chain only."""
    path: list[int] = []
    node = 0
    while True:
        children = [index for index in range(node, len(prefixes.parents)) if prefixes.parents[index] == node]
        if not children:
            break
        path.append(max(children, key=lambda index: prefixes.psi[index]))
        node = path[-1] + 1
    return Prefixes(
        [prefixes.tokens[index] for index in path],
        list(range(len(path))),
        [prefixes.psi[index] for index in path],
    )
