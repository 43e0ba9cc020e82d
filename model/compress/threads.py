"""Limits the threads of OpenBLAS, by which XLA:CPU factors matrices, while a model is compressed.

OpenBLAS has threads of its own. After a call they wait in a loop for the next one, and take the
cores from XLA's threads. With two threads on two cores that other programs used as well, GPTQ of a
matrix of 1536 inputs took 3.3 s of processor time, and with one 0.07 s. One thread also gives the
same bits on any number of cores.
"""

import contextlib
import importlib

import threadpoolctl

MOST_INPUTS = 4096  # to which one thread is enough; beyond, the factorizations would take too long


def few(inputs: int) -> contextlib.AbstractContextManager:
  """A context with one thread of BLAS, if matrices have at most `MOST_INPUTS` inputs."""
  if inputs > MOST_INPUTS:
    return contextlib.nullcontext()
  importlib.import_module('scipy.linalg')  # loads OpenBLAS, which cannot be limited before
  return threadpoolctl.threadpool_limits(1, user_api='blas')
