"""Remembers digests of files that did not change, so that gigabytes are hashed once."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from posttrain.store.files import file_sha256


class DigestCache:
    """A small table of key -> digest in SQLite; safe for several processes.

    A file's key holds its path, size, modification time and inode: whoever writes to a file
    changes its key. What changes bytes without leaving a trace in the file system (a bit that
    flips on the disk) is found by `posttrain store verify`, which never asks this cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def file_digest(self, path: Path) -> str:
        """SHA-256 of the file's content, from the cache where the file is unchanged."""
        key = self._file_key(path)
        known = self.get(key)
        if known is None:
            known = file_sha256(path)
            # A file that was written to while it was hashed must not enter the cache.
            if self._file_key(path) == key:
                self.put(key, known)
        return known

    def remember(self, path: Path, digest: str) -> None:
        """Enter a digest that was computed elsewhere."""
        self.put(self._file_key(path), digest)

    def get(self, key: str) -> str | None:
        """The digest under a key, or None."""
        try:
            with closing(self._connect()) as connection:
                row = connection.execute(
                    "SELECT value FROM digest WHERE key = ?", (key,)
                ).fetchone()
        except sqlite3.Error:
            return None  # a cache that cannot be read is an empty one
        return str(row[0]) if row else None

    def put(self, key: str, value: str) -> None:
        """Enter a digest under a key; a cache that cannot be written is left as it is."""
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("INSERT OR REPLACE INTO digest VALUES (?, ?)", (key, value))
        except sqlite3.Error:
            return

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=10)
        connection.execute("CREATE TABLE IF NOT EXISTS digest (key TEXT PRIMARY KEY, value TEXT)")
        return connection

    @staticmethod
    def _file_key(path: Path) -> str:
        stat = path.stat()
        return f"file:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
