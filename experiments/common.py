"""What every script needs: clean errors, progress bars, its own command line, plug-ins."""

import functools
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from model import corpus, sharding
from model.tokenizer import WINDOW_BOS

RECIPES = pathlib.Path(__file__).parent / 'recipes'
CHARACTERS_A_TOKEN = 4  # of usual text and vocabularies
SHORT_S = 2.0  # a progress bar appears only where the wait is longer than this


def run(main: Callable[[], None]) -> None:
  """Runs a script's `main`. Wrong input ends it with one line on stderr and exit status 2."""

  def guarded(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {shlex.join(argv[1:])}; options need a --')
    logging.set_verbosity(logging.WARNING)  # the checkpoint library reports every file at INFO
    try:
      main()
    except ValueError as error:
      if os.environ.get('LISSOM_TRACEBACK'):
        raise
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)

  app.run(guarded)


def progress(items: Iterable, label: str):
  """The items, behind a progress bar if they take longer than two seconds."""
  return tqdm.tqdm(items, desc=label, delay=SHORT_S, leave=False, file=sys.stderr)


def labelled(label: str) -> Callable[[Iterable], Iterable]:
  """`progress` with its label given."""
  return functools.partial(progress, label=label)


def command() -> str:
  """The command that started this process, as one would type it."""
  name = pathlib.Path(sys.argv[0]).stem
  return shlex.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])


def cache_folder() -> pathlib.Path:
  """Where trained base models are kept between runs; LISSOM_CACHE names another place."""
  default = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'lissom'
  return pathlib.Path(os.environ.get('LISSOM_CACHE', default)).expanduser()


def load_plugins(paths: list[str]) -> None:
  """Imports Python files that register techniques or weight types of the user's own.

  Raises ValueError if a file is missing.
  """
  for path in paths:
    if not pathlib.Path(path).is_file() or not path.endswith('.py'):
      raise ValueError(f'there is no plug-in {path}; name a Python file')
    name = f'lissom_plugin_{pathlib.Path(path).stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    # Dataclasses look their module up while they are made.
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def calibration_rows(
  tokenizer, texts, seq_len: int, count: int, seed: int = 0, bos_id: int | None = None
) -> np.ndarray:
  """Rows of tokens from random places of the calibration part: [count, seq_len].

  The training part is taken as well where the calibration part is too short. There are fewer rows
  where both hold fewer characters than tokens are asked for. With `bos_id`, each row begins with
  it. Raises ValueError if both together are shorter than a row.
  """
  if bos_id is not None:
    rows_BT = calibration_rows(tokenizer, texts, seq_len - 1, count, seed)
    return np.pad(rows_BT, ((0, 0), (1, 0)), constant_values=bos_id)
  pool = texts.calibration
  if sum(map(len, pool)) < count * seq_len * CHARACTERS_A_TOKEN:
    pool = (*pool, *texts.train)
  most = max(1, sum(map(len, pool)) // seq_len)
  return corpus.sample_rows(pool, tokenizer.encode, seq_len, min(count, most), seed=seed)


def check_positive(**values: float | None) -> None:
  """Raises ValueError naming the first flag whose value is not above zero."""
  for name, value in values.items():
    if value is not None and value <= 0:
      raise ValueError(f'--{name} must be above 0, not {value}')


def define_plugins() -> flags.FlagHolder:
  """The --plugins flag."""
  return flags.DEFINE_list(
    'plugins', [], 'Python files to import first; they may register techniques of your own.'
  )


def define_bos() -> flags.FlagHolder:
  """The --bos flag; `model.tokenizer.window_bos` reads it."""
  return flags.DEFINE_enum(
    'bos',
    'auto',
    list(WINDOW_BOS),
    'Token in front of each window: none, the BOS (window), or what the family needs (auto).',
  )


def define_mesh() -> dict[str, flags.FlagHolder]:
  """The flags that lay the devices out as a mesh; `mesh` reads them."""
  what = {
    'data': 'split the batch',
    'fsdp': 'split the batch and the parameters',
    'model': 'split heads, feed-forward layers and vocabulary',
  }
  return {
    axis: flags.DEFINE_integer(f'mesh_{axis}', 1, f'Devices that {text}.', lower_bound=1)
    for axis, text in what.items()
  }


def mesh(holders: dict[str, flags.FlagHolder]) -> jax.sharding.Mesh:
  """The mesh that the flags ask for. Raises ValueError if there are too few devices."""
  return sharding.make_mesh(**{axis: holder.value for axis, holder in holders.items()})
