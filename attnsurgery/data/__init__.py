"""Images with what is known of them, in three splits: found, checked, divided, decoded, and delivered in batches."""

from attnsurgery.data.embedded import SIZES, embedded_name
from attnsurgery.data.load import Data, FirstTask, count_files, load_data, native_size
from attnsurgery.data.preprocess import Preprocessing

__all__ = [
    "SIZES",
    "Data",
    "FirstTask",
    "Preprocessing",
    "count_files",
    "embedded_name",
    "load_data",
    "native_size",
]
