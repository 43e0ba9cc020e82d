"""Child processes that answer one request at a time, for measurements in interleaved rounds.

A child reads a job, one line of JSON, and answers with one line of JSON when it is ready. From then
on it answers each line with one line of JSON, and waits in between, so that only one side works at
a time. It ends at the end of its input. Lines that do not begin with a brace are ignored, because
libraries print greetings.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

Answer = dict[str, Any]
SHOWN_CHARACTERS = 800  # of what a child wrote to stderr before it failed


@dataclasses.dataclass(frozen=True)
class Child:
  """A child process that waits for a line."""

  name: str
  process: subprocess.Popen
  errors: IO[str]  # what it writes to stderr

  def ask(self, line: str) -> Answer:
    """Sends a line and waits for the answer. Raises ValueError if the process ends instead."""
    # Where it has ended already, its output says so.
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.write(line + '\n')
      self.process.stdin.flush()
    for answer in self.process.stdout:
      if answer.startswith('{'):
        return json.loads(answer)
    status = self.process.wait()
    self.errors.seek(0)
    said = self.errors.read().strip()[-SHOWN_CHARACTERS:]
    raise ValueError(f'{self.name} failed with status {status}: {said}')


@contextlib.contextmanager
def start(
  name: str, command: Sequence[str], job: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> Iterator[tuple[Child, Answer]]:
  """Starts a child with a job; yields it with its first answer, and ends it afterwards.

  `env` adds to the environment. Raises ValueError if it cannot be started or fails.
  """
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
  with tempfile.TemporaryFile('w+') as errors:
    try:
      process = subprocess.Popen(command, stderr=errors, env=os.environ | dict(env or {}), **pipes)
    except OSError as error:
      raise ValueError(f'{name} cannot be started: {error}') from None
    try:
      child = Child(name, process, errors)
      yield child, child.ask(json.dumps(job))
    finally:
      process.kill()
      process.communicate()


def read_job() -> Answer:
  """Reads the job; in a child."""
  return json.loads(sys.stdin.readline())


def serve(ready: Answer, answer: Callable[[str], Answer]) -> None:
  """Says that a child is ready, and answers requests until there are no more."""
  print(json.dumps(ready), flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(line.strip())), flush=True)
