"""The difference between a model's weights and its base's: the tensors that are not equal bit for bit, in one file.

Weights are identified by their *digest*: sha256 over their tensors in the order of their names, each as one line of
JSON [name, dtype, shape] followed by its bytes. So a .pth and a .safetensors file of the same weights have the same
digest. The safetensors file of a difference contains the digests of the base's weights, as their file holds them, and
of the model's weights, which are compared when the model is restored.
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

from attnsurgery.checkpoint.formats import DELTA_MARK
from attnsurgery.checkpoint.weights import StateDict
from attnsurgery.errors import CheckpointError

VERSION = "1"

_CASTS = ("float64", "float32", "float16", "bfloat16")
"""Types between which a base's tensor may be converted when the model is restored: the rounding is the same on every
machine."""


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """'sha256:' and 64 hexadecimal digits, from names, dtypes, shapes and bytes of all tensors."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha256.update(json.dumps([name, _dtype(tensor), list(tensor.shape)]).encode() + b"\n")
        sha256.update(_bytes(name, tensor).numpy().data)
    return f"sha256:{sha256.hexdigest()}"


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """True for the same dtype, shape and bytes: a NaN equals itself, and 0 is not -0."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and torch.equal(_bytes("", first), _bytes("", second))


class _Header(pydantic.BaseModel):
    """The metadata of the file, validated."""

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
    """A model's weights as their difference from its base's."""

    base: str
    """timm name of the base."""
    base_file: str
    """Name of the file of the base's weights when the difference was computed, for information."""
    base_digest: str
    """Digest of the base's weights, as their file holds them."""
    digest: str
    """Digest of the model's weights."""
    tensors: StateDict
    """New tensors, and those of the base with other values or another shape."""
    dropped: tuple[str, ...] = ()
    """Names of the base's tensors that the model does not have."""
    cast: Mapping[str, tuple[str, ...]] | None = None
    """By dtype: names of tensors that are the base's, converted to this type."""

    @classmethod
    def between(cls, whole: StateDict, native: StateDict, *, base: str, base_file: str, base_digest: str) -> Difference:
        """The difference between a model's weights and its base's.

        Args:
            whole: the model's weights.
            native: the base's weights under timm's names.
            base: timm name of the base.
            base_file: name of the file of the base's weights.
            base_digest: digest of the base's weights, as their file holds them.

        Raises:
            CheckpointError: the base has none of the model's tensors, so it is the base of another model.
        """
        if not any(name in whole and whole[name].shape == tensor.shape for name, tensor in native.items()):
            raise CheckpointError(
                f"{base_file} holds no tensor that this model has, neither by name nor by shape; are these the weights "
                f"of {base}, its base?"
            )
        tensors: StateDict = {}
        cast: dict[str, list[str]] = {}
        for name, tensor in whole.items():
            original = native.get(name)
            if original is not None and same_bits(tensor, original):
                continue
            if original is not None and _is_converted(tensor, original):
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
        """The model's weights, restored.

        Args:
            native: the base's weights under timm's names.
            source: the name of the difference in messages.

        Raises:
            CheckpointError: the result does not have the digest of the model's weights.
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
                f"{source} and its base do not give the model that was saved: its digest was {self.digest}, and this "
                f"is {digest(whole)}. The delta was changed since, or this version of timm renames the base's tensors "
                "in another way."
            )
        return whole

    def write(self, path: Path) -> None:
        """Write a safetensors file; everything except the tensors is in its metadata."""
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
        """Read a file that `write` wrote.

        Memory is allocated only after the sizes in the file's header were compared with the size of the file.

        Raises:
            CheckpointError: missing, damaged, another kind of file, or of a later version.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
        except Exception as error:  # safetensors raises exceptions of many classes for damaged files
            raise _damaged(path, error) from None
        header = _header(path, metadata)
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


def _header(path: Path, metadata: dict[str, str]) -> _Header:
    version = metadata.get(DELTA_MARK)
    if version is None:
        raise CheckpointError(f"{path} is a safetensors file but no delta: its metadata names no base.")
    if version != VERSION:
        raise CheckpointError(f"{path} is a delta of version {version[:20]!r}; this attnsurgery reads {VERSION!r}.")
    try:
        fields: dict[str, Any] = {key: value for key, value in metadata.items() if key != "format"}
        for key in ("dropped", "cast"):
            fields[key] = json.loads(fields.get(key, ""))
        return _Header.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:60]
        raise CheckpointError(f"{path} is a damaged delta: its {field!r} is not valid ({first['msg']}).") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is a damaged delta: its metadata does not read as JSON.") from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    message = " ".join(str(error).split())[:120]
    return CheckpointError(f"{path} is no readable delta: damaged, truncated or another kind of file ({message}).")


def _is_converted(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    """True if the model's tensor is the base's, converted to another type."""
    types = _dtype(tensor), _dtype(original)
    return types[0] != types[1] and set(types) <= set(_CASTS) and same_bits(tensor, original.to(tensor.dtype))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values in row-major order as bytes on the CPU.

    Raises:
        CheckpointError: it is sparse, quantised or on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{name!r} is sparse, quantised or without data; only plain tensors can be compared.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
