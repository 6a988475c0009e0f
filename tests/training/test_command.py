"""`vllm-ctc-spec train` before a stage begins: its arguments, and what its process imports."""

import os
import subprocess
import sys

import pytest

from vllm_ctc_spec.cli import _parser
from vllm_ctc_spec.training.stages import _fit_settings

FIT = ["train", "fit", "target", "rows.jsonl", "drafter"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", f"import os, sys\nfrom vllm_ctc_spec.cli import main\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment)


@pytest.mark.parametrize(("given", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_of_torch_sleep_and_engines_inherit_no_policy(given: dict[str, str], used: str) -> None:
    """libgomp prints the policy that it uses when it is loaded."""
    arguments = [*FIT, "--target-layers", "x"]
    code = f"assert main({arguments}) == 2\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    done = run(code, OMP_DISPLAY_ENV="TRUE", **given)
    assert "--target-layers x: write layer numbers" in done.stderr
    assert f"OMP_WAIT_POLICY = '{used}'" in done.stderr
    assert done.stdout.strip() == str(given.get("OMP_WAIT_POLICY"))


def test_regenerate_imports_neither_evaluation_nor_trainer() -> None:
    code = "assert main(['train', 'regenerate', 'target', 'rows.jsonl']) == 2\n"
    code += "print([name for name in ('evaluate', 'trainer') if f'vllm_ctc_spec.training.{name}' in sys.modules])"
    done = run(code)
    assert "no prompts" in done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", [FIT, ["train", "regenerate", "target", "prompts.jsonl", "rows.jsonl"]])
def test_variables_of_the_chat_template_are_a_json_object(stage: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def parsed(text: str) -> object:
        return _parser().parse_args([*stage, "--chat-template-kwargs", text]).chat_template_kwargs

    assert _parser().parse_args(stage).chat_template_kwargs is None
    assert parsed('{"enable_thinking": false, "n": [1]}') == {"enable_thinking": False, "n": [1]}
    for text, message in {
        "{": "'{' is not JSON",
        "[1]": "is not a JSON object",
        '{"tokenize": true}': "'tokenize' is set by the command itself",
    }.items():
        with pytest.raises(SystemExit):
            parsed(text)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rate"),
    [([], 0.005), (["--init", "other"], 0.002), (["--init", "other", "--learning-rate", "0.01"], 0.01)],
)
def test_the_learning_rate_is_lower_for_weights_that_are_trained_already(options: list[str], rate: float) -> None:
    assert _fit_settings(_parser().parse_args([*FIT, *options])).learning_rate == rate
