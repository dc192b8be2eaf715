"""Prefixes that were read before: their state is copied, their pages are shared.

A prompt that begins as an earlier one did goes on from where that one stood. Snapshots stand at
ends of chunks alone, where reading on gives the bits that reading from the beginning gives; never
where decoding stood, whose products round differently.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from mmx.config import ModelConfig
from mmx.inference.cache import kv_bytes_per_token, state_bytes
from mmx.inference.decoding import PADDED
from mmx.inference.page_store import PageStore
from mmx.inference.pool import Pool, begin_with_state, empty_states, keep_state
from mmx.training.flops import forward_flops_per_token
from sharding import Partition

EVERY = 16_384  # tokens of a long prompt between two snapshots


@dataclass(eq=False)
class Snapshot:
    """A prefix of so many tokens: the slot of its state, and its pages in order."""

    key: bytes
    tokens: int
    slot: int
    pages: list[int]
    parent: bytes | None  # the longest shorter prefix that was kept when it was
    used: int = 0  # when, in lookups


class Snapshots:
    """Finds the longest prefix of a prompt that was kept.

    Args:
      slots: prefixes at most; 0 keeps none.
      pages: of the pool, shared by those who hold them.
      page_size: tokens of a page; kv: bytes of a number in it.
      partition: of the pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        pages: PageStore,
        page_size: int,
        kv: int,
        partition: Partition | None = None,
    ):
        self.states = empty_states(config, slots, partition)
        self._config, self._pages, self._page_size, self._kv = config, pages, page_size, kv
        # Whole pages are shared, and chunks begin at multiples of the largest padded length.
        self.step = math.lcm(page_size, PADDED[-1])
        self._free = list(range(slots))
        self._kept: dict[bytes, Snapshot] = {}
        self._lookups = 0
        self.hits, self.saved_tokens = 0, 0
        self._hashed_prompt: np.ndarray | None = None
        self._hashed: list[tuple[int, bytes]] = []
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, prompt: np.ndarray) -> Snapshot | None:
        """The longest kept prefix that leaves at least one token to read."""
        self._lookups += 1
        lengths = {snapshot.tokens for snapshot in self._kept.values()}
        longest = (prompt.size - 1) // self.step * self.step
        best = None
        for length, key in self._keys(prompt, min(longest, max(lengths, default=0))):
            if length in lengths:
                best = self._kept.get(key, best)
        return best

    def begin(self, pool: Pool, row: int, snapshot: Snapshot) -> Pool:
        """The pool with a row that has read the prefix; its pages are the caller's to share."""
        snapshot.used = self._lookups
        self.hits += 1
        self.saved_tokens += snapshot.tokens
        return begin_with_state(pool, self.states, np.int32(row), np.int32(snapshot.slot))

    def keep(self, pool: Pool, row: int, prompt: np.ndarray, read: int, pages: list[int]) -> None:
        """Keep what a row has read of a prompt, where that is worth it."""
        left = prompt.size - read
        if read % self.step or not (read % EVERY == 0 or left < PADDED[-1]):
            return
        if not self._free and not self._kept:
            return
        keys = dict(self._keys(prompt, read))
        key = keys[read]
        if key in self._kept:
            self._kept[key].used = self._lookups
            return
        if not self._free:
            self.evict()
        shorter = [n for n, k in keys.items() if n < read and k in self._kept]
        parent = keys[max(shorter)] if shorter else None
        held = pages[: read // self._page_size]
        self._pages.share(held)
        snapshot = Snapshot(key, read, self._free.pop(), list(held), parent, self._lookups)
        self.states = keep_state(self.states, pool, np.int32(row), np.int32(snapshot.slot))
        self._kept[key] = snapshot

    def evict(self, spare: Snapshot | None = None) -> bool:
        """Give up the prefix that saves least; False where there is none but the spared one.

        That is the FLOPs it saves for each byte it takes, both beyond the next shorter prefix, over
        the lookups since it was of use.
        """
        candidates = [s for s in self._kept.values() if s is not spare]
        if not candidates:
            return False
        worst = min(candidates, key=self._worth)
        del self._kept[worst.key]
        self._free.append(worst.slot)
        self._pages.give(worst.pages)
        return True

    def clear(self) -> None:
        """Give up all of them."""
        while self.evict():
            pass

    def _worth(self, snapshot: Snapshot) -> float:
        parent = self._kept.get(snapshot.parent) if snapshot.parent else None
        before = parent.tokens if parent else 0
        flops = self._flops(snapshot.tokens) - self._flops(before)
        new = snapshot.tokens - before
        size = state_bytes(self._config) + new * kv_bytes_per_token(self._config, self._kv)
        return flops / max(size, 1) / (1 + self._lookups - snapshot.used)

    def _flops(self, tokens: int) -> float:
        return forward_flops_per_token(self._config, tokens).total * tokens if tokens else 0.0

    def _keys(self, prompt: np.ndarray, until: int) -> list[tuple[int, bytes]]:
        """(length, digest of so many tokens) at every step.

        The first request of those that wait is looked up at every step of the engine: the digests
        of the last prompt are remembered.
        """
        if self._hashed_prompt is not prompt:
            self._hashed_prompt, self._hashed = prompt, []
            self._digest = hashlib.sha256()
        for end in range((len(self._hashed) + 1) * self.step, until + 1, self.step):
            self._digest.update(prompt[end - self.step : end].astype("<i4").tobytes())
            self._hashed.append((end, self._digest.digest()))
        return self._hashed[: until // self.step]
