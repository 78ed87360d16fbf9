"""Images with what is known of them, in three splits: found, checked, divided, decoded, and delivered in batches."""

from attnsurgery.data.embedded import SIZES, embedded_name
from attnsurgery.data.kinds import several_classes
from attnsurgery.data.load import Data, FirstTask, count_files, labelled_images, load_data, native_size
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.data.source import IGNORED, Masks, Source, Sources

__all__ = [
    "IGNORED",
    "SIZES",
    "Data",
    "FirstTask",
    "Masks",
    "Preprocessing",
    "Source",
    "Sources",
    "count_files",
    "embedded_name",
    "labelled_images",
    "load_data",
    "native_size",
    "several_classes",
]
