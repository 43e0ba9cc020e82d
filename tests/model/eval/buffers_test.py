"""Buffers are read off a program's text, and widened copies told from what a fusion passes on."""

import jax
import jax.numpy as jnp

from model.eval.buffers import Buffer, buffers, widened

TEXT = """HloModule jit_f, entry_computation_layout={(s8[64,32]{1,0})->f32[64,32]{1,0}}

%fused_computation (p: s8[64,32]) -> f32[64,32] {
  %p = s8[64,32]{1,0} parameter(0)
  ROOT %convert.1 = f32[64,32]{1,0} convert(%p)
}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main.1 (w: s8[64,32], x: bf16[4,64]) -> f32[64,32] {
  %w = s8[64,32]{1,0:T(32,128)(4,1)} parameter(0)
  %start = (s8[64,32]{1,0:T(32,128)(4,1)S(1)}, s8[64,32]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %done = s8[64,32]{1,0:S(1)} copy-done(%start)
  %view = s8[2048]{0} bitcast(%done)
  %wide = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} convert(%done)
  %sum = f32[] reduce(%wide, %c), to_apply=%region_0.1
  ROOT %fusion = f32[64,32]{1,0} fusion(%done), kind=kLoop, calls=%fused_computation
}
"""


def test_what_is_outside_fusions_has_a_buffer():
  found = [(b.dtype, b.shape, b.op) for b in buffers(TEXT)]
  assert found == [
    ('s8', (64, 32), 'copy-start'),
    ('s8', (64, 32), 'copy-start'),
    ('u32', (), 'copy-start'),
    ('s8', (64, 32), 'copy-done'),
    ('bf16', (64, 32), 'convert'),
    ('f32', (), 'reduce'),
    ('f32', (64, 32), 'fusion'),
  ]
  assert [Buffer(t, (), '').bits for t in ('pred', 's4', 'f8e4m3fn', 'bf16')] == [8, 4, 8, 16]


def test_a_copy_is_widened_if_it_has_as_many_elements_of_more_bits():
  shape = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  ops = lambda *weights: [b.op for b in widened(TEXT, weights)]
  assert ops(shape(jnp.int8, 64, 32)) == ['convert', 'fusion']
  assert ops(shape(jnp.int4, 64, 32))[0] == 'copy-start'
  assert ops(shape(jnp.bfloat16, 64, 32)) == ['fusion']
  assert ops(shape(jnp.int8, 62, 32)) == ['convert', 'fusion']  # filled up to whole blocks
  assert ops(shape(jnp.int8, 32, 32)) == ops(shape(jnp.int8, 128, 32)) == []


def test_a_program_of_this_machine():
  w, x = shape_of(64, 32, jnp.int8), shape_of(4, 64, jnp.float32)
  text = jax.jit(lambda x, w: (x @ w.astype(x.dtype), w.astype(jnp.float32))).lower(x, w).compile()
  assert {b.dtype for b in widened(text.as_text(), [w])} == {'f32'}


def shape_of(*shape_and_dtype):
  *shape, dtype = shape_and_dtype
  return jax.ShapeDtypeStruct(tuple(shape), dtype)
