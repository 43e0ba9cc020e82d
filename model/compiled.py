"""The memory that a compiled program reports."""

import jax


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes that the program holds by its own account: arguments, outputs and temporaries."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
