"""scripts/setup.sh with stand-ins for Python, uv and apt; every script without a .venv; a checkout and a home that
nobody may write to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import compiled

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (REPO / "scripts").iterdir() if path.suffix in (".sh", ".slurm"))
# What setup.sh may call besides the stand-ins: no compiler, no pkg-config, no sudo.
TOOLS = "bash env cat cut dirname sha256sum grep mkdir rm touch true".split()
# Its own lines of Python are answered by MODULES, what is "there"; whatever it installs is written down.
PYTHON = """#!/bin/bash
case "$*" in
  --version) echo "Python $VERSION" ;;
  *version_info*) [[ $VERSION != 3.9* ]] ;;
  *ensurepip*) [[ $MODULES == *ensurepip* ]] ;;
  *Python.h*) [[ $MODULES == *headers* ]] ;;
  "-m pip --version") [[ $MODULES == *pip* ]] ;;
  "-m venv"*|"-m pip"*)
    echo "python $*" >> "$LOG"; mkdir -p .venv/bin
    printf '#!/bin/bash\\nexec python3 "$@"\\n' > .venv/bin/python
    printf '#!/bin/bash\\necho uv $* >> "$LOG"\\n' > .venv/bin/uv
    /bin/chmod +x .venv/bin/python .venv/bin/uv ;;
  *) echo "python $*" >> "$LOG" ;;
esac
"""
APT = '#!/bin/bash\necho "apt-get $*" >> "$LOG"\n'
GOOD = "#!/bin/bash\nexit 0\n"  # a compiler, and a pkg-config that knows everything


@pytest.fixture
def setup(tmp_path):
    """Runs setup.sh in a folder of its own: `setup(*flags, modules=…, root=…, more={program: text}, VERSION=…)`."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / "scripts").mkdir(parents=True)
    programs.mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, checkout / name)
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name))

    def run(*flags, modules="ensurepip", root=True, more=None, version="3.11.2"):
        for name, text in ({"python3": PYTHON, "apt-get": APT} | (more or {})).items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        log = tmp_path / "log"
        log.write_text("")
        # EUID is bash's own: an ordinary user is one whom the script believes to be one.
        script = (REPO / "scripts" / "setup.sh").read_text()
        (checkout / "scripts" / "setup.sh").write_text(script.replace("$EUID", "01"[not root]))
        environment = {"PATH": str(programs), "LOG": str(log), "MODULES": modules, "VERSION": version}
        command = [programs / "bash", "scripts/setup.sh", *flags]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        return done, log.read_text()

    return run


def test_without_root_and_compiler_ffcv_alone_is_left_out(setup):
    done, log = setup(root=False)
    assert done.returncode == 0, done.stderr
    missing = (
        "missing: g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev; bash scripts/setup.sh --ffcv gets it"
    )
    assert done.stderr.count(f"FFCV, which only --loader ffcv needs, is left out ({missing})\n") == 1
    assert (
        log.startswith("python -m venv .venv\n")
        and "--editable .[test]\n" in log
        and "ffcv" not in log
        and "apt-get" not in log
    )
    assert "python scripts/compile_kernels.py\n" in log
    assert setup(root=False)[1] == "" and setup(root=False)[0].stderr == ""  # nothing is left to do


def test_apt_is_asked_for_nothing_unless_ffcv_is(setup):
    assert "apt-get" not in setup(root=True)[1]
    done, log = setup("--ffcv", root=True)
    assert done.returncode == 0, done.stderr
    assert "install -y -qq --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev\n" in log
    assert "--no-build-isolation-package ffcv --editable .[test,ffcv]\n" in log


def test_ffcv_is_compiled_where_all_is_there(setup):
    done, log = setup(root=False, modules="ensurepip headers", more={"g++": GOOD, "pkg-config": GOOD})
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    assert ".[test,ffcv]" in log and "apt-get" not in log


def test_ffcv_that_did_not_compile_is_tried_again_if_it_is_asked_for(setup):
    """And a machine with other system packages has nothing to do in a checkout that is set up."""
    there = {"modules": "ensurepip headers", "more": {"g++": GOOD, "pkg-config": GOOD}}
    assert setup(root=False)[0].returncode == 0
    assert setup(root=False, **there)[1] == ""
    assert ".[test,ffcv]" in setup("--ffcv", root=False, **there)[1]


def test_an_environment_whose_python_is_gone_is_made_again(setup, tmp_path):
    setup(root=False)
    python = tmp_path / "checkout" / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.11")
    done, log = setup(root=False)
    assert done.returncode == 0 and log.startswith("python -m venv .venv\n"), done.stderr


