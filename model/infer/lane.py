"""A model with its caches: of the batch, of the prompt that is being read, and of kept blocks.

An engine has a lane for its model, and one for the model that drafts for it if there is one. Both
hold the same tokens in the same rows, so they do the same at every change of the rows.
"""

import jax
import numpy as np

from model import kv_cache, sharding
from model.cache_spec import CacheSpec
from model.infer import adapter_bank, programs
from model.infer.generate import Program
from model.infer.prepare import prepare
from model.transformer import Caches, Transformer

BLOCK = 32  # tokens of a block of a shared beginning


class Lane:
  """The arrays of one model; `rows` are the caches of the batch."""

  def __init__(self, model: Transformer, capacity: int, format: CacheSpec | str):
    self.config, self._dtype = model.config, model.dtype
    self._stored, self._format = -(-capacity // BLOCK) * BLOCK, format
    self._mesh = sharding.mesh_of(model)
    model = prepare(model)
    self._program = Program.of(model)
    self._choices = adapter_bank.places_of_choice(model, self._program.leaves)
    self.rows, self._alone, self._width = self._empty(1), self._empty(1), 1
    self._blocks: Caches | None = None

  def program(self, adapters_B: np.ndarray) -> tuple:
    """The first arguments of `model.infer.programs`: the static structure, and the leaves.

    `adapters_B` are the adapters of the rows, int32; a model without any does not look at them.
    """
    leaves = list(self._program.leaves)
    for i in self._choices:
      leaves[i] = adapters_B
    return self._program.static, tuple(leaves)

  @property
  def row_bytes(self) -> int:
    """Bytes of the keys and values of one row."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self._alone))

  @property
  def by_position(self) -> bool:
    """Whether beginnings of a row can be kept for other requests."""
    alone = self._mesh is None or self._mesh.size == 1
    return alone and all(cache.by_position for cache in self.rows)

  def can_return(self, tokens: int) -> bool:
    """Whether rows can be set back by this number of tokens."""
    return all(cache.by_position or cache.spare >= tokens for cache in self.rows)

  def places_in(self, room: int) -> int:
    """How many blocks fit into this number of bytes."""
    return room * self._stored // (BLOCK * self.row_bytes)

  def keep_blocks(self, places: int) -> None:
    """Allocates places for blocks."""
    self._blocks = kv_cache.init(self.config, places, BLOCK, self._dtype, self._format)

  def read(self, tokens_BT, start: int, length: int, adapter: int):
    """Reads a part of a prompt: the logits after its last token."""
    logits_BV, self._alone = programs.read(*self._part(tokens_BT, start, length, adapter))
    return logits_BV

  def score(self, tokens_BT, start: int, length: int, adapter: int, next_T):
    """As `read`, with the log-probabilities of the tokens that follow."""
    own = self._part(tokens_BT, start, length, adapter)
    logits_BV, self._alone, chosen = programs.score(*own, next_T)
    return logits_BV, chosen

  def _part(self, tokens_BT, start, length, adapter) -> tuple:
    program = self.program(np.asarray([adapter], np.int32))
    return *program, self._alone, tokens_BT, np.int32(start), np.int32(length)

  def admit(self, row: int) -> None:
    """Puts the prompt that was read into a row of the batch."""
    self.rows = programs.admit(self.rows, np.int32(row), self._alone)

  def rearrange(self, order_B: np.ndarray) -> None:
    """Makes these rows the rows of the batch."""
    self.rows, self._width = programs.rearrange(self.rows, order_B), len(order_B)

  def keep(self, places: dict[int, int], row: int | None) -> None:
    """Copies blocks of a row, or of the prompt that was read, to their places."""
    none = jax.tree.leaves(self._blocks)[0].shape[0]
    caches, own = (self._alone, 0) if row is None else (self.rows, row)
    places_P = self._places(places, none)
    self._blocks = programs.keep(self._blocks, caches, np.int32(own), places_P)

  def fetch(self, places: list[int]) -> None:
    """Starts a prompt from the blocks in these places."""
    # What comes after them in the last place's stead is never seen.
    places_P = self._places(dict(enumerate(places)), 0)
    self._alone = programs.fetch(self._blocks, self._alone, places_P)

  def warm_parts(self, lengths: list[int]):
    """Compiles the programs that read parts of these lengths; returns some logits."""
    for length in lengths:
      logits_BV = self.read(np.zeros((1, length), np.int32), 0, 1, 0)
    if self._blocks is not None:
      self.fetch([])
      self.keep({}, None)
    return logits_BV

  def warm_scores(self, lengths: list[int]) -> None:
    """Compiles the programs that score parts of these lengths."""
    for length in lengths:
      self.score(np.zeros((1, length), np.int32), 0, 1, 0, np.zeros(length, np.int32))

  def warm_rows(self) -> None:
    """Compiles the programs that move the rows of a batch of this width."""
    self.admit(0)
    if self._blocks is not None:
      self.keep({}, 0)

  def _empty(self, width: int) -> Caches:
    return kv_cache.init(
      self.config, width, self._stored, self._dtype, self._format, mesh=self._mesh
    )

  def _places(self, by_block: dict[int, int], others: int) -> np.ndarray:
    places_P = np.full(self._stored // BLOCK, others, np.int32)
    places_P[list(by_block)] = list(by_block.values())
    return places_P
