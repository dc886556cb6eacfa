"""Write new captions of a source, from images and alt texts, in sidecar files.

  bazel run //tools/data:recaption -- --input=/data/shards --split=train --output=/data/captions \
    --server=http://localhost:8000/v1 --served_model=Qwen/Qwen2.5-VL-7B-Instruct --captions=3

--server is any server with the chat completions of OpenAI, such as vLLM; its API key is read from
the environment variable that --api_key_env names. --model=FOLDER uses a captioner of
`//apps:export -- --format=safetensors` instead, which reads only the image. Both sample among the
--top_k most likely tokens, weighted by their probability. The output has one Parquet file per shard
(`ov_data.annotations`). Repeat the command to resume an interrupted run.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import os
from typing import TYPE_CHECKING

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.data import source_flags

if TYPE_CHECKING:
  from tools.data import captions

_PROMPT = (
  "Describe this image in one paragraph, for a reader who cannot see it. The image was published "
  "with the text below, which may be wrong or unrelated; use it only where the image agrees. "
  "Answer with the description only.\n\n{caption}"
)
_PROMPT_WITHOUT_TEXT = (
  "Describe this image in one paragraph, for a reader who cannot see it. Answer with the "
  "description only."
)
_MILLION = 1_000_000

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the captions.")
_MODEL = flags.DEFINE_string("model", None, "Folder of an exported captioner.")
_SERVER = flags.DEFINE_string("server", None, "Base URL, such as http://localhost:8000/v1.")
_SERVED_MODEL = flags.DEFINE_string("served_model", "", "Name of the model on the server.")
_KEY = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "Environment variable with the key.")
_CAPTIONS = flags.DEFINE_integer("captions", 1, "Captions per image.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divisor of the logits.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Most likely tokens to sample from; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability mass of the tokens to sample from.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling, with the position of the record.")
_TEMPLATE = flags.DEFINE_string("prompt", _PROMPT, "Prompt with {caption} for the alt text.")
_WITHOUT = flags.DEFINE_string(
  "prompt_without_text", _PROMPT_WITHOUT_TEXT, "Prompt of records without alt text."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Maximum tokens of a caption of the server.")
_MAX_SIDE = flags.DEFINE_integer("max_side", 1024, "Larger images are resized for the server.")
_RATE = flags.DEFINE_float("requests_per_second", 0.0, "Maximum rate of requests; 0 for no limit.")
_CONCURRENT = flags.DEFINE_integer("concurrent", 16, "Maximum number of concurrent requests.")
_TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds until a request counts as failed.")
_ATTEMPTS = flags.DEFINE_integer("attempts", 6, "Failed requests after which a record is unusable.")
_MAX_WAIT = flags.DEFINE_float("max_wait", 600.0, "A longer Retry-After (seconds) ends the run.")
_PROMPT_PRICE = flags.DEFINE_float("prompt_price", None, "Price of a million prompt tokens.")
_PRICE = flags.DEFINE_float("completion_price", None, "Price of a million generated tokens.")


def main() -> None:
  one_captioner = bool(_SERVER.value) != bool(_MODEL.value)
  if not (source_flags.INPUT.value and _OUTPUT.value and one_captioner):
    raise UserError(
      "give --input=DATA, --output=FOLDER, and either --server=URL with --served_model=NAME or "
      "--model=FOLDER"
    )
  try:
    with user_errors():
      print(recaption(os.path.expanduser(_OUTPUT.value)))
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def recaption(out: str) -> str:
  """Write captions according to the flags and return a summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; missing flags are reported before.
  import ov_data
  from tools.data import captions
  from tools.data.progress import Counter

  captioner = _server(_SERVER.value) if _SERVER.value else _folder(_MODEL.value or "")
  dataset = source_flags.open_input()
  try:
    with Counter("captioning", len(dataset)) as counter:
      summary = captions.recaption(
        dataset, out, captioner, max_bad_fraction=source_flags.MAX_BAD.value, progress=counter
      )
  except ov_data.TooManyBadRecords as error:
    raise ValueError(str(error)) from error
  return "\n".join([
    f"{out}: {summary.records:,} records; {summary.captioned:,} captioned in this run",
    _cost(summary),
    *([f"damaged: {summary.damaged:,} files, renamed to *.damaged-N and computed again"]
      if summary.damaged else []),
    *(f"unusable: {count:,} {reason} (the first: {summary.first_bad[reason]})"
      for reason, count in summary.bad.items()),
  ])  # fmt: skip


def _server(url: str) -> "captions.ServerCaptioner":
  from tools.data import caption_server, captions

  request = caption_server.Request(
    _SERVED_MODEL.value, _TEMPLATE.value, _WITHOUT.value, _CAPTIONS.value, _TEMPERATURE.value,
    _TOP_P.value, _TOP_K.value, _MAX_TOKENS.value, _SEED.value,
  )  # fmt: skip
  limits = caption_server.Limits(
    _RATE.value, _CONCURRENT.value, _TIMEOUT.value, _ATTEMPTS.value, _MAX_WAIT.value
  )
  key = os.environ.get(_KEY.value, "")
  client = caption_server.Client(url, request, limits, key)
  return captions.ServerCaptioner(client, _MAX_SIDE.value)


def _folder(folder: str) -> "captions.FolderCaptioner":
  import ov_serve
  from tools.data import captions

  return captions.FolderCaptioner(
    ov_serve.Model.load(os.path.expanduser(folder)), captions=_CAPTIONS.value,
    temperature=_TEMPERATURE.value, top_k=_TOP_K.value or None, top_p=_TOP_P.value,
    seed=_SEED.value, batch_size=source_flags.BATCH_SIZE.value,
  )  # fmt: skip


def _cost(summary: "captions.Summary") -> str:
  """Return a line with the tokens of all runs, and their price."""
  line = (
    f"tokens: {summary.prompt_tokens:,} of prompts and images, "
    f"{summary.completion_tokens:,} generated"
  )
  if summary.unknown:
    line += f"; not reported for {summary.unknown:,} records"
  if _PROMPT_PRICE.value is not None or _PRICE.value is not None:
    price = summary.prompt_tokens * (_PROMPT_PRICE.value or 0)
    price += summary.completion_tokens * (_PRICE.value or 0)
    line += f"; price: {price / _MILLION:,.4f}"
  return line


if __name__ == "__main__":
  run_app(main)