def test_ffcv_that_cannot_be_had_is_an_error_if_it_was_asked_for(setup):
    done, log = setup("--ffcv", root=False)
    assert done.returncode == 2 and "sudo apt-get install g++ pkg-config libopencv-dev" in done.stderr and log == ""


def test_dali_is_an_extra(setup):
    assert ".[test,dali]" in setup("--dali", root=False)[1]


@pytest.mark.parametrize(
    ("modules", "more", "expected"),
    [
        ("pip", {}, "python -m venv --without-pip .venv\npython -m pip --python .venv/bin/python install -q uv\n"),
        ("", {"uv": PYTHON.replace("-m venv", "venv -q").replace("-m pip", "pip -q")}, "python venv -q"),
    ],
)
def test_an_environment_without_ensurepip(setup, modules, more, expected):
    done, log = setup(root=False, modules=modules, more=more)
    assert done.returncode == 0 and log.startswith(expected), done.stderr + log


def test_what_a_user_is_told(setup):
    for arguments, message in (
        ({"version": "3.9.2"}, "python3 is Python 3.9.2, Python 3.11 or newer is expected"),
        ({"modules": ""}, "can make no virtual environment; install python3-venv"),
    ):
        done, log = setup(root=False, **arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and log == ""
    done, _ = setup("--fcv", root=False)
    assert done.returncode == 2 and "--fcv is not known" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_venv_a_script_makes_it_or_says_how(tmp_path, name):
    shutil.copytree(REPO / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    if name != "setup.sh":
        (tmp_path / "scripts" / "setup.sh").write_text("echo set up >&2; exit 7\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {
        "IMAGENET": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PYTHON" if name == "setup.sh" else "UNUSED": "/nonexistent/python",
    }
    command = ["bash", tmp_path / "scripts" / name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    told = done.returncode == 2 and done.stderr.startswith("error: ")
    if name == "setup.sh":
        assert told and "/nonexistent/python is missing" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (7, "set up\n") or (told and "bash scripts/setup.sh" in done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"scripts"}


# The checkout is read-only, and so is the home in it.
READ_ONLY = 'mount --bind "$REPO" "$REPO" && mount -o remount,ro,bind "$REPO" && exec "$@"'

LATEST = f"note: {REPO}/runs/latest could not be pointed at this run (Read-only file system)"


@pytest.mark.slow
def test_a_checkout_and_a_home_that_nobody_may_write_to(tmp_path, imagenet_sample):
    """From images to a page, with not a word about folders that cannot be written."""
    probe = ["unshare", "--mount", "bash", "-c", READ_ONLY, "_"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NUMBA_", "MPL"))}
    environment |= {
        "REPO": str(REPO),
        "HOME": str(REPO / "home"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    kept = Path(compiled.cache_folder())  # the kernels need not be compiled again: their place is the same
    shutil.copytree(kept, tmp_path / "tmp" / f"barlow-at-speed-{os.getuid()}" / kept.name)
    if not shutil.which("unshare") or subprocess.run([*probe, "true"], env=environment, capture_output=True).returncode:
        pytest.skip("this user may not mount a folder read-only")
    for i, path in enumerate(imagenet_sample[:48]):
        target = tmp_path / "images" / "ab"[i % 2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

    def say(*command) -> str:
        command = [*probe, sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = done.stderr.replace(LATEST, "").lower()
        assert not [word for word in ("warn", "read-only", "permission", "temporary") if word in words], done.stderr
        return done.stdout

    small = "--arch resnet10_narrow --projector 16-16 --resolution 32 --global-batch 8 --epochs 1 --workers 1".split()
    say(REPO / "pipeline/convert.py", "--source", "images", "--out", "data", "--holdout", "0.25")
    say(REPO / "train/pretrain.py", "--data", "data", "--run", tmp_path / "run", *small)
    assert "top1" in say(REPO / "eval/knn.py", "--checkpoint", "run", "--data", "data")
    say(REPO / "eval/report.py", "run")
    assert (tmp_path / "run" / "report.html").is_file()
    code = f"import os, sys; sys.path.insert(0, {str(REPO)!r}); import pipeline.compiled, triton"
    places = say("-c", f"{code}; print(triton.knobs.cache.dir, os.environ['MPLCONFIGDIR'])").split()
    assert len(places) == 2 and all(Path(place).is_relative_to(tmp_path / "tmp") for place in places)
