"""`vllm-ctc-spec bench`: plain vLLM and speculative methods, measured in turn on one machine.

command, config, yaml_file  arguments; the YAML as typed settings; reading and overriding it
run, cells                  prompts, resume and results of a run; one cell measured and summarised
processes                   the benchmark's side of the methods' processes
worker, worker_extension    a method's process; the part that runs inside vLLM's worker
records, equality, report   messages between the two; comparison with plain vLLM; report.md and figures
"""
