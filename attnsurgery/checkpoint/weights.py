"""Reads the tensors out of a weights file, whoever wrote it, and says what the file is when it holds none.

Pickled code is never run: torch files are read with `weights_only=True`. What a file is, is told from its first bytes,
because names lie: a Git LFS pointer or a download page is often called `model.safetensors`.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from attnsurgery.errors import CheckpointError, did_you_mean

StateDict = dict[str, torch.Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
ENTRIES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model")
"""Where the weights lie in a training checkpoint, in the order of preference: averaged ones first, as timm has it."""
INNER_ENTRIES = (*ENTRIES, "module")
"""The same one level down: some trainers keep {"ema": {"module": weights, "updates": 3}}."""

WRAPPERS = {
    "module.": "DistributedDataParallel or AveragedModel",
    "_orig_mod.": "torch.compile",
    "model.": "Lightning",
    "timm_model.": "transformers' TimmWrapper",
    "encoder.": "segmentation_models_pytorch",
    "backbone.": "mmpretrain",
    "base_model.model.": "PEFT",
}
"""What names begin with in the checkpoints of modules that hold a model, and who writes that."""
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What wrappers of torch put into the middle of names, too; no model of timm has it."""
_AVERAGED = "n_averaged"
"""The counter of torch's AveragedModel, beside the names that begin with 'module.'."""
_ADAPTERS = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module)\.")

DELTA_NAME = "weights.delta"
"""The file of a delta directory: safetensors, under a name that nobody takes for a whole model's weights."""
DELTA_MARK = "attnsurgery_delta"
"""In the metadata of a safetensors file: it holds what differs from a base, and is no use without it."""

_PREFERRED = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

