"""Compiles for TPUs and NVIDIA GPUs on a machine without them; XLA's compilers need no device.

  python -m pip install 'lissom[tpu]'     libtpu, for a TPU topology such as 'v5e:2x2'
  python -m pip install 'lissom[cuda]'    JAX's CUDA plug-in, for one H200

A program is lowered for arguments that are placed on such a device (`placed`), and compiled. It has
the text and the memory analysis of the program on a device, but cannot run. The compilers choose
tile sizes by a cost model instead of by timing, so the program on a machine with a GPU may differ.
"""

import contextlib
import os
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  Sharding,
  SingleDeviceSharding,
  use_abstract_mesh,
)

# The fields of XLA's description of a GPU that its compiler needs.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 150000000000 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H200"
"""


def tpu(topology: str = 'v5e:2x2') -> list[jax.Device]:
  """The devices of a TPU topology. Raises ValueError if it or libtpu does not exist."""
  # Without these, libtpu asks a server on the network for the kind of machine, and serves only one
  # process at a time.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  find = lambda: topologies.get_topology_desc(platform='tpu', topology_name=topology)
  return _devices(find, f'the TPU topology {topology!r}', 'lissom[tpu]')


def gpu() -> list[jax.Device]:
  """One H200. Raises ValueError without JAX's CUDA plug-in."""
  find = lambda: topologies.get_topology_desc(
    platform='cuda', topology_name='h200', topology='1x1x1', target_config=H200
  )
  return _devices(find, 'CUDA', 'lissom[cuda]')


def placed(tree, where: jax.Device | Sharding):
  """The shapes of a tree's arrays, placed on a device or with a sharding."""
  sharding = where if isinstance(where, Sharding) else SingleDeviceSharding(where)
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  return jax.tree.map(place, tree)


def compile(fn: Callable, device: jax.Device, *args) -> jax.stages.Compiled:
  """Compiles a function of arrays with these shapes for a device."""
  with lowering(device):
    return jax.jit(fn).lower(*placed(args, device)).compile()


@contextlib.contextmanager
def lowering(device: jax.Device):
  """Within it, programs are lowered for a device that is not present.

  JAX 0.11 lowers Pallas kernels for the GPU of this description, and else asks one that is present.
  """
  if device.platform != 'gpu':
    yield
    return
  described = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform='gpu')
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
    yield


def _devices(find, what: str, extra: str) -> list[jax.Device]:
  try:
    return list(find().devices)
  except (NotImplementedError, RuntimeError, ModuleNotFoundError) as error:
    raise ValueError(f'there is no compiler for {what}: {error}; pip install {extra!r}') from error
