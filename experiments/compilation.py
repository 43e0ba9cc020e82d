"""Compiled programs are kept on disk, so that the next run of a script need not compile them.

JAX finds a program by a hash of its operations, of JAX's version, of XLA's flags and of the device.
Programs for a CPU use the instructions of the CPU that compiled them, and machines of several kinds
may share a home folder, so each set of CPU features has a folder of its own. Importing this module
changes nothing.
"""

import hashlib
import os
import pathlib
import platform
import warnings

import jax
import jaxlib

MIN_COMPILE_S = 0.1  # reading a program takes 5 to 20 ms


def use_cache(folder: pathlib.Path) -> bool:
  """Keeps compiled programs below `folder`, and returns whether it does.

  It does not if the folder cannot be made, or JAX_COMPILATION_CACHE_DIR names another one. From a
  folder that is read-only, programs are read.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return False
  folder = folder / f'{jaxlib.__version__}-{_machine()}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return False
  # An entry that cannot be read (another process is writing it) or written (the disk is full) costs
  # a compilation, and there is nothing that a user could do.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_COMPILE_S)
  return True


def _machine() -> str:
  """A hash of the CPU's architecture and features."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
    features = next((x for x in lines if x.lower().startswith(('flags', 'features'))), '')
  except OSError:
    features = platform.processor()
  words = [platform.machine(), *sorted(features.split())]
  return hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]