_BY_FIRST_BYTES = (
    (b"version https://git-lfs", "a Git LFS pointer and not the weights themselves; fetch them with 'git lfs pull'"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; convert it to a PyTorch state dict first"),
    (b"\x93NUMPY", "one NumPy array; convert it to a PyTorch state dict first"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"GGUF", "a GGUF file; a PyTorch state dict is needed"),
)
_READABLE = "Readable are .safetensors files, torch.save'd state dicts (.pth, .pt, .bin) and timm directories."


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the weights lie in a file, where that is not found by itself."""

    key: str | None = None
    """The entry that holds them; one inside another is written 'ema.module'."""
    prefix: str | None = None
    """What their names begin with in it."""

    def __bool__(self) -> bool:
        return self.key is not None or self.prefix is not None


AS_FOUND = Layout()


@dataclass(frozen=True, slots=True)
class Read:
    """The tensors of a file, and what was between them and the file."""

    tensors: StateDict
    path: str
    key: str = ""
    """The entry under which they lay, such as 'state_dict' or 'ema.module'."""
    stripped: tuple[str, ...] = ()
    """What was taken off the names."""
    left_out: tuple[str, ...] = ()
    """Tensors that were under the same entry and belong to something around the model."""

    def told(self) -> str | None:
        """What was taken off, in words; None for a file that holds tensors under plain names and nothing else."""
        entry = f"under {self.key!r}" if self.key else ""
        makers = {prefix: WRAPPERS.get(prefix) for prefix in self.stripped}
        prefixes = ", ".join(f"{prefix!r}{f' ({maker})' if maker else ''}" for prefix, maker in makers.items())
        names = f"names without {prefixes}" if prefixes else ""
        some = ", ".join(name[:60] for name in self.left_out[:3]) + ", ..." * (len(self.left_out) > 3)
        left = f"{len(self.left_out)} other tensors left out ({some})" if self.left_out else ""
        return "; ".join(filter(None, (entry, names, left))) or None


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a .safetensors or torch file, a training checkpoint (averaged weights first), or a timm directory.

    Prefixes that wrappers of torch leave in names (`module.`, `_orig_mod.`) are taken off. Tensors are on the CPU.

    Raises:
        CheckpointError: missing, empty, damaged, of another kind, or with pickled code in it, which is never run.
    """
    return read(path).tensors


def read(path: str | Path, key: str | None = None) -> Read:
    """As `read_state_dict`, with what was taken off.

    Args:
        key: the entry that holds the weights; one inside another is written 'ema.module'. By default one of `ENTRIES`.

    Raises:
        CheckpointError: as `read_state_dict`, or no such entry.
    """
    path = _file_meant(Path(path))
    kind = _kind(path)
    if kind == "safetensors":
        found: Any = _read_safetensors(path)
        if key is not None:
            raise CheckpointError(f"{path} is a .safetensors file: it has no entries, and so none called {key!r}.")
        key = ""
    elif kind == "torch":
        key, found = _entry(_read_torch(path), path, key)
    else:
        raise CheckpointError(f"{path} is {kind}{'' if kind.endswith('?') else '.'} {_READABLE}")
    return _cleaned(_only_tensors(found, path), path, key)


def without_wrappers(read: Read, prefix: str | None = None) -> Iterator[Read]:
    """What the weights of the model inside may be: as they are, and without each row of prefixes that is known.

    Args:
        prefix: the one to take off, whatever it is.

    Raises:
        CheckpointError: no name begins with `prefix`.
    """
    yield from (_without(read, found) for found in ([prefix] if prefix is not None else _prefixes(read.tensors)))


def _prefixes(tensors: StateDict) -> list[str]:
    """Every row of known prefixes that a name begins with, the shortest first; '' among them."""
    found = {""}
    for name in tensors:
        at = ""
        while prefix := next((one for one in WRAPPERS if name.startswith(one, len(at))), None):
            at += prefix
            found.add(at)
    return sorted(found, key=len)


def _without(read: Read, prefix: str) -> Read:
    if not prefix:
        return read
    ours = {name[len(prefix) :]: tensor for name, tensor in read.tensors.items() if name.startswith(prefix)}
    if not ours:
        heads = sorted({name.partition(".")[0] + "." for name in read.tensors})
        raise CheckpointError(
            f"no name in {read.path} begins with {prefix!r}.{did_you_mean(prefix, heads)} They begin with "
            f"{', '.join(heads[:8])}{', ...' * (len(heads) > 8)}"
        )
    others = tuple(name for name in read.tensors if not name.startswith(prefix))
    return Read(ours, read.path, read.key, (*read.stripped, prefix), (*read.left_out, *others))


def refuse_adapters(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Raises:
        CheckpointError: adapters lie beside the weights that they change.
    """
    adapters = [name for name in tensors if _ADAPTERS.search(f".{name}")]
    if adapters:
        raise CheckpointError(
            f"{source} holds the weights of a model with adapters in it ({adapters[0][:80]} and {len(adapters) - 1} "
            "more), which are no weights of the model itself. Merge them first: PEFT's merge_and_unload() returns the "
            "model, and torch.save(model.state_dict(), 'weights.pth') writes it."
        )


def _file_meant(path: Path) -> Path:
    """`path` itself, or the weights in it when it is a timm directory."""
    try:
        if path.is_dir():
            return _weights_in(path)
        if path.is_file():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is no regular file. {_READABLE}")
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot look at {path}: {error.strerror}.") from None
    raise CheckpointError(f"there is no file {str(path)!r}.{did_you_mean(path.name, near)}")


def _weights_in(directory: Path) -> Path:
    if (directory / DELTA_NAME).is_file():
        raise CheckpointError(_is_delta(directory))
    for name in _PREFERRED:
        if (directory / name).is_file():
            return directory / name
    found = sorted(entry for entry in directory.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.name for entry in found[:5])
        raise CheckpointError(
            f"the directory {directory} holds {len(found)} weights files ({names}); name one of them."
        )
    held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"the directory {directory} holds no weights, but {held}. A timm directory has model.safetensors."
    )


def _kind(path: Path) -> str:
    """'safetensors', 'torch', or in words what else the file is."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
    if not head:
        return "empty (0 bytes); was a download or a copy interrupted?"
    for begin, words in _BY_FIRST_BYTES:
        if head.startswith(begin):
            return words
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    return _kind_of_text(head)


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises anything from a broken directory; torch itself explains what is broken
        return "torch"
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive; convert it to a PyTorch state dict first"
    return "a zip archive without a PyTorch state dict in it; unpack it first"


def _kind_of_text(head: bytes) -> str:
    if head.lstrip()[:1] == b"<":
        return "a web page (HTML or XML) and not weights; the address gave a page instead of the file"
    try:
        text = head[:400].decode("utf-8")
    except UnicodeDecodeError:
        return "a binary file of no kind that is known here, or a truncated one"
    if any(ord(letter) < 32 and letter not in "\t\r\n" for letter in text):
        return "a binary file of no kind that is known here, or a truncated one"
    return f"a text file that begins {text.split(chr(10), 1)[0][:40]!r}"


def _is_delta(path: Path) -> str:
    return (
        f"{path} is a delta: it holds only what differs from its base. Put them together with 'attnsurgery merge DELTA "
        "--base FILE --output DIR'."
    )


def _read_safetensors(path: Path) -> Any:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            delta = DELTA_MARK in (file.metadata() or {})
        if not delta:
            return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own, OSError, ValueError and more for damaged files
        raise CheckpointError(
            f"{path} begins like a .safetensors file but is damaged or truncated ({_brief(error)}). "
            "Fetch or write it again."
        ) from None
    raise CheckpointError(_is_delta(path))


def _read_torch(path: Path) -> Any:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a torch.save'd file under the name of a .safetensors file. Rename it to .pth."
        )
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: the errors below say more
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make torch raise nearly anything
        raise CheckpointError(_why_torch_failed(path, error)) from None


def _harmless() -> list[Any]:
    """What training checkpoints hold beside tensors and what runs nothing when it is made: settings, numbers, paths."""
    # numpy called the package of its C functions numpy.core before 2.0, and files say either
    core = getattr(np, "_core", None) or np.core
    functions = [core.multiarray.scalar, core.multiarray._reconstruct]
    named = [(one, f"numpy.{home}.multiarray.{one.__name__}") for one in functions for home in ("core", "_core")]
    dtypes = {type(np.dtype(kind)) for kind in np.typecodes["All"]}
    paths = [(pathlib.PurePath, f"pathlib.{name}") for name in ("PosixPath", "WindowsPath")]
    mine = [argparse.Namespace, *named, np.ndarray, np.dtype, *dtypes, *paths, pathlib.PurePosixPath]
    theirs = torch.serialization.get_safe_globals()  # torch forgets what it is given here, those of the user too
    return [one for one in mine if one not in theirs]


def _entry(found: Any, path: Path, key: str | None) -> tuple[str, Any]:
    """The entry of a training checkpoint that holds the weights, and its name; '' and all of it where there is none."""
    if key is not None:
        return key, _entry_called(found, path, key)
    names: list[str] = []
    while isinstance(found, Mapping) and len(names) < 3:
        inner = next((name for name in (INNER_ENTRIES if names else ENTRIES) if _is_entry(found.get(name))), None)
        if inner is None:
            break
        names.append(inner)
        found = found[inner]
    if not isinstance(found, Mapping) or any(not isinstance(name, str) for name in found) or _spoilt(found):
        raise CheckpointError(
            f"{path} is a torch file but holds no dictionary of tensors. Write one with "
            "torch.save(model.state_dict(), 'weights.pth')."
        )
    return ".".join(names), found


def _is_entry(value: Any) -> bool:
    """True for weights by name, or for a dictionary that holds such an entry."""
    if not isinstance(value, Mapping):
        return False
    return _has_tensor(value) or any(_is_entry(value.get(name)) for name in INNER_ENTRIES)


def _spoilt(found: Mapping[str, Any]) -> bool:
    """True if there is an entry for the weights, and it holds something else."""
    return any(name in found and found[name] is not None and not _has_tensor(found) for name in ("state_dict", "model"))


def _entry_called(found: Any, path: Path, key: str) -> Any:
    value, at = found, ""
    rest = key
    while rest:
        if not isinstance(value, Mapping):
            break
        known = [name for name in value if isinstance(name, str)]
        name = next((name for name in known if rest == name or rest.startswith(f"{name}.")), None)
        if name is None:
            raise CheckpointError(
                f"{path} has no entry {key!r}.{did_you_mean(rest, known)} "
                f"There is: {', '.join(name[:40] for name in known[:8]) or 'nothing'}{', ...' * (len(known) > 8)}"
            )
        value, at, rest = value[name], f"{at}.{name}", rest[len(name) + 1 :]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the entry {key!r} of {path} is no dictionary of tensors, but {type(value).__name__}.")
    return value


def _cleaned(tensors: StateDict, path: Path, key: str) -> Read:
    """Names without what wrappers of torch add, of which a model of timm has nothing."""
    found: StateDict = {}
    stripped: dict[str, None] = {}
    for name, tensor in tensors.items():
        plain = name
        for part in ANYWHERE:
            if plain.startswith(part) or f".{part}" in plain:
                plain = plain.removeprefix(part).replace(f".{part}", ".")
                stripped[part] = None
        if plain.startswith("module."):
            plain = plain.removeprefix("module.").removeprefix("_orig_mod.")
            stripped["module."] = None
        if plain in found:
            raise CheckpointError(f"{path} holds {plain!r} twice, once of them as {name!r}. Which of them is meant?")
        found[plain] = tensor
    left = (_AVERAGED,) if "module." in stripped and found.pop(_AVERAGED, None) is not None else ()
    return Read(found, str(path), key, tuple(stripped), left)


def _why_torch_failed(path: Path, error: Exception) -> str:
    said = f"{error} {error.__cause__ or ''}"
    code = re.search(r"(?:Unsupported globals: |GLOBAL )(\w+(?:\.\w+)+)", said)
    again = "Write the tensors alone with torch.save(model.state_dict(), 'weights.pth')."
    if "TorchScript" in said:
        return f"{path} is a TorchScript program and not a state dict. {again}"
    if code:
        return f"{path} holds pickled code ({code[1]}), which is never run: it could do anything. {again}"
    if isinstance(error, pickle.UnpicklingError):
        return f"{path} is damaged, or a pickle that cannot be read without running the code in it. {again}"
    return f"{path} begins like a torch file but is damaged or truncated ({_brief(error)}). Fetch or write it again."


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _only_tensors(found: Any, path: Path) -> StateDict:
    """`found` if it maps names to tensors and to nothing else."""
    others = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if found and not others:
        return dict(found)
    if len(others) == len(found):
        inner = [str(key) for key, value in found.items() if isinstance(value, dict) and _has_tensor(value)]
        hint = f" There are tensors under {inner[0]!r}; save that alone, or name it with --key." if inner else ""
        named = ", ".join(repr(key)[:40] for key in others[:5]) or "nothing at all"
        raise CheckpointError(
            f"{path} holds no tensors, but {named}. Weights are looked for in {', '.join(ENTRIES)}.{hint}"
        )
    named = ", ".join(f"{str(key)[:60]!r} ({type(found[key]).__name__})" for key in others[:3])
    raise CheckpointError(
        f"{path} holds {len(others)} entries that are no tensors among its {len(found)}: {named}. Is it a state dict?"
    )


def _has_tensor(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())
