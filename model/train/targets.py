"""Stores the next-token distributions of a teacher, which then need not be there in training.

A target has the K most likely tokens with their exact probabilities (the head) and N draws from
the rest (the tail), each of which stands for an N-th of the tail's probability:

  t_i  for i in the head,    (1 - sum of the head) / N  for each draw

So the mean over the draws is the teacher's distribution t, and the gradient of the cross entropy
has the mean q - t. The head alone, as it is often stored, has not: renormalized, it makes students
overconfident. K = 0 is random sampling distillation (Anshumann et al. 2025,
https://arxiv.org/abs/2503.16870); an exact head lowers the variance. The draws are stratified: draw
j inverts the cumulative sum of the tail at a random point of its j-th N-th, which keeps the mean
and lowers the variance again. The sum has 24 bits, so how often a token is drawn is off by up to
1e-7 of the tail.

What a stored target cannot do: its temperature is that of the file. The reverse KL and the JSD need
the teacher where the student has mass, which a file does not hold. The draws are fixed: a run of
several epochs sees the same ones again, and learns their noise where the head is small; take a
larger head, or write a file for each epoch with another seed.

  FOLDER/targets.json          who made it of what: fingerprints, settings, the size of each shard
  FOLDER/rows-00000.safetensors  for a number of rows:
    ids         [rows, T, K + N]  uint16, or uint32 where the vocabulary needs it
    log_probs   [rows, T, K]      of the head, float32 or float16
    logsumexp   [rows, T]         of the teacher's logits divided by the temperature, float32
    entropy     [rows, T]         of the teacher's distribution in nats, float32
    digest      [rows, 16]        of the tokens, segments and positions of the row, BLAKE2b
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import files, fingerprint, safetensors_io, shared_vocabulary
from model.safetensors_io import Tensor
from model.tokenizer import Tokenizer
from model.train.data import Batch, PackedDataset
from model.train.objectives import Network
from model.transformer import Transformer

ABOUT, KIND, VERSION = 'targets.json', 'targets', 1
SAMPLER = 'exact head, stratified tail'
DIGEST_BYTES = 16
DTYPES = ('float32', 'float16')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig:
  """What is stored of each token, and how it is computed.

  vocabulary: the tokens of the tokenizer; logits beyond it, the padding of the model's vocabulary,
    are cut before the softmax. None: all of the model.
  dtype: of the head's log-probabilities. float16 has a relative error up to 2e-3 in a probability
    of 0.01, and saves a third of the head.
  """

  head: int = 16  # K
  draws: int = 48  # N
  temperature: float = 1.0
  vocabulary: int | None = None
  dtype: str = 'float32'
  compute_dtype: str = 'float32'
  seed: int = 0
  rows_per_shard: int = 256
  batch_size: int = 8  # rows that the teacher reads at a time
  chunk: int = 1024  # tokens whose logits are held at a time

  def __post_init__(self):
    if self.head < 0 or self.draws < 0 or self.head + self.draws < 1:
      raise ValueError(f'a target holds tokens, not head {self.head} and draws {self.draws}')
    if not self.temperature > 0:
      raise ValueError(f'the temperature must be positive, not {self.temperature}')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype {self.dtype!r} is not one of {", ".join(DTYPES)}')
    for name in ('rows_per_shard', 'batch_size', 'chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}')


def of_logits(
  logits: jax.Array, uniform: jax.Array, head: int, temperature: float = 1.0
) -> dict[str, jax.Array]:
  """Computes the stored targets of logits [..., V].

  `uniform` holds random numbers [..., N] from 0 on and below 1. Returns ids [..., K + N],
  log_probs [..., K], logsumexp [...] and entropy [...], as the module describes them.
  """
  scaled = logits.astype(jnp.float32) / temperature
  logsumexp = jax.nn.logsumexp(scaled, axis=-1)
  log_p = scaled - logsumexp[..., None]
  log_probs, ids = jax.lax.top_k(log_p, head)
  tail = jnp.put_along_axis(jnp.exp(log_p), ids, 0.0, axis=-1, inplace=False)
  return {
    'ids': jnp.concatenate([ids, _draw(tail, uniform)], axis=-1),
    'log_probs': log_probs,
    'logsumexp': logsumexp,
    'entropy': -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
  }


def _draw(tail: jax.Array, uniform: jax.Array) -> jax.Array:
  """Draws N indices in proportion to tail [..., V], one from each N-th of the cumulative sum."""
  count = uniform.shape[-1]
  sums = jnp.cumsum(tail, axis=-1)
  # Above 0 and at most 1, so that the first sum that reaches it is that of a token with mass.
  ends = jnp.broadcast_to(jnp.arange(1.0, count + 1), uniform.shape)
  points = (ends - uniform) / max(count, 1) * sums[..., -1:]
  find = jnp.vectorize(jnp.searchsorted, signature='(v),(n)->(n)')
  return find(sums, points).astype(jnp.int32)


def digest(batch: Batch) -> np.ndarray:
  """BLAKE2b of all that the teacher's distributions depend on in each row: uint8 [B, 16]."""
  arrays = [np.asarray(a, '<i4') for a in (batch.tokens_BT, batch.segments_BT, batch.positions_BT)]
  rows = [b''.join(a[row].tobytes() for a in arrays) for row in range(len(arrays[0]))]
  hashed = [hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest() for row in rows]
  return np.frombuffer(b''.join(hashed), np.uint8).reshape(-1, DIGEST_BYTES)


