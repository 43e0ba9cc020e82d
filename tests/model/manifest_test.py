"""What may be replaced: a folder whose manifest accounts for all that it holds."""

import json
import shutil

import pytest
import transformers

from model import manifest
from model.files import atomic_folder
from model.manifest import check_replaceable

FILES = {'config.json': '{}', 'models/int8/model.safetensors': 'weights', 'größe.txt': 'é'}


@pytest.fixture
def out(tmp_path):
  with atomic_folder(tmp_path / 'out') as folder:
    for name, text in FILES.items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_text(text)
  return tmp_path / 'out'


def test_the_manifest_lists_every_file_with_its_size(out):
  data = json.loads((out / '.lissom-manifest.json').read_text())
  assert data['kind'] == 'model'
  assert data['files'] == {'config.json': 2, 'models/int8/model.safetensors': 7, 'größe.txt': 2}


def test_an_output_may_be_replaced_also_in_part_and_after_a_move(out, tmp_path):
  check_replaceable(out)
  shutil.copytree(out, tmp_path / 'copy')
  check_replaceable(tmp_path / 'copy')
  shutil.rmtree(out / 'models')
  check_replaceable(out)


def test_a_checkpoint_that_transformers_wrote_is_somebody_s_work(tmp_path):
  config = transformers.LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
  )
  transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  for kind in ('model', 'tokenizer'):
    with pytest.raises(ValueError, match=r'no \.lissom-manifest\.json lists it, so it may be your'):
      check_replaceable(tmp_path, kind=kind)


def _manifest(text):
  return lambda out: (out / manifest.NAME).write_text(text)


WORK = {
  'a file': (lambda out: (out / 'notes.json').touch(), r'something else \(notes\.json\)'),
  'a file below': (lambda out: (out / 'models/int8/a').touch(), r'else \(models/int8/a\)'),
  'a hidden file': (lambda out: (out / '.env').touch(), r'something else \(\.env\)'),
  'an empty folder': (lambda out: (out / 'run').mkdir(), r'something else \(run/\)'),
  'a link': (lambda out: (out / 'link').symlink_to('nowhere'), r'something else \(link\)'),
  'a linked folder': (lambda out: (out / 'link').symlink_to(out), r'something else \(link\)'),
  'another size': (lambda out: (out / 'config.json').write_text('{"a": 1}'), 'that was changed'),
  'no manifest': (lambda out: (out / manifest.NAME).unlink(), 'no .lissom-manifest.json'),
  'not JSON': (_manifest('{'), 'no .lissom-manifest.json'),
  'not ours': (_manifest('{"files": {"config.json": 2}}'), 'no .lissom-manifest.json'),
}


@pytest.mark.parametrize('case', WORK)
def test_a_folder_with_anything_else_is_refused(out, case):
  change, message = WORK[case]
  change(out)
  before = manifest.contents(out)
  with pytest.raises(ValueError, match=message):
    check_replaceable(out)
  with pytest.raises(ValueError, match=message):
    with atomic_folder(out):
      pytest.fail('work was done')
  assert manifest.contents(out) == before


def test_an_output_of_another_kind_is_refused(out):
  with pytest.raises(ValueError, match=r'another kind \(model, not tokenizer\)'):
    check_replaceable(out, kind='tokenizer')


def test_of_a_folder_without_a_manifest_only_the_top_is_read(tmp_path, monkeypatch):
  (tmp_path / 'home/me').mkdir(parents=True)
  monkeypatch.setattr(manifest, 'contents', None)  # as --out=/ would read the whole disk
  with pytest.raises(ValueError, match=r'something else \(home\)'):
    check_replaceable(tmp_path)
