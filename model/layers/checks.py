"""Checks of the fields of configs; each message has the value and what is allowed."""

import math


def check_count(name: str, value: int) -> None:
  """Raises ValueError unless the value is an integer of at least 1."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{name} must be an integer of at least 1, not {value!r}')


def check_positive(name: str, value: float | None) -> None:
  """Raises ValueError unless the value is None, or finite and above 0."""
  if value is not None and not (value > 0 and math.isfinite(value)):
    raise ValueError(f'{name} must be a positive number, not {value}')


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError unless the value is one of the choices."""
  if value not in choices:
    raise ValueError(f'{name} {value!r} is not one of {", ".join(choices)}')
