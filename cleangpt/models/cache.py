"""Keys and values of the tokens that a model has read, so that each new token costs one pass over itself alone.

A block whose attention has a window keeps no more than that many tokens, in a ring. Rows of a batch may have different
lengths: every row has its own positions, and what stands behind its end is never seen and is written over. So a batch
gives each row what the row alone would get.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Mask = Tensor | None


class BlockCache:
    """What one block keeps `(batch, kv_heads, slots, head_dim)`; made at the first tokens, in their dtype and place."""

    def __init__(self, owner: "KVCache", window: int | None) -> None:
        self.owner, self.window = owner, window
        self.slots = owner.slots(window)
        self.keys = self.values = torch.empty(0)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Mask]:
        """All keys and values that the new tokens may see, these among them, and which of them each may see.

        Args:
            key: of the new tokens `(batch, kv_heads, seq, head_dim)`.
            value: likewise.

        Returns:
            Keys and values `(batch, kv_heads, seen, head_dim)`, and the mask as `attend` takes it.
        """
        if not len(self.keys):
            shape = (*key.shape[:2], self.slots, key.shape[3])
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        seen = self.owner.seen[self.window]
        if not self.owner.wraps(self.window):
            keys, values = self._write(key, value)
            return keys, values, seen
        # A ring may lose in the writing what the first of the new tokens still see.
        before = slice(min(self.owner.end - key.shape[2], self.slots))
        keys = torch.cat([self.keys[:, :, before], key], dim=2)
        values = torch.cat([self.values[:, :, before], value], dim=2)
        self._write(key[:, :, -self.slots :], value[:, :, -self.slots :])
        return keys, values, seen

    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the newest tokens into their slots; returns the slots in use."""
        owner, count = self.owner, key.shape[2]
        end = min(owner.end, self.slots)
        first = (owner.end - count) % self.slots
        if owner.even and first + count <= self.slots:
            self.keys[:, :, first : first + count] = key
            self.values[:, :, first : first + count] = value
        else:
            slots = owner.positions[:, -count:].remainder(self.slots)[:, None, :, None].expand_as(key)
            self.keys.scatter_(2, slots, key)
            self.values.scatter_(2, slots, value)
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The caches of all blocks, and where each row of the batch stands.

    Args:
        windows: of each block's attention, in tokens; None: it sees all.
        max_len: tokens that a row may have.
        rollback_tokens: how many tokens can be taken back; a ring keeps that many more.
        keep_ids: whether to keep the ids of all tokens, for `tokens_before`.
    """

    def __init__(
        self, windows: Sequence[int | None], max_len: int, rollback_tokens: int = 0, keep_ids: bool = False
    ) -> None:
        self.max_len, self.rollback_tokens, self.keep_ids = max_len, rollback_tokens, keep_ids
        self.lengths = torch.empty(0, dtype=torch.int64)
        """Tokens that each row has read `(batch,)`."""
        self.end = 0
        """The most of them."""
        self.even = True
        """Whether all rows have as many."""
        self.positions = torch.empty(0, dtype=torch.int64)
        """Of the tokens being read `(batch, seq)`."""
        self.separators: Tensor | None = None
        """How many are before each position `(batch, max_len + 1)`, where attention ends with documents."""
        self.ids = torch.empty(0, dtype=torch.int64)
        """Of the token at each position `(batch, max_len)`, where they are wanted."""
        self.seen: dict[int | None, Mask] = {}
        """What the tokens being read see in a block, by its window: a mask `(batch, 1, seq, seen)`, or none."""
        self.blocks = [BlockCache(self, window) for window in windows]

    def limit(self, tokens: int) -> None:
        """Keeps room for no more than `tokens` in a row; before the first are read."""
        self.max_len = min(self.max_len, tokens)
        for block in self.blocks:
            block.slots = self.slots(block.window)

    def slots(self, window: int | None) -> int:
        """Tokens that a block with this window keeps."""
        return self.max_len if window is None else min(self.max_len, window + self.rollback_tokens)

    def wraps(self, window: int | None) -> bool:
        """Whether several tokens being read do not fit beside all that they see."""
        return self.positions.shape[1] > 1 and self.slots(window) < self.end

    def begin(self, tokens: Tensor, separator: int | None = None) -> Tensor:
        """Makes room for `tokens` `(batch, seq)`, which the model reads now, and says at which positions they stand.

        Args:
            tokens: ids.
            separator: the token that ends a document, where attention ends with it.

        Returns:
            Positions `(batch, seq)`, or `(1, seq)` where all rows have the same.

        Raises:
            ValueError: a row would have more than `max_len` tokens.
        """
        batch, seq = tokens.shape
        if self.end + seq > self.max_len:
            raise ValueError(f"{self.end} tokens and {seq} more; this cache holds at most {self.max_len}")
        if not len(self.lengths):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        start, steps = self.end, torch.arange(seq, device=tokens.device)
        rows = steps[None] + start if self.even else self.lengths[:, None] + steps
        self.positions = rows.expand(batch, seq)
        self.lengths = self.lengths + seq
        self.end = start + seq
        if separator is not None:
            self._note_separators(tokens == separator)
        if self.keep_ids:
            self.ids = self.ids if len(self.ids) else tokens.new_zeros(batch, self.max_len)
            self.ids.scatter_(1, self.positions, tokens)
        self.seen = {window: self._mask(window, start) for window in {block.window for block in self.blocks}}
        return rows

    def tokens_before(self, count: int) -> Tensor:
        """The ids that stand 0, 1, ... `count` - 1 places before each token being read, `(count, batch, seq)`.

        -1 where none does, or where it stands in another document.
        """
        places = self.positions - torch.arange(count, device=self.positions.device)[:, None, None]
        found = torch.stack([self.ids.gather(1, where.clamp(min=0)) for where in places])
        found = torch.where(places >= 0, found, -1)
        if self.separators is None:
            return found
        documents = torch.stack([self.separators.gather(1, where.clamp(min=0)) for where in places])
        return torch.where(documents == documents[0], found, -1)

    def rewind(self, lengths: Tensor | Sequence[int]) -> None:
        """Takes back the last tokens of rows, at most `rollback_tokens` of each, so that so many remain `(batch,)`."""
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        counts = self.lengths.tolist()
        self.end, self.even = max(counts), min(counts) == max(counts)

    def _note_separators(self, ends: Tensor) -> None:
        """Counts the separators before each position; `ends` `(batch, seq)` says which of the new tokens are some."""
        if self.separators is None:
            self.separators = torch.zeros(len(ends), self.max_len + 1, dtype=torch.int64, device=ends.device)
        before = self.separators.gather(1, self.positions[:, :1])
        self.separators.scatter_(1, self.positions + 1, before + ends.cumsum(1))

    def _mask(self, window: int | None, start: int) -> Mask:
        """Which of the keys that `BlockCache.extend` gives each token sees; none: all up to itself."""
        seq, slots = self.positions.shape[1], self.slots(window)
        limited = window is not None and self.end > window and (seq > 1 or slots > window)
        if self.even and self.separators is None and not limited and (seq == 1 or start == 0):
            return None
        if self.wraps(window):
            before = self._in_slots(slots, min(start, slots), self.lengths - seq)
            keys = torch.cat([before, self.positions], dim=1)
        else:
            keys = self._in_slots(slots, min(self.end, slots), self.lengths)
        distance = self.positions[:, :, None] - keys[:, None, :]
        seen = (keys[:, None, :] >= 0) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        if self.separators is not None:
            documents = [self.separators.gather(1, where.clamp(min=0)) for where in (self.positions, keys)]
            seen &= documents[0][:, :, None] == documents[1][:, None, :]
        return seen[:, None]

    def _in_slots(self, slots: int, used: int, lengths: Tensor) -> Tensor:
        """The position `(batch, used)` that each of the `used` first slots holds in rows of `lengths` tokens.

        Below 0, or out of every window: none of this row.
        """
        last = lengths[:, None] - 1
        return last - (last - torch.arange(used, device=lengths.device)).remainder(slots)
