"""Exact CTC tree speculative decoding for vLLM.

One decoding step, in the order in which the code reads:

    target hidden states      engine/runner.py      what vLLM's forward pass leaves behind at verified positions
    → frames                  drafter/modeling.py   T output slots, each a distribution over V tokens and blank
    → prefix tree             algorithm/            the N prefixes of largest probability under CTC: the best tree
    → chosen nodes            engine/adaptive/      of the trees' nodes as many as make the batch faster, or none
    → tree attention          engine/attention/     one target pass over all nodes, each seeing its ancestors only
    → acceptance              engine/walk.py        vLLM's own sampler walks the tree from the anchor
    → K/V move                engine/runner.py      accepted nodes' keys and values go to consecutive slots

The tokens are those that vLLM would have produced without us: the tree decides only how many come at once.
vLLM finds the plugin through `vllm.general_plugins` (engine/plugin.py) and uses it for
`speculative_config={"method": "ctc", ...}`. Drafters are trained by training/, and demo/ shows all of it.
"""

__version__ = "0.1.0"
