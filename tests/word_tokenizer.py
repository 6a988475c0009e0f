"""A tokenizer of a dozen words with a chat template, so that tests can read prompts."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} \n {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = ["user", "assistant", ":", "one", "two", "three", "four", "five", "six", "solve", "a", "b"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)


def words_of(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(token_ids)))
