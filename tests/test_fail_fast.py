"""A base over the budget ends a search before anything is trained, with what would fit."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
import timm
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.evaluate import finetune
from attnsurgery.latency import Conditions, Latency
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.search import Listener, SearchConfig, run
from attnsurgery.search.execution import assemble as assembling
from attnsurgery.search.execution import baseline
from attnsurgery.search.execution.assemble import assemble, before_images
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.execution.over_budget import BaseFacts, refuse_over_budget
from attnsurgery.search.execution.preview import preview
from attnsurgery.search.execution.what_fits import Alternative, siblings, what_fits
from attnsurgery.search.files import Journal
from attnsurgery.search.storage.run_directory import CONFIG, WEIGHTS
from attnsurgery.search.storage.schema import STUDY, TRIALS
from attnsurgery.search.watching import StopRequested, Watching
from attnsurgery.search.workers import worker
from attnsurgery.search.workers.launch import Link, OnMessage
from attnsurgery.search.workers.launch.processes import Processes
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_space(tmp_path_factory.mktemp("space"))


@pytest.fixture
def config(tmp_path: Path, images: Path, space: Path) -> SearchConfig:
    return change(small_search(images, space, tmp_path / "run"), input_size=64, trials=1)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments of every training."""
    calls: list[object] = []
    real = finetune.train

    def spy(*args: object, **named: object) -> object:
        calls.append(args)
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(baseline, "train", spy)
    monkeypatch.setattr(finetune, "train", spy)
    return calls


def latency_at(config: SearchConfig, size: int, name: str = "test_resnet") -> float:
    """The computed latency of a model with two classes, in ms."""
    backend = FixedLatency(Conditions(input_size=(3, size, size), threads=1))
    return backend.measure(timm.create_model(name, num_classes=2)).p50_ms


