"""The prompts: the user's file, or built-in ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.prompts import read_questions
from vllm_ctc_spec.training.sources import Line, read_lines

PROMPTS = (
    "Why is the sky blue during the day and red in the evening?",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "List the planets of the solar system in the order of their distance from the sun.",
    "Write a short poem about a lighthouse in winter.",
    "Translate into French: The library opens at nine and closes at six.",
    "Correct the mistakes: She don't likes to goes to the school because it are far away.",
    "Name three advantages and three disadvantages of living in a big city.",
    "Tom has 12 apples. He gives a third of them to Anna and then buys 5 more. How many apples does he have?",
    "Explain to a child what a volcano is.",
    "Write an e-mail to a landlord about a broken heater. Be polite.",
    "What is the difference between a list and a tuple in Python? Give an example of each.",
    "Summarize in one sentence: The committee met on Monday, discussed the budget for three hours, and adjourned "
    "without a decision, because two of its members doubted the figures that the treasurer had presented.",
    "Extract every date from this text: The bridge was planned in 1869, begun in January 1870, opened on 24 May 1883 "
    "and repaired between 1948 and 1954.",
    "Rewrite this text in the past tense: The cat sits at the window. It watches the birds. It jumps when one of them "
    "comes near. The birds fly away, and the cat sits down again.",
    "Repeat the following list and add two entries: red, orange, yellow, green, blue, indigo, violet.",
    "Is 97 a prime number? Show how you decide.",
    "Write a SQL query that returns the five customers with the highest total of orders, from tables customers(id, "
    "name) and orders(id, customer_id, amount).",
    "Continue the story: When Maria opened the old box in the attic, she found a letter that was addressed to her.",
    "Give a recipe for a simple vegetable soup, with quantities for four people.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Why do people get this wrong?",
    "Write the numbers from one to twenty in words.",
    "What are the main causes of the French Revolution? Answer in bullet points.",
    "Classify each review as positive or negative: 1. The food was cold. 2. I will come back soon. 3. Never again. "
    "4. A wonderful evening. 5. We waited for an hour.",
)


def read_verify_prompts(
    path: Path | None, count: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], ...]:
    """Token ids of at most `count` prompts, spread evenly over `path` or the built-in ones.

    path: lines in the layouts that `train` and `bench` read.

    Raises ValueError that names the faulty line, or a file without prompts.
    """
    questions = read_questions(_built_in() if path is None else read_lines(path), tokenizer)
    if not questions:
        raise ValueError(f"--prompts {str(path)!r} holds no prompts. Give a file of at least one.")
    chosen = min(count, len(questions))
    return tuple(questions[index * len(questions) // chosen].first for index in range(chosen))


def _built_in() -> Iterator[Line]:
    for number, prompt in enumerate(PROMPTS, start=1):
        yield Line(f"built-in prompt {number}", {"question": prompt})
