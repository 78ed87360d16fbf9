"""Recognises weights files by their first bytes, and reads their content without ever running pickled code.

Torch files are read with `weights_only=True`. Names of files do not tell what they are: a Git LFS pointer or a download
page is often called `model.safetensors`.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from attnsurgery.errors import CheckpointError, did_you_mean, shorten

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
DELTA_NAME = "weights.delta"
"""The weights file of a delta directory: safetensors, with a name that no program takes for a whole model's weights."""
DELTA_MARK = "attnsurgery_delta"
"""Key in the metadata of a safetensors file that holds only differences from a base."""

_PREFERRED = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

_FOREIGN_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the weights themselves; fetch them with 'git lfs pull'"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; convert it to a PyTorch state dict first"),
    (b"\x93NUMPY", "one NumPy array; convert it to a PyTorch state dict first"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"GGUF", "a GGUF file; a PyTorch state dict is needed"),
)
READABLE = "Readable are .safetensors files, torch.save'd state dicts (.pth, .pt, .bin) and timm directories."


def weights_file(path: Path) -> Path:
    """`path` itself, or the weights file in it if it is a directory.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    try:
        if path.is_dir():
            return _file_in(path)
        if path.is_file():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is no regular file. {READABLE}")
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot look at {path}: {error.strerror}.") from None
    raise CheckpointError(f"there is no file {str(path)!r}.{did_you_mean(path.name, near)}")


def _file_in(directory: Path) -> Path:
    if (directory / DELTA_NAME).is_file():
        raise CheckpointError(_delta_error(directory))
    for name in _PREFERRED:
        if (directory / name).is_file():
            return directory / name
    candidates = sorted(entry for entry in directory.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(entry.name for entry in candidates[:5])
        raise CheckpointError(
            f"the directory {directory} holds {len(candidates)} weights files ({names}); name one of them."
        )
    content = ", ".join(sorted(entry.name for entry in directory.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"the directory {directory} holds no weights, but {content}. A timm directory has model.safetensors."
    )


def kind_of(path: Path) -> str:
    """'safetensors', 'torch', or a description of any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
    if not head:
        return "empty (0 bytes); was a download or a copy interrupted?"
    for start, description in _FOREIGN_FORMATS:
        if head.startswith(start):
            return description
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
    except Exception:  # zipfile raises anything for a damaged file, and torch's own error explains the damage
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
        return "a binary file of no known kind, or a truncated one"
    if any(ord(letter) < 32 and letter not in "\t\r\n" for letter in text):
        return "a binary file of no known kind, or a truncated one"
    return f"a text file that begins {text.split(chr(10), 1)[0][:40]!r}"


def _delta_error(path: Path) -> str:
    return (
        f"{path} is a delta: it holds only what differs from its base. Put them together with 'attnsurgery merge DELTA "
        "--base FILE --output DIR'."
    )


def load_safetensors(path: Path) -> Any:
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
    raise CheckpointError(_delta_error(path))


def load_torch(path: Path) -> Any:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a torch.save'd file under the name of a .safetensors file. Rename it to .pth."
        )
    try:
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript: the errors below say more
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make torch raise anything
        raise CheckpointError(_torch_error(path, error)) from None


def _safe_globals() -> list[Any]:
    """Classes and functions in training checkpoints that are safe to unpickle: settings, numbers, paths."""
    # before 2.0 numpy called the package of its C functions numpy.core, and files have either name
    core = getattr(np, "_core", None) or np.core
    functions = [core.multiarray.scalar, core.multiarray._reconstruct]
    renamed = [
        (function, f"numpy.{home}.multiarray.{function.__name__}")
        for function in functions
        for home in ("core", "_core")
    ]
    dtypes = {type(np.dtype(kind)) for kind in np.typecodes["All"]}
    paths = [(pathlib.PurePath, f"pathlib.{name}") for name in ("PosixPath", "WindowsPath")]
    classes = [argparse.Namespace, *renamed, np.ndarray, np.dtype, *dtypes, *paths, pathlib.PurePosixPath]
    registered = torch.serialization.get_safe_globals()  # the context removes its own at its end, also the user's
    return [entry for entry in classes if entry not in registered]


def _torch_error(path: Path, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''}"
    code = re.search(r"(?:Unsupported globals: |GLOBAL )(\w+(?:\.\w+)+)", text)
    advice = "Write the tensors alone with torch.save(model.state_dict(), 'weights.pth')."
    if "TorchScript" in text:
        return f"{path} is a TorchScript program and not a state dict. {advice}"
    if code:
        return f"{path} holds pickled code ({code[1]}), which is never run: it could do anything. {advice}"
    if isinstance(error, pickle.UnpicklingError):
        return f"{path} is damaged, or a pickle that cannot be read without running the code in it. {advice}"
    return f"{path} begins like a torch file but is damaged or truncated ({_brief(error)}). Fetch or write it again."


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return shorten(text, 120)
