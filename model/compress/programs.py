"""Compiles the programs of a compression: each runs a few times, so compiling must be cheap.

XLA:CPU compiles a solver's nested loops in half the time without its fusion emitters, and they run
no slower. The options are given to each program alone. Where a version of XLA does not know them,
programs are compiled without.
"""

import functools
from collections.abc import Callable

import jax

from model.compress import statistics
from model.compress.registry import Outcome
from ops.linear import Matrix, core, with_core

QUICK = {'xla_cpu_use_fusion_emitters': False}
QUICKEST = {**QUICK, 'xla_backend_optimization_level': 1}  # where nearly all work is products


def compiled(function: Callable, quick: dict = QUICK, **settings) -> Callable:
  """Returns `jax.jit(function, **settings)`, compiled by the options `quick` on a CPU.

  It cannot be called inside another traced function. Its `eval_shape` keeps the trace, which serves
  when the program is compiled.
  """

  @functools.cache
  def program(platform: str):
    return jax.jit(function, compiler_options=_known(platform, **quick), **settings)

  @functools.wraps(function)
  def run(*args):
    return program(jax.default_backend())(*args)

  run.eval_shape = lambda *args: program(jax.default_backend()).eval_shape(*args)
  return run


@functools.cache
def _known(platform: str, **options) -> dict | None:
  if platform != 'cpu':
    return None
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:  # this version of XLA lacks an option
    return None
  return options


@functools.partial(compiled, quick=QUICKEST, static_argnums=(0, 1))
def execute(row, spec, w: Matrix, measured) -> Outcome:
  """Runs a technique on one matrix; `measured` are the statistics of its inputs."""
  outcome = row(core(w), measured, spec)
  events = {**outcome.events, **statistics.starved(measured)}
  return Outcome(with_core(w, outcome.weight), events)
