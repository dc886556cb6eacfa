"""Settings that published CLIP protocols share: towers of arXiv 2103.00020, softmax loss, AdamW.

`datacomp.py` and `slip.py` add the sizes, schedule and data of their protocol. docs/references.md
lists the published numbers, and how these runs differ from the published ones.
"""

from collections.abc import Mapping
import os
from typing import Any

from ml_collections import ConfigDict

from apps.configs.base import clip_config
from apps.configs.objectives import use_objective

# Arguments of all protocols.
ARGUMENTS = {
  "txt_key": "txt",  # record feature with the text; several as a+b, one is drawn
  "vocab_path": "",  # tokenizer of the run; "" trains WordPiece on the captions
  "imagenet": "",  # TFDS folder of ImageNet for zero-shot classification; "" disables it
  "accumulate": 1,  # micro-batches; the gradient stays exact
  "dtype": "bfloat16",
  "remat": "full",
}
_VOCABULARY = 49_408


def clip_protocol(
  a: ConfigDict, encoder: str, encoder_options: Mapping[str, Any], activation: str
) -> ConfigDict:
  """Return the shared settings of a protocol at 224 px with batches of 4,096.

  Args:
    a: arguments, with the keys of ARGUMENTS.
    encoder: variant and patch size of the image encoder.
    encoder_options: fields of ov_models.ViTConfig beyond a cls token and learned positions.
    activation: activation of the text tower.
  """
  config = clip_config()
  config.batch_size = 4096
  config.accumulate = a.accumulate
  config.model.update(
    encoder=encoder,
    text="B",
    image_size=224,
    token_len=77,
    vocab_size=_VOCABULARY,
    preset="clip",
    embed_dim=512,
    dtype=a.dtype,
    remat=a.remat,
  )
  config.model.encoder_options = ConfigDict(
    {"pool": "tok", "position": "learned", **encoder_options}
  )
  text_options: dict[str, Any] = {"activation": activation, "norm_eps": 1e-5}
  if not a.vocab_path:  # the last id of a trained tokenizer is a word, not the end of the text
    text_options["pool"] = "last"
  config.model.text_options = ConfigDict(text_options)
  config.input.update(alt_keys=tuple(a.txt_key.split("+")), color_jitter=False)
  use_objective(config, "clip")
  config.loss.max_scale = 100.0
  config.optimizer.update(learning_rate=5e-4, b1=0.9, b2=0.98, mu_dtype="float32")
  config.tokenizer.update(path=os.path.expanduser(a.vocab_path), train_vocab_size=_VOCABULARY)
  if a.imagenet:
    config.eval.zero_shot.update(
      dir=os.path.expanduser(a.imagenet),
      split="validation",
      image_key="image",
      classes="imagenet",
    )
  return config
