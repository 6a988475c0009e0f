"""The evaluation equals a plain count, anchor by anchor, with psi summed over all alignments."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.algorithm.brute_force import Case, ConditionedCase, IndependentCase, Prefix, prefix_probabilities
from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.config import CTCDrafterConfig, SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.training.evaluate import (
    CHAIN,
    PAPER_TREE,
    Evaluation,
    Observations,
    TreeChoice,
    evaluate,
    observe,
    standard_error,
    summarise,
)
from vllm_ctc_spec.training.report import to_json, to_png, to_table

NUM_ANCHORS, NUM_FRAMES, NUM_TOKENS = 60, 3, 4
BUDGETS = (1, 4, 16, 63)
TREES = (CHAIN, *(TreeChoice(SpecOptions(), num_nodes) for num_nodes in BUDGETS), PAPER_TREE)
FAMILIES = {
    "independent": ("independent", NUM_FRAMES),
    "conditioned": ("conditioned", NUM_FRAMES - 1),
    "without blank": ("conditioned", NUM_FRAMES),
}
"""Emission and label length."""


def tiny_tables(family: str, num_tokens: int = NUM_TOKENS) -> CTCDrafter:
    """A small drafter of the emission family, with random tables."""
    torch.manual_seed(2)
    emission, label_length = FAMILIES[family]
    config = CTCDrafterConfig(
        hidden_size=8, vocab_size=num_tokens, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        num_frames=NUM_FRAMES, label_length=label_length, emission=emission, condition_rank=2, initializer_range=0.5,
    )  # fmt: skip
    drafter = CTCDrafter(config).requires_grad_(False)
    drafter.set_tables(torch.randn(num_tokens, 8), torch.randn(num_tokens, 8))
    return drafter


class Problem:
    """Random frames and texts of one drafter, with psi of all prefixes at each anchor."""

    def __init__(self, family: str) -> None:
        self.family, self.drafter = family, tiny_tables(family)
        torch.manual_seed(3)
        self.logits = torch.randn(NUM_ANCHORS, NUM_FRAMES, NUM_TOKENS + self.drafter.config.has_blank)
        rank = 0 if family == "independent" else 2
        self.draft = Draft(torch.empty(NUM_ANCHORS, 0), torch.randn(NUM_ANCHORS, rank), torch.randn(NUM_ANCHORS, rank))
        self.labels = torch.randint(NUM_TOKENS, (NUM_ANCHORS, NUM_FRAMES))
        self.rows = torch.arange(NUM_ANCHORS) // 7
        self.texts = [tuple(text) for text in self.labels.tolist()]
        self.psi = [prefix_probabilities(self.case(anchor).outcomes()) for anchor in range(NUM_ANCHORS)]

    def case(self, anchor: int) -> Case:
        if self.drafter.config.emission == "independent":
            return IndependentCase(self.logits[anchor])
        conditions = self.draft.start[anchor], self.draft.gate[anchor]
        return ConditionedCase(self.logits[anchor], self.drafter.conditioning, *conditions)

    def observed(self) -> Observations:
        return observe(self.drafter, self.draft, self.logits, self.labels, self.rows, TREES)

    def evaluation(self) -> Evaluation:
        return summarise(self.observed(), TREES, num_rows_left_out=0)


@pytest.fixture(scope="module", params=FAMILIES)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def best_tree(psi: dict[Prefix, float], num_nodes: int) -> set[Prefix]:
    return set(sorted(psi, key=lambda prefix: -psi[prefix])[:num_nodes])


def chain(psi: dict[Prefix, float]) -> set[Prefix]:
    nodes, prefix = set(), ()
    while len(prefix) < NUM_FRAMES and (best := best_child(psi, prefix)) is not None:
        prefix = (*prefix, best)
        nodes.add(prefix)
    return nodes


def best_child(psi: dict[Prefix, float], prefix: Prefix) -> int | None:
    children = {token: psi[(*prefix, token)] for token in range(NUM_TOKENS) if (*prefix, token) in psi}
    return max(children, key=lambda token: children[token], default=None)


def accepted_prefixes(tree: set[Prefix], text: Prefix) -> list[Prefix]:
    """The text's prefixes that are in the tree, by depth. The tree is connected, so none is missing in between."""
    return [text[:depth] for depth in range(1, len(text) + 1) if text[:depth] in tree]


def test_length_expected_length_and_depths_equal_a_count_over_anchors(problem: Problem):
    evaluation = problem.evaluation()
    shapes: list[Callable] = [chain, *(lambda psi, n=n: best_tree(psi, n) for n in BUDGETS)]
    assert [tree.num_nodes for tree in evaluation.trees] == [NUM_FRAMES, *BUDGETS, 63]
    for tree, shape in zip(evaluation.trees, shapes):
        nodes = [shape(psi) for psi in problem.psi]
        reached = [len(accepted_prefixes(*pair)) for pair in zip(nodes, problem.texts)]
        expected = sum(psi[prefix] for psi, prefixes in zip(problem.psi, nodes) for prefix in prefixes)
        assert tree.length == pytest.approx(1 + sum(reached) / NUM_ANCHORS)
        assert tree.expected == pytest.approx(1 + expected / NUM_ANCHORS, rel=1e-5)
        assert tree.expected_over_accepted == pytest.approx(expected / sum(reached), rel=1e-5)
        counts = [NUM_ANCHORS, *(sum(depth <= each for each in reached) for depth in range(1, NUM_FRAMES + 1))]
        assert tree.depth_shares == pytest.approx([count / NUM_ANCHORS for count in counts[1:]])
        conditional = [now / above if above else None for above, now in pairwise(counts)]
        assert tree.conditional_shares == pytest.approx(conditional)


