"""New captions of the records of a source, in sidecar files; resumable by record.

The files are those of `ov_data.annotations` with `CAPTION_COLUMNS`, one per shard. A server is
expensive, so every answer is appended to `00000.journal` until the file of its shard is complete:
a killed run repeats only the requests that were in flight. The captioner of a folder computes an
unfinished shard again in the same batches.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np

from ov_data import (
  annotation,
  annotations,
  decode,
  fs,
  hashing,
  image_header,
  keep_list,
  output_lock,
  recaptions,
)
from ov_data.bad_records import BadRecords, Problem
from ov_data.example import FeatureError
from ov_data.sources import Dataset
from tools.data.caption_server import Answer, Client

_MIMES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # sent unchanged
_QUALITY = 95  # of re-encoded images
_MAX_TEXT = 4000  # characters of an alt text; longer ones are cut
_MAX_JOURNAL_BYTES = 4 << 30
_SMALL = 8  # pixels of the copy that verifies an image
_UPRIGHT = 1  # EXIF orientation

_T = TypeVar("_T")
Answers = Generator[tuple[int, Answer | Problem]]  # in any order
Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads images and alt texts. Thread-safe.

  Attributes:
    dataset: source of the records.
    bad: logs unexpected errors.
  """

  dataset: Dataset
  bad: BadRecords

  def __call__(
    self, record: int, prepare: Callable[[bytes], _T]
  ) -> tuple[_T, str | None] | Problem:
    """Return the prepared image and the first caption of a record, or why it is unusable.

    Args:
      record: number of the record.
      prepare: function of the encoded image; it raises DecodeError for unusable images.
    """
    problems: list[Problem] = []
    source = self.dataset.source
    with self.bad.catch(problems, lambda: self.dataset.location(record)):
      found = self.dataset.read(record, (source.image_key, *source.caption_keys))
      if found.image is None:
        raise FeatureError(f"no image under {source.image_key}")
      texts = (text for key in source.caption_keys for text in found.texts.get(key, ()))
      text = next((text for text in texts if text.strip()), b"").decode(errors="replace")
      return prepare(found.image), text.strip()[:_MAX_TEXT] or None
    return problems[0]


class Captioner(Protocol):
  """Source of captions.

  Attributes:
    fingerprint: text that determines the captions of given images and alt texts.
    keeps_journal: whether answers are stored one by one; otherwise, a shard is computed again.
  """

  @property
  def fingerprint(self) -> str: ...

  keeps_journal: bool

  def run(self, records: Sequence[int], read: Reader) -> Answers:
    """Yield the answer of each record, in any order."""


@dataclasses.dataclass(frozen=True)
class Summary:
  """Result of `recaption`.

  Attributes:
    records: number of records of the source.
    captioned: number of records that this run captioned, or found to be unusable.
    bad, first_bad, damaged: see `ov_data.annotation.Summary`.
    prompt_tokens, completion_tokens: tokens of all records, also of earlier runs.
    unknown: number of records whose tokens the server did not report.
  """

  records: int
  captioned: int
  bad: dict[str, int]
  first_bad: dict[str, str]
  damaged: int
  prompt_tokens: int
  completion_tokens: int
  unknown: int


