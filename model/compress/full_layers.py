"""Which layers keep full attention when that of the others is replaced.

full_every: of this number of consecutive layers the last one stays; None: no layer stays.
full_layers: the layers that stay, by number from 0 on, in place of `full_every`.
"""

from collections.abc import Sequence

from model.config import ModelConfig


def check_every(full_every: int | None) -> None:
  """Raises ValueError if no layer would change."""
  if full_every is not None and full_every < 2:
    raise ValueError(
      f'full_every must be at least 2, not {full_every}; 1 would leave all layers as they are, and '
      'null leaves none'
    )


def others(
  config: ModelConfig, full_every: int | None, full_layers: Sequence[int] | None
) -> list[int]:
  """The layers that change. Raises ValueError if none does, or one that stays does not exist."""
  count = len(config.layers)
  outside = [l for l in full_layers or () if not 0 <= l < count]
  if outside:
    raise ValueError(f'full_layers names layer {outside[0]}; there are layers 0 to {count - 1}')
  full = set(full_layers or ())
  if not full and full_every is not None:
    full = set(range(full_every - 1, count, full_every))
  chosen = [l for l in range(count) if l not in full]
  if not chosen:
    raise ValueError(f'no layer of {count} changes; let fewer stay as they are')
  return chosen
