"""Seeds derived from their purpose."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """A seed that depends on its parts alone, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
