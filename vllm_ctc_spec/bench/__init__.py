"""`vllm-ctc-spec bench`: plain vLLM and speculative methods, measured in turn on one machine.

command, config            the arguments, and the YAML as typed settings
run, cells                 prompts, resume and results of a run; one cell measured and summed up
processes                  the benchmark's side of the methods' processes
worker, worker_extension   a method's process, and what it runs inside vLLM's worker
records, equality, report  what travels between the two; comparison with plain vLLM; report.md and figures
"""
