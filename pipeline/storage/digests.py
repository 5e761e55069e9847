"""Whether stored bytes are still those of the conversion: a bit that flips on a disk decodes to other pixels."""

import hashlib

import numpy as np

from pipeline.storage.beton import Stored, checked_bytes, files_path, jpeg_bytes


class Digests:
    """The sha256 of each sample's bytes as the converter noted it, read where `x.files.tsv` is mapped.

    8 bytes a sample in memory. Raises UserError at construction if the file is missing or another dataset's.
    """

    def __init__(self, stored: Stored) -> None:
        path = files_path(stored.path)
        checked_bytes(path, stored.path, stored.manifest["files_sha256"])
        self._stored, self._text = stored, np.memmap(path, np.uint8, "r")
        self._ends = np.flatnonzero(self._text == ord("\n"))  # of the heading, of sample 0, …

    def match(self, sample: int) -> bool:
        """Whether a sample's bytes have its digest."""
        line = self._text[self._ends[sample] + 1 : self._ends[sample + 1]].tobytes()
        noted = line.split(b"\t", 4)[3]
        return hashlib.sha256(jpeg_bytes(self._stored, sample).data).hexdigest().encode() == noted
