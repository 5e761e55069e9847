"""Files of tensors that tell whether they are whole: a digest of their content stands in them and decides.

    write_state, read_state               nested dicts and lists of tensors and plain values, as torch.save writes them
    tensor_file, parsed_tensor_file       a safetensors file's bytes; the digest is part of its metadata
    content_sha256, require_content       the digest itself, for whoever reads and writes in another way

The digest covers every byte, type and shape of every tensor, every plain value and every name, so what is read is what
was written, bit for bit. PyTorch itself does not even look at the checksums of its zip files. Where a file has no
digest (somebody else's, or from before there was one), the zip's checksums are looked at here; older formats and
others' safetensors have none. A file is read once, from one descriptor, and the hash that names it is of those bytes.

    cost     about a second per GB for the digest, without the interpreter's lock; while a file is read, memory for its
             bytes besides its tensors
"""

import errno
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import TypeGuard

import safetensors
import safetensors.torch
import torch

from pipeline.disk import write_whole
from pipeline.errors import UserError

DIGEST = "content_sha256"
SHA256 = "sha256:"  # how its value begins in a file's metadata
PICKLE, TORCH_OLD = b"\x80", b"\x80\x02\x8a\x0a\x6c\xfc"  # how any pickle begins; what torch.save wrote up to 1.5
# Where others keep their weights beside objects: a name in the pickle → the way to a state dict.
WEIGHTS = {
    "state_dict": '["state_dict"]',
    "classy_state_dict": '["classy_state_dict"]["base_model"]["model"]',  # VISSL
    "student": '["student"]',  # DINO
    "model": '["model"]',
}


class MissingFile(UserError):
    """There is no such file."""


class DamagedFile(UserError):
    """A file that is there and cannot be read: cut short, changed, or not what its name says."""


