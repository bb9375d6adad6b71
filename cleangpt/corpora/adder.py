"""Addition of two n-digit numbers: ``123+456=9750`` is 123 + 456 = 0579, the result in reverse."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cleangpt.corpora.arithmetic import Arithmetic


@dataclass(frozen=True, kw_only=True)
class Adder(Arithmetic):
    """Addition; the sum has n + 1 digits."""

    sign: ClassVar[str] = "+"

    @property
    def result_digits(self) -> int:
        """Digits of every sum, padded."""
        return self.digits + 1

    def solve(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sums."""
        return left + right
