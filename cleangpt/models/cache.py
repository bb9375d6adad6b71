"""Keys and values of the tokens that a model has read, so that each new token costs one pass over itself alone.

A block with windowed attention keeps no more than its window, in a ring. Rows of a batch may have different lengths:
each has its own positions, and slots past its end are masked until new tokens overwrite them. So a row's result does
not depend on the other rows of its batch, and rows can leave a batch and join it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Mask = Tensor | None


class BlockCache:
    """Keys and values of one block `(batch, kv_heads, slots, head_dim)`, in the dtype and on the device of the first.

    The token at position p is in slot p modulo the number of slots.
    """

    def __init__(self, owner: "KVCache", window: int | None) -> None:
        self.owner, self.window = owner, window
        self.slots = owner.slots(window)
        self.keys = self.values = torch.empty(0)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Mask]:
        """Adds new tokens; returns all keys and values that they may attend to, themselves included, and the mask.

        Args:
            key: of the new tokens `(batch, kv_heads, seq, head_dim)`.
            value: of the new tokens, in the same shape.

        Returns:
            Keys and values `(batch, kv_heads, seen, head_dim)`, and the mask as attention takes it.
        """
        if not len(self.keys):
            shape = (*key.shape[:2], self.slots, key.shape[3])
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        mask = self.owner.masks[self.window]
        if not self.owner.wraps(self.window):
            keys, values = self._write(key, value)
            return keys, values, mask
        # Writing into the ring may overwrite what the first of the new tokens still attend to; the last are not kept.
        before = slice(min(self.owner.end - key.shape[2], self.slots))
        keys = torch.cat([self.keys[:, :, before], key], dim=2)
        values = torch.cat([self.values[:, :, before], value], dim=2)
        if not self.owner.final:
            self._write(key[:, :, -self.slots :], value[:, :, -self.slots :])
        return keys, values, mask

    def resize(self, slots: int) -> None:
        """Changes the number of slots, keeping the newest tokens of each row."""
        if len(self.keys) and slots != self.slots:
            positions = self.owner.positions_in_slots(slots, slots, self.owner.lengths)
            source = positions.clamp(min=0).remainder(self.slots)[:, None, :, None]
            source = source.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
            self.keys, self.values = self.keys.gather(2, source), self.values.gather(2, source)
        self.slots = slots

    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the newest tokens into their slots; returns the slots in use."""
        owner, count = self.owner, key.shape[2]
        if owner.even and (first := (owner.end - count) % self.slots) + count <= self.slots:
            self.keys[:, :, first : first + count] = key
            self.values[:, :, first : first + count] = value
        else:
            # Whole vectors by the number of their slot among those of all rows and heads: quicker than a scatter.
            slots = owner.positions[:, None, -count:].remainder(self.slots)
            rows = torch.arange(0, self.keys[..., 0].numel(), self.slots, device=key.device).view(*key.shape[:2], 1)
            for kept, new in ((self.keys, key), (self.values, value)):
                kept.view(-1, key.shape[3]).index_copy_(0, (rows + slots).flatten(), new.reshape(-1, key.shape[3]))
        end = owner.slots_in_use(self.window)
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The caches of all blocks, and how many tokens each row of the batch has.

    Args:
        windows: of each block's attention, in tokens; None: unlimited.
        max_len: the most tokens in a row.
        rollback_tokens: how many tokens can be dropped again; a ring keeps that many more.
        keep_ids: whether to keep the ids of all tokens, for `tokens_before`.
    """

    def __init__(
        self, windows: Sequence[int | None], max_len: int, rollback_tokens: int = 0, keep_ids: bool = False
    ) -> None:
        self.max_len, self.rollback_tokens, self.keep_ids = max_len, rollback_tokens, keep_ids
        self.lengths = torch.empty(0, dtype=torch.int64)
        """Tokens in each row `(batch,)`."""
        self.end = 0
        """The largest of the lengths."""
        self.even = True
        """Whether all rows have the same length."""
        self.positions = torch.empty(0, dtype=torch.int64)
        """Positions of the tokens being read `(batch, seq)`."""
        self.reads_all_slots = False
        """Whether all slots are read, masked, and nothing depends on `end`; see `all_slots`."""
        self.final = False
        """Whether the tokens read next are the last, which are not kept; see `finish`."""
        self.separators: Tensor | None = None
        """Separators before each position `(batch, max_len + 1)`, where attention ends with documents."""
        self.ids = torch.empty(0, dtype=torch.int64)
        """The token at each position `(batch, max_len)`, with `keep_ids`."""
        self.masks: dict[int | None, Mask] = {}
        """What the tokens being read attend to, by the block's window: `(batch, 1, seq, seen)`; None: everything."""
        self.blocks = [BlockCache(self, window) for window in windows]

    def slots(self, window: int | None) -> int:
        """Tokens that a block with this window keeps."""
        return self.max_len if window is None else min(self.max_len, window + self.rollback_tokens)

    def slots_in_use(self, window: int | None) -> int:
        """Slots of a block with this window that are read."""
        slots = self.slots(window)
        return slots if self.reads_all_slots else min(self.end, slots)

    @contextmanager
    def all_slots(self) -> Iterator[None]:
        """Within it, a token of each row is read by the same operations on the same tensors at every length, so that
        they can be recorded once and replayed. The caller adds 1 to `end` for each."""
        even, self.even, self.reads_all_slots = self.even, False, True
        try:
            yield
        finally:
            self.even, self.reads_all_slots = even, False

    def wraps(self, window: int | None) -> bool:
        """Whether several tokens are being read that do not fit into the ring together with all they attend to, or that
        are not kept."""
        return self.final or (self.positions.shape[1] > 1 and self.slots(window) < self.end)

    def begin(self, tokens: Tensor, separator: int | None = None) -> Tensor:
        """Makes room for `tokens` `(batch, seq)`, which the model is about to read, and returns their positions.

        Args:
            tokens: ids.
            separator: the token that ends a document, where attention ends with it.

        Returns:
            Positions `(batch, seq)`, or `(1, seq)` where all rows have the same.

        Raises:
            ValueError: a row would have more than `max_len` tokens.
        """
        batch = len(tokens)
        rows = self._take_slot() if self.reads_all_slots else self._take_slots(tokens)
        self.positions = rows.expand(batch, -1)
        if separator is not None:
            self._count_separators(tokens == separator)
        if self.keep_ids:
            self.ids = self.ids if len(self.ids) else tokens.new_zeros(batch, self.max_len)
            self.ids.scatter_(1, self.positions, tokens)
        self.masks = {window: self._mask(window) for window in {block.window for block in self.blocks}}
        return rows

    def check_room(self, count: int) -> None:
        """Raises ValueError if a row would have more than `max_len` tokens with `count` more."""
        if self.end + count > self.max_len:
            raise ValueError(f"{self.end} tokens and {count} more; this cache holds at most {self.max_len}")

    def _take_slots(self, tokens: Tensor) -> Tensor:
        """The positions of new tokens `(batch, seq)`, which are counted from now on."""
        batch, seq = tokens.shape
        self.check_room(seq)
        if not len(self.lengths):
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        steps = torch.arange(seq, device=tokens.device)
        rows = steps[None] + self.end if self.even else self.lengths[:, None] + steps
        self.lengths = self.lengths + seq
        self.end += seq
        return rows

    def _take_slot(self) -> Tensor:
        """The positions `(batch, 1)` of one new token of each row, counted in place."""
        rows = self.lengths[:, None].clone()
        self.lengths.add_(1)
        return rows

    def tokens_before(self, count: int) -> Tensor:
        """The tokens 0, 1, ... `count` - 1 places before each token being read, `(count, batch, seq)`.

        -1 where there is none, or where it belongs to another document.
        """
        places = self.positions - torch.arange(count, device=self.positions.device)[:, None, None]
        found = torch.stack([self.ids.gather(1, where.clamp(min=0)) for where in places])
        found = torch.where(places >= 0, found, -1)
        if self.separators is None:
            return found
        documents = torch.stack([self.separators.gather(1, where.clamp(min=0)) for where in places])
        return torch.where(documents == documents[0], found, -1)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Drops the last tokens of each row, at most `rollback_tokens`, so that `lengths` tokens remain."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self._measure(lengths)

    def resize(self, max_len: int, rollback_tokens: int) -> None:
        """Changes how many tokens a row can hold, at least as many as there are, and how many can be dropped again."""
        self.max_len, self.rollback_tokens = max_len, rollback_tokens
        for block in self.blocks:
            block.resize(self.slots(block.window))
        self._pad()

    def finish(self, count: int) -> None:
        """Makes room for the last `count` tokens of each row, whose keys and values are not kept."""
        self.final, self.max_len = True, self.max_len + count
        self._pad()

    def _pad(self) -> None:
        """Adapts to another `max_len` what is kept of every position."""
        if self.separators is not None:
            self.separators = F.pad(self.separators, (0, self.max_len + 1 - self.separators.shape[1]))
        if len(self.ids):
            self.ids = F.pad(self.ids, (0, self.max_len - self.ids.shape[1]))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch, in this order; a row named twice is copied."""
        index = torch.tensor(rows, device=self.lengths.device)
        self._update(lambda tensor: _rows(tensor, index))

    def join(self, other: "KVCache") -> None:
        """Appends the rows of another cache of the same model, which must not be used afterwards."""
        max_len, rollback_tokens = (
            max(self.max_len, other.max_len), min(self.rollback_tokens, other.rollback_tokens),
        )  # fmt: skip
        for cache in (self, other):
            cache.resize(max_len, rollback_tokens)
        self._update(lambda *tensors: torch.cat(tensors), other)

    def _update(self, function: Callable[..., Tensor], *others: "KVCache") -> None:
        """Replaces every tensor by a function of it and of those of other caches; the first dimension is the batch."""
        caches = (self, *others)
        self.lengths = function(*(cache.lengths for cache in caches))
        if self.separators is not None:
            self.separators = function(*(cache.separators for cache in caches))
        if len(self.ids):
            self.ids = function(*(cache.ids for cache in caches))
        for block, *rest in zip(*(cache.blocks for cache in caches), strict=True):
            block.keys = function(block.keys, *(one.keys for one in rest))
            block.values = function(block.values, *(one.values for one in rest))
        self._measure(self.lengths.tolist())

    def _measure(self, lengths: Sequence[int]) -> None:
        self.end, self.even = max(lengths), min(lengths) == max(lengths)

    def _count_separators(self, ends: Tensor) -> None:
        """Counts the separators before each position; `ends` `(batch, seq)` says which of the new tokens are one."""
        if self.separators is None:
            self.separators = torch.zeros(len(ends), self.max_len + 1, dtype=torch.int64, device=ends.device)
        before = self.separators.gather(1, self.positions[:, :1])
        self.separators.scatter_(1, self.positions + 1, before + ends.cumsum(1))

    def _mask(self, window: int | None) -> Mask:
        """Which of the keys that `BlockCache.extend` returns each token attends to; None: all up to itself."""
        seq, slots, used = self.positions.shape[1], self.slots(window), self.slots_in_use(window)
        if self.even and self.separators is None and (seq == 1 or seq == self.end):
            limited = window is not None and self.end > window and (seq > 1 or slots > window)
            if not limited:
                return None
        if seq == 1 and window is None and self.separators is None and not self.final:
            return (torch.arange(used, device=self.lengths.device) < self.lengths[:, None])[:, None, None]
        if self.wraps(window):
            before = self.positions_in_slots(slots, min(self.end - seq, slots), self.lengths - seq)
            keys = torch.cat([before, self.positions], dim=1)
        else:
            keys = self.positions_in_slots(slots, used, self.lengths)
        distance = self.positions[:, :, None] - keys[:, None, :]
        mask = (keys[:, None, :] >= 0) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        if self.separators is not None:
            documents = [self.separators.gather(1, where.clamp(min=0)) for where in (self.positions, keys)]
            mask &= documents[0][:, :, None] == documents[1][:, None, :]
        return mask[:, None]

    @staticmethod
    def positions_in_slots(slots: int, used: int, lengths: Tensor) -> Tensor:
        """The position `(batch, used)` that each of the first `used` slots holds in rows of `lengths` tokens.

        Negative, or outside of every window: the slot holds no token of this row.
        """
        last = lengths[:, None] - 1
        return last - (last - torch.arange(used, device=lengths.device)).remainder(slots)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor. An embedding's backward pass adds up the gradients of a row named often in less time."""
    if not tensor.requires_grad:
        return tensor.index_select(0, index)
    return F.embedding(index, tensor.flatten(1)).view(len(index), *tensor.shape[1:])
