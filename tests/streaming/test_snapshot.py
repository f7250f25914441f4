"""A stream that was saved and resumed, anywhere and anyhow, is the stream that never stopped."""

import errno
import json

import jax.numpy as jnp
import pytest

from sinkjax import FullCache, HeadSplit, LanguageModel, PerLayer, Sampling, SinkRing, Stream
from sinkjax.streaming import snapshot
from sinkjax.streaming.snapshot import Recorder, resume, saved_settings
from tests.conftest import byte_tokenizer, python, tiny_decoder

RANDOM = Sampling(temperature=1.0, repetition_penalty=1.2, repetition_window=16)
RING = SinkRing(sinks=2, window=14)


def new(lm, cache=RING, **settings) -> Stream:
    return Stream(lm, cache=cache, chunk=8, **(dict(sampling=RANDOM) | settings))


def said(stream: Stream, calls: int = 0, recorder: Recorder | None = None) -> list[list]:
    """What each row gives in so many calls (0: until all have ended): its text and tokens."""
    rows = [["", []] for _ in stream.rows]
    for number, outputs in enumerate(stream.run(), 1):
        for row, out in zip(rows, outputs, strict=True):
            row[0] += out.text
            row[1] += out.tokens
        if recorder:
            recorder.record(outputs)
        if number == calls:
            break
    return rows


def together(first: list[list], second: list[list]) -> list[list]:
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


@pytest.fixture
def record():
    """Makes recorders, and leaves them as a kill would: what they had to save is lost."""
    made = []

    def make(*args, **kwargs) -> Recorder:
        made.append(Recorder(*args, **kwargs))
        return made[-1]

    yield make
    for recorder in made:
        for file in recorder._texts:
            file.close()


@pytest.fixture
def saved(byte_lm, tmp_path, record):
    """A folder with a stream that was saved after 10 tokens, and what it said after that."""
    stream = new(byte_lm, ignore_eos=True)
    stream.feed(["Hi"])
    recorder = record(tmp_path / "saved", stream, every=10)
    said(stream, 10, recorder)
    return tmp_path / "saved", said(stream, 20)


@pytest.mark.parametrize(
    "cache", [RING, FullCache(200), PerLayer([RING, SinkRing(0, 7, kv_dtype="int8")])], ids=str
)
def test_two_rows_go_on_as_if_nothing_had_happened(byte_lm, tmp_path, cache, record):
    """Random draws, a penalty with a memory, prompts of two lengths; saved at every token, so also
    within characters (most bytes of this model begin one, or are none)."""
    settings = dict(cache=cache, seeds=[4, 2**32 - 1], ignore_eos=True)
    prompts = ["A longer prompt, of several chunks", "é"]
    stream = new(byte_lm, **settings)
    stream.feed(prompts)
    expected = said(stream, 40)
    stream = new(byte_lm, **settings)
    stream.feed(prompts)
    recorder = record(tmp_path, stream, every=1)
    got = said(stream, 3, recorder)
    for _ in range(12):
        stream = resume(tmp_path, byte_lm)
        recorder = record(tmp_path, stream, every=1, resumed=True)
        got = together(got, said(stream, 3, recorder))
    got = together(got, said(stream, 1, recorder))
    assert got == expected
    recorder.close()
    for number, (text, _) in enumerate(expected):
        assert (tmp_path / f"text-{number}.txt").read_bytes() == text.encode()


def test_half_a_character_and_half_a_stop_string_are_kept(byte_lm, tmp_path, record):
    """The host's part alone: bytes are pushed by hand, as no random model would spell them."""
    stream = new(byte_lm, stop=["→END"])
    stream.feed(["Hi"])
    row = stream.rows[0]

    def push(row, data: bytes) -> tuple[str, bool]:
        text, stopped = "", False
        for byte in data:
            (token,) = [t for t in range(256) if byte_lm.tokenizer.token_bytes(t) == bytes([byte])]
            piece, stopped = row.stops.push(row.detokenizer.push(token))
            text += piece
        return text, stopped

    whole = "so → and →ENd and →END never".encode()
    # Every cut: inside the arrow's three bytes, and inside the stop string and its beginnings.
    for cut in range(len(whole)):
        stream.reset()
        stream.feed(["Hi"])
        before, stopped = push(stream.rows[0], whole[:cut])
        if stopped:
            break
        folder = tmp_path / str(cut)
        record(folder, stream, every=1).save()
        row = resume(folder, byte_lm).rows[0]
        after, stopped = push(row, whole[cut:])
        assert (before + after, stopped) == ("so → and →ENd and ", True)
    assert cut > whole.index(b"END")