def arguments_of(config: SearchConfig, **budgets: float) -> list[str]:
    """The command line of a small search with these budgets."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in budgets.items()]
    settings = ["--input-size=64", "--trials=1", "--epochs=1", "--base-epochs=1", "--workers=0", "--latency=fixed"]
    settings += [
        "--lr=1e-3",
        "--block-lr-scale=10",
        "--finalists=1",
        "--confirm-seeds=1",
        f"--data={config.data}",
        f"--space={config.space}",
    ]
    return ["search", "test_resnet", f"--output={config.output}", *settings, *options]


def bench_of(config: SearchConfig) -> Bench:
    return assemble(config, Listener())


def watching() -> Watching:
    return Watching(Listener(), lambda: False)


# The search


@pytest.mark.slow
def test_search_over_budget_trains_nothing(config: SearchConfig, trainings: list[object]) -> None:
    """A base over the latency budget is refused before training, and the same directory serves a larger budget."""
    base_ms = latency_at(config, 64)
    result = CliRunner().invoke(build_app(), arguments_of(config, budget_ms=base_ms * 0.99))
    assert result.exit_code == 3
    message = " ".join(result.stderr.split())
    assert f"no candidate fits {base_ms * 0.99:.4g} ms (cpu, float32, batch 1, input 3x64x64" in message
    assert (
        f"The base test_resnet alone takes {base_ms:.4g} ms (95 % interval {base_ms:.4g} to {base_ms:.4g} ms)"
        in message
    )
    assert not trainings
    assert not Path(config.output).exists()
    again = CliRunner().invoke(build_app(), arguments_of(config, budget_ms=base_ms * 10))
    assert again.exit_code == 0, again.stderr
    assert trainings, "the search that is within its budget trains"
    assert (Path(config.output) / "best.yaml").is_file()


@pytest.mark.parametrize("budgets", [{"budget_ms": 0.01}, {"budget_params": 100_000}, {"budget_macs": 1_000_000}])
@pytest.mark.slow
def test_preview_over_budget_exits_with_3(
    config: SearchConfig, budgets: dict[str, float], trainings: list[object]
) -> None:
    """A dry run of a search whose base is over a budget ends with exit code 3, and writes nothing."""
    result = CliRunner().invoke(build_app(), [*arguments_of(config, **budgets), "--dry-run"])
    assert result.exit_code == 3
    assert "The base test_resnet alone" in " ".join(result.stderr.split())
    assert not trainings
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({"budget_params": 100_000}, r"alone has 372\.9 k parameters.* Raise --budget-params above 3\d{5}, or choose"),
        (
            {"budget_macs": 1_000_000},
            r"alone has 16\.39 M MACs.* counted, not measured.* raise --budget-macs above 16392384",
        ),
        ({"budget_mb": 0.5}, r"alone needs \d\S* MB.* raise --budget-mb above \d"),
        ({"budget_ips": 1e6}, r"alone takes .* lower --budget-ips to less than \d{4}; or"),
    ],
)
@pytest.mark.slow
def test_every_budget_is_refused_early(
    config: SearchConfig, budgets: dict[str, float], words: str, trainings: list[object]
) -> None:
    """A base over any budget is refused before training, with the budget that it would need."""
    with pytest.raises(NothingFeasibleError, match=words):
        run(change(config, budget_ms=None, **budgets))
    assert not trainings
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_base_is_measured_once(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement before the training is the one that the study stores."""
    events: list[str] = []
    real = FixedLatency.measure, baseline.train

    def measure(self: FixedLatency, model: object) -> Latency:
        events.append("measured")
        return real[0](self, model)  # type: ignore[arg-type]

    def train(*args: object, **named: object) -> object:
        events.append("trained")
        return real[1](*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(FixedLatency, "measure", measure)
    monkeypatch.setattr(FixedLatency, "compare", lambda *args: pytest.fail("no candidate is wanted here"))
    monkeypatch.setattr(baseline, "train", train)
    monkeypatch.setattr("attnsurgery.search.coordinator.search.TrialLoop.run", lambda self: None)
    outcome_folder = Path(config.output)
    with pytest.raises(NothingFeasibleError):  # no trial was made
        run(config)
    assert events == ["measured", "trained"]
    facts = [entry for entry in Journal(outcome_folder / TRIALS).read() if entry.get("fact") == "base"]
    assert facts
    assert facts[0]["value"]["latency"]["p50_ms"] == pytest.approx(latency_at(config, 64))


@pytest.mark.slow
def test_given_backend_makes_no_suggestions(config: SearchConfig, trainings: list[object]) -> None:
    """A backend that was passed as an object knows one input size, so nothing else is measured with it."""
    backend = FixedLatency(Conditions(input_size=(3, 64, 64), threads=1), milliseconds=lambda model: 7.0)
    for start in (run, preview):
        with pytest.raises(NothingFeasibleError, match=r"takes 7 ms .* Raise --budget-ms above 7, or choose a smaller"):
            start(change(config, budget_ms=6.9), backend=backend)
    assert not trainings


@pytest.mark.slow
def test_worker_measures_base_before_training(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With worker processes, one of them measures the base and what fits."""
    budget_ms = (latency_at(config, 40) + latency_at(config, 48)) / 2
    started: list[int] = []
    real = Processes.start

    def start(self: Processes, index: int, on_message: OnMessage) -> Link:
        started.append(index)
        return real(self, index, on_message)

    monkeypatch.setattr(Processes, "start", start)
    with pytest.raises(NothingFeasibleError, match=r"test_resnet at 40 x 40 pixels with .* \(--input-size 40\)"):
        run(change(config, workers=2, budget_ms=budget_ms))
    names = {path.name for path in Path(config.output).glob("*")}
    assert started == [0], "another worker that starts would disturb the measurement"
    assert not names & {WEIGHTS, STUDY, TRIALS, CONFIG}


@pytest.mark.slow
def test_worker_measures_base_without_weights(config: SearchConfig, tmp_path: Path) -> None:
    """A worker measures the base without the weights in the run directory, which may not be the search's own."""
    folder = Path(config.output)
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"not the search's")
    subject = worker._Worker({"threads": 1, "config": config.model_dump()}, worker.Wire(StringIO()), threading.Event())
    subject.assemble()
    assert subject.answer(Job("base latency"))["result"]["latency"]["p50_ms"] == pytest.approx(latency_at(config, 64))
    assert "error" in subject.answer(Job("base scores"))


@pytest.mark.slow
def test_extend_below_base_keeps_its_trials(config: SearchConfig) -> None:
    """A search that is extended under a budget below its base ends as before: with a report of what it has."""
    earlier = run(config)
    assert earlier.base.timing is not None
    with pytest.raises(NothingFeasibleError, match=r"The base alone takes"):
        run(change(config, budget_ms=earlier.base.timing.ms * 0.9, extend=True))
    assert (Path(config.output) / "report.html").is_file()
    again = run(change(config, extend=True))
    assert again.records[0].metric == earlier.records[0].metric


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_many_images_are_read_afterwards(config: SearchConfig, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading the images takes long, the base is measured before they are opened, and once."""
    monkeypatch.setattr(assembling, "MANY_IMAGES", 41)
    assert before_images(config) is None, "there are 40 images"
    monkeypatch.setattr(assembling, "MANY_IMAGES", 40)
    config = change(config, workers=workers)
    phases: list[str] = []

    class Phases(Listener):
        def phase(self, text: str) -> None:
            phases.append(text.partition(" ")[0])

    for start in (run, preview):
        with pytest.raises(NothingFeasibleError, match="The base test_resnet alone takes"):
            start(change(config, budget_ms=0.01), Phases())
    assert "measuring" in phases
    assert "reading" not in phases
    phases.clear()
    outcome = run(config, Phases())
    assert phases[:3] == ["measuring", "reading", "training"]
    assert phases.count("measuring") == 1
    assert outcome.base.timing is not None
    assert outcome.base.timing.ms == pytest.approx(latency_at(config, 64))
    assert outcome.trained == 1
    phases.clear()
    assert preview(change(config, output=f"{config.output}-2"), Phases()).base_ms == pytest.approx(
        outcome.base.timing.ms
    )
    assert phases[:2] == ["measuring", "reading"]


# Which base is over its budget


def latency(ms: float, noise: float) -> Latency:
    return Latency(ms, ms, 1, noise, "cpu", "float32", 1, "eager")


@pytest.mark.slow
def test_refusal_needs_a_certain_excess(config: SearchConfig) -> None:
    """A base is over the budget if the lower end of its interval is; not if a candidate may cost less than it."""
    bench = bench_of(change(config, budget_ms=1.0))
    refuse_over_budget(bench, BaseFacts(latency(1.05, 0.1), None), None)
    refuse_over_budget(bench, BaseFacts(latency(1.0, 0.0), None), None)
    with pytest.raises(NothingFeasibleError, match=r"takes 1\.05 ms \(95 % interval 1\.04 to 1\.06 ms\)"):
        refuse_over_budget(bench, BaseFacts(latency(1.05, 0.01), None), None)
    refuse_over_budget(bench, BaseFacts(latency(2.0, 0.0), None, least=0.4), None)
    with pytest.raises(NothingFeasibleError):
        refuse_over_budget(bench, BaseFacts(latency(2.0, 0.0), None, least=0.6), None)


@pytest.mark.slow
def test_refusal_names_largest_size_and_model(config: SearchConfig) -> None:
    """The message names the largest size and the sibling that fit, or else the smallest budget that would do."""
    bench = bench_of(change(config, budget_ms=1.0))

    def other(model: str, size: int, ms: float) -> Alternative:
        return Alternative(model, size, size, ms <= 1.0, {"latency": ms * 1.02}, ms)

    tried = [other("test_resnet", 32, 0.5), other("test_resnet", 48, 0.91), other("test_vit", 64, 0.7)]
    with pytest.raises(NothingFeasibleError) as fitting:
        refuse_over_budget(bench, BaseFacts(latency(2.0, 0.01), None), lambda: [*tried, other("test_resnet", 56, 1.2)])
    assert str(fitting.value).endswith(
        "What would fit, measured here under the same conditions: test_resnet at 48 x 48 pixels with 0.91 ms "
        "(--input-size 48); the smaller model test_vit at 64 x 64 pixels with 0.7 ms. Take that, or raise --budget-ms "
        "above 2.02."
    )
    with pytest.raises(NothingFeasibleError) as none:
        refuse_over_budget(
            bench,
            BaseFacts(latency(2.0, 0.01), None),
            lambda: [other("test_resnet", 32, 1.5), other("test_resnet", 16, 1.2)],
        )
    assert (
        "The closest is test_resnet at 16 x 16 pixels with 1.2 ms: for it, raise --budget-ms above 1.23"
        in f"{none.value}"
    )


# What fits


@pytest.mark.parametrize("size", [56, 40, 24])
@pytest.mark.slow
def test_what_fits_finds_the_largest_size(config: SearchConfig, size: int) -> None:
    """Of the sizes below the present one, the largest that fits is found, with its latency."""
    budget_ms = (latency_at(config, size) + latency_at(config, size + 8)) / 2
    bench = bench_of(change(config, budget_ms=budget_ms))
    tried = what_fits(bench, latency_at(config, 64), watching())
    fitting = [other for other in tried if other.within]
    assert max(other.height for other in fitting) == size
    assert {other.height: other.ms for other in fitting}[size] == pytest.approx(latency_at(config, size))
    assert {other.height for other in tried if not other.within} <= {size + 8, *range(size + 16, 64, 8)}


@pytest.mark.slow
def test_what_fits_finds_a_smaller_model(config: SearchConfig) -> None:
    """A smaller model of the family that keeps to the budget is named, and no larger one."""
    with pytest.raises(NothingFeasibleError, match=r"counted, not measured: the smaller model") as error:
        run(change(config, base="resnet34", budget_ms=None, budget_params=15_000_000))
    name = re.findall(r"the smaller model (\w+) at 64 x 64", str(error.value))[0]
    assert sum(parameter.numel() for parameter in timm.create_model(name, num_classes=2).parameters()) < 15_000_000
    assert "--input-size" not in str(error.value), "smaller images have as many parameters"


@pytest.mark.slow
def test_what_fits_measures_a_smaller_model(config: SearchConfig) -> None:
    """A smaller model is measured at the size of the images, and is within the budget."""
    budget_ms = latency_at(config, 64, "resnet18") * 1.01
    bench = bench_of(change(config, base="resnet34", budget_ms=budget_ms))
    tried = what_fits(bench, latency_at(config, 64, "resnet34"), watching())
    models: Mapping[str, Alternative] = {other.model: other for other in tried if other.model != "resnet34"}
    within = [other for other in models.values() if other.within]
    assert 1 <= len(models) <= 3
    assert len(within) == 1
    assert within[0].ms == pytest.approx(latency_at(config, 64, within[0].model))
    assert (within[0].height, within[0].width) == (64, 64)


@pytest.mark.slow
def test_what_fits_builds_models_of_a_size(config: SearchConfig, tmp_path: Path) -> None:
    """A model that is built for one image size is built anew for smaller images, in multiples of its patch size."""
    space = tmp_path / "vit.yaml"
    space.write_text("version: 1\nname: vit\ndecisions:\n  - at: 'stage:1 last'\n    choices:\n      - block: se\n")
    budget_ms = latency_at(config, 64, "test_vit") * 0.9
    bench = bench_of(change(config, base="test_vit", space=str(space), budget_ms=budget_ms))
    tried = what_fits(bench, latency_at(config, 64, "test_vit"), watching())
    assert any(other.within for other in tried)
    assert all(other.height % 16 == 0 for other in tried)


@pytest.mark.slow
def test_what_fits_ends_on_a_stop(config: SearchConfig) -> None:
    """A request to stop ends the attempts."""
    bench = bench_of(change(config, budget_ms=0.01))
    with pytest.raises(StopRequested):
        what_fits(bench, 1.0, Watching(Listener(), lambda: True))


def test_siblings_are_of_one_family() -> None:
    """Siblings are timm's own models of the same family, first those that differ in size alone."""
    names = siblings("resnet50.a1_in1k")
    assert set(names[:6]) == {"resnet18", "resnet26", "resnet34", "resnet101", "resnet152", "resnet200"}
    assert "resnet50d" in names
    assert not {"resnet50", "resnet50_se", "seresnet50", "resnext50_32x4d"} & set(names)
    assert "convnext_nano" in siblings("convnext_tiny")[:8]
    assert "vit_tiny_patch16_224" in siblings("vit_small_patch16_224")[:8]
    assert set(siblings("convnext_tiny", pretrained=True)) <= set(siblings("convnext_tiny"))
