"""How texts reach a text tower is kept with the run: one way at a time, that of the stage."""

from ml_collections import ConfigDict
import pytest

from apps.trainer.inputs import check_text_processor, keep_text_processor, open_tokenizer
from apps.trainer.progress import Terminal
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


def tokenizer_config(path=""):
  config = ConfigDict({"tokenizer": {"path": path}, "eval_only": False, "ft_from": ""})
  config.init_from = ConfigDict({"path": ""})
  config.checkpoint = ConfigDict({"dir": ""})
  return config


@pytest.mark.parametrize("left", ([], ["tokenizer.json"], ["packing.json"], ["notes.txt"]))
def test_a_tokenizer_whose_save_was_interrupted_is_made_again(workdir, short, tmp_path, left):
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


def test_an_incomplete_tokenizer_of_a_run_with_checkpoints_is_refused(workdir, short, tmp_path):
  short.tokenizer.save(tmp_path / "given")
  (workdir.path / "tokenizer").mkdir()
  (workdir.path / "checkpoints" / "4").mkdir(parents=True)
  with pytest.raises(ValueError, match="is incomplete, but the checkpoints in .* need its token"):
    open_tokenizer(tokenizer_config(str(tmp_path / "given")), workdir, Terminal(active=False))