def test_ends_are_kept(byte_lm, tmp_path, record):
    """One row has ended, the other goes on: silent stays silent."""
    tokens = said_by(byte_lm, "Hi", seed=0)
    stop = byte_lm.tokenizer.decode(tokens[:12])[-2:]
    settings = dict(seeds=[0, 5], stop=[stop], ignore_eos=True)
    stream = new(byte_lm, **settings)
    stream.feed(["Hi", "Hi"])
    recorder = record(tmp_path, stream, every=1)
    said(stream, 15, recorder)
    assert stream.rows[0].ended and not stream.rows[1].ended
    expected = said(stream, 15)
    resumed = resume(tmp_path, byte_lm)
    assert said(resumed, 15) == expected
    assert expected[0] == ["", []] and len(expected[1][1]) > 0
    assert resumed.stats() == stream.stats()


def said_by(lm, prompt: str, seed: int) -> list[int]:
    stream = new(lm, seeds=[seed], ignore_eos=True)
    stream.feed([prompt])
    return said(stream, 40)[0][1]


@pytest.mark.parametrize(
    "cache",
    [
        SinkRing(1, 5, "absolute"),
        PerLayer([SinkRing(1, 5), FullCache(9)]),
        HeadSplit(FullCache(9), SinkRing(1, 5, "absolute"), [[True, False], [False, True]]),
    ],
    ids=["ring", "layers", "heads"],
)
def test_settings_come_back(byte_lm, tmp_path, record, cache):
    settings = dict(stop=["a", "b"], seeds=[7, 9], ignore_eos=True, cache=cache)
    stream = new(byte_lm, **settings)
    stream.feed(["Hi", "Ho"])
    record(tmp_path, stream, every=5, extra=dict(model="some")).save()
    found = saved_settings(tmp_path)
    assert (found.cache, found.sampling) == (settings["cache"], RANDOM)
    assert (found.seeds, found.stop, found.ignore_eos) == ((7, 9), ("a", "b"), True)
    assert found.extra == dict(model="some")


def test_steps_per_call_may_differ_afterwards(byte_lm, saved):
    folder, expected = saved
    resumed = resume(folder, byte_lm, steps_per_call=5)
    assert said(resumed, 4) == expected


def test_a_stream_without_tokenizer(tiny_lm, tmp_path, record):
    stream = new(tiny_lm, sampling=Sampling())
    stream.feed([[1, 2, 3]])
    record(tmp_path, stream, every=1).save()
    expected = said(stream, 10)
    assert said(resume(tmp_path, tiny_lm), 10) == expected


def test_only_the_newest_snapshots_are_kept(byte_lm, tmp_path, record):
    stream = new(byte_lm, ignore_eos=True)
    stream.feed(["Hi"])
    recorder = record(tmp_path, stream, every=4)
    said(stream, 19, recorder)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text-0.txt", f"at-{2 + 12:015d}", f"at-{2 + 16:015d}"}
    recorder.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text-0.txt", f"at-{2 + 16:015d}", f"at-{2 + 19:015d}"}


def test_texts_are_cut_back_to_the_snapshot(byte_lm, saved):
    folder, _ = saved
    text = (folder / "text-0.txt").read_bytes()
    (folder / "text-0.txt").write_bytes(text + b"what a killed process had written since")
    resume(folder, byte_lm)
    assert (folder / "text-0.txt").read_bytes() == text
    (folder / "text-0.txt").write_bytes(text[:-1])
    with pytest.raises(ValueError, match="text-0.txt is shorter than the"):
        resume(folder, byte_lm)


# Where it is refused


def test_another_model_is_refused(byte_lm, saved):
    folder, _ = saved
    others = [
        tiny_decoder(258, seed=1),
        tiny_decoder(259),
        tiny_decoder(258, dtype=jnp.bfloat16),
    ]
    for model in others:
        with pytest.raises(ValueError, match="another model than other .*dtype"):
            resume(folder, LanguageModel(model, byte_tokenizer(), "other"))


def test_a_folder_that_holds_a_stream_takes_no_other(byte_lm, saved, record):
    folder, expected = saved
    with pytest.raises(ValueError, match="holds a saved stream already: resume it"):
        record(folder, new(byte_lm), every=10)
    assert said(resume(folder, byte_lm), 20) == expected


