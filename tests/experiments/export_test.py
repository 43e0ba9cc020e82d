"""export: codes that are kept, scales that are weighted, and bad input."""

import subprocess
import sys

import gguf
import numpy as np
import pytest

from model import hf, transformer
from model.infer.generate import generate
from ops import quantized


@pytest.fixture(scope='module')
def int4(base, tmp_path_factory):
  """The base model in int4 with groups of 32."""
  folder = tmp_path_factory.mktemp('model') / 'int4'
  model, tokenizer = hf.load_pretrained(base)
  for linear in transformer.linears(model).values():
    linear.weight.set_value(quantized.quantize(linear.weight.get_value(), 'int4', group_size=32))
  hf.save_pretrained(model, tokenizer, folder)
  return folder


def _kinds(path):
  return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_codes_are_kept_and_the_rest_is_as_asked(script, int4, tmp_path, capsys):
  script(f'--model={int4}', '--rest=bf16', f'--out={tmp_path / "m.gguf"}')
  said = capsys.readouterr().out
  kinds = _kinds(tmp_path / 'm.gguf')
  assert kinds['blk.0.ffn_down.weight'] == 'Q4_0' and kinds['token_embd.weight'] == 'BF16'
  assert 'codes copied' in said and said.endswith(' MB\n')
  (ours, tokenizer), (again, same) = map(hf.load_pretrained, (int4, tmp_path / 'm.gguf'))
  text = 'def f(x):\n  return 12 * x  # ä'
  assert same.encode(text) == tokenizer.encode(text)
  for path, w in transformer.matrices(ours).items():
    if path != 'head':
      found = transformer.matrices(again)[path]
      np.testing.assert_array_equal(found, quantized.dense(w))


def test_scales_are_weighted_by_calibration_text(script, base, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text(''.join(f'def add_{i}(a, b):\n  return a + b + {i}\n\n\n' for i in range(200)))
  plain = [f'--model={base}', '--type=q4_1', f'--out={tmp_path / "m.gguf"}']
  script(*plain)
  rounded = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / 'm.gguf').tensors}
  capsys.readouterr()
  script(*plain, f'--text={text}', '--calibration_rows=4', '--seq_len=64')
  assert 'rounded by importance' in capsys.readouterr().out
  for tensor in gguf.GGUFReader(tmp_path / 'm.gguf').tensors:
    weighted = tensor.name.startswith('blk.') and 'norm' not in tensor.name
    assert (tensor.data != rounded[tensor.name]).any() == weighted, tensor.name


def test_programs_run_by_their_own_script(script, int4, tmp_path, capsys):
  """It continues as `generate` does; `stablehlo_test` shows it for other weights and caches."""
  pytest.importorskip('flatbuffers')
  folder = tmp_path / 'm'
  script(f'--model={int4}', '--format=stablehlo', '--capacity=32', '--steps=8', f'--out={folder}')
  assert 'step_8.bin' in capsys.readouterr().out
  command = [sys.executable, '-I', str(folder / 'run.py'), '5,6,7', '6']
  said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
  model, _ = hf.load_pretrained(int4)
  (expected,) = generate(model, [[5, 6, 7]], max_new_tokens=6)
  assert said.split() == str(expected).split()


def test_a_folder_for_transformers(script, int4, tmp_path, capsys):
  script(f'--model={int4}', '--format=compressed-tensors', f'--out={tmp_path / "m"}')
  said = capsys.readouterr().out
  assert 'int4 g32, pack-quantized' in said and said.endswith(' MB\n')
  (ours, _), (again, tokenizer) = map(hf.load_pretrained, (int4, tmp_path / 'm'))
  assert tokenizer is not None
  for path, w in transformer.matrices(ours).items():
    found = transformer.matrices(again)[path]
    assert type(found) is type(w)
    np.testing.assert_array_equal(quantized.dense(found), quantized.dense(w))


def test_bad_input_is_refused(script, base, tmp_path):
  for given in (f'--out={tmp_path / "m.gguf"}', f'--model={base}'):
    with pytest.raises(ValueError, match='export needs --model and --out'):
      script(given)
  with pytest.raises(ValueError, match=r'does not end in \.gguf'):
    script(f'--model={base}', f'--out={tmp_path / "m.bin"}')
  with pytest.raises(ValueError, match='--type is for --format=gguf, not compressed-tensors'):
    script(
      f'--model={base}', '--format=compressed-tensors', '--type=q8_0', f'--out={tmp_path / "m"}'
    )
  with pytest.raises(ValueError, match='no linear layer of this model has codes'):
    script(f'--model={base}', '--format=compressed-tensors', f'--out={tmp_path / "m"}')
