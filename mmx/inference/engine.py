"""Continuous batching: many requests, two compiled programs, no request that sees another.

Each `step` sends off a chunk of a prompt, or those of several short ones, and some decode steps of
all running rows, and then looks at what the step before has given, so that the device need not wait
for the host. Requests come in the order they were submitted, as far as rows and pages last. Short
of pages, kept prefixes go first; then the youngest row is moved to the host with its state, bit for
bit, and comes back before anybody new.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from mmx.config import ModelConfig
from mmx.inference.decoding import PADDED, chunk_size, decode, place, prefill
from mmx.inference.live import Live
from mmx.inference.page_store import PageStore
from mmx.inference.pool import Pool, init_pool, put_back, take_out
from mmx.inference.requests import Event, FinishReason, Result, Sampling, check_prompt, result_of
from mmx.inference.rows import (
    MAX_STOP_IDS,
    Chosen,
    begin_row,
    deactivate,
    empty_rows,
    get_row,
    new_row,
    set_pages,
    set_row,
)
from mmx.inference.sizes import sizes_of
from mmx.inference.snapshots import Snapshots
from mmx.inference.text import TextStream
from mmx.model import Params
from sharding import Partition


class Engine:
    """Serves requests of token ids with one model.

    Args:
      config, params: of the model.
      rows: sequences that decode together.
      pages: of `page_size` tokens, for keys and values of all sequences; None is room for one
        sequence of `max_seq_len` tokens or `rows` of 4096, whichever is more.
      max_seq_len: longest sequence, prompt and output; the config's when None.
      page_size: tokens a page.
      chunk: tokens of prompts that a step reads at most, a power of two of at least 256.
      decode_steps: steps of a dispatch; more cost less a token and make newcomers wait longer.
      kv_dtype: of keys and values; that of the embedding when None. bf16 or float8_e4m3fn take less
        memory; in fp8 a key or value is off by at most 1/16 of itself.
      snapshots: prefixes of prompts that are kept for later ones; see `Snapshots`.
      tokenizer: turns tokens into text; without one there is neither text nor stop strings.
      implementation: of the kernels.
      partition: spreads parameters, heads and pages over devices (`sharding.rules.SERVING`).

    Raises:
      ValueError: numbers that do not fit, or sizes that the devices cannot share evenly.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        rows: int = 8,
        pages: int | None = None,
        max_seq_len: int | None = None,
        page_size: int = 256,
        chunk: int = 2048,
        decode_steps: int = 4,
        kv_dtype: jnp.dtype | None = None,
        snapshots: int = 8,
        tokenizer: Tokenizer | None = None,
        implementation: str | None = None,
        partition: Partition | None = None,
    ):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        sizes = sizes_of(
            config, params["embed"]["embedding"].dtype, rows=rows, pages=pages,
            max_seq_len=max_seq_len, page_size=page_size, chunk=chunk, decode_steps=decode_steps,
            kv_dtype=kv_dtype, snapshots=snapshots, partition=partition,
        )  # fmt: skip
        self.sizes, self.row_pages, self.max_seq_len = sizes, sizes.row_pages, sizes.max_seq_len
        self.chunk, self.decode_steps = chunk, decode_steps
        self._how = dict(config=config, implementation=implementation, partition=partition)
        if partition is not None:
            self.params = place(params, config, partition)
        self.partition = partition
        self._numbers = itertools.count()
        self._begin()

    def _begin(self) -> None:
        """Memory that holds nothing, and no requests."""
        sizes, partition = self.sizes, self.partition
        self.pool: Pool = init_pool(self.config, sizes.pool, partition)
        self.rows = empty_rows(self.config, sizes.rows, sizes.row_pages)
        if partition is not None:
            self.rows = jax.device_put(self.rows, NamedSharding(partition.mesh, PartitionSpec()))
        self.pages = PageStore(sizes.pages, sizes.page_devices)
        self.snapshots = Snapshots(
            self.config, sizes.snapshots, self.pages, sizes.page_size, sizes.kv_dtype.itemsize,
            partition,
        )  # fmt: skip
        self._free_rows = list(range(sizes.rows))
        self._waiting: deque[Live] = deque()
        self._away: deque[Live] = deque()
        self._at_work: list[Live] = []  # in the order they were let in
        # What was sent off and not looked at: whose column each is, and the result to be.
        self._under_way: deque[tuple[list[tuple[Live, int]], Chosen]] = deque()
        self._events: list[Event] = []

    # ------------------------------------------------------------ requests

    def submit(self, tokens: Sequence[int] | np.ndarray, sampling: Sampling | None = None) -> int:
        """Queue a request; its number.

        Raises:
          ValueError: an empty prompt, ids out of range, options out of range, stop strings without
            a tokenizer, or more tokens than there can be room for, with the number there is.
        """
        sampling = sampling or Sampling()
        sampling.check(self.config)
        ends = sampling.end_ids(self.config)
        if len(ends) > MAX_STOP_IDS:
            raise ValueError(f"stop_ids: at most {MAX_STOP_IDS}, the end token included")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: strings need an Engine with a tokenizer; give stop_ids")
        prompt = check_prompt(tokens, self.config)
        total = prompt.size + sampling.max_new_tokens
        if total > self.max_seq_len:
            raise ValueError(
                f"a prompt of {prompt.size} tokens and max_new_tokens={sampling.max_new_tokens} "
                f"are {total} tokens; there is room for {self.max_seq_len} together"
            )
        text = None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop)
        request = Live(next(self._numbers), prompt, sampling, frozenset(ends), text)
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> list[Event]:
        """End a request now and free what it holds; nothing where it has ended already."""
        for request in [*self._at_work, *self._waiting, *self._away]:
            if request.number == number:
                self._end(request, "cancelled")
                return [Event(number, None, finish_reason="cancelled")]
        return []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._at_work or self._waiting or self._away or self._events)

    @property
    def load(self) -> tuple[int, int]:
        """Requests at work, and requests that wait for room."""
        return len(self._at_work), len(self._waiting) + len(self._away)

    def step(self) -> list[Event]:
        """Let in whom there is room for, send off a chunk and decode steps; what came of before.

        Where it raises, all requests have ended: the programs take the memory they are given, and
        what had become of it nobody knows. The engine begins anew, and serves whoever comes next.
        """
        try:
            return self._step()
        except BaseException:
            del self.pool, self.rows, self.snapshots  # room for the new ones
            self._begin()
            raise

    def _step(self) -> list[Event]:
        self._let_in()
        left = self.chunk
        for request in self._at_work:
            while left > 0 and request.state == "reading":
                size = chunk_size(request.prompt.size - request.read, self.chunk)
                if size <= left:  # else it waits, and those behind it
                    self._read(request, size)
                left -= max(size, PADDED[-1])  # the weights are read for a short one as well
        # The device works on what was just sent off while the host looks at the rest.
        self._look(leave=1 if self._decode() else 0)
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------ whole answers

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> Iterator[tuple[int, Event]]:
        """Submit prompts and yield (index of the prompt, event) as tokens come."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} samplings; give one for each")
        numbers: dict[int, int] = {}
        try:
            for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                numbers[self.submit(prompt, one)] = index
            left = len(numbers)
            while left:
                for event in self.step():
                    if event.request in numbers:
                        left -= event.finish_reason is not None
                        yield numbers[event.request], event
        finally:
            for number in numbers:
                self.cancel(number)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        **options,
    ) -> list[Result]:
        """Continue each prompt.

        Args:
          prompts: lists of token ids.
          sampling: for all, or one for each; or the fields of `Sampling` as keywords.

        Raises:
          ValueError: as `submit`; or the tokenizer fails on a token.
        """
        if sampling is not None and options:
            raise ValueError("give either a Sampling or its fields, not both")
        got: list[list[Event]] = [[] for _ in prompts]
        for index, event in self.stream(prompts, sampling or Sampling(**options)):
            if event.error:
                raise ValueError(event.error)
            got[index].append(event)
        return [result_of(events, text=self.tokenizer is not None) for events in got]

    # ------------------------------------------------------------ rows and pages

    def _let_in(self) -> None:
        """Those who were sent away first, then newcomers, as long as there is room."""
        while self._free_rows and (self._away or self._waiting):
            queue = self._away or self._waiting
            request = queue[0]
            prefix = None
            if queue is self._waiting:
                prefix = self.snapshots.find(request.prompt)
                if prefix is not None:
                    self.pages.share(prefix.pages)
                    request.pages = list(prefix.pages)
            # Room for what is known and to grow: or it would be sent away at once. No more than it
            # can come to: there may be no more at all, and it would wait for ever.
            known = request.reach if queue is self._away else request.prompt.size
            wanted = min(known + self.decode_steps, request.longest)
            while not self._take_pages(request, wanted):
                if not self.snapshots.evict(spare=prefix):
                    self.pages.give(request.pages)
                    request.pages = []
                    return
            queue.popleft()
            request.row = self._free_rows.pop(0)
            self._at_work.append(request)
            if request.memory is not None:
                self._bring_back(request)
                continue
            request.state, request.read = "reading", 0
            if prefix is not None:
                self.pool = self.snapshots.begin(self.pool, request.row, prefix)
                request.read = prefix.tokens

    def _take_pages(self, request: Live, tokens: int) -> bool:
        """Give a request the pages for so many tokens; False, and nothing, where they are short."""
        wanted = min(-(-tokens // self.pool.page_size), self.row_pages) - len(request.pages)
        taken = self.pages.take(max(wanted, 0), len(request.pages))
        request.pages += taken or []
        return taken is not None

    def _make_room(self) -> None:
        """Pages for the next steps of every row that decodes; prefixes and the youngest make way.

        Before anybody is sent away all results are looked at: they may end requests.
        """
        for request in list(self._at_work):
            if not request.decodes:
                continue
            had = len(request.pages)
            while request.decodes and not self._take_pages(
                request, min(request.reach + self.decode_steps, request.longest)
            ):
                if self.snapshots.evict():
                    continue
                if self._under_way:
                    self._look(leave=0)
                    continue
                self._send_away(self._at_work[-1])
            if request.decodes and len(request.pages) > had:
                page_row = request.page_row(self.row_pages)
                self.rows = set_pages(self.rows, request.row, page_row)

    def _send_away(self, request: Live) -> None:
        """Copy a row's memory to the host and give up row and pages."""
        if request.state == "reading":
            # Nothing was chosen yet: it begins anew.
            self._release(request)
            request.state = "waiting"
            self._waiting.appendleft(request)
            return
        request.memory = take_out(self.pool, request.row, request.pages)
        request.place = jax.device_get(get_row(self.rows, request.row))
        self._release(request)
        request.state = "away"
        self._away.append(request)

    def _bring_back(self, request: Live) -> None:
        assert request.memory is not None
        assert request.place is not None
        held = request.pages[: request.memory.keys.shape[1]]
        self.pool = put_back(self.pool, request.memory, request.row, held)
        place = dataclasses.replace(request.place, page_table=request.page_row(self.row_pages))
        self.rows = set_row(self.rows, request.row, place)
        request.memory = request.place = None
        request.state = "running"

    def _release(self, request: Live) -> None:
        """Give up row and pages; whatever they hold reaches nobody."""
        if request.row >= 0:
            self.rows = deactivate(self.rows, request.row)
            self._free_rows.append(request.row)
            self._free_rows.sort()
            self._at_work.remove(request)
        self.pages.give(request.pages)
        request.row, request.pages = -1, []

    def _end(self, request: Live, reason: FinishReason) -> None:
        for queue in (self._waiting, self._away):
            if request in queue:
                queue.remove(request)
        self._release(request)
        request.reason = reason

    # ------------------------------------------------------------ the programs

    def _read(self, request: Live, size: int) -> None:
        """Send off the next chunk of a prompt; with the last one, the choice of a first token."""
        count = min(size, request.prompt.size - request.read)
        tokens = np.zeros(size, np.int32)
        tokens[:count] = request.prompt[request.read : request.read + count]
        self.pool, logits = prefill(
            self.params, self.pool, tokens, np.int32(count), np.int32(request.row),
            request.page_row(self.row_pages), np.int32(request.read), **self._how,
        )  # fmt: skip
        request.read += count
        self.snapshots.keep(self.pool, request.row, request.prompt, request.read, request.pages)
        if request.read < request.prompt.size:
            return
        page_row = request.page_row(self.row_pages)
        row = new_row(request.prompt, request.sampling, self.config, page_row)
        self.rows, chosen = begin_row(self.rows, request.row, row, logits)
        request.state, request.issued = "running", 1
        self._under_way.append(([(request, 0)], chosen))

    def _decode(self) -> bool:
        """Send off the next steps of all rows that decode; False where there are none."""
        if any(request.decodes for request in self._at_work):
            self._make_room()
        ours = [request for request in self._at_work if request.decodes]
        if not ours:
            return False
        self.pool, self.rows, chosen = decode(
            self.params, self.pool, self.rows, steps=self.decode_steps, **self._how
        )
        for request in ours:
            most = request.sampling.max_new_tokens
            request.issued = min(request.issued + self.decode_steps, most)
        self._under_way.append(([(request, request.row) for request in ours], chosen))
        return True

    def _look(self, *, leave: int) -> None:
        """Wait for results, the oldest first, and make events of them; leave the last so many."""
        while len(self._under_way) > leave:
            places, chosen = self._under_way.popleft()
            chosen = jax.device_get(chosen)
            for step in range(chosen.tokens.shape[0]):
                for request, column in places:
                    # One that has ended meanwhile gets no more.
                    if request.reason is not None or not chosen.valid[step, column]:
                        continue
                    event = request.event(chosen, step, column)
                    self._events.append(event)
                    if event.finish_reason is not None:
                        self._end(request, event.finish_reason)
