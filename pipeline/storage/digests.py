"""Whether stored bytes are still those of the conversion: a bit that flips on a disk decodes to other pixels."""

import hashlib

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.beton import Stored, checked_bytes, files_path, jpeg_bytes
from pipeline.storage.mapped import map_file


class Digests:
    """The sha256 of each sample's bytes as the converter noted it, read where `x.files.tsv` is mapped.

    8 bytes a sample in memory. Raises UserError at construction if the file is missing or another dataset's.
    """

    def __init__(self, stored: Stored) -> None:
        self._stored, self._path = stored, files_path(stored.path)
        try:
            content = checked_bytes(self._path, stored.path, stored.manifest["files_sha256"])
        except UserError as error:
            where = "pretraining's --no-check-bytes, LoaderConfig's check_bytes=False"
            raise UserError(f"{error}; training can do without its check of the images' bytes ({where})") from None
        if content.count(b"\n") != len(stored) + 1:
            raise UserError(f"{self._path} lists other images than {stored.path.name} has; convert again")
        self._text = map_file(self._path)
        self._ends = np.flatnonzero(self._text == ord("\n"))  # of the heading, of sample 0, …

    def match(self, sample: int) -> bool:
        """Whether a sample's bytes have its digest. Raises UserError where the file has none for it."""
        columns = self._text[self._ends[sample] + 1 : self._ends[sample + 1]].tobytes().split(b"\t")
        if len(columns) != 5:
            raise UserError(f"{self._path}, line {sample + 2} is not one of an image; convert again")
        return hashlib.sha256(jpeg_bytes(self._stored, sample).data).hexdigest().encode() == columns[3]