def recaption(
  dataset: Dataset,
  out: str | os.PathLike[str],
  captioner: Captioner,
  *,
  max_bad_fraction: float = 0.1,
  progress: Progress | None = None,
) -> Summary:
  """Write captions of every record of a source.

  Args:
    dataset: source without keep-list.
    out: folder of the captions; an interrupted run resumes there.
    captioner: source of the captions.
    max_bad_fraction: fraction of unusable records above which the run stops.
    progress: called with the number of records that were completed.

  Raises:
    ValueError: if the source has a keep-list, the folder has other captions, another process writes
      to it, or the server rejects the request.
    OSError: if the server is not reachable.
    TooManyBadRecords: if too many records are unusable.
    ImportError: if pyarrow is not installed.
  """
  if dataset.keep is not None:
    raise ValueError(f"keep_list={dataset.source.keep_list}: captions are for all records; omit it")
  folder = pathlib.Path(out)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file; expected a new folder, or one of captions")
  dataset.check_keys()
  report = progress or (lambda _: None)
  rows = annotation.shards(dataset)
  identity = hashlib.sha256(captioner.fingerprint.encode()).hexdigest()[:16]
  info = annotations.Info(
    keep_list.identity(dataset), " ".join(dataset.source.paths), tuple(map(len, rows)), identity,
    annotations.CAPTION_COLUMNS, 0,
  )  # fmt: skip
  recipe = _recipe(info, dataset)
  writer = annotations.Writer(folder, info, recipe)
  bad = BadRecords(max_bad_fraction, len(dataset))
  read = Reader(dataset, bad)
  captioned = 0
  with output_lock.locked(folder):
    writer.check_recipe()
    for shard, records in enumerate(rows):
      path = folder / f"{shard:05}.journal"
      if writer.is_complete(shard, len(records)):
        report(len(records))
      else:
        with contextlib.closing(Journal(path, recipe, captioner.keeps_journal)) as journal:
          found = _answers(dataset, captioner, records, read, bad, journal, report)
        captioned += len(records) - journal.resumed
        writer.write(shard, _rows(records, found))
      path.unlink(missing_ok=True)
    complete = writer.finish()
    _write_for_training(folder, complete)
  reasons, first = annotation.unusable(complete)
  return Summary(
    len(dataset), captioned, reasons, first, writer.damaged, *_usage(complete)
  )  # fmt: skip


def _write_for_training(folder: pathlib.Path, found: annotations.Annotations) -> None:
  """Write the files that training reads; see `ov_data.recaptions`."""
  facts = json.dumps([found.info.source, found.info.rows, found.info.footers])
  fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
  captions = (
    texts
    for shard in range(len(found.info.rows))
    for texts in found.read(shard, ("captions",))["captions"]
  )
  recaptions.write(folder, found.info.source, fingerprint, len(found), captions)


class Journal:
  """Answers of an unfinished shard, one per line with a checksum.

  Failed records are only in it for their tokens: a repeated command tries them again.

  Args:
    path: file of the journal.
    recipe: everything that determines the answers.
    is_kept: whether to store answers; otherwise, only the methods exist.

  Attributes:
    answers: stored answers by record.
    spent: tokens of failed requests by record.
    resumed: number of answers that earlier runs stored.

  Raises:
    ValueError: if the journal belongs to another recipe.
  """

  def __init__(self, path: pathlib.Path, recipe: str, is_kept: bool):
    self.answers: dict[int, Answer] = {}
    self.spent: dict[int, tuple[int, int]] = {}
    self._file: io.BufferedRandom | None = None
    good = self._load(path, recipe) if is_kept and path.exists() else 0
    self.resumed = len(self.answers)
    if is_kept:
      self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
      self._file.truncate(good)  # a line that a killed run did not complete
      self._file.seek(good)
      if not good:
        self._append([recipe])

  def add(self, record: int, answer: Answer) -> Answer:
    """Store an answer, and return it with the tokens of earlier failed requests."""
    if record in self.spent:
      prompt, completion = self.spent.pop(record)
      answer = dataclasses.replace(
        answer,
        prompt_tokens=(answer.prompt_tokens or 0) + prompt,
        completion_tokens=(answer.completion_tokens or 0) + completion,
      )
    self._append([record, answer.captions, answer.prompt_tokens, answer.completion_tokens])
    return answer

  def close(self) -> None:
    """Close the file."""
    if self._file is not None:
      self._file.close()

  def _append(self, content: list[Any]) -> None:
    if self._file is not None:
      line = json.dumps(content).encode()
      self._file.write(b"%08x %s\n" % (google_crc32c.value(line), line))
      self._file.flush()

  def _load(self, path: pathlib.Path, recipe: str) -> int:
    """Read the lines of a journal and return the number of intact bytes."""
    good = 0
    for number, line in enumerate(io.BytesIO(fs.read_regular(str(path), _MAX_JOURNAL_BYTES))):
      checksum, _, content = line.partition(b" ")
      if checksum != b"%08x" % google_crc32c.value(content[:-1]) or line[-1:] != b"\n":
        break
      values = json.loads(content)
      if not number and values != [recipe]:
        raise ValueError(
          f"{path} was written for other data, another model or other settings; choose another "
          "--output, or remove the folder"
        )
      if number:
        record, captions, *tokens = values
        if captions is None:
          self.spent[record] = (tokens[0] or 0, tokens[1] or 0)
        else:
          self.answers[record] = Answer(tuple(captions), None, "", *tokens)
      good += len(line)
    return good


