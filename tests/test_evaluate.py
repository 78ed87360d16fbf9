"""Data in three splits that share nothing, and training that is repeatable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from attnsurgery.data import Data, Preprocessing, load_data
from attnsurgery.data.memory import allocate_for
from attnsurgery.data.moves import apply_moves, augment_images, draw_moves
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.evaluate import EVALUATORS, Epoch, TrainSettings, Watch, evaluate, fit_head, train
from attnsurgery.evaluate.channels_last import ChannelsLast
from attnsurgery.evaluate.precision import float32_as

SMALL = Preprocessing((3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def write_images(folder: Path, count: int, level: int, size: int = 12) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 40, (size, size, 3)) + level
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture
def flat_folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "data" / "dark", 20, 0)
    write_images(tmp_path / "data" / "light", 10, 200)
    return tmp_path / "data"


def names(data: Data) -> tuple[set[str], set[str], set[str]]:
    return set(data.train.ids), set(data.val.ids), set(data.test.ids)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", SMALL)


@pytest.mark.slow
def test_splits_share_no_image_and_lose_none(digits: Data) -> None:
    """The three splits share no image and lose none."""
    train_ids, val_ids, test_ids = names(digits)
    assert not train_ids & val_ids
    assert not train_ids & test_ids
    assert not val_ids & test_ids
    assert len(train_ids | val_ids | test_ids) == 1797


def test_splits_all_have_every_class(digits: Data) -> None:
    """Every split has images of every class."""
    for split in (digits.train, digits.val, digits.test):
        assert split.labels.unique().tolist() == list(range(10))


@pytest.mark.slow
def test_splits_depend_on_the_seed(digits: Data) -> None:
    """The same seed gives the same splits and fingerprint, and another seed others."""
    assert names(load_data("digits", SMALL)) == names(digits)
    assert load_data("digits", SMALL).fingerprint == digits.fingerprint
    other = load_data("digits", SMALL, seed=1)
    assert names(other) != names(digits)
    assert other.fingerprint != digits.fingerprint


def test_flat_folder_is_split_by_class(flat_folder: Path) -> None:
    """A folder without parts is split class by class."""
    data = load_data(str(flat_folder), SMALL)
    assert data.classes == ("dark", "light")
    assert [len(data.train), len(data.val), len(data.test)] == [18, 6, 6]
    assert data.test.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert all("/" in name for name in data.train.ids)


def test_folder_parts_are_used_and_completed(tmp_path: Path) -> None:
    """Parts that a folder has are used, and a missing one is taken out of training."""
    for part, count in (("train", 10), ("test", 4)):
        write_images(tmp_path / part / "dark", count, 0)
        write_images(tmp_path / part / "light", count, 200)
    data = load_data(str(tmp_path), SMALL)
    assert {name.split("/")[0] for name in data.test.ids} == {"test"}
    assert {name.split("/")[0] for name in (*data.train.ids, *data.val.ids)} == {"train"}
    assert [len(data.train), len(data.val), len(data.test)] == [16, 4, 8]


def test_folder_named_validation_is_a_split(tmp_path: Path) -> None:
    """A folder called "validation" is the validation split."""
    for part in ("train", "validation", "test"):
        write_images(tmp_path / part / "dark", 4, 0)
        write_images(tmp_path / part / "light", 4, 200)
    data = load_data(str(tmp_path), SMALL)
    assert {name.split("/")[0] for name in data.val.ids} == {"validation"}
    assert len(data.train) == 8


def test_missing_path_says_what_would_do(tmp_path: Path) -> None:
    """A missing directory is refused with the form that is needed."""
    with pytest.raises(UsageError, match=r"there is no such directory.*one sub-folder a class"):
        load_data(str(tmp_path / "nothing"), SMALL)


def test_streamed_data_set_is_refused() -> None:
    """A streamed data set is refused with its random-access form."""
    with pytest.raises(UsageError, match="Use its random-access form"):
        load_data("tfds/cifar10", SMALL)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    """A folder without folders of classes is refused."""
    Image.new("RGB", (8, 8)).save(tmp_path / "lonely.png")
    with pytest.raises(SearchError, match="holds 0 classes"):
        load_data(str(tmp_path), SMALL)


def test_class_not_in_training_is_refused(tmp_path: Path) -> None:
    """A class that the training part lacks is refused."""
    for part, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "c")):
        write_images(tmp_path / part / label, 4, 0)
    with pytest.raises(SearchError, match="training does not have: c"):
        load_data(str(tmp_path), SMALL)


def test_class_of_too_few_images_is_named(flat_folder: Path) -> None:
    """A class with too few images is refused by name."""
    write_images(flat_folder / "rare", 2, 90)
    with pytest.raises(SearchError, match=r"class 'rare' has 2"):
        load_data(str(flat_folder), SMALL)


def test_unreadable_images_are_named(flat_folder: Path) -> None:
    """Unreadable images are counted and named before anything is trained."""
    (flat_folder / "dark" / "0.png").write_bytes(b"no image")
    whole = (flat_folder / "dark" / "1.png").read_bytes()
    (flat_folder / "dark" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SearchError, match=r"images cannot be read: dark/\d\.png"):
        load_data(str(flat_folder), SMALL)


def test_images_from_files_have_same_pixels(flat_folder: Path) -> None:
    """Images that memory does not hold are read from files, with the same pixels for evaluation."""
    preprocessing = Preprocessing((3, 8, 8), crop_pct=0.9)
    in_memory = load_data(str(flat_folder), preprocessing)
    from_files = load_data(str(flat_folder), preprocessing, memory_bytes=0, workers=0)
    assert type(in_memory.val) is not type(from_files.val)
    for (x, y), (x_read, y_read) in zip(
        in_memory.val.eval_batches(4, "cpu"), from_files.val.eval_batches(4, "cpu"), strict=True
    ):
        assert torch.equal(x, x_read)
        assert torch.equal(y, y_read)


def test_images_decode_late_in_inference_mode(flat_folder: Path) -> None:
    """Images that are needed first for an evaluation can be read then, and trained on later."""
    data = load_data(str(flat_folder), Preprocessing((3, 16, 16)), decode=False)
    with torch.inference_mode():
        (batch, _), *_ = data.val.eval_batches(4, "cpu")
    assert batch.shape[1:] == (3, 16, 16)
    assert not data.val.decode().is_inference()  # type: ignore[attr-defined]


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
def test_batches_depend_on_seed_and_epoch(flat_folder: Path, memory_bytes: int) -> None:
    """Batches of training depend on seed and epoch alone."""
    split = load_data(str(flat_folder), SMALL, memory_bytes=memory_bytes, workers=0).train

    def pixels(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat([x for x, _ in split.train_batches(4, "cpu", seed, epoch)])

    first = pixels(0, 0)
    torch.rand(3)
    assert torch.equal(first, pixels(0, 0))
    assert not torch.equal(first, pixels(0, 1))
    assert not torch.equal(first, pixels(1, 0))


def test_unreadable_file_read_late_is_named(flat_folder: Path) -> None:
    """Where files are read late, an unreadable one is named."""
    data = load_data(str(flat_folder), SMALL, memory_bytes=0, workers=0)
    for path in flat_folder.rglob("*.png"):
        path.write_bytes(b"gone bad")
    with pytest.raises(SearchError, match=r"cannot read the image dark/"):
        list(data.val.eval_batches(4, "cpu"))


def test_augmentation_mirrors_where_allowed() -> None:
    """Augmentation shifts images, and mirrors them only where a mirror image has the same label."""
    ramp = torch.arange(16, dtype=torch.uint8).expand(32, 3, 16, 16)

    def falling(flip: bool) -> int:
        x = augment_images(ramp, flip, torch.Generator().manual_seed(0))
        return int((x[:, 0, 0, 5] > x[:, 0, 0, 10]).sum())

    assert falling(flip=False) == 0
    assert 4 < falling(flip=True) < 28
    shifted = augment_images(ramp, False, torch.Generator().manual_seed(0))
    assert not torch.equal(shifted, ramp.float())
    assert shifted.shape == ramp.shape


@pytest.mark.slow
def test_pixels_are_normalised_for_the_model() -> None:
    """Pixels are normalised with the mean and standard deviation of the model."""
    model = timm.create_model("test_resnet")
    preprocessing = Preprocessing.of(model, (3, 16, 16))
    assert (preprocessing.mean, preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    x, _ = next(load_data("digits", preprocessing).val.eval_batches(8, "cpu"))
    assert x.shape == (8, 3, 16, 16)
    assert x.min() == -1.0
    assert x.max() <= 1.0


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.slow
def test_finetune_learns_and_repeats(digits: Data) -> None:
    """Fine-tuning learns, and gives the same score for the same seed."""
    settings = TrainSettings(epochs=2, lr=3e-3)
    before = evaluate(tiny(), digits.val, settings).metric
    epochs: list[Epoch] = []

    class Note(Watch):
        def epoch(self, epoch: Epoch) -> None:
            epochs.append(epoch)

    score = EVALUATORS["finetune"](digits, settings).score(tiny(), seed=0, watch=Note())
    again = EVALUATORS["finetune"](digits, settings).score(tiny(), seed=0)
    other = EVALUATORS["finetune"](digits, settings).score(tiny(), seed=1)
    assert score.metric > before + 0.3
    assert (score.metric, score.loss) == (again.metric, again.loss)
    assert score.loss != other.loss
    assert torch.equal(score.values, again.values)
    assert score.values.shape == (len(digits.val),)
    assert [epoch.index for epoch in epochs] == [1, 2]


def test_finetune_scores_test_on_demand(digits: Data) -> None:
    """The test split is scored on demand."""
    score = EVALUATORS["finetune"](digits, TrainSettings(epochs=1)).score(tiny(), seed=0, on="test")
    assert score.values.shape == (len(digits.test),)


def test_train_moves_a_gate_at_zero(digits: Data) -> None:
    """A gate at zero moves in training."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.branch = tiny(), nn.Linear(768, 10)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.gate * self.branch(x.flatten(1))  # type: ignore[no-any-return]

    model = Gated()
    train(model, digits.train, TrainSettings(epochs=1), seed=0)
    assert model.gate.abs() > 1e-4
    assert not model.training


