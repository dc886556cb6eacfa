"""What a manifest is made from: an app with its flags; how it is stopped and started again."""

from collections.abc import Sequence
import dataclasses
import re

from tools.tpu import names

APPS = ("caption_train", "clip_train")
# A name becomes part of the names of pods, which add numbers and letters and may have 63 in all.
_LONGEST_NAME = 40
_TIME = re.compile(r"([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]")
_WORD = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]*")
_IMAGE = re.compile(
  r"[a-z0-9][-._a-z0-9]*(:[0-9]+)?(/[-._a-z0-9]+)*(:[-._A-Za-z0-9]+)?(@sha256:[0-9a-f]{64})?"
)


@dataclasses.dataclass(frozen=True)
class Job:
  """An app to run.

  Attributes:
    name: of the job.
    app: a module of apps.
    config: as its --config takes it.
    workdir: of the run.
    arguments: further ones of the app.
    grace: seconds between SIGTERM and the end; a checkpoint must be written in them.
    restarts: how often a failed job begins again, from its last checkpoint.
  """

  name: str
  app: str
  config: str
  workdir: str
  arguments: tuple[str, ...]
  grace: int
  restarts: int

  def __post_init__(self) -> None:
    names.name(self.name)
    if len(self.name) > _LONGEST_NAME:
      raise ValueError(
        f"--name={self.name!r} has {len(self.name)} letters; at most {_LONGEST_NAME}"
      )
    for flag in ("config", "workdir"):
      if not getattr(self, flag):
        raise ValueError(f"--{flag} is missing; the app needs it")
    for value in (self.config, self.workdir, *self.arguments):
      if not value.isprintable():
        raise ValueError(f"{value!r}: expected letters that can be printed, in one line")

  def command(self, python: str, workdir: str, more: Sequence[str] = ()) -> list[str]:
    """The arguments of the process that runs the app."""
    own = [f"--config={self.config}", f"--workdir={workdir}", *more]
    return [python, "-m", f"apps.{self.app}", *own, *self.arguments]


USER_MISTAKE = 2  # an app's exit code when starting again would not help


def shared_workdir(workdir: str) -> str:
  """A folder that all machines see, or gs://BUCKET/PATH."""
  return bucket_workdir(workdir) if "://" in workdir else workdir


def bucket_workdir(workdir: str) -> str:
  _, _, path = names.bucket(workdir, "--workdir").removeprefix("gs://").partition("/")
  if not path.strip("/"):
    raise ValueError(f"--workdir={workdir}; expected gs://BUCKET/PATH, a folder for each run")
  return workdir


def time_limit(value: str) -> str:
  if not _TIME.fullmatch(value):
    raise ValueError(f"--time={value!r}; expected HH:MM:SS or D-HH:MM:SS")
  return value


def word(value: str, flag: str) -> str:
  if not _WORD.fullmatch(value):
    raise ValueError(f"{flag}={value!r}; expected letters, digits, dots and dashes")
  return value


def image(value: str) -> str:
  if not _IMAGE.fullmatch(value):
    raise ValueError(f"--image={value!r}; expected the image of a registry: HOST/PATH:TAG")
  return value
