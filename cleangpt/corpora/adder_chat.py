"""Addition as conversations: ``What is 17 + 25?`` is answered ``7+5=12, 1+2+1=4, so 42``, digit by digit.

A small model can learn answers that show their work: no step needs more than two digits and a carry.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cleangpt.corpora.arithmetic import Problems
from cleangpt.data.chat_template import (
    ASSISTANT,
    ChatTemplate,
    answer_mask,
    encode_chat,
    plain_template,
    special_tokens,
)
from cleangpt.data.tokenizers import ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class AdderChat(Problems):
    """Addition, one byte per token: a question and its answer in each row, padded. Needs jinja2."""

    questions: ClassVar[tuple[str, ...]] = ("What is {} + {}?", "Add {} and {}.", "How much do {} and {} make?")
    """Wordings of the question; a problem always has the same one."""

    @property
    def row_length(self) -> int:
        """Length in bytes of the longest conversation, counting the end of text as one; a sample has one less."""
        largest = 10**self.digits - 1
        return max(len(self._encoded(largest, largest, number)[0]) for number in range(len(self.questions)))

    def rows(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8], int]:
        """Token ids and loss mask, both `(len(positions), row_length)`, of the problems at `positions`; and the size
        of their text in bytes."""
        left, right = self.operands(positions)
        rows = np.zeros((2, len(positions), self.row_length), np.int64)
        written = 0
        for row, (one, other) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
            encoded = self._encoded(one, other, (one + 2 * other) % len(self.questions))
            rows[:, row, : encoded.shape[1]] = encoded
            written += encoded.shape[1] - 1
        return rows[0], rows[1].astype(np.uint8), written

    def tokenizer(self) -> ByteTokenizer:
        """One token per byte."""
        return ByteTokenizer()

    def chat_template(self) -> ChatTemplate:
        """The plain one: each message below its role."""
        return plain_template(self.tokenizer())

    def answer(self, left: int, right: int) -> str:
        """The assistant's answer."""
        steps, carry = [], 0
        for digit in range(self.digits):
            one, other = (number // 10**digit % 10 for number in (left, right))
            steps.append(f"{one}+{other}{'+1' * carry}={one + other + carry}")
            carry = (one + other + carry) // 10
        return f"{', '.join(steps)}, so {left + right}"

    def _encoded(self, left: int, right: int, question: int) -> NDArray[np.int64]:
        """Tokens and mask `(2, length)` of a problem."""
        asked = self.questions[question].format(left, right)
        messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": self.answer(left, right)}]
        tokenizer = self.tokenizer()
        text, spans = self.chat_template().render_answers(messages, special_tokens(tokenizer))
        ((ids, places),) = encode_chat(tokenizer, [text])
        return np.stack([ids, answer_mask(places, spans)])