def test_depth_shares_add_up_to_the_accepted_length(problem: Problem):
    for tree in problem.evaluation().trees:
        assert 1 + sum(tree.depth_shares) == pytest.approx(tree.length)
        assert math.prod(share or 0.0 for share in tree.conditional_shares) == pytest.approx(tree.depth_shares[-1])


def test_the_paper_tree_has_no_expected_length_and_no_best_tree_of_its_size_is_shorter(problem: Problem):
    *_, best, paper = problem.evaluation().trees
    assert (paper.tree, paper.expected, paper.expected_over_accepted) == ("template", None, None)
    assert 1 < paper.length <= best.length


def test_the_next_token_is_judged_after_first_choices_and_siblings_as_in_a_count(problem: Problem):
    counts = {True: [0, 0], False: [0, 0]}
    for psi, text in zip(problem.psi, problem.texts):
        tree = best_tree(psi, 63)
        for prefix in accepted_prefixes(tree, text)[: NUM_FRAMES - 1]:
            siblings = [psi[node] for node in tree if node[:-1] == prefix[:-1]]
            hits_and_count = counts[psi[prefix] == max(siblings)]
            hits_and_count[0] += best_child(psi, prefix) == text[len(prefix)]
            hits_and_count[1] += 1
    evaluation = problem.evaluation()
    for rate, (hits, count) in zip((evaluation.after_first_choice, evaluation.after_sibling), counts.values()):
        assert 0 < hits < count
        assert (rate.share, rate.count) == (pytest.approx(hits / count), count)


def test_reliability_bins_hold_every_node_and_every_accepted_one(problem: Problem):
    evaluation, nodes = problem.evaluation(), []
    for psi, text in zip(problem.psi, problem.texts):
        nodes += [(psi[prefix], text[: len(prefix)] == prefix) for prefix in best_tree(psi, 63)]
    assert len(evaluation.reliability) > 5
    for each in evaluation.reliability:
        inside = [(value, accepted) for value, accepted in nodes if each.lower < value <= each.upper]
        assert each.accepted.count == len(inside)
        assert each.mean_psi == pytest.approx(sum(value for value, _ in inside) / len(inside), rel=1e-5)
        assert each.accepted.share == pytest.approx(sum(accepted for _, accepted in inside) / len(inside))
    assert sum(each.accepted.count for each in evaluation.reliability) == len(nodes)


def test_a_drafter_is_found_calibrated_on_text_that_it_drew_itself():
    # Every output has T tokens, as the labels do.
    problem = Problem("without blank")
    texts = []
    for anchor in range(NUM_ANCHORS):
        chances = problem.case(anchor).outcomes()
        drawn = torch.multinomial(torch.tensor(list(chances.values())), 100, replacement=True)
        texts.append(torch.tensor(list(chances))[drawn])
    logits, draft = (
        problem.logits.repeat_interleave(100, 0),
        Draft(*(each.repeat_interleave(100, 0) for each in problem.draft)),
    )
    observed = observe(problem.drafter, draft, logits, torch.cat(texts), torch.arange(len(logits)), TREES)
    evaluation = summarise(observed, TREES, num_rows_left_out=0)
    for tree in evaluation.trees[:-1]:
        assert abs(tree.length - tree.expected) < 4 * tree.standard_error
    for each in evaluation.reliability:
        spread = math.sqrt(each.mean_psi / each.accepted.count)
        assert abs(each.accepted.share - each.mean_psi) < 4 * spread


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_that_is_right_and_sure_has_the_known_numbers(family: str):
    drafter = tiny_tables(family)
    labels = torch.tensor([[0, 1, 2], [3, 2, 1]])
    logits = 100.0 * torch.nn.functional.one_hot(labels, NUM_TOKENS + drafter.config.has_blank)
    unbiased = Draft(torch.empty(2, 0), *torch.zeros(2, 2, 2))
    observed = observe(drafter, unbiased, logits, labels, torch.tensor([0, 1]), TREES)
    evaluation = summarise(observed, TREES, num_rows_left_out=5)
    for tree in evaluation.trees:
        full = 1.0 if tree.num_nodes >= NUM_FRAMES else 0.0
        assert tree.depth_shares == (1.0, full, full)
        assert tree.length == 2 + 2 * full and tree.standard_error == 0
        assert tree.tree == "template" or (tree.expected, tree.expected_over_accepted) == pytest.approx(
            (tree.length, 1.0)
        )
    assert (evaluation.after_first_choice.share, evaluation.after_first_choice.count) == (1.0, 4)
    assert (evaluation.after_sibling.share, evaluation.after_sibling.count) == (None, 0)
    assert evaluation.reliability[-1].accepted.count == 6 and evaluation.reliability[-1].accepted.share == 1.0
    assert (evaluation.num_anchors, evaluation.num_rows, evaluation.num_rows_left_out) == (2, 2, 5)


