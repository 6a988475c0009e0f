"""`vllm-ctc-spec verify`: compares the answers of a speculative method with plain vLLM's."""
