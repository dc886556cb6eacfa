"""Named combinations of losses, with their requirements on model and data.

openvision  CLIP loss over two texts per image, and captioning by learned queries, arXiv 2505.04601
clip        softmax contrastive loss only, arXiv 2103.00020
siglip      sigmoid contrastive loss only, arXiv 2303.15343
coca        CLIP loss with a causal text tower, and teacher-forced captioning, arXiv 2205.01917;
            here text tower and decoder share no layers, and image tokens are a prefix
cappa       captioning only, three quarters of the examples in parallel, arXiv 2306.07915
"""

from ml_collections import ConfigDict

OBJECTIVES = ("openvision", "clip", "siglip", "coca", "cappa")


def use_objective(config: ConfigDict, name: str) -> None:
  """Set the losses `name` in a configuration of base.clip_config.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in OBJECTIVES:
    raise ValueError(f"loss={name!r}: expected one of {', '.join(OBJECTIVES)}")
  model, loss = config.model, config.loss
  loss.update(clip=1.0, siglip=0.0, caption=0.0)
  config.input.sentence_positive = name == "openvision"
  if name in ("clip", "siglip"):
    model.decoder, config.input.caption_keys = "", ()
  if name == "openvision":
    loss.caption = 2.0
  elif name == "siglip":
    loss.update(clip=0.0, siglip=1.0)
    model.update(scale_init=10.0, bias_init=-10.0)
  elif name == "coca":
    loss.caption = 2.0
    model.decoder_kind = "teacher_forced"
    model.text_options = ConfigDict({**model.text_options.to_dict(), "mask": "causal"})
  elif name == "cappa":
    loss.update(clip=0.0, caption=1.0)
    model.update(text="", decoder_kind="teacher_forced", parallel_ratio=0.75)
