"""What a compiled program says of itself."""

import jax


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Its own account of the memory it holds: arguments, outputs and temporaries."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
