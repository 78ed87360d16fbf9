"""Images in three splits, and evaluators, which train a model and give it a score."""

from attnsurgery.evaluate._base import EVALUATORS, Epoch, Evaluator, Score, TrainSettings, Watch
from attnsurgery.evaluate.data import Data, FirstTask, count_files, load_data, native_size
from attnsurgery.evaluate.embedded import SIZES, embedded_name
from attnsurgery.evaluate.finetune import accuracy, answers, train
from attnsurgery.evaluate.head import fit_head
from attnsurgery.evaluate.preprocess import Preprocessing

__all__ = [
    "EVALUATORS",
    "SIZES",
    "Data",
    "Epoch",
    "Evaluator",
    "FirstTask",
    "Preprocessing",
    "Score",
    "TrainSettings",
    "Watch",
    "accuracy",
    "answers",
    "count_files",
    "embedded_name",
    "fit_head",
    "load_data",
    "native_size",
    "train",
]
