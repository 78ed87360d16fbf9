"""Tasks: what models are trained for, and how they are judged."""

from attnsurgery.tasks._base import TASKS, Criterion, Evaluation, Metric, Task, balanced_weights, task_of
from attnsurgery.tasks.ratios import ratio_of_sums

__all__ = ["TASKS", "Criterion", "Evaluation", "Metric", "Task", "balanced_weights", "ratio_of_sums", "task_of"]