class ServerCaptioner:
  """Captions of a server, with concurrent requests.

  Args:
    client: client of the server.
  """

  keeps_journal = True

  def __init__(self, client: Client, max_side: int):
    if max_side < 16:
      raise ValueError(f"max_side={max_side}: expected at least 16")
    self._client, self._max_side = client, max_side

  @property
  def fingerprint(self) -> str:
    """Model, prompt, sampling and image size, not URL and limits."""
    return json.dumps([dataclasses.asdict(self._client.request), self._max_side])

  def run(self, records: Sequence[int], read: Reader) -> Answers:
    """See `Captioner`."""
    concurrent = self._client.limits.concurrent
    waiting = iter(records)
    running: dict[futures.Future[Answer | Problem], int] = {}
    with futures.ThreadPoolExecutor(concurrent, "ov-recaption") as pool:
      try:
        while True:
          for record in itertools.islice(waiting, 2 * concurrent - len(running)):
            running[pool.submit(self._caption, record, read)] = record
          if not running:
            return
          for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
      except BaseException:
        self._client.close()
        for future in running:
          future.cancel()
        raise

  def _caption(self, record: int, read: Reader) -> Answer | Problem:
    found = read(record, functools.partial(_sendable, max_side=self._max_side))
    if isinstance(found, Problem):
      return found
    (image, mime), text = found
    return self._client.caption(record, image, mime, text)


class FolderCaptioner:
  """Captions of an exported model, sampled with a seed per record and caption.

  Args:
    model: `ov_serve.Model` that generates captions; it reads the image only.
    captions: number of captions per image.
    temperature, top_k, top_p: see `ov_models.generate`.
    seed: seed of the sampling.
    batch_size: number of images per batch.

  Raises:
    ValueError: if the model generates no captions, or a number is out of range.
  """

  keeps_journal = False

  def __init__(
    self, model: Any, *, captions: int, temperature: float, top_k: int | None, top_p: float,
    seed: int, batch_size: int,
  ):  # fmt: skip
    if not model.can_caption:
      raise ValueError("the model has no caption decoder; expected a captioner, or use --server")
    if min(captions, batch_size) < 1:
      raise ValueError(f"captions={captions}, batch_size={batch_size}: expected at least 1")
    self._model, self._captions, self._seed, self._batch = model, captions, seed, batch_size
    self._options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

  @property
  def fingerprint(self) -> str:
    """Model, sampling, and batch size, which can change the last bits of probabilities."""
    facts = [self._model.fingerprint, self._captions, self._seed, self._batch, self._options]
    return json.dumps(facts)

  def run(self, records: Sequence[int], read: Reader) -> Answers:
    """See `Captioner`."""
    with futures.ThreadPoolExecutor(thread_name_prefix="ov-recaption") as pool:
      start = lambda first: [
        (record, pool.submit(read, record, self._model.decode))
        for record in records[first : first + self._batch]
      ]
      following = start(0)
      for first in range(0, len(records), self._batch):
        batch, following = following, start(first + self._batch)
        images: list[Any] = []
        usable = []
        for record, task in batch:
          if isinstance(found := task.result(), Problem):
            yield record, found
          else:
            usable.append(record)
            images.append(found[0])
        answers = self._sample(usable, images) if usable else []
        yield from zip(usable, answers, strict=True)

  def _sample(self, records: Sequence[int], images: Sequence[Any]) -> list[Answer]:
    drawn = [
      self._model.sample_captions(
        np.stack(images), [hashing.key(self._seed, record, number) for record in records],
        **self._options,
      )
      for number in range(self._captions)
    ]  # fmt: skip
    return [
      Answer(tuple(row.text for row in rows), None, "", 0, sum(row.tokens for row in rows))
      for rows in zip(*drawn, strict=True)
    ]


