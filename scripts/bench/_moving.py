"""Moves an unfinished search to another machine, so that a search of many hours needs no machine for that long.

Two things are kept of the run directory: the journal, and those tensors of starting weights that are not published
ones, which are those of a new head. On the other machine the search resumes with `extend`. All latencies are ratios to
the base's, so those of both machines are on one scale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from attnsurgery.search.files import Journal, locked, write_atomically
from attnsurgery.search.storage.repair import repair
from attnsurgery.search.storage.run_directory import CONFIRMING, WEIGHTS, mark, write_own
from attnsurgery.search.storage.schema import FACT, TRIALS

_SEPARATOR = "|"
"""Between the parts of a kept tensor's name: file in the run directory, folder of the published weights, tensor."""


def keep(run: Path, kept: Path, published: Sequence[Path]) -> None:
    """Write KEPT.jsonl and KEPT.safetensors, from which `restore` makes the run directory again.

    Args:
        run: the run directory, in which no search is running.
        kept: path of the two files, without suffix.
        published: timm directories of the weights that the search began with.

    Raises:
        SearchError: a search is running.
    """
    with locked(run):
        entries = Journal(run / TRIALS).read()
        last = {entry[FACT]: place for place, entry in enumerate(entries) if FACT in entry}
        lines = [
            json.dumps(entry, sort_keys=True)
            for place, entry in enumerate(entries)
            if FACT not in entry or last[entry[FACT]] == place
        ]
        own: dict[str, torch.Tensor] = {}
        for path in (run / WEIGHTS, *sorted((run / CONFIRMING).glob("start-*.safetensors"))):
            own |= _own_tensors(path, path.relative_to(run).as_posix(), published)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(own, kept.with_suffix(".safetensors"))
    write_atomically(kept.with_suffix(".jsonl"), "\n".join(lines) + "\n")


def restore(run: Path, kept: Path, published: Sequence[Path]) -> None:
    """Make the run directory that `keep` was called on again, unless there is one or nothing was kept.

    Args:
        run: the run directory.
        kept: path of the two files, without suffix.
        published: the timm directories that `keep` was given.
    """
    if run.exists() or not kept.with_suffix(".jsonl").exists():
        return
    run.mkdir(parents=True)
    mark(run)
    by_name = {folder.name: folder for folder in published}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(kept.with_suffix(".safetensors")).items():
        file, source, name = key.split(_SEPARATOR)
        if file not in files:
            files[file] = load_file(by_name[source] / "model.safetensors")
        files[file][name] = tensor
    (run / CONFIRMING).mkdir()
    for file, tensors in files.items():
        write_own(run, file, save(tensors))
    write_atomically(run / TRIALS, kept.with_suffix(".jsonl").read_bytes())
    repair(run)


def _own_tensors(path: Path, file: str, published: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of a weights file that are not those of the most similar published weights, under their kept names.

    Raises:
        SystemExit: the file cannot be made from them again.
    """
    tensors, choices = load_file(path), {}
    for folder in published:
        other = load_file(folder / "model.safetensors")
        if other.keys() == tensors.keys():
            choices[folder.name] = [name for name in tensors if not torch.equal(tensors[name], other[name])]
    if not choices or hashlib.sha256(save(tensors)).digest() != hashlib.sha256(path.read_bytes()).digest():
        raise SystemExit(f"{path} was not made from published weights.")
    source = min(choices, key=lambda name: len(choices[name]))
    return {_SEPARATOR.join((file, source, name)): tensors[name] for name in choices[source]}
