"""`vllm-ctc-spec bench`: plain vLLM against speculative methods, taking turns on one machine."""
