"""Which pages are free: counted, since a prefix shares its pages with all that begin with it."""

from collections.abc import Iterable


class PageStore:
    """The pages 0 to `count` - 1, each free or held so many times."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many free pages, now held once; None, and nothing taken, where they are short."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
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
        self._free += reversed(freed)
        return freed
