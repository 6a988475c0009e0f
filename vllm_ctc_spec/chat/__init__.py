"""`vllm-ctc-spec chat`: a conversation in the terminal that shows how many tokens each decoding step emitted."""
