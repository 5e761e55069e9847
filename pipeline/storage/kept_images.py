"""A source → what a .beton keeps of each of its images, in order: read, checked and encoded by worker processes."""

from collections.abc import Generator

from pipeline.errors import UserError
from pipeline.storage import store
from pipeline.storage.sources.source import Place, Read, Source, Stamp, image_places, pixel_stamp
from pipeline.storage.workers import CHUNK_IMAGES, Workers, out_of_memory, write_slot

Kept = tuple[store.ImageBytes | str, Stamp]  # what is kept of an image, or why it cannot be read; and its stamp


def keep_image(place: Place, read: Read, how: store.How) -> Kept:
    """One image. Raises UserError if the disk or the memory fails, which says nothing about the image."""
    try:
        data, stamp = read(place)
    except OSError as error:
        raise UserError(
            f"{place[0]} cannot be read from the disk ({error.strerror or error}); repair that and run again"
        ) from None
    except MemoryError:
        raise out_of_memory(f"for {place[0]}") from None
    try:
        return store.store_image(data, how), stamp
    except store.Unreadable as error:
        return str(error), stamp
    except MemoryError:
        raise out_of_memory(f"for {place[0]}") from None


def _keep_chunk(places: list[Place], slot: int, read: Read, how: store.How) -> list[Kept]:
    """In a worker, some images. The bytes that fit into the slot lie there, one behind the other, not in `data`."""
    results, taken = [], 0
    for place in places:
        result, stamp = keep_image(place, read, how)
        if isinstance(result, store.ImageBytes) and write_slot(slot, taken, result.data):
            taken += result.size_bytes
            result = result._replace(data=b"")
        results.append((result, stamp))
    return results


def kept_images(source: Source, start: int, how: store.How, workers: Workers | None) -> Generator[Kept]:
    """Images start … of a source. `data` is valid until the next one is asked for. Pixels need no workers."""
    if source.pixels is not None:
        yield from ((store.store_raw(pixels), pixel_stamp(pixels)) for pixels in source.pixels[start:])
        return
    assert workers is not None
    chunks = (
        (image_places(source, first, min(first + CHUNK_IMAGES, len(source))), number % workers.slots, source.read, how)
        for number, first in enumerate(range(start, len(source), CHUNK_IMAGES))
    )
    for number, chunk in enumerate(workers.in_order(_keep_chunk, chunks)):
        at = 0
        for result, stamp in chunk:
            if isinstance(result, store.ImageBytes) and not result.data:
                result = result._replace(data=workers.read_slot(number % workers.slots, at, result.size_bytes))
                at += result.size_bytes
            yield result, stamp
