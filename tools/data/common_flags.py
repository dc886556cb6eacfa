"""Flags of every app here that writes shards."""

from absl import flags

OUTPUT = flags.DEFINE_string("output", None, "Folder for the shards.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other random choices.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one for each core.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --output.")
