"""Which pages are free: counted, since a prefix shares its pages with all that begin with it.

Where devices share the pages (`sharding.paged`), page n of a row is of the device n mod D.
"""

from collections.abc import Iterable


class PageStore:
    """The pages 0 to `count` - 1, each free or held so many times.

    Args:
      count: a multiple of `devices`, of which each has as many, in order.
    """

    def __init__(self, count: int, devices: int = 1):
        assert count % devices == 0
        self.count, self._share = count, count // devices
        self._free = [
            list(range((d + 1) * self._share - 1, d * self._share - 1, -1)) for d in range(devices)
        ]
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return sum(map(len, self._free))

    def take(self, count: int, first: int = 0) -> list[int] | None:
        """Free pages, now held once, for the pages `first` and on of a row; None where short."""
        devices = len(self._free)
        wanted = [(first + i) % devices for i in range(count)]
        if any(wanted.count(d) > len(free) for d, free in enumerate(self._free)):
            return None
        pages = [self._free[d].pop() for d in wanted]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more that are held."""
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] += 1

    def give(self, pages: Iterable[int]) -> list[int]:
        """Hold pages once less; those that are free now."""
        freed = []
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page] == 0:
                freed.append(page)
        for page in reversed(freed):
            self._free[page // self._share].append(page)
        return freed
