"""Exact CTC tree speculative decoding for vLLM.

The stages of a decoding step, in the order in which to read them:

    target hidden states      engine/runner.py      outputs of vLLM's forward pass at verified positions
    → frames                  drafter/modeling.py   T output slots, each a distribution over V tokens and blank
    → prefix tree             algorithm/            the N prefixes with the largest probability under CTC
    → chosen nodes            engine/adaptive/      as many nodes as make the batch faster, or none
    → tree attention          engine/attention/     one target pass over all nodes; each sees only its ancestors
    → acceptance              engine/walk.py        vLLM's own sampler walks the tree from the anchor
    → K/V move                engine/runner.py      keys and values of accepted nodes move to consecutive slots

The tokens are those of vLLM without this plugin; the tree changes only how many are emitted per step.
vLLM finds the plugin through `vllm.general_plugins` (engine/plugin.py) and uses it for
`speculative_config={"method": "ctc", ...}`. training/ trains drafters, and demo/ shows the whole system.
"""

__version__ = "0.1.0"