def test_train_leaves_average_of_weights(digits: Data) -> None:
    """With `average`, the weights that are left are the exponential average of those after each step."""
    settings = TrainSettings(epochs=1, batch_size=256, lr=1e-3, average=0.5)
    model, states = tiny(), []
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        done = real(self, *arguments)  # type: ignore[arg-type]
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return done

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        train(model, digits.train, settings, seed=0)
    assert len(states) == len(digits.train) // 256
    window = 0.5 * len(states) / 2
    for state in states:
        for name, value in state.items():
            if value.is_floating_point():
                expected[name] = (window * expected[name] + value) / (1 + window)
            else:
                expected[name] = value
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_train_diverged_names_the_epoch(digits: Data) -> None:
    """Training that diverges fails with the epoch and the loss."""
    model = tiny()
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.raises(SearchError, match=r"training diverged in epoch 1 of 1 \(loss is nan\)"):
        train(model, digits.train, TrainSettings(epochs=1), seed=0)


def test_train_ends_when_watch_raises(digits: Data) -> None:
    """What the watch raises ends the training within a batch."""
    steps: list[int] = []

    class Stop(Watch):
        def step(self) -> None:
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), digits.train, TrainSettings(epochs=5), seed=0, watch=Stop())
    assert len(steps) == 3


