"""Tables are not cut in a pipe."""

import subprocess
import sys

CODE = """
from rich.table import Table
from vllm_ctc_spec.tables import console
table = Table(*["a column of some width"] * 16)
table.add_row(*["0.5000000 (0.5000000)"] * 16)
console().print(table)
"""


def test_a_wide_table_is_not_cut_in_a_pipe():
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert printed.count("0.5000000 (0.5000000)") == 16
