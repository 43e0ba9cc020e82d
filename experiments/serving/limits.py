"""What a call may take, and who may ask: needs nothing of the extra `serve`."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a call may take; `queue` is the number of choices that may wait for a slot."""

  body_bytes: int = 4 * 2**20
  queue: int = 256
  seconds: float = 600.0
  body_seconds: float = 30.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name == 'queue' else 1
      if not value >= least:
        raise ValueError(f'the limit {field.name} must be at least {least}, not {value}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
  """Who may ask. `hosts` are the names that a Host header may have; None: any."""

  key: str | None = dataclasses.field(default=None, repr=False)
  hosts: frozenset[str] | None = None

  def __post_init__(self):
    if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
      raise ValueError('the key must have printable ASCII characters, and at least one')
