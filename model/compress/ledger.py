"""Records the fallbacks of a compression and the result of each layer."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """A deviation from the recipe: a fallback, a skipped layer, an input that no token used."""

  layer: str
  technique: str
  event: str
  detail: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
  """One matrix after all steps. `relative_error` is |w - ŵ| / |w| in the Frobenius norm."""

  layer: str
  shape: tuple[int, ...]
  stored: str
  stored_bytes: int
  relative_error: float


@dataclasses.dataclass
class Ledger:
  """All events and layer results of one compression."""

  events: list[Event] = dataclasses.field(default_factory=list)
  layers: list[LayerResult] = dataclasses.field(default_factory=list)

  def add(self, layer: str, technique: str, events: dict) -> None:
    """Records the events whose count is not zero."""
    for event, count in events.items():
      if int(count):
        row = Event(layer=layer, technique=technique, event=event, detail=str(int(count)))
        self.events.append(row)

  def extend(self, other: 'Ledger') -> None:
    """Appends the rows of another ledger."""
    self.events.extend(other.events)
    self.layers.extend(other.layers)

  def to_rows(self) -> list[dict]:
    """Returns the events as plain values, for a record."""
    return [dataclasses.asdict(event) for event in self.events]
