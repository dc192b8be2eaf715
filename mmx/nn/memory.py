"""What the layers of one forward pass remember: carried through the scan, read and written by each.

Two kinds with one interface. `Slots` is the memory of a batch whose rows write the same slots
(`mmx.Cache`); `Pages` that of an engine, whose rows keep their keys and values in pages of a pool.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmx.config import LayerKind
from mmx.nn.sequence import Sequence
from sharding import Partition, paged
from sharding.attention import softmax_attention


class Memory(Protocol):
    """Of all layers of a model."""

    def read(self, kind: LayerKind, place: Int[Array, ""]) -> Any:
        """What layer number `place` of this kind sees: its `State`, or its `KeyValues`."""
        ...

    def write(self, kind: LayerKind, place: Int[Array, ""], new: Any) -> Self:
        """The memory with what that layer has made of it."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of one lightning layer, among those of all so that it can be updated in place."""

    states: Float[Array, "Ll B H K V"]
    layer: Int[Array, ""]

    def value(self) -> Float[Array, "B H K V"]:
        return jax.lax.dynamic_index_in_dim(self.states, self.layer, keepdims=False)

    def replaced(self, new: Float[Array, "B H K V"]) -> "State":
        states = jax.lax.dynamic_update_index_in_dim(self.states, new, self.layer, 0)
        return State(states, self.layer)


class KeyValues(Protocol):
    """Of one softmax layer."""

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        sequence: Sequence,
        *,
        implementation: str | None,
        partition: Partition | None = None,
    ) -> tuple[Float[Array, "B T H K"], Self]:
        """Remember new keys and values, and attend to all that the queries may see."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The arrays of a `Cache` that layers write.

    Attributes:
      lightning_states: of the lightning layers in order.
      keys, values: of the softmax layers in order.
      slot_samples: which sample of its row the token in each slot is of, the new ones included.
      first_slot: where the new tokens go.
    """

    lightning_states: Float[Array, "Ll B H K V"]
    keys: Float[Array, "Ls B S G K"]
    values: Float[Array, "Ls B S G K"]
    slot_samples: Int[Array, "B S"]
    first_slot: Int[Array, ""]

    def read(self, kind: LayerKind, place: Int[Array, ""]) -> Any:
        if kind == "lightning":
            return State(self.lightning_states, place)
        return _LayerSlots(self, place)

    def write(self, kind: LayerKind, place: Int[Array, ""], new: Any) -> "Slots":
        if kind == "lightning":
            return Slots(**{**vars(self), "lightning_states": new.states})
        return new.memory


@dataclass(frozen=True)
class _LayerSlots:
    """The keys and values of one layer, among those of all so that XLA can update them in place."""

    memory: Slots
    layer: Int[Array, ""]

    def attend(
        self,
        q,
        k,
        v,
        sequence: Sequence,
        *,
        implementation: str | None,
        partition: Partition | None = None,
    ):
        memory = self.memory
        at = (self.layer, 0, memory.first_slot, 0, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(old, paged.as_held(new, old.dtype)[None], at)
            for old, new in ((memory.keys, k), (memory.values, v))
        )
        ours = (
            jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False).astype(q.dtype)
            for x in (keys, values)
        )
        out = softmax_attention(
            q,
            *ours,
            segment_ids=sequence.segment_ids,
            kv_segment_ids=memory.slot_samples,
            q_offset=memory.first_slot,
            implementation=implementation,
            partition=partition,
        )
        memory = Slots(**{**vars(memory), "keys": keys, "values": values})
        return out, _LayerSlots(memory, self.layer)


jax.tree_util.register_dataclass(_LayerSlots, ["memory", "layer"], [])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """The rows of a pool that one pass works on.

    Attributes:
      lightning_states: of the lightning layers in order.
      key_pages, value_pages: of all softmax layers and rows; P pages of S tokens a layer.
      page_table: which page holds the tokens n S .. n S + S - 1 of each row; what lies past a row's
        length is any number.
    """

    lightning_states: Float[Array, "Ll B H K V"]
    key_pages: Float[Array, "Ls P S G K"]
    value_pages: Float[Array, "Ls P S G K"]
    page_table: Int[Array, "B N"]

    def read(self, kind: LayerKind, place: Int[Array, ""]) -> Any:
        if kind == "lightning":
            return State(self.lightning_states, place)
        return _LayerPages(self, place)

    def write(self, kind: LayerKind, place: Int[Array, ""], new: Any) -> "Pages":
        if kind == "lightning":
            return Pages(**{**vars(self), "lightning_states": new.states})
        return new.memory


@dataclass(frozen=True)
class _LayerPages:
    """The keys and values of one layer, as pages among those of all."""

    memory: Pages
    layer: Int[Array, ""]

    def attend(
        self,
        q,
        k,
        v,
        sequence: Sequence,
        *,
        implementation: str | None,
        partition: Partition | None = None,
    ):
        memory = self.memory
        out, keys, values = paged.write_and_attend(
            q,
            k,
            v,
            memory.key_pages,
            memory.value_pages,
            memory.page_table,
            jnp.where(sequence.real, sequence.positions, -1),
            self.layer,
            implementation=implementation,
            partition=partition,
        )
        memory = Pages(**{**vars(memory), "key_pages": keys, "value_pages": values})
        return out, _LayerPages(memory, self.layer)


jax.tree_util.register_dataclass(_LayerPages, ["memory", "layer"], [])
