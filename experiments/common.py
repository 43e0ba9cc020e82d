"""What all scripts share: errors in one line, output folders, progress bars, plug-ins, flags."""

import functools
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags, logging

from experiments import compilation
from model import cache_spec, context_parallel, corpus, gguf, hf, sharding
from model.tokenizer import WINDOW_BOS, Tokenizer
from model.transformer import Transformer

RECIPES = pathlib.Path(__file__).parent / 'recipes'
CHARACTERS_A_TOKEN = 4  # of usual text and vocabularies
# The modules of optional extras without which a script cannot do its work.
EXTRAS = {
  'harness': ('lm_eval',),
  'serve': ('llguidance', 'prometheus_client', 'starlette', 'uvicorn'),
}
SHORT_S = 2.0  # a wait without a progress bar
WRONG_INPUT, INTERRUPTED = 2, 130  # exit statuses


def run(main: Callable[..., None], *, takes_arguments: bool = False) -> None:
  """Runs a script's `main`, which may take the list of arguments that are no flags.

  Wrong input and errors of the disk end the process with one line on stderr and exit status 2; with
  LISSOM_TRACEBACK set, they show where they come from. Compiled programs are kept in the cache
  folder.
  """

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # the checkpoint library reports every file at INFO
    compilation.use_cache(cache_folder() / 'xla')
    try:
      if len(argv) > 1 and not takes_arguments:
        raise ValueError(f'unexpected arguments: {shlex.join(argv[1:])}; options need a --')
      main(*[argv[1:]] * takes_arguments)
      sys.stdout.flush()
    except (ValueError, OSError, KeyboardInterrupt) as error:
      if os.environ.get('LISSOM_TRACEBACK'):
        raise
      _end(error)

  if takes_arguments:
    flags.FLAGS.set_gnu_getopt()  # flags may come after them
  app.run(guarded)


def _end(error: BaseException) -> None:
  if isinstance(error, BrokenPipeError):  # the reader of our output wants no more of it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  if isinstance(error, KeyboardInterrupt):
    print('interrupted', file=sys.stderr)
    sys.exit(INTERRUPTED)
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    names = [os.fspath(name) for name in (error.filename, error.filename2) if name]
    text = ': '.join([*map(str, names[:1]), error.strerror])
  print(f'error: {text}', file=sys.stderr)
  sys.exit(WRONG_INPUT)


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
  """The folder that keeps trained base models and compiled programs; LISSOM_CACHE names another."""
  default = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'lissom'
  return pathlib.Path(os.environ.get('LISSOM_CACHE', default)).expanduser()


def out(name: str) -> pathlib.Path:
  """The folder that --out names, with ~ for the home folder. Raises ValueError if it is empty."""
  if not name.strip():
    raise ValueError('--out is empty; name a folder')
  return pathlib.Path(name).expanduser()


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


def load_model(
  path: str, dtype: jnp.dtype | None = None, said: list[str] | None = None
) -> tuple[Transformer, Tokenizer]:
  """Loads a model with its tokenizer; for the rest see `hf.load_pretrained`.

  What is not loaded as it is stored is logged, and appended to `said`.

  Raises ValueError if there is no tokenizer, or the model cannot be loaded.
  """

  def say(line):
    hf.LOG.warning(line)
    if said is not None:
      said.append(line)

  model, tokenizer = hf.load_pretrained(path, dtype, say=say)
  if tokenizer is not None:
    return model, tokenizer
  if gguf.find_file(path) is not None:
    raise ValueError(f'{path} has no vocabulary; take a GGUF file that was written with one')
  raise ValueError(f'{path} has no tokenizer; put its tokenizer.json into the folder')


def calibration_rows(
  tokenizer, texts, seq_len: int, count: int, seed: int = 0, bos_id: int | None = None
) -> np.ndarray:
  """Draws rows of tokens from the calibration part of a corpus: [rows, seq_len].

  If that part is too short, the training part is used as well. If both have fewer than `count` rows
  of tokens, there are fewer rows, and a line on stderr says how many. With `bos_id`, each row
  begins with it. Raises ValueError if there is not enough text for one row.
  """
  if bos_id is not None:
    rows_BT = calibration_rows(tokenizer, texts, seq_len - 1, count, seed)
    return np.pad(rows_BT, ((0, 0), (1, 0)), constant_values=bos_id)
  pool = texts.calibration
  if sum(map(len, pool)) < count * seq_len * CHARACTERS_A_TOKEN:
    pool = (*pool, *texts.train)
  rows_BT = corpus.sample_rows(pool, tokenizer.encode, seq_len, count, seed=seed)
  if len(rows_BT) < count:
    print(
      f'calibration: the text has {len(rows_BT)} rows of {seq_len} tokens, not {count}; '
      'rows are not repeated',
      file=sys.stderr,
    )
  return rows_BT


def need_extra(extra: str) -> None:
  """Raises ValueError with what to install if a module of an optional extra is not there."""
  missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
  if missing:
    raise ValueError(f"{', '.join(missing)} not installed; pip install -e '.[{extra}]'")


def check_positive(**values: float | None) -> None:
  """Raises ValueError naming the first flag whose value is not above zero."""
  for name, value in values.items():
    if value is not None and value <= 0:
      raise ValueError(f'--{name} must be above 0, not {value}')


def define_out(default: str, text: str) -> flags.FlagHolder:
  """The --out flag; `out` reads it."""
  return flags.DEFINE_string('out', default, text)


class _KVCache(flags.ArgumentParser):
  """A text that `model.cache_spec` understands, kept as it is."""

  def parse(self, argument):
    cache_spec.of(argument)
    return argument


def define_kv_cache(default: str | None, text: str) -> flags.FlagHolder:
  """The --kv_cache flag: a format of keys and values, and which tokens stay."""
  text = f'{text} One of {cache_spec.FORMS}.'
  return flags.DEFINE(_KVCache(), 'kv_cache', default, text)


def define_dtype() -> flags.FlagHolder:
  """The --dtype flag of scripts that load a model; `dtype` reads it."""
  return flags.DEFINE_enum(
    'dtype', None, ['float32', 'bfloat16'], 'Type of activations and plain weights.'
  )


def dtype(holder: flags.FlagHolder) -> jnp.dtype | None:
  """The dtype that --dtype names; None: as the model is stored."""
  return None if holder.value is None else jnp.dtype(holder.value)


def define_plugins() -> flags.FlagHolder:
  """The --plugins flag."""
  return flags.DEFINE_list(
    'plugins', [], 'Python files to import first. They may register techniques of your own.'
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
    'expert': 'split the experts of routed layers',
    'context': 'split the tokens of a row in training',
  }
  return {
    axis: flags.DEFINE_integer(f'mesh_{axis}', 1, f'Devices that {text}.', lower_bound=1)
    for axis, text in what.items()
  }


def define_context_strategy() -> flags.FlagHolder:
  """The --context_strategy flag."""
  return flags.DEFINE_enum(
    'context_strategy',
    'auto',
    get_args(context_parallel.Strategy),
    'How keys get to queries with --mesh_context; see model/context_parallel.py.',
  )


def mesh(holders: dict[str, flags.FlagHolder]) -> jax.sharding.Mesh:
  """The mesh that the flags ask for. Raises ValueError if there are too few devices."""
  return sharding.make_mesh(**{axis: holder.value for axis, holder in holders.items()})
