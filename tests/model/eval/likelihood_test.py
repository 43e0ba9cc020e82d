"""Log-likelihoods of continuations, against numpy on the logits of transformers, text by text."""

import numpy as np
import pytest
import torch
import transformers

from model import hf
from model.eval import likelihood, sharing
from model.eval.likelihood import Request

# Sums of up to 64 log-probabilities of float32 logits, by two libraries that add in other orders.
TOLERANCE = 1e-4
POSITIONS = 64
TINY = {
  'vocab_size': 200,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': POSITIONS,
  'bos_token_id': 0,
  'eos_token_id': 0,
}
# A window is kept in a cache that forgets, which a shared beginning has to survive.
CASES = {'Llama': TINY, 'Gemma3': {**TINY, 'head_dim': 8, 'sliding_window': 8}}
SMALL = 256  # tokens of a call, so that there are several


@pytest.fixture(scope='module', params=CASES)
def models(request, tmp_path_factory):
  """(ours, theirs) with the same weights, which are large enough to matter."""
  torch.manual_seed(0)
  family, suffix = request.param, 'Text' if request.param == 'Gemma3' else ''
  config = getattr(transformers, f'{family}{suffix}Config')(**CASES[family])
  theirs = getattr(transformers, f'{family}ForCausalLM')(config).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(torch.randn(parameter.shape) * 0.1)
  folder = tmp_path_factory.mktemp(family)
  theirs.save_pretrained(folder)
  return hf.load_pretrained(folder)[0], theirs


def _oracle(theirs, request: Request, length: int = POSITIONS) -> tuple[float, bool]:
  tokens = [*request.context, *request.continuation][-(length + 1) :]
  with torch.no_grad():
    logits = theirs(torch.tensor([tokens[:-1]])).logits[0].double().numpy()
  count = len(request.continuation)
  logits, targets = logits[-count:], np.array(request.continuation)
  highest = logits.max(1, keepdims=True)
  log_probs = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
  return log_probs[np.arange(count), targets].sum(), bool((logits.argmax(1) == targets).all())


def test_beginnings_are_read_once(rng, monkeypatch):
  """Of four questions with four answers each, nearly a quarter of the tokens is read."""
  texts = []
  for _ in range(4):
    question = _draw(rng, 100)
    for _ in range(4):
      answer = _draw(rng, 3)
      texts.append(
        sharing.Text(tokens=(*question, *answer[:-1]), wanted=len(question) - 1, targets=answer)
      )
  plan = sharing.plan(texts * 20, 4096)  # asked again, they are read once all the same
  assert len(plan.rows) == 16
  monkeypatch.setattr(sharing, 'PROGRAM', 10)  # reading them has to be worth the programs
  plan = sharing.plan(texts, 4096)
  assert plan.read == 4 * (99 + 4 * 3)
  assert [len(stage.calls) for stage in plan.stages] == [1]


def _draw(rng, length) -> tuple[int, ...]:
  return tuple(rng.integers(1, TINY['vocab_size'], length).tolist())


def _requests(rng) -> list[Request]:
  """Questions with several answers, examples before them, texts alone, and texts that are long."""
  questions = [_draw(rng, length) for length in (20, 23, 41)]
  answers = [Request(q, _draw(rng, n)) for q in questions for n in (1, 1, 2, 7)]
  examples = _draw(rng, 30)
  shots = [Request(examples + _draw(rng, n), _draw(rng, 3)) for n in (1, 4, 9, 9)]
  alone = [Request(_draw(rng, n), _draw(rng, m)) for n, m in ((1, 1), (1, 12), (5, 40), (30, 2))]
  long = [Request(_draw(rng, n), _draw(rng, m)) for n, m in ((100, 5), (POSITIONS, 1), (3, 64))]
  begun = Request(shots[0].context, shots[0].continuation[:1])  # the beginning of another one
  same = Request(questions[0][:-2], questions[0][-2:])  # within a context
  return [*answers, *shots, *alone, *long, begun, same, answers[0]]


@pytest.mark.parametrize('least', [16, None], ids=['shared', 'packed'])
@pytest.mark.quick(models=('Gemma3',))
def test_every_score_is_that_of_the_text_alone(models, least, rng, monkeypatch):
  monkeypatch.setattr(sharing, 'LEAST_SHARED', (least,))
  ours, theirs = models
  requests = _requests(rng)
  order = rng.permutation(len(requests))
  scores = likelihood.score(ours, [requests[i] for i in order], tokens=SMALL)
  expected = [_oracle(theirs, requests[i]) for i in order]
  assert len({score.log_prob for score in scores}) == len(requests) - 1
  for score, (log_prob, greedy) in zip(scores, expected, strict=True):
    assert score.log_prob == pytest.approx(log_prob, abs=TOLERANCE)
    assert score.greedy == greedy


@pytest.mark.quick(models=('Gemma3',))
def test_what_the_model_itself_would_say_is_greedy(models, rng):
  ours, theirs = models
  context = _draw(rng, 17)
  with torch.no_grad():
    said = theirs.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)
  said = tuple(said[0, len(context) :].tolist())
  wrong = (*said[:-1], (said[-1] + 1) % TINY['vocab_size'])
  early = ((said[0] + 1) % TINY['vocab_size'], *said[1:])
  requests = [Request(context, one) for one in (said, wrong, early, said[:1])]
  found = [score.greedy for score in likelihood.score(ours, requests)]
  assert found == [True, False, False, True]


@pytest.mark.quick(models=('Gemma3',))
@pytest.mark.parametrize(
  'context, continuation, options, message',
  [
    ((), (1,), {}, 'a context, and a continuation of 1 to 64 tokens, not 0 and 1 tokens'),
    ((1,), (), {}, 'not 1 and 0 tokens'),
    ((1,), (2,) * 65, {}, 'not 1 and 65 tokens'),
    ((1, 200), (2,), {}, 'the tokens 1 to 200, but the model has a vocabulary of 200'),
    ((1,), (-1,), {}, 'the tokens -1 to 1'),
    ((1,), (2,), {'max_length': 0}, 'max_length must be within 1 and the 64 positions, not 0'),
  ],
)
def test_bad_input_is_refused(models, context, continuation, options, message):
  with pytest.raises(ValueError, match=message):
    likelihood.score(models[0], [Request(context, continuation)], **options)
