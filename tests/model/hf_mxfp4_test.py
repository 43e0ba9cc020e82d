"""gpt-oss with MXFP4 experts: read bit for bit, multiplied as transformers does, written again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from model import hf, native, transformer
from model.eval import cost
from ops.linear import dense
from ops.quantized import QuantizedTensor

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
EXPERTS, WIDTH, INNER = 3, 64, 32
SIZES = {
  'vocab_size': 99,
  'hidden_size': WIDTH,
  'intermediate_size': INNER,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'num_local_experts': EXPERTS,
  'num_experts_per_tok': 2,
  'sliding_window': 6,
}
TOKENS = np.random.default_rng(1).integers(0, 99, (2, 12))
MLP = 'model.layers.1.mlp.experts'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A folder as the hub has it, with random codes, and the logits of transformers."""
  folder, rng = tmp_path_factory.mktemp('mxfp4'), np.random.default_rng(0)
  config = transformers.GptOssConfig(**SIZES, attn_implementation='eager')
  theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
  tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
  for l, layer in enumerate(theirs.model.layers):
    for name, shape in (('gate_up_proj', (2 * INNER, WIDTH)), ('down_proj', (WIDTH, INNER))):
      shape = (EXPERTS, shape[0], shape[1] // 32)
      codes = rng.integers(0, 256, (*shape, 16), np.uint8)
      scales = rng.integers(122, 126, shape, np.uint8)  # 2 ** -5 to 2 ** -2
      wide = convert_moe_packed_tensors(
        torch.tensor(codes), torch.tensor(scales), dtype=torch.float32
      )
      getattr(layer.mlp.experts, name).data.copy_(wide)
      path = f'model.layers.{l}.mlp.experts.{name}'
      del tensors[path]
      tensors |= {f'{path}_blocks': codes, f'{path}_scales': scales}
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  method = {'quantization_config': {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}}
  about = {**config.to_dict(), 'architectures': ['GptOssForCausalLM'], **method}
  (folder / 'config.json').write_text(json.dumps(about))
  with torch.no_grad():
    return folder, theirs, theirs(torch.tensor(TOKENS)).logits.numpy()


def test_codes_keep_their_bits_and_multiply_as_widened(checkpoint):
  folder, theirs, expected = checkpoint
  model, _ = hf.load_pretrained(folder)
  experts = theirs.model.layers[1].mlp.experts
  w = {path: param.get_value() for path, param in transformer.parameters(model).items()}
  name = 'layers.1.ffn.{}.weight'
  for path, wide in {
    'gate': experts.gate_up_proj[..., ::2],
    'up': experts.gate_up_proj[..., 1::2],
    'down': experts.down_proj,
  }.items():
    own = w[name.format(path)]
    assert isinstance(own, QuantizedTensor) and own.format == 'mxfp4'
    np.testing.assert_array_equal(dense(own), wide.detach().numpy())
  packed = [v for v in w.values() if isinstance(v, QuantizedTensor)]
  elements = 2 * EXPERTS * 3 * WIDTH * INNER
  assert sum(v.nbytes for v in packed) == elements * 17 // 32  # 4 bits, and 8 for 32 of them
  assert cost.parameters(model.config).total == sum(p.numel() for p in theirs.parameters())
  graphdef, state = nnx.split(model)
  logits = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t))(state, jnp.asarray(TOKENS, jnp.int32))
  np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_what_is_written_is_what_was_read(checkpoint, tmp_path):
  folder, _, _ = checkpoint
  model, _ = hf.load_pretrained(folder)
  hf.save_pretrained(model, None, tmp_path / 'saved')
  stored, written = (load_file(f / 'model.safetensors') for f in (folder, tmp_path / 'saved'))
  assert stored.keys() == written.keys()
  for name, array in stored.items():
    assert array.dtype == written[name].dtype, name
    np.testing.assert_array_equal(array, written[name], err_msg=name)
  about = json.loads((tmp_path / 'saved/config.json').read_text())
  assert about['quantization_config']['quant_method'] == 'mxfp4'
  assert not native.is_native(tmp_path / 'saved')
  assert hf.load_config(tmp_path / 'saved') == model.config


def test_other_formats_of_experts_are_saved_as_such(checkpoint, tmp_path):
  model, _ = hf.load_pretrained(checkpoint[0])
  param = model.layers[0].ffn.down.weight
  param.set_value(dense(param.get_value()))  # one layer widened: the hub has no form for both
  with pytest.raises(ValueError, match=r'no way to describe .*\n.*ffn\.gate\.weight: Quantized'):
    hf.to_tensors(model)
  hf.save_pretrained(model, None, tmp_path / 'saved')
  assert native.is_native(tmp_path / 'saved')
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  codes = lambda model: model.layers[0].ffn.up.weight.get_value().values
  np.testing.assert_array_equal(codes(again), codes(model))


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (f'{MLP}.down_proj_scales', lambda a: a[:, :, :0], f'misshapen: {MLP}.down_proj_scales'),
    (f'{MLP}.down_proj_blocks', lambda a: a[1:], f'misshapen: {MLP}.down_proj_blocks'),
    (f'{MLP}.gate_up_proj_blocks', None, f'missing: {MLP}.gate_up_proj_blocks'),
    (f'{MLP}.gate_up_proj_blocks', lambda a: np.float32(a), 'unsupported dtype: .*_blocks is'),
    (f'{MLP}.gate_up_proj_scales', lambda a: a * 0 + 255, 'NaN or infinity in .*\n.*_scales'),
  ],
)
def test_damaged_tensors_are_named(checkpoint, tmp_path, name, change, message):
  tensors = load_file(checkpoint[0] / 'model.safetensors')
  array = tensors.pop(name)
  if change is not None:
    tensors[name] = np.ascontiguousarray(change(array))
  save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
  (tmp_path / 'config.json').write_bytes((checkpoint[0] / 'config.json').read_bytes())
  with pytest.raises(ValueError, match=message):
    hf.load_pretrained(tmp_path)
