"""Reads and resets the resident memory of this process, which Linux keeps in /proc/self.

glibc does not return freed buffers of up to 32 MB to the system. A process with `ENVIRONMENT`
returns them, so that what it has freed does not count.
"""

import pathlib

MMAP_THRESHOLD_BYTES = 2**22
ENVIRONMENT = {'MALLOC_MMAP_THRESHOLD_': str(MMAP_THRESHOLD_BYTES)}
PROCESS = pathlib.Path('/proc/self')


def is_known() -> bool:
  """Whether this system says how much memory is resident."""
  return (PROCESS / 'clear_refs').exists()


def reset_peak() -> None:
  """Sets the peak to what is held now."""
  (PROCESS / 'clear_refs').write_text('5')


def peak_bytes() -> int:
  """The largest resident memory since the last reset."""
  for line in (PROCESS / 'status').read_text().splitlines():
    if line.startswith('VmHWM:'):
      return 1024 * int(line.split()[1])
  raise ValueError('/proc/self/status has no VmHWM')
