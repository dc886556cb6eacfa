"""Embed, search and serve images with a trained model."""

from ov_serve.app import create_app
from ov_serve.embedding import Summary, embed
from ov_serve.evaluation import evaluate
from ov_serve.guard import Limits
from ov_serve.index import Hit, Index, Info, RecordEntry
from ov_serve.model import Caption, Model
from ov_serve.source import open_images

__all__ = [
  "Caption",
  "Hit",
  "Index",
  "Info",
  "Limits",
  "Model",
  "RecordEntry",
  "Summary",
  "create_app",
  "embed",
  "evaluate",
  "open_images",
]
