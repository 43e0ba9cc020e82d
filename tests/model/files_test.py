"""Output folders appear whole or not at all."""

import pytest

from model.files import atomic_folder


def _save(path, name='model.safetensors'):
  with atomic_folder(path) as folder:
    (folder / 'config.json').write_text('{}')
    (folder / name).write_text(name)


def test_a_new_folder_and_its_parents_appear(tmp_path):
  _save(tmp_path / 'a/b')
  assert sorted(p.name for p in (tmp_path / 'a/b').iterdir()) == [
    'config.json',
    'model.safetensors',
  ]
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['b']


def test_an_empty_folder_and_an_earlier_output_are_replaced(tmp_path):
  (tmp_path / 'out').mkdir()
  _save(tmp_path / 'out', 'first.safetensors')
  _save(tmp_path / 'out', 'second.safetensors')
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
    'config.json',
    'second.safetensors',
  ]
  assert [p.name for p in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('exists', [False, True])
def test_a_failed_block_changes_nothing(exists, tmp_path):
  if exists:
    _save(tmp_path / 'out')
  with pytest.raises(KeyboardInterrupt):
    with atomic_folder(tmp_path / 'out') as folder:
      (folder / 'config.json').write_text('half')
      raise KeyboardInterrupt
  assert [p.name for p in tmp_path.iterdir()] == (['out'] if exists else [])
  if exists:
    assert (tmp_path / 'out/config.json').read_text() == '{}'


@pytest.mark.parametrize('stranger', ['.git/HEAD', 'notes.md', 'src/main.py'])
def test_folders_with_anything_else_are_refused(stranger, tmp_path):
  _save(tmp_path / 'out')
  (tmp_path / 'out' / stranger).parent.mkdir(exist_ok=True)
  (tmp_path / 'out' / stranger).write_text('mine')
  with pytest.raises(ValueError, match='holds something else'):
    _save(tmp_path / 'out')
  assert (tmp_path / 'out' / stranger).read_text() == 'mine'


def test_a_folder_without_the_marker_is_refused(tmp_path):
  (tmp_path / 'package.json').write_text('{}')
  with pytest.raises(ValueError, match=r'no config\.json, so it is no earlier output'):
    _save(tmp_path)


def test_work_that_appears_meanwhile_is_kept(tmp_path):
  with pytest.raises(ValueError, match='holds something else'):
    with atomic_folder(tmp_path / 'out') as folder:
      (folder / 'config.json').write_text('{}')
      (tmp_path / 'out').mkdir()
      (tmp_path / 'out/thesis.tex').write_text('years')
  assert (tmp_path / 'out/thesis.tex').read_text() == 'years'


def test_a_link_keeps_pointing_at_the_output(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  _save(tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink() and (tmp_path / 'real/config.json').exists()
