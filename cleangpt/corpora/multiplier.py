"""Multiplication of two n-digit numbers: ``12x34=8040`` is 12 x 34 = 0408, the result in reverse."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cleangpt.corpora.arithmetic import Arithmetic


@dataclass(frozen=True, kw_only=True)
class Multiplier(Arithmetic):
    """Multiplication; the product has 2n digits."""

    sign: ClassVar[str] = "x"

    @property
    def result_digits(self) -> int:
        """Digits of every product, padded."""
        return 2 * self.digits

    def solve(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """The products; 12 digits fit into 64 bits."""
        return left * right
