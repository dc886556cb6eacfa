"""How texts reach a text tower is kept with the run: one way at a time, that of the stage."""

import pytest

from apps.trainer.inputs import check_text_processor, keep_text_processor
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


def test_a_later_stage_with_other_texts_takes_the_place_of_the_one_before(workdir, short, long):
  check_text_processor(workdir, [short, long])  # nothing is kept, so nothing is wrong
  keep_text_processor(workdir, short, replace=True)
  assert kept(workdir) == 12
  check_text_processor(workdir, [short, long])
  keep_text_processor(workdir, long, replace=True)
  assert kept(workdir) == 20
  check_text_processor(workdir, [short, long])


def test_evaluating_an_earlier_stage_leaves_the_workdir_alone(workdir, short, long):
  keep_text_processor(workdir, long, replace=False)
  keep_text_processor(workdir, short, replace=False)
  assert kept(workdir) == 20


def test_texts_of_no_stage_are_refused(workdir, short, long):
  keep_text_processor(workdir, short, replace=True)
  with pytest.raises(ValueError, match="belongs to texts of 12 tokens, .* asks for 20 tokens"):
    check_text_processor(workdir, [long, long])
  other = TextProcessor(short.tokenizer, 30)
  with pytest.raises(ValueError, match="asks for 20 tokens, .* or 30 tokens"):
    check_text_processor(workdir, [long, other])


def test_without_a_text_tower_nothing_is_kept_or_refused(workdir, short):
  keep_text_processor(workdir, None, replace=True)
  assert not (workdir.path / "tokenizer").exists()
  keep_text_processor(workdir, short, replace=True)
  check_text_processor(workdir, [None])
