"""Opens storages by their URLs, and explains why one cannot be opened or written."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search.storage.schema import FORMAT_KEY, is_format

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
"""Drivers for URLs that name none. Database hosts often write postgres:// for postgresql://."""
_LOCKED_S = 60.0
"""How long to wait for a SQLite database that another process writes to, in s."""
_ATTEMPTS = 5
"""How often to open a database whose tables others create."""
_PAUSE_S = 0.2
_EXTRAS = {"postgres": "postgres", "mysql": "mysql", "grpc": "grpc"}
"""The extra of this package that installs the driver, by the beginning of a URL."""
_KINDS = "It reads like sqlite:///study.db, postgresql://user@host/name, mysql://user@host/name or grpc://host:port."
_NO_URL = f"--storage is not a database URL. {_KINDS}"


def open_storage(url: str | BaseStorage) -> BaseStorage:
    """The storage of a URL, with the drivers that the extras of this package install."""
    if not isinstance(url, str):
        return url
    if proxy := _proxy_of(url):
        host, port = proxy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.GrpcStorageProxy(host=host, port=port)
    # wait for a SQLite database that another process writes to; reconnect where a server has dropped the connection
    options = {"connect_args": {"timeout": _LOCKED_S}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return _create_tables_once(lambda: optuna.storages.RDBStorage(_with_driver(url), engine_kwargs=options))


def _create_tables_once(open_database: Callable[[], BaseStorage]) -> BaseStorage:
    """Open a database again where another search created its tables at the same moment."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return open_database()
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            created = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not created or attempt == _ATTEMPTS:
                raise
            time.sleep(attempt * _PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def url_of(database: Path) -> str:
    """The URL of a SQLite file; '?' and '%' in its path are escaped."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(database.resolve())).render_as_string(hide_password=False)


def close(storage: BaseStorage) -> None:
    """Close the connections of a storage."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def check_url(url: str) -> None:
    """Make sure that a URL can be parsed and that its driver is installed; no connection is made.

    Raises:
        UsageError: the URL cannot be parsed, or its driver is missing.
    """
    with storage_errors(url):
        if _proxy_of(url):
            importlib.import_module("grpc")
        else:
            from sqlalchemy import create_engine

            create_engine(_with_driver(url)).dispose()


def _with_driver(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    scheme = _DRIVERS.get(scheme, scheme)
    if scheme.startswith("postgres+"):  # the URL names a driver
        scheme = scheme.replace("postgres", "postgresql", 1)
    return f"{scheme}{colon}{rest}"


def _proxy_of(url: str) -> tuple[str, int] | None:
    """Host and port of Optuna's gRPC proxy; None for any other URL.

    Raises:
        UsageError: host or port is missing.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "grpc":
        return None
    host, _, port = rest.rstrip("/").rpartition(":")
    if not (host and port.isdecimal()):
        raise UsageError("--storage: a gRPC proxy is named as grpc://host:port, without user and password.")
    return host, int(port)


@contextmanager
def writing_errors() -> Iterator[None]:
    """Explain errors of a study that cannot be written, because the disk is full or the server is down."""
    try:
        yield
    except Exception as error:
        reason = _of_a_storage(error)
        if reason is None:
            raise
        raise SearchError(
            f"the study cannot be written: {reason.rstrip('.')}. All earlier trials are kept, and the same command "
            "resumes as soon as it can be written."
        ) from None


def _of_a_storage(error: Exception) -> str | None:
    """The message of a database or proxy error in one line; None for any other error."""
    from sqlalchemy.exc import SQLAlchemyError

    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if type(cause).__module__.partition(".")[0] == "grpc":
        details = getattr(cause, "details", None)
        return str((details() if details else None) or type(cause).__name__).splitlines()[0]
    if isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
        return str(getattr(cause, "orig", None) or cause or error).splitlines()[0]
    return None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Explain why a study cannot be opened, without showing the password in its URL."""
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        yield
    except NoSuchModuleError:
        raise UsageError(f"--storage {without_password(url)} names no database that is known here. {_KINDS}") from None
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise UsageError(_NO_URL) from None
    except ImportError as error:
        prefix = next((prefix for prefix in _EXTRAS if url.startswith(prefix)), "")
        extra = f" Install it with  pip install 'attnsurgery[{_EXTRAS[prefix]}]'" if prefix else ""
        raise UsageError(
            f"--storage {without_password(url)} needs a package that is missing: {error}.{extra}"
        ) from None
    except Exception as error:
        if _of_a_storage(error) is None and not isinstance(error, RuntimeError | OSError):
            raise
        text = _of_a_storage(error) if "grpc" in url else str(error)
        reason = str(text).splitlines()[0].replace(url, without_password(url))
        repair = " attnsurgery repair RUN_DIR rebuilds it from the journal." if url.startswith("sqlite") else ""
        raise SearchError(
            f"the study at {without_password(url)} cannot be opened: {reason.rstrip('.')}.{repair}"
        ) from None


def without_password(url: str) -> str:
    """The URL with its password hidden.

    Raises:
        UsageError: the URL cannot be parsed.
    """
    parsed, secret = _parsed(url)
    return parsed.update_query_dict(dict.fromkeys(secret, "hidden")).render_as_string(hide_password=True)


def has_password(url: str) -> bool:
    """Whether the URL holds a password.

    Raises:
        UsageError: the URL cannot be parsed.
    """
    parsed, secret = _parsed(url)
    return parsed.password is not None or bool(secret)


def _parsed(url: str) -> tuple[URL, list[str]]:
    """The parsed URL, and the names of its parameters that hold a password for some drivers."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise UsageError(_NO_URL) from None
    return parsed, [name for name in parsed.query if "pass" in name.lower()]


def check_ours(storage: BaseStorage, name: str, location: str) -> None:
    """Make sure that a study belongs to a search or is empty, so that nothing is written into a study of others.

    Args:
        storage: of the study.
        name: of the study.
        location: of the storage, for the message.

    Raises:
        SearchError: the study holds other trials or data, or does not maximize one value.
    """
    study = storage.get_study_id_from_name(name)
    attributes = storage.get_study_user_attrs(study)
    if is_format(attributes.get(FORMAT_KEY)):
        return
    count = len(storage.get_all_trials(study, deepcopy=False))
    other_direction = storage.get_study_directions(study) not in ([StudyDirection.MAXIMIZE], [StudyDirection.NOT_SET])
    if count or attributes or other_direction:
        data = f" and data under {', '.join(sorted(attributes)[:3])}" if attributes else ""
        raise SearchError(
            f"{location} has a study {name!r} that no search has made: it holds {count} trials{data}. Nothing was "
            "written. The last part of --output names the study: give the search another one, or another --storage."
        )


def study_name(storage: BaseStorage, folder: Path) -> str | None:
    """The study of a run directory: the one with its name, or the only one there is; None if there is neither."""
    names = optuna.get_all_study_names(storage)
    name = folder.resolve().name
    return name if name in names else names[0] if len(names) == 1 else None
