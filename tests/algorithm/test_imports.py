"""The algorithm package stands on its own."""

from __future__ import annotations

import subprocess
import sys


def test_the_algorithm_imports_neither_vllm_nor_transformers_nor_numba_at_once() -> None:
    code = (
        "import sys, vllm_ctc_spec.algorithm\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'vllm', 'transformers', 'numba'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_search_needs_no_folder_to_keep_its_code_in() -> None:
    code = (
        "import torch, numba.core.caching as caching\n"
        "for impl in (caching.CacheImpl, *caching.CacheImpl.__subclasses__()): impl._locator_classes = []\n"
        "from vllm_ctc_spec.algorithm import Conditioning, conditioned_emissions, search_prefix_trees\n"
        "tables = Conditioning(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 2))\n"
        "emissions = conditioned_emissions(torch.zeros(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 2), tables, 3)\n"
        "print(search_prefix_trees(emissions, 5).depths.tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[[1, 1, 1, 2, 2]]"
