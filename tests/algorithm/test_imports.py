"""The algorithm package stands on its own."""

from __future__ import annotations

import subprocess
import sys


def test_the_algorithm_imports_neither_vllm_nor_transformers() -> None:
    code = (
        "import sys, vllm_ctc_spec.algorithm\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'vllm', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