def write(
  folder: str | pathlib.Path,
  teacher: Transformer,
  dataset: PackedDataset,
  tokenizer: Tokenizer,
  config: TargetConfig,
  progress: Callable[[Sequence], Iterable] = iter,
) -> None:
  """Writes the targets of every row of a data set.

  A run that was killed goes on after its last shard and ends with the same bytes. A folder that
  holds just these targets is left as it is. `progress` wraps the list of shards.

  Raises:
    ValueError: the settings do not fit the vocabulary, or the folder holds something else.
  """
  vocabulary = _vocabulary(teacher, config)
  about = _about(teacher, dataset, tokenizer, dataclasses.replace(config, vocabulary=vocabulary))
  with files.claim(folder, kind=KIND, on_wait=lambda _: None) as output:
    if _read_about(output.path) == about | {'shards': _read_about(output.path).get('shards')}:
      return
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    with output.writing(key) as partial:
      for left in partial.glob('.*.partial'):
        left.unlink()  # of a shard that was being written when a run was killed
      compute = _compute(teacher, config, vocabulary)
      firsts = range(0, dataset.rows, config.rows_per_shard)
      for first in progress(firsts):
        path = partial / _shard_name(first // config.rows_per_shard)
        if not _is_sound(path):
          rows = np.arange(first, min(first + config.rows_per_shard, dataset.rows))
          _write_shard(path, _stored(compute, dataset, rows, config, vocabulary))
      shards = [_shard_about(partial / _shard_name(n)) for n in range(len(firsts))]
      (partial / ABOUT).write_text(json.dumps(about | {'shards': shards}, indent=2) + '\n')


def _vocabulary(teacher: Transformer, config: TargetConfig) -> int:
  widest = teacher.config.vocab_size
  vocabulary = config.vocabulary or widest
  if not 1 <= vocabulary <= widest:
    raise ValueError(f'vocabulary must be within 1 and {widest}, not {vocabulary}')
  if config.head > vocabulary:
    raise ValueError(f'a head of {config.head} tokens, but the vocabulary has {vocabulary}')
  return vocabulary


def _about(teacher, dataset, tokenizer, config) -> dict[str, Any]:
  """All that the bytes of the files depend on, as JSON values."""
  return {
    'version': VERSION,
    'sampler': SAMPLER,
    'config': dataclasses.asdict(config),
    'rows': dataset.rows,
    'seq_len': dataset.seq_len,
    'teacher': fingerprint.of_model(teacher),
    'tokenizer': shared_vocabulary.fingerprint(tokenizer),
    'data': dataset.fingerprint,
  }


def _compute(teacher: Transformer, config: TargetConfig, vocabulary: int):
  """The compiled function from a batch and its row numbers to targets."""
  graphdef, params = nnx.split(teacher)

  @jax.jit
  def compute(params, batch: Batch, rows_B):
    model = nnx.merge(graphdef, params)
    model.dtype = jnp.dtype(config.compute_dtype)
    network = Network(model, config.chunk, remat=None)
    # A key for each row: what is drawn does not depend on the batch that a row comes in.
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(config.seed)))(rows_B)
    shape = (batch.tokens_BT.shape[1], config.draws)
    uniform_BT_ = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys_B)

    def of_chunk(x_BTD, uniform_BT_):
      logits_BTV = network.logits(x_BTD)[..., :vocabulary]
      return of_logits(logits_BTV, uniform_BT_, config.head, config.temperature)

    return network.over_tokens(of_chunk, network.hidden(batch), uniform_BT_)

  return functools.partial(compute, params)


def _stored(compute, dataset, rows, config, vocabulary) -> dict[str, np.ndarray]:
  """The arrays of one shard. The last batch is filled up, so that one program serves all."""
  types = {'ids': _id_dtype(vocabulary), 'log_probs': np.dtype(config.dtype)}
  parts = []
  for first in range(0, len(rows), config.batch_size):
    own = rows[first : first + config.batch_size]
    padded = np.resize(own, config.batch_size)
    batch = dataset.take(padded)
    found = compute(batch, padded.astype(np.uint32)) | {'digest': digest(batch)}
    parts.append({name: np.asarray(array)[: len(own)] for name, array in found.items()})
  joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  return {name: array.astype(types.get(name, array.dtype)) for name, array in joined.items()}


