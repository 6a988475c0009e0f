"""Training a drafter: rows of text -> frozen target's hidden states -> alignment-sum loss -> drafter folder.

command, stages               `vllm-ctc-spec train` and its stages
sources, prompts, regenerate  lines and their fields; prompts; rows that the target writes with vLLM
data                          rows, anchors and batches
hidden_sources, hidden_cache  the target's hidden states, by the model in this process or by vLLM; their files
models, objective, loss       target and drafter; one training pass; the alignment-sum losses
loop, trainer                 budget, optimizer and checkpoints; transformers' Trainer for a drafter
calibrate, fit                one factor on all logits; the whole training run
evaluate, report, card        acceptance length on unseen rows; its tables and figure; the model card
"""
