"""Tests of the text processor and tokenizer saved in the workdir."""

import pytest

from apps.trainer.inputs import check_text_processor, open_tokenizer, save_text_processor
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.workdir import Workdir
from ov_data import TextProcessor, Tokenizer


@pytest.fixture(scope="module")
def short():
  return TextProcessor(Tokenizer.train(["a large red circle above a small blue square"], 60), 12)


@pytest.fixture(scope="module")
def long(short):
  return TextProcessor(short.tokenizer, 20)


@pytest.fixture
def workdir(tmp_path):
  return Workdir(tmp_path)


def kept(workdir):
  return TextProcessor.load(workdir.path / "tokenizer").length


def test_later_stage_replaces_text_processor(workdir, short, long):
  check_text_processor(workdir, [short, long])  # nothing is kept, so nothing is wrong
  save_text_processor(workdir, short, replace=True)
  assert kept(workdir) == 12
  check_text_processor(workdir, [short, long])
  save_text_processor(workdir, long, replace=True)
  assert kept(workdir) == 20
  check_text_processor(workdir, [short, long])


def test_evaluation_does_not_change_workdir(workdir, short, long):
  save_text_processor(workdir, long, replace=False)
  save_text_processor(workdir, short, replace=False)
  assert kept(workdir) == 20


def test_text_processor_of_no_stage_is_rejected(workdir, short, long):
  save_text_processor(workdir, short, replace=True)
  with pytest.raises(ValueError, match="belongs to texts of 12 tokens, .* requires 20 tokens"):
    check_text_processor(workdir, [long, long])
  other = TextProcessor(short.tokenizer, 30)
  with pytest.raises(ValueError, match="requires 20 tokens, .* or 30 tokens"):
    check_text_processor(workdir, [long, other])


def test_no_text_processor_without_text_tower(workdir, short):
  save_text_processor(workdir, None, replace=True)
  assert not (workdir.path / "tokenizer").exists()
  save_text_processor(workdir, short, replace=True)
  check_text_processor(workdir, [None])


def tokenizer_config(path=""):
  return RunConfig.parse({"tokenizer": {"path": path}})


@pytest.mark.parametrize("left", ([], ["tokenizer.json"], ["packing.json"], ["notes.txt"]))
def test_incomplete_tokenizer_is_recreated(workdir, short, tmp_path, left):
  short.tokenizer.save(tmp_path / "given")
  folder = workdir.path / "tokenizer"
  folder.mkdir()
  for name in left:
    (folder / name).write_text("half")
  config = tokenizer_config(str(tmp_path / "given"))
  opened = open_tokenizer(config, workdir, Terminal(active=False))
  assert opened.fingerprint == short.tokenizer.fingerprint
  assert Tokenizer.load(folder).fingerprint == short.tokenizer.fingerprint
  aside = workdir.path / "tokenizer.incomplete-0"
  assert [path.name for path in aside.iterdir()] == left if left else not aside.exists()


def test_incomplete_tokenizer_with_checkpoints_is_an_error(workdir, short, tmp_path):
  short.tokenizer.save(tmp_path / "given")
  (workdir.path / "tokenizer").mkdir()
  (workdir.path / "checkpoints" / "4").mkdir(parents=True)
  with pytest.raises(ValueError, match="is incomplete, but the checkpoints in .* need its token"):
    open_tokenizer(tokenizer_config(str(tmp_path / "given")), workdir, Terminal(active=False))
