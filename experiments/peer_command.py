"""Runs a peer: a command that times another tool and prints a JSON line for each configuration.

The scripts of experiments/peers that benchmarks call between their own rounds are such commands.
A line has at least the keys of `KEYS`; further ones say how it was measured.
"""

import json
import shlex
import subprocess
from typing import Any

KEYS = ('peer', 'weights', 'prefill_tokens_per_s', 'decode_tokens_per_s')


def run(command: str) -> list[dict[str, Any]]:
  """The lines that a command prints.

  Raises ValueError if it cannot be started or fails, or prints no line, or one without a key.
  """
  try:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
  except OSError as error:
    raise ValueError(f'the peer {command!r} cannot be started: {error}') from None
  if done.returncode:
    raise ValueError(f'the peer {command!r} failed: {done.stderr.strip()[-500:]}')
  lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  for line in lines:
    missing = [key for key in KEYS if key not in line]
    if missing:
      raise ValueError(f'the peer {command!r} prints lines without {", ".join(missing)}')
  if not lines:
    raise ValueError(f'the peer {command!r} prints no JSON line')
  return lines
