"""Evaluators, which train a model and give it a score."""

from attnsurgery.evaluate._base import EVALUATORS, Epoch, Evaluator, Score, TrainSettings, Watch
from attnsurgery.evaluate.finetune import answers, evaluate, train
from attnsurgery.evaluate.head import fit_head

__all__ = [
    "EVALUATORS",
    "Epoch",
    "Evaluator",
    "Score",
    "TrainSettings",
    "Watch",
    "answers",
    "evaluate",
    "fit_head",
    "train",
]
