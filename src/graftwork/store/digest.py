"""SHA-256 of many bytes, taken by a thread: hashlib lets the interpreter go on meanwhile."""

from __future__ import annotations

import hashlib
from threading import Thread


class Digest(Thread):
    """The hash of `data`, begun at once. Nothing may write into the bytes before `hex` has returned."""

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__(name="graftwork-sha256")
        self._data = data
        self._found = ""
        self.start()

    def run(self) -> None:
        """What the thread does."""
        self._found = hashlib.sha256(self._data).hexdigest()

    def hex(self) -> str:
        """The hash as 64 characters, once it is there."""
        self.join()
        return self._found
