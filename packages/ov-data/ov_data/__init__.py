"""Input pipeline from records and image files to numpy batches, without JAX."""

from ov_data.bad_records import TooManyBadRecords
from ov_data.decode import Crop, DecodeError, Limits
from ov_data.keep_list import KeepList
from ov_data.loader import Loader
from ov_data.order import Order
from ov_data.record_source import Record, RecordSource, Skip
from ov_data.records import RecordError
from ov_data.shards import find_shards
from ov_data.sources import Dataset, Source
from ov_data.text_processor import TextProcessor
from ov_data.texts import TextSpec
from ov_data.tokenizer import Tokenizer
from ov_data.writer import ShardWriter, Summary, write_dataset

__all__ = [
  "Crop",
  "Dataset",
  "DecodeError",
  "KeepList",
  "Limits",
  "Loader",
  "Order",
  "Record",
  "RecordError",
  "RecordSource",
  "ShardWriter",
  "Skip",
  "Source",
  "Summary",
  "TextProcessor",
  "TextSpec",
  "Tokenizer",
  "TooManyBadRecords",
  "find_shards",
  "write_dataset",
]
