"""What a trained model has that its base does not: the tensors that differ, bit for bit, in one safetensors file.

Two sets of weights are told apart by their *digest*: sha256 over their tensors in the order of their names, each as one
line of JSON [name, dtype, shape] and then its bytes. A .pth and a .safetensors file of the same weights have the same.
The file keeps two: of the base's weights, as their file holds them, and of the whole, so that what is put together
again is proven to be what was taken apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors
import safetensors.torch
import torch

from attnsurgery.checkpoint.weights import DELTA_MARK, StateDict
from attnsurgery.errors import CheckpointError

VERSION = "1"

_CASTS = ("float64", "float32", "float16", "bfloat16")
"""Types between which a base's tensor may be converted on the way back: one rounding, the same everywhere."""


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """'sha256:' and 64 digits, of names, dtypes, shapes and bytes; tensor by tensor, without copies on the CPU."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, _dtype(tensor), list(tensor.shape)]).encode() + b"\n")
        found.update(_bytes(name, tensor).numpy().data)
    return f"sha256:{found.hexdigest()}"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for the same dtype, shape and bytes: a NaN equals itself, and 0 is not -0."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(_bytes("", one), _bytes("", other))


class _Header(pydantic.BaseModel):
    """What the file says besides its tensors."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    attnsurgery_delta: Literal["1"]
    base: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
    base_file: Annotated[str, pydantic.Field(max_length=300)]
    base_digest: Annotated[str, pydantic.Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    digest: Annotated[str, pydantic.Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    dropped: list[str]
    cast: dict[Literal["float64", "float32", "float16", "bfloat16"], list[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A model's weights as what differs from its base's."""

    base: str
    """timm name of the base."""
    base_file: str
    """What the base's weights were called when this was made; says nothing about what they must be called."""
    base_digest: str
    digest: str
    """Of the whole."""
    tensors: StateDict
    """New ones, and those of the base with other numbers or another shape."""
    dropped: tuple[str, ...] = ()
    """Tensors of the base that the model does not have."""
    cast: Mapping[str, tuple[str, ...]] | None = None
    """By dtype: tensors that are the base's, converted."""

    @classmethod
    def between(cls, whole: StateDict, native: StateDict, *, base: str, base_file: str, base_digest: str) -> Difference:
        """
        Args:
            whole: the model's weights.
            native: the base's weights under timm's names.

        Raises:
            CheckpointError: the base has none of the model's tensors, so it is the base of something else.
        """
        if not any(name in whole and whole[name].shape == tensor.shape for name, tensor in native.items()):
            raise CheckpointError(
                f"{base_file} holds no tensor that this model has, neither by name nor by shape; are these the weights "
                f"of {base}, its base?"
            )
        tensors: StateDict = {}
        cast: dict[str, list[str]] = {}
        for name, tensor in whole.items():
            there = native.get(name)
            if there is not None and same_bits(tensor, there):
                continue
            if there is not None and _is_cast(tensor, there):
                cast.setdefault(_dtype(tensor), []).append(name)
            else:
                tensors[name] = tensor
        return cls(
            base=base,
            base_file=base_file,
            base_digest=base_digest,
            digest=digest(whole),
            tensors=tensors,
            dropped=tuple(sorted(native.keys() - whole.keys())),
            cast={dtype: tuple(sorted(names)) for dtype, names in cast.items()},
        )

    def joined(self, native: StateDict, source: str) -> StateDict:
        """The whole again, from the base's weights under timm's names.

        Raises:
            CheckpointError: what comes out has not the digest of what was taken apart.
        """
        whole = {name: tensor for name, tensor in native.items() if name not in set(self.dropped)}
        for dtype, names in (self.cast or {}).items():
            for name in names:
                if name not in whole or name in self.tensors:
                    raise CheckpointError(f"{source} is damaged: it converts {name!r}, which the base does not have.")
                whole[name] = whole[name].to(getattr(torch, dtype))
        whole.update(self.tensors)
        if digest(whole) != self.digest:
            raise CheckpointError(
                f"{source} and its base do not make the model that was taken apart: its digest was {self.digest}, and "
                f"this is {digest(whole)}. The delta was changed since, or this timm renames the base's tensors "
                "in another way."
            )
        return whole

    def write(self, path: Path) -> None:
        """As a safetensors file; what goes with the tensors stands in its metadata."""
        header = {
            DELTA_MARK: VERSION,
            "base": self.base,
            "base_file": self.base_file[:300],
            "base_digest": self.base_digest,
            "digest": self.digest,
            "dropped": json.dumps(self.dropped),
            "cast": json.dumps(self.cast or {}),
        }
        safetensors.torch.save_file(self.tensors, path, metadata={"format": "pt", **header})

    @classmethod
    def read(cls, path: Path) -> Difference:
        """
        Raises:
            CheckpointError: missing, damaged, not such a file, or of a later version. Nothing is allocated before the
                sizes in the file's header have been found to fill the file.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                said = dict(file.metadata() or {})
        except Exception as error:  # the library raises its own, OSError, ValueError and more for damaged files
            raise _damaged(path, error) from None
        header = _header(path, said)
        try:
            tensors = safetensors.torch.load_file(path)
        except Exception as error:
            raise _damaged(path, error) from None
        return cls(
            base=header.base,
            base_file=header.base_file,
            base_digest=header.base_digest,
            digest=header.digest,
            tensors=tensors,
            dropped=tuple(header.dropped),
            cast={dtype: tuple(names) for dtype, names in header.cast.items()},
        )


def _header(path: Path, said: dict[str, str]) -> _Header:
    version = said.get(DELTA_MARK)
    if version is None:
        raise CheckpointError(f"{path} is a safetensors file but no delta: it does not say what it differs from.")
    if version != VERSION:
        raise CheckpointError(f"{path} is a delta of version {version[:20]!r}; this attnsurgery reads {VERSION!r}.")
    try:
        fields: dict[str, Any] = {key: value for key, value in said.items() if key != "format"}
        for key in ("dropped", "cast"):
            fields[key] = json.loads(fields.get(key, ""))
        return _Header.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:60]
        raise CheckpointError(f"{path} is a damaged delta: its {field!r} is not right ({first['msg']}).") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is a damaged delta: its metadata does not read as JSON.") from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    said = " ".join(str(error).split())[:120]
    return CheckpointError(f"{path} is no readable delta: damaged, truncated or another kind of file ({said}).")


def _is_cast(tensor: torch.Tensor, there: torch.Tensor) -> bool:
    """True if the model's tensor is the base's in another type."""
    types = _dtype(tensor), _dtype(there)
    return types[0] != types[1] and set(types) <= set(_CASTS) and same_bits(tensor, there.to(tensor.dtype))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory, row by row, as a flat row of bytes on the CPU."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{name!r} is sparse, quantised or without data; only plain tensors can be compared.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
