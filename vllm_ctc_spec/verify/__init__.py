"""`vllm-ctc-spec verify`: the same requests with and without a speculative method, and what differs."""
