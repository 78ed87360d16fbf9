"""The settings of a search, each declared once.

The command line, configuration files, environment variables, the check of a resumed search and the report use these
fields (`attnsurgery.settings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from attnsurgery.catalog import Declaration, declarations
from attnsurgery.errors import UsageError
from attnsurgery.recipe.schema import Strict
from attnsurgery.recipe.strict_yaml import writes
from attnsurgery.settings import (
    Amount,
    Augment,
    ClassWeights,
    ImageSize,
    Mode,
    RankBy,
    Setting,
    TrainDtype,
    settings_of,
)

AUTO: Literal["auto"] = "auto"
"""The value of a setting that the search chooses for the data and the model."""
FIRST_SEEDS = 3
"""Trainings of a model from which on their variance is estimated well enough for a verdict."""
DEFAULT_BASE = "test_resnet"
"""The default model: small enough for a search in minutes on a laptop, with four stages."""

BUDGET, MODEL, TRAINING = "Budget", "Model and data", "Training"
CHOOSING, MEASURING, WORKERS, STORING = "Choosing candidates", "Measuring", "Workers", "Storage"


def _ordered(declared: Iterable[Declaration], *first: str) -> list[Declaration]:
    """The entries that the help lists by name, those in `first` before all others."""
    entries = {entry.name: entry for entry in declared if not entry.hidden}
    return [entries[name] for name in (*first, *sorted(entries.keys() - set(first))) if name in entries]


def _names(entries: Iterable[Declaration]) -> str:
    return "|".join(entry.name for entry in entries)


def _summaries(entries: Iterable[Declaration]) -> str:
    texts = [", ".join(filter(None, (entry.name, entry.summary))) for entry in entries]
    return "; ".join([*texts[:-1], *(f"or {text}" for text in texts[-1:])])


# the catalogs themselves would import torch and Optuna, which takes seconds
_TASKS = declarations("attnsurgery.tasks", "attnsurgery.tasks")
_SAMPLERS = _ordered(declarations("attnsurgery.samplers", "attnsurgery.samplers"), "additive", "tpe")
_EVALUATORS = [
    *_ordered(declarations("attnsurgery.evaluate", "attnsurgery.evaluators"), "finetune"),
    Declaration("supernet", "all candidates at once"),  # it trains many candidates, so it is no Evaluator
]
_BACKENDS = _ordered(declarations("attnsurgery.latency", "attnsurgery.latency"))
_LAUNCHERS = _ordered(declarations("attnsurgery.search.workers.launch", "attnsurgery.launchers"), "local")


class SearchConfig(Strict):
    """All settings of a search; equal settings make the same search."""

    budget_ms: Annotated[
        float | None, Field(gt=0, description="Maximum latency of one forward pass, in ms."), Setting(BUDGET)
    ] = None
    budget_ips: Annotated[
        float | None,
        Field(gt=0, description="Minimum throughput of the measured forward pass, in images per second."),
        Setting(BUDGET),
    ] = None
    budget_params: Annotated[
        Amount | None,
        Field(gt=0, description="Maximum number of parameters, such as 26M."),
        Setting(BUDGET, metavar="N"),
    ] = None
    budget_macs: Annotated[
        Amount | None,
        Field(gt=0, description="Maximum number of multiply-accumulates of one image, such as 4.2G."),
        Setting(BUDGET, metavar="N"),
    ] = None
    budget_mb: Annotated[
        float | None,
        Field(gt=0, description="Maximum peak memory of one forward pass, in MB: weights, input, live activations."),
        Setting(BUDGET),
    ] = None
    base: Annotated[
        str,
        Field(description="Any timm architecture; a tag is allowed."),
        Setting(MODEL, hidden=True),
    ] = DEFAULT_BASE
    data: Annotated[
        str | None,
        Field(
            description="Image folder, table such as labels.csv, folder of .tar shards, or a name such as "
            "hfds/cifar10; embedded data: pairs and digits."
        ),
        Setting(MODEL, default="the embedded pairs", may_change=True),
    ] = None
    task: Annotated[
        str,
        Field(description="What models are trained for, or a class of your own as 'module:Class'."),
        Setting(MODEL, metavar=_names(_TASKS)),
    ] = "classification"
    metric: Annotated[
        str | None,
        Field(
            description="What models are judged by: top1, balanced (accuracy) or f1 for classification; map or f1 for "
            "multilabel; miou or pixel (accuracy) for segmentation."
        ),
        Setting(MODEL, metavar="NAME", default="the task's first: top1"),
    ] = None
    input_size: Annotated[
        ImageSize | None,
        Field(description="Height and width of the images, in pixels: 96, or 96x128 with the height first."),
        Setting(MODEL, metavar="N|HxW", default="what suits model and data"),
    ] = None
    augment: Annotated[
        Augment | None,
        Field(
            description="How training images are varied: none; shift; light, which also mirrors them left to right; "
            "or timm, random resized crops."
        ),
        Setting(MODEL, default="light, or shift where a mirrored image seems to be of another class"),
    ] = None
    group_by: Annotated[
        str | None,
        Field(
            description="A regular expression on the paths of images, such as 'patient\\d+': images with the same "
            "match stay in one split."
        ),
        Setting(MODEL, metavar="PATTERN"),
    ] = None
    pretrained: Annotated[bool, Field(description="Start from timm's published weights."), Setting(MODEL)] = False
    checkpoint: Annotated[
        str | None,
        Field(description="Start from the weights in this file."),
        Setting(MODEL, metavar="FILE", may_change=True),
    ] = None
    space: Annotated[
        str,
        Field(description="Search space: auto, tiny, se, non_local, dual, residual, full, or a YAML file."),
        Setting(CHOOSING, metavar="NAME|FILE", may_change=True),
    ] = "auto"
    trials: Annotated[
        int,
        Field(ge=1, description="Candidates within the budget to train, over all runs."),
        Setting(CHOOSING, may_change=True),
    ] = 10
    sampler: Annotated[
        str,
        Field(description="Chooses the next candidate."),
        Setting(CHOOSING, metavar=_names(_SAMPLERS)),
    ] = "additive"
    rank_by: Annotated[
        RankBy, Field(description="What orders candidates on the validation images."), Setting(CHOOSING)
    ] = "metric"
    rungs: Annotated[
        str,
        Field(
            description="Cheaper trainings that come first, such as 'blocks:1'; the best candidates of each are "
            "trained on the next."
        ),
        Setting(CHOOSING, metavar="'NAME:EPOCHS ...'"),
    ] = ""
    halving: Annotated[
        int, Field(ge=2, description="Reduction factor (eta) of successive halving."), Setting(CHOOSING)
    ] = 3
    finalists: Annotated[
        int,
        Field(ge=1, le=20, description="Best candidates that are trained again, to choose the winner among them."),
        Setting(CHOOSING, may_change=True),
    ] = 3
    confirm_seeds: Annotated[
        Annotated[int, Field(ge=1, le=20)] | Literal["auto"],
        Field(
            description="Trainings of each finalist, then of winner and base for the verdict; auto takes three, and "
            "adds more to the verdict until it is decided."
        ),
        Setting(CHOOSING, metavar="N|auto", may_change=True),
    ] = "auto"
    max_seeds: Annotated[
        int,
        Field(ge=3, le=50, description="Most trainings of winner and base with --confirm-seeds auto."),
        Setting(CHOOSING, may_change=True),
    ] = 8
    difference: Annotated[
        float,
        Field(
            ge=0, lt=100, description="Smallest gain that matters, in points of the metric: the verdict looks for it."
        ),
        Setting(CHOOSING, metavar="POINTS", may_change=True),
    ] = 0.5
    reliability: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="First candidates that are trained from a second seed, which tells how reliable their ranking "
            "is: at most half of --trials.",
        ),
        Setting(CHOOSING, metavar="N", may_change=True),
    ] = 6
    seed: Annotated[
        int, Field(ge=0, lt=2**31, description="The same seed makes the same search."), Setting(CHOOSING)
    ] = 0
    epochs: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        Field(
            description="Epochs of each trial, and of the confirmation; auto doubles them while the base gains from it."
        ),
        Setting(TRAINING, metavar="N|auto"),
    ] = AUTO
    against: Annotated[
        str | None,
        Field(
            description="Other timm models, and other input sizes of the base, that are trained under the same budget: "
            "'resnet34,seresnet50:192,:160'; or none."
        ),
        Setting(
            CHOOSING,
            metavar="NAME[:SIZE],...",
            default="with --pretrained, up to three models of the family that fit",
            may_change=True,
        ),
    ] = None
    final_epochs: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        Field(
            description="Epochs of the trainings for the verdict, of which one is saved; their weights are averaged. "
            "auto is twice the epochs of a trial."
        ),
        Setting(TRAINING, metavar="N|auto", may_change=True),
    ] = "auto"
    base_epochs: Annotated[
        int, Field(ge=1, description="Epochs of a base without weights, or of a new head."), Setting(TRAINING)
    ] = 2
    lr: Annotated[
        Annotated[float, Field(gt=0)] | Literal["auto"],
        Field(description="Peak learning rate; auto chooses one for the base and one for the candidates."),
        Setting(TRAINING, metavar="RATE|auto"),
    ] = AUTO
    block_lr_scale: Annotated[
        Annotated[float, Field(gt=0)] | Literal["auto"],
        Field(description="Learning rate of blocks, relative to --lr."),
        Setting(TRAINING, metavar="FACTOR|auto"),
    ] = AUTO
    train_batch_size: Annotated[int, Field(ge=2, description="Images in one training step."), Setting(TRAINING)] = 64
    class_weights: Annotated[
        ClassWeights,
        Field(
            description="Weights of classes in the loss: none, or balanced, inversely proportional to their numbers of "
            "images."
        ),
        Setting(TRAINING),
    ] = "none"
    evaluator: Annotated[
        str,
        Field(description=f"How a trial is trained: {_summaries(_EVALUATORS)}."),
        Setting(TRAINING, metavar=_names(_EVALUATORS)),
    ] = "finetune"
    train_dtype: Annotated[
        TrainDtype,
        Field(description="Number format of training; bfloat16 is mixed precision, on CUDA only."),
        Setting(TRAINING, default="bfloat16 on CUDA", by_device=True),
    ] = "float32"
    device: Annotated[
        str,
        Field(description="Where models are measured and trained: auto, cpu, cuda, cuda:1 ..."),
        Setting(MEASURING, default="a GPU where there is one"),
    ] = "cpu"
    batch_size: Annotated[int, Field(ge=1, description="Images in one measured forward pass."), Setting(MEASURING)] = 1
    dtype: Annotated[
        str,
        Field(description="Number format of the measured forward pass."),
        Setting(MEASURING, metavar="float32|bfloat16|float16", default="bfloat16 on CUDA", by_device=True),
    ] = "float32"
    mode: Annotated[
        Mode,
        Field(description="How the measured forward pass runs."),
        Setting(MEASURING, default="cudagraph on CUDA, else eager", by_device=True),
    ] = "eager"
    channels_last: Annotated[
        bool,
        Field(description="Memory layout of the measured forward pass, and of training on CUDA."),
        Setting(
            MEASURING,
            flags=("--channels-last/--channels-first",),
            default="channels last on CUDA in half precision",
            by_device=True,
        ),
    ] = False
    tf32: Annotated[
        bool,
        Field(description="On CUDA, float32 convolutions and matrix products may round to TF32."),
        Setting(MEASURING),
    ] = False
    cudnn_benchmark: Annotated[
        bool, Field(description="On CUDA, cuDNN tries its algorithms and keeps the fastest."), Setting(MEASURING)
    ] = False
    cold_cache: Annotated[
        bool,
        Field(description="Flush the cache before every measured forward pass, so that weights come from memory."),
        Setting(MEASURING),
    ] = False
    threads: Annotated[
        int, Field(ge=0, description="CPU threads of the measured forward pass; 0 for all."), Setting(MEASURING)
    ] = 1
    latency: Annotated[
        str | None,
        Field(description="What the measured model runs in."),
        Setting(MEASURING, metavar=_names(_BACKENDS), default="torch"),
    ] = None
    latency_seconds: Annotated[
        float,
        Field(gt=0, description="Time spent on one measurement, in s."),
        Setting(MEASURING, may_change=True, hidden=True),
    ] = 1.5
    workers: Annotated[
        int,
        Field(ge=0, le=1024, description="Processes that measure and train, one per GPU; 0 for none beside this one."),
        Setting(WORKERS, may_change=True),
    ] = 1
    launcher: Annotated[
        str,
        Field(description=f"What starts workers: {_summaries(_LAUNCHERS)}."),
        Setting(WORKERS, metavar=_names(_LAUNCHERS), may_change=True),
    ] = "local"
    launcher_args: Annotated[
        str,
        Field(description="Arguments of the launcher, such as 'slurm_partition=gpu'."),
        Setting(WORKERS, metavar="'NAME=VALUE ...'", may_change=True),
    ] = ""
    in_step: Annotated[
        bool,
        Field(description="Several workers wait for each other, so that the same seed makes the same search."),
        Setting(WORKERS),
    ] = False
    patience_minutes: Annotated[
        float,
        Field(gt=0, description="Minutes without a sign of life after which a worker is ended and its trial retried."),
        Setting(WORKERS, may_change=True),
    ] = 10.0
    output: Annotated[
        str,
        Field(description="Run directory."),
        Setting(STORING, flags=("--output", "-o"), metavar="DIR", default="runs/<name>", may_change=True),
    ] = "runs/search"
    storage: Annotated[
        str | None,
        Field(
            description="Optuna storage URL. The environment variable does not show a password to other users of the "
            "machine."
        ),
        Setting(STORING, metavar="URL", default="SQLite in the run directory", may_change=True),
    ] = None
    lease_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="At a shared --storage, seconds after which another process takes over a lease that was not "
            "renewed.",
        ),
        Setting(STORING, may_change=True),
    ] = 60.0
    extend: Annotated[
        bool,
        Field(description="Resume although budgets, hardware or library versions changed, or the space offers more."),
        Setting(STORING, flags=("--extend",), may_change=True),
    ] = False

    @property
    def tunes(self) -> bool:
        """Whether a setting of the training is left to the search."""
        return AUTO in (self.lr, self.block_lr_scale, self.epochs)

    @property
    def first_seeds(self) -> int:
        """Trainings of each finalist, and of winner and base at the first look of the verdict."""
        return FIRST_SEEDS if isinstance(self.confirm_seeds, str) else self.confirm_seeds

    @property
    def most_seeds(self) -> int:
        """Trainings of winner and base at the last look of the verdict."""
        return self.max_seeds if isinstance(self.confirm_seeds, str) else self.confirm_seeds

    @property
    def latency_budget_ms(self) -> float | None:
        """The latency budget in ms: the smaller of `budget_ms` and what `budget_ips` leaves for a batch."""
        by_throughput = 1000.0 * self.batch_size / self.budget_ips if self.budget_ips else None
        return min((limit for limit in (self.budget_ms, by_throughput) if limit is not None), default=None)

    @model_validator(mode="before")
    @classmethod
    def _device_defaults(cls, values: Any) -> Any:
        """Fill in settings that are missing or None with the usual values for the device."""
        if not isinstance(values, Mapping):
            return values
        values = {name: value for name, value in values.items() if value is not None or name not in BY_DEVICE}
        if values.keys() >= set(BY_DEVICE):  # nothing to fill in: the latency backend need not be installed
            return values
        device, latency = str(values.get("device", "cpu")), values.get("latency")
        return {**defaults_on(device, latency, values.get("dtype")), **values}

    @model_validator(mode="after")
    def _has_a_budget(self) -> SearchConfig:
        if not (self.latency_budget_ms or self.budget_params or self.budget_macs or self.budget_mb):
            raise UsageError(
                "a search needs a budget: --budget-ms, --budget-ips, --budget-params, --budget-macs or --budget-mb, or "
                "several."
            )
        if self.train_dtype != "float32" and not self.device.startswith("cuda"):
            raise UsageError(f"--train-dtype {self.train_dtype} needs a CUDA device, not {self.device}.")
        if self.reliability == 1:
            raise UsageError("--reliability 1: one candidate has no rank. Give 2 or more, or 0 for none.")
        if self.workers == 0 and self.launcher != "local":
            raise UsageError(f"--launcher {self.launcher} starts workers, and --workers 0 wants none. Leave one out.")
        return self

    def as_yaml(self) -> str:
        """All settings as a file that `--config` reads, under the headings of the help; without a storage URL, which
        may hold a password."""
        lines, heading = [], ""
        for name, setting in settings_of(type(self)).items():
            if name == "storage":
                continue
            if setting.group != heading:
                heading = setting.group
                lines.append(f"# {heading}")
            lines.append(writes({name: getattr(self, name)}).rstrip())
        return "\n".join(lines) + "\n"


BY_DEVICE = tuple(name for name, setting in settings_of(SearchConfig).items() if setting.by_device)
"""Settings whose defaults depend on the device."""


def defaults_on(device: str, latency: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The default values of `BY_DEVICE`.

    Args:
        device: as torch names it.
        latency: name of a latency backend; None for the device's own.
        dtype: the number format of measurements, if it is given.

    Raises:
        UnknownNameError: there is no such backend.
    """
    from attnsurgery.latency import LATENCY, device_defaults  # which need torch, and the fields above do not

    measured = device_defaults(device, dtype) if latency is None else LATENCY[latency].defaults(device, dtype)
    return {**measured, "train_dtype": "bfloat16" if device.partition(":")[0] == "cuda" else "float32"}