def test_the_standard_error_counts_rows_not_anchors():
    torch.manual_seed(4)
    values, ones = torch.rand(200, dtype=torch.float64), torch.arange(200)
    assert standard_error(values, ones) == pytest.approx(float(values.std()) / math.sqrt(200))
    assert standard_error(values.repeat(3), ones.repeat(3)) == pytest.approx(standard_error(values, ones))
    assert standard_error(values, torch.zeros(200, dtype=torch.int64)) is None


def test_the_standard_error_is_the_spread_of_repeated_evaluations():
    torch.manual_seed(5)
    clusters = torch.arange(40).repeat_interleave(6)
    means, errors = [], []
    for _ in range(400):
        values = torch.randn(40).repeat_interleave(6) + 0.5 * torch.randn(240)
        means.append(float(values.mean()))
        errors.append(standard_error(values, clusters))
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.12)


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target")
    tiny_target(tied=False).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("emission", ["independent", "conditioned"])
def test_files_in_numbers_out_whatever_the_batch_size(target_path: str, emission: str, tmp_path, monkeypatch):
    target = tiny_target(tied=False)
    # In bfloat16 the padding of a batch moves the last digits.
    monkeypatch.setattr("vllm_ctc_spec.training.evaluate.load_target", lambda *_: target)
    drafter_path = str(tmp_path / "drafter")
    tiny_drafter(target, emission=emission).save_pretrained(drafter_path)
    lengths = [4, 5, 30, 12, 3, 20]
    rows = [{"prompt_token_ids": [1, 2], "token_ids": [(7 * i) % VOCAB for i in range(length)]} for length in lengths]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, many = (evaluate(target_path, drafter_path, path, batch_size=size) for size in (1, 16))
    # T + 1 = 5 tokens are needed; a continuation of n tokens has n - 4 anchors, of which at most 8 are drawn.
    assert (many.num_rows, many.num_rows_left_out, many.num_anchors) == (4, 2, 1 + 8 + 8 + 8)
    assert to_json(many) == to_json(evaluate(target_path, drafter_path, path))
    for field in ("length", "expected", "standard_error"):
        ones, manys = ([getattr(tree, field) for tree in evaluation.trees] for evaluation in (one, many))
        assert ones == pytest.approx(manys, rel=1e-4)


def test_rows_without_an_anchor_are_refused(target_path: str, tmp_path):
    tiny_drafter(tiny_target()).save_pretrained(tmp_path / "drafter")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5, 6]}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl' has no row with 5 tokens to predict in sequence"):
        evaluate(target_path, str(tmp_path / "drafter"), path)


def test_json_survives_json_and_holds_what_is_derived(problem: Problem):
    fields = to_json(problem.evaluation())
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    for tree, expected in zip(fields["trees"], problem.evaluation().trees, strict=True):
        assert tree["conditional_shares"] == list(expected.conditional_shares)
        assert (tree["length"], tree["expected_over_accepted"]) == (expected.length, expected.expected_over_accepted)
        assert tree["options"]["tree"] == expected.tree


def test_the_table_names_every_tree_and_its_length(problem: Problem):
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(to_table(problem.evaluation()))
    text = console.export_text()
    for tree in problem.evaluation().trees:
        assert tree.tree in text and f"{tree.length:.2f}" in text
    assert f"{problem.evaluation().after_sibling.share:.2f} (of" in text


def test_the_figure_is_a_png_and_stands_alone(problem: Problem, tmp_path):
    to_png({"one": problem.evaluation(), "two": problem.evaluation()}, tmp_path / "evaluation.png")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.png"]
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_missing_matplotlib_is_named_with_its_remedy(problem: Problem, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "vllm-ctc-spec\[train\]"'):
        to_png({"one": problem.evaluation()}, tmp_path / "evaluation.png")


def test_trees_do_not_depend_on_which_others_are_judged_beside_them(problem: Problem):
    together = problem.evaluation().trees
    for choice, expected in zip(TREES, together, strict=True):
        arguments = problem.drafter, problem.draft, problem.logits, problem.labels, problem.rows, [choice]
        (alone,) = summarise(observe(*arguments), [choice], 0).trees
        assert alone == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_what_the_cpu_sees(problem: Problem):
    def on_gpu(values: Tensor) -> Tensor:
        return values.cuda()

    draft, drafter = Draft(*map(on_gpu, problem.draft)), tiny_tables(problem.family).cuda()
    logits, labels, rows = map(on_gpu, (problem.logits, problem.labels, problem.rows))
    observed = observe(drafter, draft, logits, labels, rows, TREES)
    assert torch.equal(observed.num_accepted, problem.observed().num_accepted)
    assert torch.equal(observed.right_next, problem.observed().right_next)
    torch.testing.assert_close(observed.expected, problem.observed().expected)
