"""libturbojpeg, wherever it comes from: the system's and the wheel's give the same pixels, planes and bytes."""

import ctypes
import importlib.metadata
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.storage import jpeg


@pytest.fixture
def places(monkeypatch):
    """Sets where the library is looked for; what was loaded before is forgotten, and so is what the test loads."""
    jpeg.load_library.cache_clear()
    yield lambda *found: (jpeg.load_library.cache_clear(), monkeypatch.setattr(jpeg, "_places", lambda: found))
    jpeg.load_library.cache_clear()


def _system() -> str:
    try:
        ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        pytest.skip("the system has no libturbojpeg.so.0")
    return "libturbojpeg.so.0"


def _wheel() -> str:
    try:
        files = importlib.metadata.files("turbojpeg")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package turbojpeg is not installed")
    return next(str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))


def _jpegs(paths) -> list[bytes]:
    """Real files; of each fifth an odd size in every subsampling, progressive, grey, CMYK, RGB; cut off, damaged."""
    found = [path.read_bytes() for path in paths]
    for data in found[::5]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.crop((0, 0, image.width - 1, image.height - 3))
        ways = [{"subsampling": way} for way in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")] + [{"keep_rgb": True}]
        for mode, settings in [("RGB", way) for way in ways] + [
            ("RGB", {"progressive": True}),
            ("L", {}),
            ("CMYK", {}),
        ]:
            file = io.BytesIO()
            image.convert(mode).save(file, "JPEG", **settings)
            found.append(file.getvalue())
        found += [data[: len(data) // 2], data[:2000] + bytes(50) + data[2050:]]
    return found


def _results(data: bytes) -> list:
    """All that is made of a JPEG, with the words where it is refused."""
    results = []
    for side in (10_000, 100, 20):
        decoded, planes = jpeg.decode_pixels(data, side, 10**8), jpeg.decode_planes(data, side, 10**8)
        results += [decoded] if isinstance(decoded, str) else [decoded.pixels.tobytes(), *decoded[1:]]
        if planes:
            results += [plane.tobytes() for plane in planes.planes] + [planes.factors]
        if planes and (len(planes.planes) == 1 or planes.factors == (2, 2)):
            results.append(jpeg.encode_planes(planes.planes, *planes.planes[0].shape, quality=90))
    return results


def test_the_wheel_gives_what_the_system_gives(places, imagenet_sample):
    datas = _jpegs(imagenet_sample[:20])
    of_each = []
    for place in (_system(), _wheel()):
        places(place)
        of_each.append([_results(data) for data in datas])
    assert of_each[0] == of_each[1]
    assert sum(isinstance(results[0], bytes) for results in of_each[0]) > 40


def test_it_is_found_in_condas_folder_and_beside_python(places, monkeypatch, tmp_path):
    for name in ("conda", "python"):
        (tmp_path / name / "lib").mkdir(parents=True)
        shutil.copy(_wheel(), tmp_path / name / "lib" / "libturbojpeg.so.0")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setattr(jpeg.sys, "prefix", str(tmp_path / "python"))
    system, *others = jpeg._places()
    assert system == "libturbojpeg.so.0" and others[2:] == [_wheel()]
    for left in (others, others[1:], others[2:]):
        places(str(tmp_path / "missing.so"), *left)
        assert jpeg.turbojpeg()._name == left[0]


def test_a_library_that_lacks_functions_or_makes_other_pixels_is_passed_over(places, monkeypatch):
    places("libm.so.6", _wheel())
    assert jpeg.turbojpeg()._name == _wheel()
    right = jpeg._CHECKSUMS
    for wrong in ((right[0], right[1] ^ 1), (right[0] ^ 1, right[1])):
        monkeypatch.setattr(jpeg, "_CHECKSUMS", wrong)
        places(_wheel())
        with pytest.raises(UserError, match="no usable libturbojpeg .* install libturbojpeg0 "):
            jpeg.decode_pixels(b"", 1, 1)


def test_the_check_image_is_decoded_as_pillow_does(places):
    """The checksum of its pixels is libjpeg-turbo's own, not just that of the library we found."""
    places(_system())
    luma = np.arange(1024).reshape(32, 32) * 7 % 256
    planes = [plane.astype(np.uint8) for plane in (luma, luma[:16, 16:], luma[16:, :16])]
    data = jpeg.encode_planes(planes, 32, 32, quality=90)
    assert jpeg.zlib.crc32(np.asarray(Image.open(io.BytesIO(data)))) == jpeg._CHECKSUMS[1]
