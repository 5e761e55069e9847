"""Images that cannot be decoded or have changed since the conversion: the run stops, or another sample stands in.

    stand-in of sample s in epoch e  =  ids[draw(seed, e, s, try)]      try = 0, 1, … until one can be decoded

A pure function of seed, epoch and sample: the same on every backend, at any world size, after any resume. On every
backend libjpeg-turbo decides which samples are bad: those that it refuses or warns about. Pillow and DALI accept some
broken images without a word. What libjpeg-turbo cannot see either, most flipped bits and all in raw pixels, the digest
tells: each sample's bytes are hashed when it is first used. A stand-in comes with its own label and draws, so it is
seen once more in that epoch.
"""

import sys
from collections.abc import Callable

import numpy as np

from pipeline.choices.rng import DOMAIN_STAND_IN, words_array
from pipeline.errors import UserError
from pipeline.spec import LoaderConfig
from pipeline.storage.beton import MODE_JPEG, Stored, jpeg_bytes
from pipeline.storage.decode import CHANGED, NOT_A_JPEG, OK, STATUS_TEXT, UNDECODABLE, decode_status
from pipeline.storage.digests import Digests
from pipeline.storage.jpeg import Decoded, decode_pixels

_MEMORY_TOO = (STATUS_TEXT[NOT_A_JPEG], STATUS_TEXT[UNDECODABLE])  # the statuses that a shortage of memory gives, too
TRIES = 100  # bad stand-ins in a row after which the file, not an image, must be the cause


class BadImages:
    """What one loader has found so far. That only saves decoding a bad image again: it changes no batch.

    `ids` are the samples in use, from which stand-ins are drawn; `map_samples` may be a thread pool's map.
    """

    def __init__(self, config: LoaderConfig, dataset: Stored, ids: np.ndarray, map_samples: Callable = map) -> None:
        self.substitute = config.on_bad_image == "substitute"
        self.seed, self.dataset, self.ids = config.seed, dataset, ids
        self.found: set[int] = set()
        self._map = map_samples
        self._digests = Digests(dataset) if config.check_bytes else None
        self._unchanged = np.zeros(len(dataset), bool)  # the bytes were looked at
        self._judged = np.zeros(len(dataset), bool)

    def note(self, sample: int, reason: str) -> None:
        """A sample that cannot be used. Raises UserError, naming its file, unless others are to stand in."""
        if sample in self.found:
            return
        name = self.dataset.file_names()[sample]
        named = f"image {sample} of {self.dataset.path} ({name}) cannot be used: {reason}"
        if reason in _MEMORY_TOO and self._decodes(sample):
            raise UserError(f"{named}, and now it can: memory was short; end other programs, then run again")
        if not self.substitute:
            raise UserError(f"{named}; check the file with pipeline/convert.py --verify, or convert again")
        self.found.add(sample)
        print(f"note: {named}; others stand in for it", file=sys.stderr, flush=True)

    def _decodes(self, sample: int) -> bool:
        """Asks again, with the library's own words: a decoder that was refused memory calls the image broken."""
        if self.dataset.modes[sample] != MODE_JPEG:
            return False
        try:
            return isinstance(decode_pixels(jpeg_bytes(self.dataset, sample).tobytes(), 65535, 1 << 32), Decoded)
        except MemoryError:
            return True

    def replaced(self, epoch: int, wanted: np.ndarray) -> np.ndarray:
        """The sample ids of a batch with stand-ins for those that are found bad."""
        if not self.found:
            return wanted
        return np.array([self._stand_in(epoch, s) if s in self.found else s for s in wanted.tolist()], np.int64)

    def _stand_in(self, epoch: int, sample: int) -> int:
        for attempt in range(TRIES):
            word = int(words_array(self.seed, DOMAIN_STAND_IN, epoch, [sample], 0, attempt)[0, 0])
            stand_in = int(self.ids[word * len(self.ids) >> 32])
            if stand_in not in self.found:
                return stand_in
        raise UserError(
            f"{TRIES} images of {self.dataset.path} in a row cannot be used; check the file with"
            " pipeline/convert.py --verify, or convert again"
        )

    def check_bytes(self, ids: np.ndarray, status: np.ndarray, map_samples: Callable = map) -> None:
        """Gives CHANGED to those of a batch, (B,) both, that were decoded, but from bytes that have another digest.

        A sound sample is looked at once. Threads may call this at once.
        """
        if not self._digests:
            return
        new = np.flatnonzero((status == OK) & ~self._unchanged[ids])
        for b, sound in zip(new, map_samples(self._digests.match, ids[new].tolist()), strict=True):
            self._unchanged[ids[b]] = sound
            if not sound:
                status[b] = CHANGED

    def decodable(self, epoch: int, wanted: np.ndarray) -> np.ndarray:
        """`replaced`, for a backend whose own decoder does not judge: each sample is judged at its first use."""
        while self.substitute or self._digests:
            ids = self.replaced(epoch, wanted)
            new = np.unique(ids[~self._judged[ids]]).tolist()
            if not new:
                return ids
            for sample, status in zip(new, self._map(self._judge, new), strict=True):
                if status != OK:
                    self.note(sample, STATUS_TEXT[status])
                self._judged[sample] = True
        return wanted

    def _judge(self, sample: int) -> int:
        """A status: of the bytes, and before them, if there may be a stand-in, libjpeg-turbo's of a decode."""
        status = np.array([decode_status(self.dataset, sample) if self.substitute else OK])
        self.check_bytes(np.array([sample]), status)
        return int(status[0])
