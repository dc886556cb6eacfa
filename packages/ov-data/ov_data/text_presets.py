"""Text preprocessing of published model families, by name."""

from collections.abc import Mapping
import dataclasses
from typing import Literal

from ov_data.text_cleaning import Clean


@dataclasses.dataclass(frozen=True)
class TextPreset:
  """Text preprocessing of a family; see `TextProcessor.from_preset`.

  Attributes:
    length: number of tokens T of a text.
    pool, padding: see `TextProcessor`.
    clean: see `text_cleaning`.
    special: see `Tokenizer`; texts begin with [bos] only if it is among them or this is None.
  """

  length: int
  pool: Literal["last", "argmax"]
  padding: Literal["attend", "mask"]
  clean: Clean = "none"
  special: Mapping[str, str] | None = None


# Texts of SigLIP end with the end token, also if they are too long, and are padded to T on the
# right; the text tower attends to padding and reads the last column. SigLIP pads with the end token
# (big_vision calls it sticky), SigLIP 2 with the padding token of Gemma.
PRESETS = {
  # Byte-level BPE; https://arxiv.org/abs/2103.00020
  "clip": TextPreset(77, "argmax", "attend"),
  # SentencePiece unigram; https://arxiv.org/abs/2303.15343
  "siglip": TextPreset(
    64, "last", "attend", "siglip", {"pad": "</s>", "eos": "</s>", "unk": "<unk>"}
  ),
  # BPE of Gemma with byte fallback; https://arxiv.org/abs/2502.14786
  "siglip2": TextPreset(
    64, "last", "attend", "lower", {"pad": "<pad>", "eos": "<eos>", "unk": "<unk>"}
  ),
}
