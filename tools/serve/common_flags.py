"""Flags of several commands of ov-serve."""

from absl import flags

MODEL = flags.DEFINE_string("model", None, "Folder of an exported model; default: of the index.")
INDEX = flags.DEFINE_string("index", None, "Folder of the index.")
