"""Collect the commands in README.md and docs/."""

from collections.abc import Iterator
import dataclasses
import pathlib
import re
import shlex

_BLOCK = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"tools/bazel run //([\w/]+)(?::(\w+))?")


@dataclasses.dataclass(frozen=True)
class Command:
  """A command in a documentation page.

  Attributes:
    page: path of the page.
    text: the command on one line, with variables expanded and comments removed.
  """

  page: str
  text: str

  @property
  def words(self) -> list[str]:
    """Return the words of the command, without leading variables such as OV_EXTRAS=tpu."""
    words = shlex.split(self.text)
    while re.match(r"[A-Z_]+=", words[0]):
      words = words[1:]
    return words

  @property
  def program(self) -> str | None:
    """Return the file that `tools/bazel run` starts, such as "apps/export.py", or None."""
    if found := re.match(_RUN, " ".join(self.words)):
      return f"{found[1]}/{found[2] or found[1].rpartition('/')[2]}.py"
    return None

  @property
  def arguments(self) -> list[str]:
    """Return the arguments after "--"."""
    return self.words[self.words.index("--") + 1 :] if "--" in self.words else []


def collect(page: pathlib.Path) -> list[Command]:
  """Return the commands in the `sh` blocks of a page, with variables of earlier lines expanded."""
  variables: dict[str, str] = {}
  commands = []
  for block in re.findall(_BLOCK, page.read_text("utf-8")):
    for line in _lines(block):
      line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
      words = shlex.split(line)
      if len(words) == 1 and (setting := re.fullmatch(r"([a-z]+)=(.*)", words[0])):
        variables[setting[1]] = setting[2]
      elif words:
        commands.append(Command(page.as_posix(), shlex.join(words)))
  return commands


def _lines(block: str) -> Iterator[str]:
  """Yield the logical lines of a block: comments removed, continued lines and quotes joined."""
  pending = ""
  for line in block.replace("\\\n", " ").splitlines():
    pending += re.sub(r"(^|\s)#\s.*", "", line)
    try:
      shlex.split(pending)
    except ValueError:  # an open quote
      pending += "\n"
    else:
      yield pending
      pending = ""


def pages() -> list[pathlib.Path]:
  """Return README.md and the pages of docs/."""
  return [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").glob("*.md"))]