def _id_dtype(vocabulary: int) -> np.dtype:
  return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _write_shard(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  tensors = {
    n: Tensor(a.shape, a.dtype, functools.partial(np.asarray, a)) for n, a in arrays.items()
  }
  with files.atomic_file(path) as partial:
    safetensors_io.write_file(partial, tensors)


def _is_sound(path: pathlib.Path) -> bool:
  try:
    return path.is_file() and bool(safetensors_io.read_file(path))
  except ValueError:
    return False


def _shard_name(number: int) -> str:
  return f'rows-{number:05}.safetensors'


def _shard_about(path: pathlib.Path) -> dict[str, Any]:
  data = path.read_bytes()
  return {'name': path.name, 'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
  """The description of a folder of targets; {} if it has none of ours."""
  try:
    about = json.loads((folder / ABOUT).read_text())
  except (OSError, ValueError):
    return {}
  return about if isinstance(about, dict) else {}


class StoredTargets:
  """The targets of a folder; any row is read without those before it."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens a folder that `write` has finished.

    Raises:
      ValueError: there are no finished targets, they have another version, or a shard is missing,
        cut short or corrupt.
    """
    self._folder = pathlib.Path(folder)
    self.about = _read_about(self._folder)
    if self.about.get('version') != VERSION:
      raise ValueError(
        f'{folder} holds no targets of version {VERSION} ({ABOUT} is missing or another); write '
        'them, or let the run that writes them finish'
      )
    self.config = TargetConfig(**self.about['config'])
    self.rows, self.seq_len = self.about['rows'], self.about['seq_len']
    self._shards = [self._open(shard) for shard in self.about['shards']]
    found = sum(len(shard['digest']) for shard in self._shards)
    if found != self.rows:
      raise ValueError(f'{folder} should hold {self.rows} rows, but its shards have {found}')

  def _open(self, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    path = self._folder / shard['name']
    size = path.stat().st_size if path.is_file() else None
    if size != shard['bytes']:
      there = 'is missing' if size is None else f'has {size} bytes'
      raise ValueError(
        f'{path} {there}, but was written with {shard["bytes"]}: the targets are cut short; copy '
        'or write them again'
      )
    return {name: tensor.read() for name, tensor in safetensors_io.read_file(path).items()}

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the description, which has that of each shard."""
    return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

  @property
  def bytes_per_token(self) -> float:
    """The size of the shards by the number of tokens."""
    return sum(shard['bytes'] for shard in self.about['shards']) / (self.rows * self.seq_len)

  def verify(self) -> None:
    """Reads everything; raises ValueError if a shard is not, byte by byte, what was written."""
    for shard in self.about['shards']:
      if _shard_about(self._folder / shard['name']) != shard:
        raise ValueError(f'{self._folder / shard["name"]} was changed since it was written')

  def check(self, dataset: PackedDataset, tokenizer: Tokenizer | None = None) -> None:
    """Raises ValueError unless these are the targets of this data set, and of this tokenizer.

    Of a large data set, 64 rows are compared here; `read` compares each row that it reads.
    """
    if (self.rows, self.seq_len) != (dataset.rows, dataset.seq_len):
      raise ValueError(
        f'{self._folder} has targets for {self.rows} rows of {self.seq_len} tokens, but the data '
        f'set has {dataset.rows} of {dataset.seq_len}'
      )
    if tokenizer and shared_vocabulary.fingerprint(tokenizer) != self.about['tokenizer']:
      raise ValueError(f'{self._folder} has targets of a teacher of another tokenizer')
    for row in np.unique(np.linspace(0, self.rows - 1, 64).astype(int)):
      self.read([row], dataset.take([row]))

  def read(self, rows: Iterable[int], batch: Batch) -> dict[str, np.ndarray]:
    """Returns ids (int32), log_probs, logsumexp and entropy (float32) of the rows of a batch.

    Raises ValueError if a row has other tokens than those that the teacher has read.
    """
    parts = list(self._parts(rows))
    digests = np.stack([part['digest'] for part in parts])
    wrong = np.flatnonzero(np.any(digests != digest(batch), axis=1))
    if len(wrong):
      raise ValueError(
        f'row {list(rows)[wrong[0]]} has other tokens or documents than those that the teacher of '
        f'{self._folder} has read; use the data and the row length that it was written with'
      )
    types = {'ids': np.int32, 'log_probs': np.float32, 'logsumexp': np.float32}
    types |= {'entropy': np.float32}
    return {name: np.stack([part[name] for part in parts]).astype(t) for name, t in types.items()}

  def _parts(self, rows: Iterable[int]) -> Iterator[dict[str, np.ndarray]]:
    for row in rows:
      shard, at = divmod(int(row), self.config.rows_per_shard)
      yield {name: array[at] for name, array in self._shards[shard].items()}