def is_dense(value: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor whose numbers are all in memory: not sparse, quantized or without any."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized


def is_plain(value: object) -> bool:
    """Whether this could stand in a JSON file: no tensor, no class, not nested without end."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def content_sha256(value) -> str:
    """The digest of nested dicts, lists and tuples of tensors and plain values. The order in a dict does not matter."""
    digest = hashlib.sha256()
    _add(value, digest)
    return digest.hexdigest()


def _add(value, digest) -> None:
    """Each part begins with what it is and how long, and plain values end with a line, so no two contents are alike."""
    if is_dense(value):
        digest.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            digest.update(f"{key!r}\n".encode())
            _add(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _add(item, digest)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        digest.update(f"{value!r}\n".encode())
    else:
        raise TypeError(f"no digest of a {type(value).__name__}: convert it to a tensor or a plain value")


def require_content(value, digest: str, path: Path) -> None:
    """Raises DamagedFile where a value that was read from `path` is not the one that its digest was made of."""
    try:
        whole = content_sha256(value) == digest
    except (TypeError, RecursionError):  # what no digest was ever made of
        whole = False
    if not whole:
        raise DamagedFile(f"{path} is damaged: its content is not the one that its own digest names")


def read_once(path: Path) -> bytes:
    """All bytes of a file, from one descriptor. Raises MissingFile, or DamagedFile where they change meanwhile."""
    try:
        with open(path, "rb") as file:
            before, data, after = os.fstat(file.fileno()), file.read(), os.fstat(file.fileno())
    except MemoryError as error:
        raise _out_of_memory(path) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR):  # ESTALE: replaced, on a network disk
            raise MissingFile(f"there is no checkpoint {path}; give a run folder or a checkpoint file") from None
        raise DamagedFile(f"{path} cannot be read ({error.strerror}); give a run folder or a checkpoint file") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != after.st_size:
        raise DamagedFile(f"{path} cannot be read while another program writes to it; run again when that is done")
    return data


def _out_of_memory(path: Path) -> UserError:
    return UserError(f"memory is too short to read {path}; twice its size is needed: end other programs and run again")


def write_state(path: Path, state: dict, keep_as: Path | None = None, advice: str = "") -> None:
    """Writes a state with its digest. It is serialized in memory first. Raises UserError like `write_whole`."""
    buffer = io.BytesIO()
    torch.save({DIGEST: content_sha256(state), **state}, buffer)
    # getvalue copies nothing here. A view of the buffer would be left in the traceback of an error, and Python 3.12 may
    # crash where it collects the two.
    write_whole(path, buffer.getvalue(), keep_as=keep_as, advice=advice)


def read_state(path: Path) -> tuple[object, str]:
    """(what torch.save wrote, without the digest; the file's sha256). Tensors are on the CPU.

    Raises MissingFile, DamagedFile where it cannot be read or its digest or checksums are of other content, and
    UserError for a class in it: loading one would run what its writer chose.
    """
    data = read_once(path)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and DIGEST in state):
            _require_zip_checksums(data)
    except Exception as error:  # torch.load tells of a broken file in half a dozen types, zipfile in others
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # no word about the file
            raise _out_of_memory(path) from error
        if data.startswith(PICKLE) and not data.startswith(TORCH_OLD):
            raise UserError(
                f"{path} is a pickle that torch.load does not take, such as a network of JAX; convert its weights to a "
                "state dict by torchvision's or timm's names"
            ) from error
        if pickled := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(_with_objects(data, path, pickled[1])) from error
        reason = str(error).split("\n")[0].split(". ")[0]
        if reason in ("", "Weights only load failed"):  # torch.load's words for bytes of another kind
            reason = "it is not what torch.save writes"
            if data[8:10] == b'{"':
                text = f"{path} is a safetensors file by its content; give it a name that ends in .safetensors"
                raise DamagedFile(text) from error
        text = f"{path} cannot be read as a checkpoint ({reason}); it may be damaged or incomplete"
        raise DamagedFile(text) from error
    if isinstance(state, dict) and DIGEST in state:
        digest = state.pop(DIGEST)
        require_content(state, digest, path)
    return state, hashlib.sha256(data).hexdigest()


def _with_objects(data: bytes, path: Path, kind: str) -> str:
    """What to do with a file that holds objects of a class besides its weights."""
    named = (way for name, way in WEIGHTS.items() if b"X" + len(name).to_bytes(4, "little") + name.encode() in data)
    return (
        f"{path} holds an object of {kind} besides its weights, which is not loaded: that would run what its writer "
        "chose. If you trust the file, keep its weights alone, in Python that has that class: "
        f'torch.save(torch.load("{path.name}", weights_only=False){next(named, ".state_dict()")}, "weights.pth"); '
        "the weights may have another name there; a whole network has them as .state_dict()"
    )


def _require_zip_checksums(data: bytes) -> None:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return  # torch.save's format up to version 1.5 has no checksums
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # All of them are 0 where PyTorch was told to leave them out (torch.serialization.set_crc32_options).
        entries = archive.infolist()
        wrong = archive.testzip() if any(entry.CRC for entry in entries) else None
        # Of what is marked as a folder PyTorch reads nothing, and leaves the tensor's memory as it finds it.
        wrong = wrong or next((e.filename for e in entries if e.external_attr & 0x10 and not e.is_dir()), None)
    if wrong:
        raise ValueError(f"its part {wrong} is damaged")


def tensor_file(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> bytes:
    """A safetensors file with `about` as its metadata, and the digest of both."""
    return safetensors.torch.save(tensors, about | {DIGEST: SHA256 + content_sha256([about, tensors])})


def parsed_tensor_file(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata without the digest) of a safetensors file's bytes. Raises DamagedFile."""
    try:
        tensors = safetensors.torch.load(data)
        header_bytes = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        if zipfile.is_zipfile(io.BytesIO(data)):
            text = f"{path} is not safetensors but what torch.save writes; give it a name that ends in .pth"
            raise DamagedFile(text) from error
        raise DamagedFile(f"{path} cannot be read as safetensors ({error}); it may be damaged or incomplete") from error
    # A damaged name must not make a file one without a digest, so the value, too, tells that it is one.
    if DIGEST in about or any(value.startswith(SHA256) for value in about.values()):
        digest = about.pop(DIGEST, "").removeprefix(SHA256)
        require_content([about, tensors], digest, path)
    return tensors, about
