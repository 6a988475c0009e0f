"""`vllm-ctc-spec demo`: a public chat model, served by plain vLLM and with CTC trees, compared."""
