"""What a search is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from attnsurgery.errors import UsageError
from attnsurgery.evaluate.augment import Augment
from attnsurgery.latency import LATENCY, Mode, device_defaults
from attnsurgery.recipe.schema import Strict

RankBy = Literal["top1", "loss"]
"""What candidates are ranked by, on the validation split. The loss also tells how sure a model was of each image, so it
tells candidates apart that get as many of them right; but those that are surer need not be right more often."""

TrainDtype = Literal["float32", "bfloat16"]

DEFAULT_BASE = "test_resnet"
"""Small enough to search for in minutes on a laptop, with four stages to choose from."""


class SearchConfig(Strict):
    """A whole search as data; the same data does the same search."""

    budget_ms: Annotated[float, Field(gt=0)] | None = Field(default=None, description="of a forward, most milliseconds")
    budget_ips: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="least throughput of measured forwards, in images per second"
    )
    budget_params: Annotated[int, Field(gt=0)] | None = Field(default=None, description="most parameters")
    budget_macs: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="most multiply-accumulates of one image"
    )
    budget_mb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="most memory at a time in a measured forward, MB: weights, input, live activations"
    )
    base: str = Field(default=DEFAULT_BASE, description="any timm architecture, a tag allowed")
    space: str = Field(default="tiny", description="a space that ships, or a YAML file")
    data: str | None = Field(default=None, description="image folder or data set name; none: the embedded digits")
    augment: Augment | None = Field(
        default=None, description="of training images: none, shift, light or timm; none given: what suits the data"
    )
    group_by: str | None = Field(
        default=None, description="regular expression on images' paths: images of a group stay in one split"
    )
    pretrained: bool = False
    checkpoint: str | None = None
    trials: Annotated[int, Field(ge=1)] = Field(default=10, description="trained trials within the budget")
    epochs: Annotated[int, Field(ge=1)] = Field(default=3, description="of each trial and of the confirmation")
    base_epochs: Annotated[int, Field(ge=1)] = Field(
        default=2, description="of a base that comes without weights, or of its new head"
    )
    train_batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Annotated[float, Field(gt=0)] = 1e-3
    evaluator: str = "finetune"
    rungs: str = Field(default="", description="cheaper ways to train that come first: 'blocks:1 blocks:3'")
    halving: Annotated[int, Field(ge=2)] = Field(default=3, description="one in so many goes to the next rung")
    sampler: str = Field(default="additive", description="which candidate is next: additive, tpe, nsga2 or random")
    rank_by: RankBy = Field(default="top1", description="what orders candidates on the validation split: top1, or loss")
    finalists: Annotated[int, Field(ge=1, le=20)] = Field(
        default=3, description="of the best that are trained again, to choose the winner among them"
    )
    confirm_seeds: Annotated[int, Field(ge=1, le=20)] = Field(
        default=2, description="trainings of each of these, then of winner and base for the verdict"
    )
    input_size: Annotated[int, Field(ge=8)] | None = Field(default=None, description="pixels a side")
    device: str = "cpu"
    dtype: str = Field(default="float32", description="of a measured forward; on CUDA bfloat16 by default")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=1, description="images in a measured forward")
    mode: Mode = Field(default="eager", description="of a measured forward; on CUDA cudagraph by default")
    channels_last: bool = Field(
        default=False, description="of a measured forward, and of training on CUDA; there the default with half floats"
    )
    tf32: bool = Field(default=False, description="float32 on CUDA may round to TF32, measured and trained")
    cudnn_benchmark: bool = Field(default=False, description="cuDNN tries its algorithms before a measurement")
    cold_cache: bool = Field(default=False, description="the cache is flushed before every measured forward")
    train_dtype: TrainDtype = Field(
        default="float32", description="of training: bfloat16 is mixed precision, on CUDA only, and the default there"
    )
    threads: Annotated[int, Field(ge=0)] = Field(default=1, description="CPU threads of a measured forward; 0: all")
    latency: str | None = Field(default=None, description="a latency backend; none: the device's own")
    latency_seconds: Annotated[float, Field(gt=0)] = Field(default=1.5, description="spent on one measurement")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=1, description="processes that measure and train; 0: this process does it itself"
    )
    launcher: str = Field(default="local", description="what starts workers: local, ray or submitit")
    launcher_args: str = Field(default="", description="what the launcher is asked for: 'NAME=VALUE ...'")
    in_step: bool = Field(
        default=False, description="several workers get their candidates together: the same seed gives the same trials"
    )
    lease_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="at a shared study, what a search does not renew for so long is taken over by others"
    )
    extend: bool = Field(default=False, description="go on though software or machine are others")
    patience_minutes: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="a worker without a sign of life for so long is ended"
    )
    output: str = Field(default="runs/search", description="the run directory")
    storage: str | None = Field(default=None, description="Optuna storage URL; none: SQLite in the run directory")

    @property
    def most_ms(self) -> float | None:
        """The latency budget in ms: the smaller of `budget_ms` and what `budget_ips` leaves for a batch."""
        by_throughput = 1000.0 * self.batch_size / self.budget_ips if self.budget_ips else None
        return min((most for most in (self.budget_ms, by_throughput) if most is not None), default=None)

    @model_validator(mode="before")
    @classmethod
    def _device_defaults(cls, given: Any) -> Any:
        """What is not given, or is None, is as models are usually deployed and trained on the device."""
        if not isinstance(given, Mapping):
            return given
        given = {name: value for name, value in given.items() if value is not None or name not in BY_DEVICE}
        if given.keys() >= set(BY_DEVICE):  # nothing to fill in: a backend that is gone by now need not be there
            return given
        device, latency = str(given.get("device", "cpu")), given.get("latency")
        return {**defaults_on(device, latency, given.get("dtype")), **given}

    @model_validator(mode="after")
    def _has_a_budget(self) -> SearchConfig:
        if not (self.most_ms or self.budget_params or self.budget_macs or self.budget_mb):
            raise UsageError(
                "a search needs a budget: --budget-ms, --budget-ips, --budget-params, --budget-macs or --budget-mb, or "
                "several."
            )
        if self.train_dtype != "float32" and not self.device.startswith("cuda"):
            raise UsageError(f"--train-dtype {self.train_dtype} needs a CUDA device, not {self.device}.")
        if self.workers == 0 and self.launcher != "local":
            raise UsageError(f"--launcher {self.launcher} starts workers, and --workers 0 wants none. Leave one out.")
        return self


BY_DEVICE = ("dtype", "mode", "channels_last", "train_dtype")
"""Settings whose defaults depend on the device."""


def defaults_on(device: str, latency: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Values of `BY_DEVICE` where they are not given.

    Args:
        latency: a latency backend; None for the device's own.

    Raises:
        UnknownNameError: there is no such backend.
    """
    measured = device_defaults(device, dtype) if latency is None else LATENCY[latency].defaults(device, dtype)
    return {**measured, "train_dtype": "bfloat16" if device.partition(":")[0] == "cuda" else "float32"}
