"""cascade: which model it takes by default, and that it runs."""

import pytest

from experiments import base as embedded


class Loaded(Exception):
  """Ends the script where it loads its model."""


@pytest.mark.parametrize(
  'given, plan', [([], embedded.BRIEF), (['--full'], None), (['--smoke'], None)]
)
def test_without_a_model_the_brief_one_is_trained(make_script, monkeypatch, given, plan):
  script, asked = make_script('cascade'), []

  def load(*arguments, **settings):
    asked.append(settings)
    raise Loaded

  monkeypatch.setattr(script.module.inputs, 'load', load)
  with pytest.raises(Loaded):
    script(*given)
  assert asked == [{'seed': 0, 'smoke': given == ['--smoke'], 'plan': plan}]


@pytest.mark.slow
def test_smoke(script, tmp_path, capsys):
  script('--smoke', f'--out={tmp_path}')
  assert 'int4: alone ' in capsys.readouterr().out
  assert (tmp_path / 'cascade.png').stat().st_size > 1000
