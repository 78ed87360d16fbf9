"""Reads the tensors out of a weights file, whoever wrote it, and says what the file is when it holds none.

Pickled code is never run: torch files are read with `weights_only=True`. What a file is, is told from its first bytes,
because names lie: a Git LFS pointer or a download page is often called `model.safetensors`.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models._helpers import clean_state_dict, load_state_dict

from attnsurgery.errors import CheckpointError, did_you_mean

StateDict = dict[str, torch.Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
NESTED_KEYS = "state_dict_ema, model_ema, state_dict, model"
"""Where timm looks for the weights in a training checkpoint, in this order."""

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


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a .safetensors or torch file, a timm training checkpoint (EMA weights first), or a timm directory.

    Prefixes that wrappers leave in names (`module.`, `_orig_mod.`) are taken off. Tensors are on the CPU.

    Raises:
        CheckpointError: missing, empty, damaged, of another kind, or with pickled code in it, which is never run.
    """
    path = _file_meant(Path(path))
    kind = _kind(path)
    if kind == "safetensors":
        tensors: Any = _read_safetensors(path)
    elif kind == "torch":
        tensors = _read_torch(path)
    else:
        raise CheckpointError(f"{path} is {kind}{'' if kind.endswith('?') else '.'} {_READABLE}")
    return _only_tensors(tensors, path)


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
            return clean_state_dict(safetensors.torch.load_file(path))
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
        # a namespace runs nothing: timm's checkpoints hold the arguments of their training in one
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: the errors below say more
            return load_state_dict(str(path), weights_only=True)
    except (AttributeError, TypeError):
        raise CheckpointError(
            f"{path} is a torch file but holds no dictionary of tensors. Write one with "
            "torch.save(model.state_dict(), 'weights.pth')."
        ) from None
    except Exception as error:  # a hostile pickle can make torch raise nearly anything
        raise CheckpointError(_why_torch_failed(path, error)) from None


def _why_torch_failed(path: Path, error: Exception) -> str:
    said = f"{error} {error.__cause__ or ''}"
    code = re.search(r"(?:Unsupported globals: |GLOBAL )(\w+(?:\.\w+)+)", said)
    again = "Write the tensors alone with torch.save(model.state_dict(), 'weights.pth')."
    if "TorchScript" in said:
        return f"{path} is a TorchScript program and not a state dict. {again}"
    if code:
        return f"{path} holds pickled code ({code[1]}), which is never run: it could do anything. {again}"
    if "weights_only=True blocked" in said:
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
        hint = f" There are tensors under {inner[0]!r}; save that alone." if inner else ""
        named = ", ".join(repr(key)[:40] for key in others[:5]) or "nothing at all"
        raise CheckpointError(f"{path} holds no tensors, but {named}. Weights are looked for in {NESTED_KEYS}.{hint}")
    named = ", ".join(f"{str(key)[:60]!r} ({type(found[key]).__name__})" for key in others[:3])
    raise CheckpointError(
        f"{path} holds {len(others)} entries that are no tensors among its {len(found)}: {named}. Is it a state dict?"
    )


def _has_tensor(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())