def test_train_leaves_global_rng_alone(digits: Data) -> None:
    """Training leaves the global random state alone."""
    model = tiny()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    train(model, digits.train, TrainSettings(epochs=1), seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_train_settings_need_an_epoch() -> None:
    """Settings with no epoch are refused."""
    with pytest.raises(UsageError, match="at least one epoch"):
        TrainSettings(epochs=0)


class Cramped(nn.Module):
    """A model with room for `room` images at a time, and for any number in the first `free` forwards."""

    def __init__(self, room: int, inputs: int = 3 * 32 * 32, classes: int = 2, says: str = "") -> None:
        super().__init__()
        self.room, self.free, self.says = room, 0, says
        self.forwards = 0
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        crowded = len(x) > self.room and self.forwards > self.free
        if crowded and self.says:
            raise RuntimeError(self.says)
        if crowded:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        logits: torch.Tensor = self.linear(x.flatten(1))
        return logits


def test_train_in_pieces_gives_same_weights(flat_folder: Path) -> None:
    """A batch that memory does not hold is passed in pieces, with the same weights at the end."""
    data = load_data(str(flat_folder), Preprocessing((3, 32, 32)))

    class Pieces(Watch):
        def __init__(self) -> None:
            self.pieces: list[int] = []

        def accumulating(self, images: int) -> None:
            self.pieces.append(images)

    trained = {}
    for room in (100, 3):
        torch.manual_seed(0)
        model, watch = Cramped(room), Pieces()
        train(model, data.train, TrainSettings(epochs=2, batch_size=8), 0, watch)
        trained[room] = (model.linear.weight, watch.pieces)
    assert trained[100][1] == []
    assert trained[3][1] == [4, 2], "halved until it fits, and kept so"
    assert torch.allclose(trained[100][0], trained[3][0], atol=1e-6)


def test_train_that_never_fits_raises(flat_folder: Path) -> None:
    """A batch that no halving makes fit raises an out-of-memory error."""
    data = load_data(str(flat_folder), Preprocessing((3, 32, 32)))
    with pytest.raises(torch.OutOfMemoryError):
        train(Cramped(1), data.train, TrainSettings(epochs=1, batch_size=8), 0)


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
@pytest.mark.parametrize("room", [200, 100, 3, 1])
@pytest.mark.slow
def test_accuracy_halves_batch_on_low_memory(digits: Data, flat_folder: Path, room: int, memory_bytes: int) -> None:
    """A batch that memory does not hold is halved from its first unscored image on, and no image is scored twice."""

    class Halves(Watch):
        def __init__(self) -> None:
            self.steps, self.halves = 0, list[int]()

        def step(self) -> None:
            self.steps += 1

        def accumulating(self, images: int) -> None:
            self.halves.append(images)

    split, classes = digits.val, 10
    if not memory_bytes:
        split, classes = load_data(str(flat_folder), SMALL, memory_bytes=0, workers=0).train, 2
    torch.manual_seed(0)
    model = Cramped(10_000, 768, classes)
    expected = evaluate(model, split, TrainSettings())
    size, halves = 256, []
    while min(size, len(split)) > room:
        size //= 2
        halves.append(size)
    for free in (0, 1):  # from the first batch on, or from the second
        model.room, model.forwards, model.free, watch = room, 0, free, Halves()
        evaluation = evaluate(model, split, TrainSettings(), watch=watch)
        assert torch.equal(evaluation.values, expected.values)
        assert (evaluation.metric, evaluation.loss) == (expected.metric, pytest.approx(expected.loss, abs=1e-6))
        if not free:
            assert watch.halves == halves
        assert watch.steps == model.forwards


def test_accuracy_of_one_image_may_not_fit(digits: Data) -> None:
    """A single image that memory does not hold raises the out-of-memory error."""
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        evaluate(Cramped(0, 768, 10, "CUDA error: out of memory"), digits.val, TrainSettings())


def test_accuracy_repeats_no_other_error(digits: Data) -> None:
    """An error that is no lack of memory is raised at once."""
    model = Cramped(0, 768, 10, "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        evaluate(model, digits.val, TrainSettings())
    assert model.forwards == 1


def test_accuracy_stops_between_batches(digits: Data) -> None:
    """An evaluation can be stopped between two batches."""

    class Stop(Watch):
        steps = 0

        def step(self) -> None:
            self.steps += 1
            if self.steps == 2:
                raise KeyboardInterrupt

    model = Cramped(10_000, 768, 10)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, digits.val, TrainSettings(), watch=Stop())
    assert model.forwards == 1


@pytest.mark.parametrize("name", [name for name in EVALUATORS if EVALUATORS[name].trains])
def test_evaluator_steps_before_each_batch(digits: Data, name: str) -> None:
    """An evaluator steps before each batch, where the watch gives signs of life and lets others measure."""
    modes: list[bool] = []

    class Note(Watch):
        def step(self) -> None:
            modes.append(model.training)

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    data = replace(digits, train=digits.test)
    EVALUATORS[name](data, TrainSettings(epochs=1, batch_size=128)).score(model, seed=0, watch=Note())
    assert modes.count(True) == len(digits.test) // 128
    assert modes.count(False) == 2, "of the batches that are judged"


def test_augmentation_moves_equal_augmented() -> None:
    """Moves that are drawn on the host give the images of `augment_images` bit for bit."""
    pixels = torch.randint(256, (32, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moves = draw_moves(32, (16, 24), True, torch.Generator().manual_seed(5))
    assert torch.equal(apply_moves(pixels, *moves), augment_images(pixels, True, torch.Generator().manual_seed(5)))
    top_B, left_B, mirror_B = (move.tolist() for move in moves)
    assert (set(top_B), set(left_B), set(mirror_B)) == (set(range(5)), set(range(7)), {0, 1})
    for image, top, left, mirror, got in zip(pixels, top_B, left_B, mirror_B, apply_moves(pixels, *moves), strict=True):
        padded = nn.functional.pad(image.float()[None], (3, 3, 2, 2), mode="reflect")[0]
        window = padded[:, top : top + 16, left : left + 24]
        assert torch.equal(got, window.flip(2) if mirror else window)


class Convolving(nn.Module):
    """A model that notes the strides of the weights and features that its forward meets."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 2)
        self.views = views
        self.last: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        self.last.append(x.is_contiguous(memory_format=torch.channels_last))
        flat = x.view(len(x), -1) if self.views else x.flatten(1)
        logits: torch.Tensor = self.linear(flat.unflatten(1, (8, -1)).mean(dim=2))  # type: ignore[no-untyped-call]
        return logits


@pytest.mark.parametrize("views", [False, True])
def test_channels_last_on_cpu_where_possible(flat_folder: Path, monkeypatch: pytest.MonkeyPatch, views: bool) -> None:
    """A CPU trains and evaluates with channels last where the model allows it, with the same results."""
    data = load_data(str(flat_folder), Preprocessing((3, 16, 16)))

    def trained() -> tuple[Convolving, float]:
        model = Convolving(views)
        train(model, data.train, TrainSettings(epochs=2, batch_size=8), 0)
        return model, evaluate(model, data.val, TrainSettings()).loss

    model, loss = trained()
    assert not model.first.weight.is_contiguous(memory_format=torch.channels_last), "afterwards they are as they were"
    assert model.first.weight.is_contiguous()
    if views:  # the first batch of each is tried, and then gone through as before
        assert [index for index, last in enumerate(model.last) if last] == [0, len(model.last) - 2]
    else:
        assert all(model.last)
    monkeypatch.setattr(ChannelsLast, "_convert", lambda self, memory_format: None)
    plain, plain_loss = trained()
    assert not any(plain.last)
    assert torch.allclose(model.second.weight, plain.second.weight, atol=1e-5)
    assert loss == pytest.approx(plain_loss, abs=1e-4)


class Card:
    """A card with `free` bytes of memory, which notes what is allocated on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        self.allocations: list[tuple[int, ...]] = []
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)

    def empty(self, *size: object, device: object = None, **named: object) -> torch.Tensor:
        if str(device).startswith("cuda"):
            self.allocations.append(size[0])  # type: ignore[arg-type]
        return self._empty(*size, **named)  # type: ignore[call-overload, no-any-return]


def test_data_takes_quarter_of_card_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images take at most a quarter of the free memory of a card, and otherwise stay on the host."""
    card = Card(monkeypatch, free=4000)
    allocate_for((10, 100), torch.uint8, "cuda")
    assert card.allocations == [(10, 100)]
    allocate_for((11, 100), torch.uint8, "cuda")
    allocate_for((10, 100), torch.float32, "cuda:1")
    assert card.allocations == [(10, 100)], "the others stay on the host"


def test_tf32_follows_settings_then_restored() -> None:
    """TF32 is as the settings say while a card trains, and is restored afterwards; a CPU changes nothing."""

    def switches() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = switches()
    for tf32 in (False, True):
        with float32_as(TrainSettings(device="cuda", tf32=tf32)):
            assert switches() == (tf32, tf32)
        assert switches() == before
    with float32_as(TrainSettings(tf32=True)):
        assert switches() == before, "a CPU has no say"


def test_channels_last_on_card_on_demand() -> None:
    """A card uses channels last only on demand."""
    model = Convolving(views=False)
    for channels_last in (False, True):
        with ChannelsLast(model, "cuda", channels_last):
            assert model.first.weight.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert model.first.weight.is_contiguous()


def test_channels_last_trial_survives_oom() -> None:
    """The first forward tries the layout; one that a lack of memory ends does not count."""
    model = Convolving(views=True)
    x = torch.zeros(2, 3, 16, 16)

    def lacks(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    with ChannelsLast(model, "cpu") as layout:
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            layout.run(lacks, x)
        layout.run(model, x)
    assert model.last == [True, False]


@pytest.mark.slow
def test_fit_head_trains_the_head_alone(digits: Data) -> None:
    """Fitting a head moves the head alone and improves the accuracy."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=False)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    untrained = evaluate(model, digits.val, TrainSettings()).metric
    fit_head(model, digits.train, TrainSettings(epochs=4, lr=1e-2), seed=0)
    fitted = evaluate(model, digits.val, TrainSettings()).metric
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(before[name], tensor)}
    assert moved == {"fc.weight", "fc.bias"}
    assert fitted > untrained + 0.2
    assert all(parameter.requires_grad for parameter in model.parameters())
