"""Continuous batching: many requests, two compiled programs, no request that sees another.

Each `step` reads one chunk of one prompt and takes some decode steps of all running rows. Requests
come in the order they were submitted, as far as rows and pages last. When pages run out the
youngest row is moved to the host with its state, bit for bit, and comes back before anybody new.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np

from mmx.config import ModelConfig
from mmx.inference.decoding import PADDED, chunk_size, decode, prefill
from mmx.inference.pool import Pool, PoolShape, RowMemory, init_pool, pool_bytes, put_back, take_out
from mmx.inference.requests import (
    FinishReason,
    Result,
    Sampling,
    TokenLogprob,
    check_prompt,
)
from mmx.inference.rows import (
    MAX_STOP_IDS,
    Chosen,
    Rows,
    choose_first,
    deactivate,
    empty_rows,
    new_row,
    set_pages,
    set_row,
)
from mmx.model import Params

State = Literal["waiting", "reading", "running", "away"]


@dataclass(frozen=True)
class Event:
    """One token of one request, or its end.

    Attributes:
      request: its number.
      token: None where the request ended without another one.
      finish_reason: of the last event.
    """

    request: int
    token: int | None
    finish_reason: FinishReason | None = None


@dataclass
class _Request:
    number: int
    prompt: np.ndarray
    sampling: Sampling
    state: State = "waiting"
    row: int = -1
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens whose keys and values are in the pages
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    memory: RowMemory | None = None  # while away
    place: Rows | None = None  # while away: its entries of the batch
    finish_reason: FinishReason | None = None


class Engine:
    """Serves requests of token ids with one model on one device.

    Args:
      config, params: of the model.
      rows: sequences that decode together.
      pages: of `page_size` tokens, for keys and values of all sequences; None is room for one
        sequence of `max_seq_len` tokens or `rows` of 4096, whichever is more.
      max_seq_len: longest sequence, prompt and output; the config's when None.
      page_size: tokens a page.
      chunk: tokens of a prompt that are read at once, a power of two of at least 256.
      decode_steps: steps of a dispatch; more cost less a token and make newcomers wait longer.
      implementation: of the kernels.

    Raises:
      ValueError: numbers that do not fit.
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
        implementation: str | None = None,
    ):
        self.config, self.params, self.implementation = config, params, implementation
        asked = dict(rows=rows, pages=pages, page_size=page_size, decode_steps=decode_steps)
        for name, value in asked.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        longest = min(max_seq_len or config.max_seq_len, config.max_seq_len)
        self.row_pages = -(-longest // page_size)
        if pages is None:
            pages = max(self.row_pages, -(-rows * 4096 // page_size))
        if chunk < PADDED[-1] or chunk & (chunk - 1):
            raise ValueError(f"chunk is {chunk}; it must be a power of two of at least 256")
        self.max_seq_len = min(longest, pages * page_size)
        self.chunk, self.decode_steps = chunk, decode_steps
        dtype = params["embed"]["embedding"].dtype
        shape = PoolShape(rows, pages, page_size, dtype)
        self.pool: Pool = init_pool(config, shape)
        self.pool_bytes = pool_bytes(config, shape)
        self.rows = empty_rows(config, rows, self.row_pages)
        self._free_rows = list(range(rows))
        self._free_pages = list(range(pages))
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._away: deque[_Request] = deque()
        self._at_work: list[_Request] = []  # in the order they were let in

    # ------------------------------------------------------------ requests

    def submit(self, tokens: Sequence[int] | np.ndarray, sampling: Sampling | None = None) -> int:
        """Queue a request; its number.

        Raises:
          ValueError: an empty prompt, ids out of range, options out of range, or more tokens than
            there can be room for, with the number there is.
        """
        sampling = sampling or Sampling()
        sampling.check(self.config)
        if len(sampling.end_ids(self.config)) > MAX_STOP_IDS:
            raise ValueError(f"stop_ids: at most {MAX_STOP_IDS}, the end token included")
        prompt = check_prompt(tokens, self.config)
        total = prompt.size + sampling.max_new_tokens
        if total > self.max_seq_len:
            raise ValueError(
                f"a prompt of {prompt.size} tokens and max_new_tokens={sampling.max_new_tokens} "
                f"are {total} tokens; there is room for {self.max_seq_len} together"
            )
        request = _Request(next(self._numbers), prompt, sampling)
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> list[Event]:
        """End a request now and free what it holds; nothing where it has ended already."""
        for request in [*self._at_work, *self._waiting, *self._away]:
            if request.number == number:
                for queue in (self._waiting, self._away):
                    if request in queue:
                        queue.remove(request)
                return self._end(request, "cancelled")
        return []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._at_work or self._waiting or self._away)

    def step(self) -> list[Event]:
        """Let in whom there is room for, read a chunk of a prompt, decode; what came of it."""
        self._let_in()
        events: list[Event] = []
        reading = next((r for r in self._at_work if r.state == "reading"), None)
        if reading is not None:
            events += self._read(reading)
        if any(r.state == "running" for r in self._at_work):
            self._make_room()
            self.pool, self.rows, chosen = decode(
                self.params,
                self.pool,
                self.rows,
                config=self.config,
                steps=self.decode_steps,
                implementation=self.implementation,
            )
            events += self._deliver(jax.device_get(chosen))
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
          ValueError: as `submit`.
        """
        if sampling is not None and options:
            raise ValueError("give either a Sampling or its fields, not both")
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        for index, event in self.stream(prompts, sampling or Sampling(**options)):
            if event.token is not None:
                tokens[index].append(event.token)
            reasons[index] = event.finish_reason or reasons[index]
        return [
            Result(tuple(ids), None, reason, None)
            for ids, reason in zip(tokens, reasons, strict=True)
        ]

    # ------------------------------------------------------------ rows and pages

    def _let_in(self) -> None:
        """Those who were sent away first, then newcomers, as long as there is room."""
        while self._free_rows and (self._away or self._waiting):
            queue = self._away or self._waiting
            request = queue[0]
            # Room for what is known, and a page to grow: or it would be sent away at once.
            known = request.length if queue is self._away else request.prompt.size
            if not self._take_pages(request, known + self.decode_steps):
                return
            queue.popleft()
            request.row = self._free_rows.pop(0)
            self._at_work.append(request)
            if request.memory is None:
                request.state = "reading"
            else:
                self._bring_back(request)

    def _take_pages(self, request: _Request, tokens: int) -> bool:
        """Give a request the pages for so many tokens; False, and nothing, where they are short."""
        wanted = min(-(-tokens // self.pool.page_size), self.row_pages) - len(request.pages)
        if wanted > len(self._free_pages):
            return False
        for _ in range(wanted):
            request.pages.append(self._free_pages.pop())
        return True

    def _make_room(self) -> None:
        """Pages for the next steps of every running row; the youngest make way."""
        for request in list(self._at_work):
            if request.state != "running":
                continue
            had = len(request.pages)
            last = request.prompt.size + request.sampling.max_new_tokens
            while not self._take_pages(request, min(request.length + self.decode_steps, last)):
                youngest = self._at_work[-1]
                self._send_away(youngest)
                if youngest is request:
                    break
            if request.state == "running" and len(request.pages) > had:
                self.rows = set_pages(self.rows, request.row, self._page_row(request))

    def _page_row(self, request: _Request) -> np.ndarray:
        row = np.zeros(self.row_pages, np.int32)
        row[: len(request.pages)] = request.pages
        return row

    def _send_away(self, request: _Request) -> None:
        """Copy a row's memory to the host and give up row and pages."""
        if request.state == "reading":
            # Nothing was chosen yet: it begins anew.
            self._release(request)
            request.state, request.length = "waiting", 0
            self._waiting.appendleft(request)
            return
        request.memory = take_out(self.pool, request.row, request.pages)
        request.place = jax.device_get(jax.tree.map(lambda x: x[request.row], self.rows))
        self._release(request)
        request.state = "away"
        self._away.append(request)

    def _bring_back(self, request: _Request) -> None:
        assert request.memory is not None
        assert request.place is not None
        held = request.memory.keys.shape[1]
        # As many pages as a row can have, so that this is one program: the rest go nowhere.
        pages = np.full(self.row_pages, self.pool.num_pages, np.int32)
        pages[:held] = request.pages[:held]
        grown = ((0, 0), (0, self.row_pages - held), (0, 0), (0, 0), (0, 0))
        memory = RowMemory(
            request.memory.lightning_state,
            np.pad(request.memory.keys, grown),  # pyright: ignore[reportArgumentType]
            np.pad(request.memory.values, grown),  # pyright: ignore[reportArgumentType]
        )
        self.pool = put_back(self.pool, memory, np.int32(request.row), pages)
        self.rows = set_row(self.rows, request.row, request.place)
        self.rows = set_pages(self.rows, request.row, self._page_row(request))
        request.memory = request.place = None
        request.state = "running"

    def _release(self, request: _Request) -> None:
        """Give up row and pages; whatever they hold reaches nobody."""
        if request.row >= 0:
            self.rows = deactivate(self.rows, request.row)
            self._free_rows.append(request.row)
            self._free_rows.sort()
            self._at_work.remove(request)
        self._free_pages += reversed(request.pages)
        request.row, request.pages = -1, []

    def _end(self, request: _Request, reason: FinishReason) -> list[Event]:
        self._release(request)
        request.finish_reason = reason
        return [Event(request.number, None, reason)]

    # ------------------------------------------------------------ the programs

    def _read(self, request: _Request) -> list[Event]:
        """The next chunk of a prompt; after the last one, its first token."""
        left = request.prompt.size - request.length
        size = chunk_size(left, self.chunk)
        count = min(size, left)
        tokens = np.zeros(size, np.int32)
        tokens[:count] = request.prompt[request.length : request.length + count]
        self.pool, logits = prefill(
            self.params,
            self.pool,
            tokens,
            np.int32(count),
            np.int32(request.row),
            self._page_row(request),
            np.int32(request.length),
            config=self.config,
            implementation=self.implementation,
        )
        request.length += count
        if request.length < request.prompt.size:
            return []
        request.state = "running"
        row = new_row(request.prompt, request.sampling, self.config, self.row_pages)
        row, chosen = choose_first(row, logits)
        self.rows = set_row(self.rows, request.row, row)
        self.rows = set_pages(self.rows, request.row, self._page_row(request))
        chosen = jax.device_get(chosen)
        return self._deliver_token(
            request, int(chosen.tokens[0]), float(chosen.logprobs[0]), bool(chosen.running[0])
        )

    def _deliver(self, chosen: Chosen) -> list[Event]:
        events: list[Event] = []
        running = [r for r in self._at_work if r.state == "running"]
        for step in range(chosen.tokens.shape[0]):
            for request in running:
                if request.row < 0 or not chosen.valid[step, request.row]:
                    continue
                request.length += 1
                events += self._deliver_token(
                    request,
                    int(chosen.tokens[step, request.row]),
                    float(chosen.logprobs[step, request.row]),
                    bool(chosen.running[step, request.row]),
                )
        return events

    def _deliver_token(
        self, request: _Request, token: int, logprob: float, running: bool
    ) -> list[Event]:
        request.tokens.append(token)
        request.logprobs.append(TokenLogprob(token, logprob))
        if running:
            return [Event(request.number, token)]
        reason: FinishReason = (
            "stop" if token in request.sampling.end_ids(self.config) else "length"
        )
        self._end(request, reason)
        return [Event(request.number, token, reason)]
