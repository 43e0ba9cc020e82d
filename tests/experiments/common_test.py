"""What the scripts share."""

import os
import pathlib
import subprocess
import sys
import types

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import common, inputs
from model import hf

ROOT = pathlib.Path(__file__).parents[2]


def test_calibration_rows_come_from_the_calibration_part_and_no_more_than_the_text_has(capsys):
  tokenizer = types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
  texts = types.SimpleNamespace(calibration=('a' * 999,), train=('b' * 500,))
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 24)
  assert rows_BT.shape == (24, 10) and {*rows_BT.ravel()} <= {ord('a'), ord('\n')}
  assert not capsys.readouterr().err
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 1000)
  assert rows_BT.shape == (151, 10) and {*rows_BT.ravel()} == {ord('a'), ord('b'), ord('\n')}
  assert 'the text has 151 rows of 10 tokens, not 1000' in capsys.readouterr().err
  with_bos_BT = common.calibration_rows(tokenizer, texts, 10, 24, bos_id=7)
  assert (with_bos_BT[:, 0] == 7).all()
  assert (with_bos_BT[:, 1:] == common.calibration_rows(tokenizer, texts, 9, 24)).all()


ERRORS = (
  (ValueError('no such thing'), 2, 'error: no such thing\n'),
  (OSError(28, os.strerror(28), '/a/b'), 2, 'error: /a/b: No space left on device\n'),
  (OSError(18, os.strerror(18), 'a', None, 'b'), 2, 'error: a: Invalid cross-device link\n'),
  (OSError('a message'), 2, 'error: a message\n'),
  (KeyboardInterrupt(), 130, 'interrupted\n'),
)


@pytest.mark.parametrize('error, status, line', ERRORS)
def test_errors_end_a_script_with_one_line(error, status, line, monkeypatch, capsys):
  """And with LISSOM_TRACEBACK they show where they come from, as errors of the program do."""

  def main():
    raise error

  monkeypatch.setattr(common.app, 'run', lambda guarded: guarded(['script']))
  monkeypatch.setattr(common.compilation, 'use_cache', lambda _: None)
  with pytest.raises(SystemExit) as end:
    common.run(main)
  assert (end.value.code, capsys.readouterr().err) == (status, line)
  monkeypatch.setenv('LISSOM_TRACEBACK', '1')
  with pytest.raises(type(error)):
    common.run(main)


def test_an_argument_that_is_no_option_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(common.app, 'run', lambda guarded: guarded(['script', 'a b', 'c']))
  monkeypatch.setattr(common.compilation, 'use_cache', lambda _: None)
  with pytest.raises(SystemExit) as end:
    common.run(lambda: None)
  line = "error: unexpected arguments: 'a b' c; options need a --\n"
  assert (end.value.code, capsys.readouterr().err) == (2, line)


def test_errors_of_the_program_are_not_hidden(monkeypatch):
  monkeypatch.setattr(common.app, 'run', lambda guarded: guarded(['script']))
  monkeypatch.setattr(common.compilation, 'use_cache', lambda _: None)
  with pytest.raises(KeyError):
    common.run(lambda: {}['x'])


def test_a_reader_that_closes_the_pipe_ends_a_script_silently(tmp_path):
  code = 'from experiments import common\ncommon.run(lambda: print("x" * 10**6))'
  environment = {**os.environ, 'LISSOM_CACHE': str(tmp_path)}
  command = f"{sys.executable} -c '{code}' | head -c 1"
  done = subprocess.run(
    command, shell=True, cwd=ROOT, capture_output=True, text=True, env=environment
  )
  assert (done.stdout, done.stderr) == ('x', '')


def test_out_is_a_folder_at_home_or_anywhere(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert str(common.out('~/x')) == '/home/me/x'
  assert str(common.out('a/b')) == 'a/b'
  with pytest.raises(ValueError, match='--out is empty'):
    common.out('')


def test_a_model_without_a_tokenizer_is_refused_with_what_helps(base, tmp_path):
  model, tokenizer = common.load_model(base)
  assert tokenizer.vocab_size <= model.config.vocab_size
  folder = tmp_path / 'folder'
  hf.save_pretrained(model, None, folder)
  with pytest.raises(ValueError, match='has no tokenizer; put its'):
    common.load_model(folder)
  _write_gguf(tmp_path / 'm.gguf')
  assert hf.load_pretrained(tmp_path / 'm.gguf')[0].config.width == 32
  for name in ('m.gguf', '.'):  # the file, and the folder that holds it
    with pytest.raises(ValueError, match='has no vocabulary; take a GGUF file that was written'):
      common.load_model(tmp_path / name)


def test_what_is_not_loaded_as_it_is_stored_is_said_and_reaches_the_study(base, tmp_path, caplog):
  model, tokenizer = common.load_model(base)
  hf.save_pretrained(model, tokenizer, tmp_path)
  file = tmp_path / 'model.safetensors'
  more = {'v_head.summary.weight': np.zeros((1, 4), np.float32)}
  save_file({**load_file(file), **more}, file, {'format': 'pt'})
  found = inputs.load(str(tmp_path), [], seed=0)
  (line,) = found.said
  assert 'v_head.summary.weight' in line and line in caplog.text
  work = inputs.make_study(found, inputs.Protocol(max_windows=2, calibration_rows=1))
  assert work.said == found.said


def _write_gguf(path):
  """A Llama of one block without a vocabulary."""
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(48)
  writer.add_head_count(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(40)
  square = dict.fromkeys(('attn_q', 'attn_k', 'attn_v', 'attn_output'), (32, 32))
  block = square | {'ffn_gate': (48, 32), 'ffn_up': (48, 32), 'ffn_down': (32, 48)}
  norms = dict.fromkeys(('blk.0.attn_norm', 'blk.0.ffn_norm', 'output_norm'), (32,))
  shapes = {f'blk.0.{name}': shape for name, shape in block.items()} | norms
  for name, shape in {'token_embd': (40, 32), **shapes}.items():
    writer.add_tensor(f'{name}.weight', np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
