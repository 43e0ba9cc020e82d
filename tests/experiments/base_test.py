"""The embedded base model: two processes at once train it once, whatever a killed run left."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import base as embedded
from model import corpus, hf, lock, manifest
from model.train import run_folder

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import dataclasses, pathlib, sys
from experiments import base
plan = dataclasses.replace(base.SMOKE, steps=6)
trained = base.load_or_train(pathlib.Path(sys.argv[1]), plan=plan)
print(trained.about["train_loss"])
"""


@pytest.mark.slow
def test_two_processes_at_once_train_once_and_get_the_same_model(tmp_path):
  command = [sys.executable, '-c', CODE, tmp_path / 'cache']
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
  with subprocess.Popen(command, **pipes) as first:
    assert 'training the base model once' in first.stderr.readline()
    first.send_signal(signal.SIGSTOP)
    with subprocess.Popen(command, **pipes) as second:
      said = second.stderr.readline()
      first.send_signal(signal.SIGCONT)
      (mine, _), (theirs, rest) = first.communicate(), second.communicate()
  assert (first.returncode, second.returncode) == (0, 0), rest
  assert f'is in use by process {first.pid}, which is training it; waiting' in said
  assert 'training the base model once' not in rest
  assert mine == theirs and float(mine) < 7
  folder, about = sorted((tmp_path / 'cache').iterdir())
  assert about == folder.with_suffix('.json')
  manifest.check_replaceable(folder)


def test_a_model_that_is_kept_is_loaded_from_a_folder_that_cannot_be_written(base, monkeypatch):
  monkeypatch.setattr(lock, 'hold', None)
  found = embedded.load_or_train(base.parent, smoke=True)
  assert found.model.config == hf.load_config(base)


def test_a_cache_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
  monkeypatch.setattr(embedded, '_train', None)
  (tmp_path / 'file').touch()
  for cache in ('file', 'file/below'):
    with pytest.raises(
      ValueError, match=r'cannot be written: .*; LISSOM_CACHE names another cache'
    ):
      embedded.load_or_train(tmp_path / cache, smoke=True)
  if os.geteuid():
    (tmp_path / 'locked').mkdir(mode=0o500)
    with pytest.raises(ValueError, match='Permission denied'):
      embedded.load_or_train(tmp_path / 'locked', smoke=True)


def test_a_model_that_another_process_finished_meanwhile_is_not_trained(
  base, tmp_path, monkeypatch
):
  name = base.name

  def finish(folder):
    shutil.copytree(base, tmp_path / name)
    shutil.copy(base.with_suffix('.json'), tmp_path)
    return contextlib.nullcontext()

  monkeypatch.setattr(embedded, '_training', finish)
  monkeypatch.setattr(embedded, '_train', None)
  assert embedded.load_or_train(tmp_path, smoke=True).model.config == hf.load_config(base)


def test_what_a_run_of_another_version_left_is_no_obstacle(tmp_path, monkeypatch, capsys):
  run = tmp_path / 'base-1.run'
  (run / 'checkpoints').mkdir(parents=True)
  (run / 'run.json').write_text('{"model": "as it was described once"}')
  tried = []

  def fit(model, data, settings, folder):
    tried.append(folder)
    with run_folder.RunFolder(folder, {'model': 'as it is described'}):
      assert not (folder / 'checkpoints' / 'old').exists()
      raise KeyboardInterrupt

  (run / 'checkpoints' / 'old').touch()
  monkeypatch.setattr(embedded.loop, 'fit', fit)
  with pytest.raises(KeyboardInterrupt):
    embedded._train(embedded.SMOKE, corpus.standard_library(), 0, tmp_path / 'base-1')
  assert 'cannot be resumed by this version; it begins anew' in capsys.readouterr().err
  assert tried == [run, run] and 'as it is described' in (run / 'run.json').read_text()
