"""Files of a run directory: the lock that lets one search in at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnsurgery.errors import SearchError
from attnsurgery.search.files import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from attnsurgery.search.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A second process is refused while the first lives, and let in once it was killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(SearchError, match=r"another search is running in .*another --output"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    """An error inside comes out as it is, and the directory is free again."""
    with pytest.raises(FileNotFoundError, match="inside"), locked(tmp_path):
        raise FileNotFoundError("inside")
    with locked(tmp_path):
        pass


def test_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A lock file that does not open is no running search."""
    (tmp_path / LOCK).mkdir()
    with pytest.raises(SearchError, match=r"cannot lock .*\.lock: Is a directory"), locked(tmp_path):
        pass
