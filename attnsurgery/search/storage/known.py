"""What a study holds before a search goes on with it, looked up before anything is read, trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from attnsurgery.search.storage.schema import FORMAT_KEY, STUDY, check_format
from attnsurgery.search.storage.urls import (
    check_ours,
    check_url,
    close,
    opened,
    storage_errors,
    study_name,
    url_of,
    without_password,
)


def known(folder: Path, storage: str | None) -> dict[str, Any]:
    """Data of the search as its study has it; empty where there is no study yet.

    Args:
        storage: URL of the study, where that is not in the run directory.

    Raises:
        UsageError: the URL does not read, or its driver is missing.
        SearchError: the storage cannot be opened, or the study is somebody else's or of a newer version.
    """
    if storage is None and not (folder / STUDY).exists():
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or url_of(folder / STUDY)
    if storage:
        check_url(storage)
    with storage_errors(url):
        kept = opened(url)
        try:
            name = folder.resolve().name if storage else study_name(kept, folder)
            if name is None or name not in optuna.get_all_study_names(kept):
                return {}
            check_ours(kept, name, without_password(url))
            attributes = kept.get_study_user_attrs(kept.get_study_id_from_name(name))
        finally:
            close(kept)
    check_format(attributes.get(FORMAT_KEY), str(folder))
    return attributes
