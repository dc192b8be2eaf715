"""Engines of one shape over one small model, what poisons them, and schedules of requests."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
from random_models import random_params, random_tokens, small_config

from mmx.inference.engine import Engine
from mmx.inference.requests import Sampling

CONFIG = small_config("ls", max_seq_len=1024)
PARAMS = random_params(CONFIG, 0)
PAGE = 16


class Poisoned(Engine):
    """What a request leaves behind is NaN: whoever reads it is found out."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        give = self.pages.give

        def poisoning(pages):
            freed = give(pages)
            if freed:
                keys, values = self.pool.key_pages, self.pool.value_pages
                keys, values = spoil(keys, freed), spoil(values, freed)
                self.pool = dataclasses.replace(self.pool, key_pages=keys, value_pages=values)
            return freed

        self.pages.give = poisoning
        evict = self.snapshots.evict

        def evicting(spare=None):
            done = evict(spare)
            free = self.snapshots._free
            self.snapshots.states = spoil(self.snapshots.states, free)
            return done

        self.snapshots.evict = evicting

    def _release(self, request):
        row = request.row
        super()._release(request)
        if row >= 0:
            states = spoil(self.pool.lightning_states, [row])
            self.pool = dataclasses.replace(self.pool, lightning_states=states)


def spoil(array, places):
    """NaN at these places of the second axis."""
    return _spoil(array, np.isin(np.arange(array.shape[1]), places))


@jax.jit
def _spoil(array, which):
    return jnp.where(jnp.expand_dims(which, (0, *range(2, array.ndim))), jnp.nan, array)


def make(kind=Engine, **options):
    """Engines of one shape, so that they share their programs."""
    shape = dict(rows=4, pages=16, max_seq_len=256, page_size=PAGE, decode_steps=8)
    return kind(CONFIG, PARAMS, **{**shape, **options})


def requests(number, seed):
    """Prompts of 1 to 90 tokens; half greedy, half drawn, of various lengths."""
    chance = random.Random(seed)
    made = []
    for index in range(number):
        prompt = random_tokens(CONFIG, (1, chance.randint(1, 90)), index)[0].tolist()
        options = {}
        if index % 2:
            options = dict(temperature=0.9, top_p=0.95, seed=index, repetition_penalty=1.1)
        made.append((prompt, Sampling(max_new_tokens=chance.randint(1, 30), **options)))
    return made


def run_schedule(engine, alone, chance):
    """Arrivals, cancellations and preemptions as chance has it; what each request got."""
    upcoming = chance.sample(range(len(alone)), chance.randint(3, 8))
    numbers, got, cancelled = {}, {}, set()
    while upcoming or not engine.idle:
        if upcoming and chance.random() < 0.5:
            index = upcoming.pop()
            numbers[engine.submit(*alone[index][:2])] = index
            got[index] = []
        if numbers and chance.random() < 0.05:
            number = chance.choice(list(numbers))
            if engine.cancel(number):
                cancelled.add(numbers[number])
        for event in engine.step():
            if event.token is not None:
                got[numbers[event.request]].append(event.token)
    return got, cancelled