def _answers(
  dataset: Dataset, captioner: Captioner, records: range, read: Reader, bad: BadRecords,
  journal: Journal, progress: Progress,
) -> dict[int, Answer | Problem]:  # fmt: skip
  """Return the answers of a shard: those of the journal, and new ones."""
  found: dict[int, Answer | Problem] = dict(journal.answers)
  progress(len(found))
  missing = [record for record in records if record not in found]
  with contextlib.closing(captioner.run(missing, read)) as answers:
    for record, answer in answers:
      problems = []
      if isinstance(answer, Answer):
        answer = journal.add(record, answer)
        if answer.error is not None:
          detail = f"{answer.error}: {answer.detail}" if answer.detail else answer.error
          problems.append(Problem(answer.error, dataset.location(record), detail))
      else:
        problems.append(answer)
      found[record] = answer
      bad.add(problems, 1)
      progress(1)
  if len(found) != len(records):
    raise RuntimeError(f"{len(found)} answers for {len(records)} records")
  for record, answer in found.items():
    if isinstance(answer, Answer) and answer.error is not None:
      found[record] = dataclasses.replace(answer, detail=dataset.location(record))
  return found


def _rows(records: range, found: dict[int, Answer | Problem]) -> annotations.Rows:
  """Return the rows of a shard; the detail of a failed answer is its location."""
  rows = annotations.Rows()
  for record in records:
    answer = found[record]
    if isinstance(answer, Problem):
      answer = Answer(None, answer.reason, answer.location)
    rows.error.append(answer.error)
    rows.location.append(None if answer.error is None else fs.printable(answer.detail))
    rows.captions.append(None if answer.captions is None else list(answer.captions))
    rows.prompt_tokens.append(answer.prompt_tokens)
    rows.completion_tokens.append(answer.completion_tokens)
    rows.record.append(record)
  return rows


def _sendable(data: bytes, max_side: int) -> tuple[bytes, str]:
  """Return an upright image of a common format with sides of at most `max_side`, and its type.

  Raises:
    DecodeError: if the image is damaged or exceeds the limits.
  """
  decode.thumbnail(data, _SMALL)
  header = image_header.read_header(data)
  mime = _MIMES.get(header.format)
  if mime and header.orientation == _UPRIGHT and max(header.width, header.height) <= max_side:
    return data, mime
  image = decode.full(data)
  image.thumbnail((max_side, max_side))
  file = io.BytesIO()
  image.save(file, "JPEG", quality=_QUALITY)
  return file.getvalue(), "image/jpeg"


def _usage(found: annotations.Annotations) -> tuple[int, int, int]:
  """Return prompt tokens, completion tokens, and the number of captioned records without them."""
  prompt = completion = unknown = 0
  for shard in range(len(found.info.rows)):
    columns = found.read(shard, ("prompt_tokens", "completion_tokens", "captions"))
    prompt += int(columns["prompt_tokens"].filled(0).sum())
    completion += int(columns["completion_tokens"].filled(0).sum())
    is_null = np.ma.getmaskarray(columns["prompt_tokens"])
    unknown += sum(
      captions is not None and null
      for captions, null in zip(columns["captions"], is_null.tolist(), strict=True)
    )
  return prompt, completion, unknown


def _recipe(info: annotations.Info, dataset: Dataset) -> str:
  """Return 16 hex digits of everything that determines the files, except the image bytes."""
  facts = {**dataclasses.asdict(info), "path": ""}  # the data may be moved
  source = dataset.source
  content = [annotations.FORMAT, facts, source.image_key, source.caption_keys]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
