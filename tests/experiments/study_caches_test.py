"""What is asked of caches that forget, and what a small run writes."""

import types

import numpy as np
import pytest

from experiments import arms, study_caches
from experiments.arms import Options
from model.eval import records
from model.eval.needle import NAMES, WORDS

DEPTHS = np.repeat(study_caches.FAR + study_caches.NEAR, study_caches.ROWS_A_DEPTH)


def test_each_context_holds_its_answer_at_its_depth():
  letters = types.SimpleNamespace(encode=lambda text: list(map(ord, text)))
  spelt = lambda tokens: ''.join(map(chr, tokens))
  text = np.asarray(letters.encode('nothing to be found here, and nothing there. ' * 20))
  setting = study_caches.Setting(
    model=None, tokenizer=letters, tokens_T=text, ends_T=None, context=200, about={}
  )
  contexts_BT, questions_BT, answers_BT = setting.questions(seed=3)
  assert contexts_BT.shape[1] == 200
  places = []
  for context, question, answer in zip(contexts_BT, questions_BT, answers_BT):
    question, answer = (spelt(part) for part in (question, answer))
    assert question.removeprefix('\nThe secret word of ').removesuffix(' is') in NAMES
    assert answer.strip() in WORDS
    told = spelt(context)
    assert told.count('secret') == 1
    places.append(told.index(f'{question}{answer}.\n') / 200)
  assert np.allclose(places, DEPTHS * (1 - 35 / 200), atol=0.02)
  again = setting.questions(seed=3)
  assert all(np.array_equal(a, b) for a, b in zip(again, (contexts_BT, questions_BT, answers_BT)))


@pytest.mark.slow
def test_a_smoke_run_measures_caches(base, tmp_path):
  out = tmp_path / 'caches.jsonl'
  arms.run(study_caches.STUDY, Options(smoke=True, output=str(out)))
  rows = {row.recipe: row for row in records.read(out)}
  assert set(rows) == {'float', 'streaming128', 'snapkv128'}
  assert rows['snapkv128'].value('cache_bytes') < rows['float'].value('cache_bytes')
  assert rows['streaming128'].value('cross_entropy') != rows['float'].value('cross_entropy')
