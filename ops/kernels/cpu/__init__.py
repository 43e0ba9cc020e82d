"""Native products and attention for the CPU: C++ behind `jax.ffi`, on XLA's own threads.

`pip install -e .` compiles them where there is a compiler. Loading them runs a self-test for each
instruction set that the machine has, and picks the best one that passes; one that computes wrongly
is never used. LISSOM_NATIVE=avx2 in the environment picks another one by name. Without the library,
or with LISSOM_NATIVE=0, `available()` is False, `why_not()` gives the reason, and all products go
through XLA.
"""

import ctypes
import dataclasses
import functools
import importlib.machinery
import platform

import jax
import numpy as np

PRODUCT = 'lissom_product'
GROUPED_PRODUCT = 'lissom_grouped_product'
ATTENTION = 'lissom_cache_attention'
PREFILL = 'lissom_prefill_attention'
WRITE_ROWS = 'lissom_write_rows'
TARGETS = (PRODUCT, GROUPED_PRODUCT, ATTENTION, PREFILL, WRITE_ROWS)
_MODULE = '_native'
_callable = jax.make_user_context(True)  # part of the key under which JAX keeps traced functions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
  """What was found: the usable instruction sets by number, best first, or the reason for none."""

  instruction_sets: dict[str, int]
  selected: str | None
  refused: dict[str, str]  # instruction set -> what it computed wrongly
  why_not: str


def available() -> bool:
  """Whether products can run natively."""
  return _callable.value and load().selected is not None


def why_not() -> str:
  """The reason why they cannot, or nothing."""
  return load().why_not if _callable.value else 'the program is for machines without the library'


def left_out():
  """A context in which nothing is native, to trace programs for machines without the library."""
  return _callable(False)


def instruction_sets() -> list[str]:
  """The usable ones on this machine, the best first; products use the first."""
  return list(load().instruction_sets)


def number(instruction_set: str | None) -> np.int64:
  """How the kernels know an instruction set; None is the best.

  Raises ValueError for one that is not usable on this machine.
  """
  usable = load().instruction_sets
  if instruction_set is None:
    return np.int64(-1)
  if instruction_set not in usable:
    raise ValueError(f'{instruction_set!r} is not one of {", ".join(usable) or "none at all"}')
  return np.int64(usable[instruction_set])


@functools.cache
def load() -> Library:
  """Loads, tests and registers the library, once a process.

  Raises ValueError if LISSOM_NATIVE names an instruction set that is not usable on this machine.
  """
  path = _find()
  if path is None:
    return _absent('the native library is not built; `pip install -e .` builds it with a compiler')
  try:
    library = ctypes.CDLL(path)
  except OSError as error:
    return _absent(f'the native library does not load: {error}')
  missing = [target for target in TARGETS if not hasattr(library, target)]
  if missing:
    return _absent(
      f'the native library is an older one; `pip install -e .` builds it ({missing[0]})'
    )
  for name in ('lissom_name', 'lissom_self_test', 'lissom_setting'):
    getattr(library, name).restype = ctypes.c_char_p
  setting = library.lissom_setting().decode()
  if setting == '0':
    return _absent('LISSOM_NATIVE=0 is set')
  usable, refused = _test(library)
  if not usable:
    return _absent(f'the native products are wrong on this machine: {refused}', refused)
  if setting:
    usable = _put_first(setting, usable)
  best = next(iter(usable))
  library.lissom_select(usable[best])
  for target in TARGETS:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library[target]), platform='cpu')
  return Library(instruction_sets=usable, selected=best, refused=refused, why_not='')


def _find() -> str | None:
  spec = importlib.machinery.PathFinder.find_spec(_MODULE, __path__)
  return None if spec is None else spec.origin


def _test(library) -> tuple[dict[str, int], dict[str, str]]:
  usable, refused = {}, {}
  for i in range(library.lissom_instruction_sets()):
    name = library.lissom_name(i).decode()
    if library.lissom_supported(i):
      wrong = library.lissom_self_test(i)
      if wrong is None:
        usable[name] = i
      else:
        refused[name] = wrong.decode()
  return usable, refused


def _put_first(name: str, usable: dict[str, int]) -> dict[str, int]:
  if name not in usable:
    raise ValueError(f'LISSOM_NATIVE={name!r} is neither 0 nor one of {", ".join(usable)}')
  return {name: usable[name], **usable}


def _absent(reason: str, refused: dict[str, str] | None = None) -> Library:
  return Library(
    instruction_sets={},
    selected=None,
    refused=refused or {},
    why_not=f'{reason} ({platform.machine()})',
  )
