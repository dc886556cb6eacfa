"""Lines are counted in the given revision, not in the working tree."""

import subprocess

import pytest

from tools.ci import lines


@pytest.fixture
def repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
  (tmp_path / "packages/a/b").mkdir(parents=True)
  (tmp_path / "packages/a/b/x.py").write_text("1\n2\n3\n")
  (tmp_path / "packages/a/b/x_test.py").write_text("1\n")
  (tmp_path / "y.py").write_text("1\n")
  (tmp_path / "y.txt").write_text("1\n")
  git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com"]
  for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
    subprocess.run([*git, *command], check=True)
  (tmp_path / "y.py").write_text("1\n2\n")
  return tmp_path


def test_lines_of_a_revision(repository):
  expected = {("packages/a", False): 3, ("packages/a", True): 1, ("", False): 1}
  assert lines.count("HEAD") == expected


def test_table_ends_with_sums(repository):
  first, *_, last = lines.table({"HEAD": lines.count("HEAD")})
  assert first.split() == ["folder", "HEAD", "source", "HEAD", "tests"]
  assert last.split() == ["all", "4", "1"]


def test_unknown_revision_gives_a_one_line_error(repository, monkeypatch):
  monkeypatch.setattr("sys.argv", ["lines.py", "nothing"])
  with pytest.raises(SystemExit, match="(?i)not a valid object name nothing"):
    lines.main()
