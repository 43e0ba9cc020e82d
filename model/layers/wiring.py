"""How the linear layers of a block are connected, as values that compression reads.

An `Edge` has the linear layers that share one input, the producer of that input, and what happens
to the producer's output before they read it. The block of a Llama has four:

  producer          through    consumers
  attention_norm    Normed     attention.query, attention.key, attention.value
  attention.value   Attended   attention.output
  ffn_norm          Normed     ffn.gate, ffn.up
  ffn.up            Gated      ffn.down

The configs of the sub-layers say so, and no other code. Calibration measures the consumers of an
edge together, folding moves scales along edges, rotation and slicing follow the residual stream
from writer to reader, and AWQ takes the layers whose outputs meet in a softmax from `Attended`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Normed:
  """The producer is a norm of the residual stream, and the consumers read its output."""


@dataclasses.dataclass(frozen=True)
class Streamed:
  """The consumers read the residual stream without a norm, so there is no single producer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed:
  """The consumers read the producer's channels as they are, within a sub-layer.

  `normed`: the producer is a norm; otherwise it is a linear layer.
  """

  normed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
  """Tokens are mixed, head by head; channels are not.

  The inputs of the consumers are the producer's channels in runs of `head_width`, each run repeated
  `copies` times, once per query head of a key/value head. `scores` are the linear layers whose
  outputs are multiplied with each other, and in attention go through a softmax.

  gated: each channel is multiplied by a gate of its own afterwards, so that a rotation of a head
    cannot be moved to the consumers.
  """

  head_width: int
  copies: int
  scores: tuple[str, ...]
  gated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """As `Attended`, but several layers attend to the same values, so that no one layer scales them.

  `scores` are the linear layers of this block whose outputs are multiplied.
  """

  scores: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadNormed:
  """The producer is a norm of each head, whose scale all heads share; a gate multiplies its output.

  The inputs of the consumers are the producer's `head_width` channels `copies` times, once for each
  head. `scores` as in `Attended`.
  """

  head_width: int
  copies: int
  scores: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated:
  """Each channel is multiplied by the activation of the same channel of the layer `gate`.

  `linear`: nothing else happens to the channel, such as a limit or an offset.
  """

  gate: str
  linear: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activated:
  """A function is applied to each channel."""

  function: str


Through = Normed | Streamed | Attended | Shared | HeadNormed | Passed | Gated | Activated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
  """The linear layers that read one input, and the norm or linear layer that it comes from.

  All names are paths within the block. The residual stream and shared values have no producer.
  """

  producer: str | None
  through: Through
  consumers: tuple[str, ...]

  @property
  def obstacle(self) -> str | None:
    """Why a positive scale cannot move from the producer's channels to the consumers, or None.

    relu(x / s) = relu(x) / s, and no other activation commutes with scales.
    """
    if isinstance(self.through, Streamed):
      return 'no norm comes before it'
    if isinstance(self.through, Shared):
      return 'several layers read the same values'
    if isinstance(self.through, Activated) and self.through.function != 'relu':
      return f'{self.through.function} does not commute with scales'
    if isinstance(self.through, Gated) and not self.through.linear:
      return 'a limit or an offset before the product does not commute with scales'
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
  """A linear layer whose output is added to the residual stream, after a norm if it has one."""

  layer: str
  norm: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wiring:
  """All edges of a block in running order, and what is written to the residual stream.

  Every linear layer is a consumer of exactly one edge.
  """

  edges: tuple[Edge, ...]
  writes: tuple[Write, ...]

  @property
  def stages(self) -> tuple[tuple[str, ...], ...]:
    """The linear layers in running order; those of a stage share their input."""
    return tuple(edge.consumers for edge in self.edges)

  @property
  def norms(self) -> dict[str, tuple[str, ...]]:
    """The norms that read the residual stream, with the linear layers that read each."""
    return {e.producer: e.consumers for e in self.edges if isinstance(e.through, Normed)}

  @property
  def scores(self) -> tuple[str, ...]:
    """The linear layers whose outputs are multiplied with each other."""
    heads = [e.through for e in self.edges if isinstance(e.through, Attended | Shared | HeadNormed)]
    return tuple(name for one in heads for name in one.scores)
