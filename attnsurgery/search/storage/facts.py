"""Reads the data of a search from its study, before the search reads images, trains or writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from attnsurgery.search.storage.schema import FORMAT_KEY, STUDY, check_format
from attnsurgery.search.storage.urls import (
    check_ours,
    check_url,
    close,
    open_storage,
    storage_errors,
    study_name,
    url_of,
    without_password,
)


def stored_facts(folder: Path, storage: str | None) -> dict[str, Any]:
    """Data of the search as its study has it; empty if there is no study yet.

    Args:
        folder: the run directory.
        storage: URL of the study; None if the study is in the run directory.

    Raises:
        UsageError: the URL cannot be parsed, or its driver is missing.
        SearchError: the storage cannot be opened, or the study is not a search's, or is of a newer version.
    """
    if storage is None and not (folder / STUDY).exists():
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or url_of(folder / STUDY)
    if storage:
        check_url(storage)
    with storage_errors(url):
        database = open_storage(url)
        try:
            name = folder.resolve().name if storage else study_name(database, folder)
            if name is None or name not in optuna.get_all_study_names(database):
                return {}
            check_ours(database, name, without_password(url))
            attributes = database.get_study_user_attrs(database.get_study_id_from_name(name))
        finally:
            close(database)
    check_format(attributes.get(FORMAT_KEY), str(folder))
    return attributes
