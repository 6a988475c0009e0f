"""CTC drafting and exact acceptance, without an engine: frames -> emissions -> token tree -> accepted path.

Read in this order: ctc.py (the mathematics, for one request, in log space), emissions.py, prefix_tree.py (levels.py and
blank_families.py are its parts), token_tree.py, walk.py. best_first.py finds the same trees on a CPU, template_tree.py
is the paper's tree, for comparison, and next_token.py is for evaluation. mixture.py and source_weights.py join the
drafter's tree with that of a second source. Nothing here imports vLLM or transformers.
"""

from .best_first import search_chains, search_prefix_trees
from .ctc import ConditionedPrefix, IndependentPrefix, collapse
from .emissions import (
    ConditionedEmissions,
    Conditioning,
    IndependentEmissions,
    conditioned_emissions,
    independent_emissions,
)
from .mixture import NOTHING, Given, Prefixes, likeliest_path, mix
from .next_token import conditioned_next_tokens, independent_next_tokens
from .prefix_tree import build_chains, build_prefix_trees
from .source_weights import DrafterGains, Reliability, SourceWeights, log_ratio, posterior
from .template_tree import build_template_trees
from .token_tree import TokenTrees
from .walk import AcceptedPaths, accept_greedy, child_of

__all__ = [
    "NOTHING",
    "AcceptedPaths",
    "ConditionedEmissions",
    "ConditionedPrefix",
    "Conditioning",
    "DrafterGains",
    "Given",
    "IndependentEmissions",
    "IndependentPrefix",
    "Prefixes",
    "Reliability",
    "SourceWeights",
    "TokenTrees",
    "accept_greedy",
    "build_chains",
    "build_prefix_trees",
    "build_template_trees",
    "child_of",
    "collapse",
    "conditioned_emissions",
    "conditioned_next_tokens",
    "independent_emissions",
    "independent_next_tokens",
    "likeliest_path",
    "log_ratio",
    "mix",
    "posterior",
    "search_chains",
    "search_prefix_trees",
]