def test_there_is_no_stream(byte_lm, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="no saved stream in"):
            resume(folder, byte_lm)
        with pytest.raises(ValueError, match="no saved stream in"):
            saved_settings(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 5', '"format": 99'),
        lambda text: json.dumps({"format": 5}),
        lambda text: text.replace('"SinkRing"', '"Unknown"'),
        lambda text: text.replace('"temperature"', '"warmth"'),
    ],
    ids=["truncated", "empty", "list", "newer", "keys missing", "policy unknown", "field unknown"],
)
def test_corrupt_descriptions_are_refused(byte_lm, saved, damage):
    folder, _ = saved
    file = sorted(folder.glob("at-*"))[-1] / "stream.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=f"{file.parent} is not a saved stream"):
        saved_settings(folder)
    with pytest.raises(ValueError, match=f"{file.parent} is not a saved stream"):
        resume(folder, byte_lm)


def test_corrupt_arrays_are_refused(byte_lm, saved):
    folder, _ = saved
    state = sorted(folder.glob("at-*"))[-1] / "state"
    # Cut short, not its data: reads of those that fail at once leave Orbax's threads complaining.
    (state / "manifest.ocdbt").write_bytes(b"xx")
    with pytest.raises(ValueError, match=f"{state} is a corrupt or truncated"):
        resume(folder, byte_lm)


def test_a_policy_that_could_not_be_read_again_is_refused(byte_lm, tmp_path, record):
    class Own(SinkRing):
        """Of a user."""

    with pytest.raises(ValueError, match="Own.* cannot be saved: expected one of SinkRing, Full"):
        record(tmp_path / "new", new(byte_lm, cache=Own(2, 14)), every=5)
    assert not (tmp_path / "new").exists()


def test_every_must_be_positive(byte_lm, tmp_path, record):
    with pytest.raises(ValueError, match="every must be ≥ 1"):
        record(tmp_path, new(byte_lm), every=0)


# What fails leaves the last good snapshot


@pytest.mark.parametrize("where", ["arrays", "description", "rename"])
def test_a_save_that_fails_leaves_the_one_before(byte_lm, saved, monkeypatch, where, record):
    folder, expected = saved
    stream = resume(folder, byte_lm)
    recorder = record(folder, stream, every=5, resumed=True)
    listing = sorted(path.name for path in folder.iterdir())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        target = {
            "arrays": (snapshot, "save_tree"),
            "description": (snapshot.json, "dump"),
            "rename": (snapshot.os, "replace"),
        }[where]
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="No space left"):
            said(stream, 20, recorder)
    assert sorted(path.name for path in folder.iterdir()) == listing
    # With space again the same stream goes on; and so does one that is resumed.
    assert said(resume(folder, byte_lm), 20) == expected
    stream = resume(folder, byte_lm)
    recorder = record(folder, stream, every=5, resumed=True)
    assert said(stream, 20, recorder) == expected


def run(code: str, *args) -> str:
    result = python("-c", code, *args)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def test_a_disk_that_is_full_leaves_the_one_before(byte_lm, tmp_path, record):
    """A real failure to write, in the middle of the arrays: no file may grow beyond 20 kB."""
    ring = SinkRing(4, 1020)  # 0.25 MB a layer
    code = """
import resource, sys
from sinkjax import LanguageModel, SinkRing, Sampling, Stream
from sinkjax.streaming.snapshot import Recorder
from tests.conftest import byte_tokenizer, tiny_decoder
lm = LanguageModel(tiny_decoder(258), byte_tokenizer())
stream = Stream(lm, cache=SinkRing(4, 1020), sampling=Sampling(), ignore_eos=True)
stream.feed(["Hi"])
recorder = Recorder(sys.argv[1], stream, every=5)
for number, outputs in enumerate(stream.run(), 1):
    if number == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        recorder.record(outputs)
    except OSError as error:
        print(number, error)
        break
"""
    said_there = run(code, tmp_path)
    assert said_there.startswith("10 ") and "File too large" in said_there
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text-0.txt", f"at-{2 + 5:015d}"}
    stream = new(byte_lm, cache=ring, sampling=Sampling(), ignore_eos=True)
    stream.feed(["Hi"])
    said(stream, 5)
    assert said(resume(tmp_path, byte_lm), 10) == said(stream, 10)


def test_a_folder_that_cannot_be_written(byte_lm, tmp_path, record):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        record(tmp_path / "file" / "folder", new(byte_lm), every=5)
