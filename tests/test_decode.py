"""The command, as its users run it: a process of its own, with a tiny model."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sinkjax import HeadSplit, Sampling, SinkRing, Stream
from sinkjax.checkpoints import orbax
from tests.conftest import ROOT, byte_tokenizer, python, tiny_decoder

DEFAULTS = Sampling(temperature=0.8, min_p=0.05, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """Every process runs the same programs: they are compiled once, for this session."""
    return dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("xla")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


@pytest.fixture(scope="module")
def decode(tiny_folder, env):
    """Runs the command to its end."""

    def run(*args, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        model = () if "--resume" in args or "--model" in args else ("--model", tiny_folder)
        return python("-m", "sinkjax.decode", *model, *args, stdin=stdin, **env)

    return run


@pytest.fixture(scope="module")
def start(tiny_folder, env):
    """Starts the command, and waits until it has written so many bytes."""
    processes = []

    def popen(*args, until: int) -> subprocess.Popen[bytes]:
        model = () if "--resume" in args else ("--model", tiny_folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "sinkjax.decode", *map(str, (*model, *args))],
            cwd=ROOT,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        processes.append(process)
        process.seen = b""
        while len(process.seen) < until:
            piece = process.stdout.read(until - len(process.seen))
            assert piece, process.stderr.read().decode()
            process.seen += piece
        return process

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def text(lm, prompts, tokens: int, *, sampling=DEFAULTS, seed=0, ignore_eos=False) -> list[str]:
    """What the library says to the same."""
    stream = Stream(
        lm,
        cache=SinkRing(4, 1020),
        sampling=sampling,
        seeds=range(seed, seed + len(prompts)),
        ignore_eos=ignore_eos,
    )
    stream.feed(prompts)
    return ["".join(pieces) for pieces in zip(*stream.pieces(tokens), strict=True)]


def succeeded(result) -> bytes:
    assert (result.returncode, result.stderr) == (0, b""), result.stderr.decode()
    return result.stdout


# What it writes


@pytest.mark.parametrize("how", ["prompt", "prompt_file", "stdin"])
def test_a_prompt_is_continued(decode, byte_lm, tmp_path, how):
    prompt = "Grüße,\nund"
    (tmp_path / "prompt.txt").write_text(prompt)
    args, stdin = {
        "prompt": (["--prompt", prompt], b""),
        "prompt_file": (["--prompt_file", tmp_path / "prompt.txt"], b""),
        "stdin": ([], prompt.encode()),
    }[how]
    said = succeeded(decode(*args, "--max_tokens", 30, stdin=stdin))
    (expected,) = text(byte_lm, [prompt], 30)
    assert said.decode() == expected + "\n"


def test_flags_reach_the_stream(decode, byte_lm):
    sampling = Sampling(temperature=1.2, top_k=90, top_p=0.95, min_p=0.01, repetition_penalty=1.3)
    flags = ["--temperature", 1.2, "--top_k", 90, "--top_p", 0.95, "--min_p", 0.01]
    flags += ["--repetition_penalty", 1.3, "--cache", "ring:1+9", "--seed", 5]
    flags += ["--ignore_eos", "--steps_per_call", 4, "--max_tokens", 50]
    stream = Stream(byte_lm, cache=SinkRing(1, 9), sampling=sampling, seeds=[5], ignore_eos=True)
    stream.feed(["Hi"])
    expected = "".join(piece for (piece,) in stream.pieces(50))
    assert succeeded(decode("--prompt", "Hi", *flags)).decode() == expected + "\n"
    stop = expected[20:23]
    said = succeeded(decode("--prompt", "Hi", *flags, "--stop", "never this", "--stop", stop))
    assert said.decode() == expected[: expected.index(stop)] + "\n"


def test_a_batch_is_written_line_by_line(decode, byte_lm, tmp_path):
    prompts = ["One", "Two, which is longer", "Three"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    said = succeeded(
        decode("--prompts_file", tmp_path / "prompts.txt", "--max_tokens", 200, "--ignore_eos")
    ).decode()
    lines = said.removesuffix("\n").split("\n")
    expected = text(byte_lm, prompts, 200, ignore_eos=True)
    for row, whole in enumerate(expected):
        mark = f"[{row}] "
        assert [x.removeprefix(mark) for x in lines if x.startswith(mark)] == whole.split("\n")
    assert len(lines) == sum(len(whole.split("\n")) for whole in expected)


def test_events_are_json(decode, byte_lm):
    result = decode("--prompt", "Hi", "--max_tokens", 40, "--json", "--stats", "--ignore_eos")
    *events, end, stats = map(json.loads, succeeded(result).splitlines())
    assert all((e["event"], e["row"], len(e["tokens"])) == ("text", 0, 1) for e in events)
    assert "".join(e["text"] for e in events) == text(byte_lm, ["Hi"], 40, ignore_eos=True)[0]
    assert end == dict(event="end", row=0, reason="max_tokens")
    assert stats["event"] == "stats" and stats["tokens_per_second"] > 0
    assert (stats["tokens_fed"], stats["tokens_drawn"], stats["slots"]) == (2, 40, 1024)


def test_stats_go_to_stderr(decode):
    flags = ["--max_tokens", 40, "--ignore_eos", "--stats", "--cache", "ring:4+8"]
    result = decode("--prompt", "Hi", *flags)
    assert result.returncode == 0
    (line,) = result.stderr.decode().splitlines()
    stats = dict(pair.split(" ") for pair in line.split(", "))
    assert (stats["tokens_drawn"], stats["slots_filled"], stats["slots"]) == ("40", "12", "12")
    assert stats["tokens_forgotten"] == "30"


def test_a_chat_remembers_its_turns(decode, byte_lm):
    flags = ["--chat", "--max_tokens", 20, "--temperature", 0, "--repetition_penalty", 1]
    said = succeeded(decode(*flags, stdin=b"Hello\n\n  And you? \n")).decode()
    stream = Stream(byte_lm, cache=SinkRing(4, 1020), sampling=Sampling())
    replies = []
    for turn in [
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
        # The first reply had no end of its own: the template gives it one.
        "<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n",
    ]:
        stream.feed([turn])
        outputs = [out for (out,) in stream.run(20)]
        assert outputs[-1].end == "max_tokens"
        replies.append("".join(out.text for out in outputs))
    assert said == "".join(reply + "\n" for reply in replies)


# How it ends


def test_ctrl_c_ends_a_stream_without_end(start):
    process = start("--prompt", "Hi", "--ignore_eos", until=50)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=60)
    assert (process.returncode, wrong) == (0, b"")
    assert said.endswith(b"\n")


def test_sigterm_saves_and_a_resumed_stream_goes_on(start, decode, byte_lm, tmp_path):
    process = start("--prompt", "Hi", "--ignore_eos", "--save", tmp_path / "s", until=50)
    process.send_signal(signal.SIGTERM)
    said, wrong = process.communicate(timeout=60)
    assert (process.returncode, wrong) == (128 + signal.SIGTERM, b"")
    saved = (tmp_path / "s" / "text-0.txt").read_bytes()
    assert process.seen + said == saved + b"\n"
    (at,) = [int(path.name.removeprefix("at-")) for path in (tmp_path / "s").glob("at-*")]
    result = decode("--resume", tmp_path / "s", "--max_tokens", at - 2 + 30)
    assert (result.returncode, result.stderr) == (0, f"resumed after {at} tokens\n".encode())
    (expected,) = text(byte_lm, ["Hi"], at - 2 + 30, ignore_eos=True)
    assert (saved + result.stdout).decode() == expected + "\n"
    assert (tmp_path / "s" / "text-0.txt").read_bytes().decode() == expected


def test_what_a_closed_pipe_did_not_take_is_saved(start, decode, byte_lm, tmp_path):
    """As in `decode … | head -c 20`."""
    process = start("--prompt", "Hi", "--ignore_eos", "--save", tmp_path / "s", until=20)
    process.stdout.close()
    wrong = process.stderr.read()
    assert (process.wait(timeout=60), wrong) == (0, b"")
    (at,) = [int(path.name.removeprefix("at-")) for path in (tmp_path / "s").glob("at-*")]
    assert decode("--resume", tmp_path / "s", "--max_tokens", at - 2 + 10).returncode == 0
    (expected,) = text(byte_lm, ["Hi"], at - 2 + 10, ignore_eos=True)
    assert (tmp_path / "s" / "text-0.txt").read_bytes().decode() == expected


def test_a_stream_that_is_killed_again_and_again_loses_nothing(start, decode, tmp_path):
    """Ten kills at random moments, most of them within a save, as it saves nearly all the time.

    A kill comes some bytes and some milliseconds after the process began to write: so all land
    in mid-stream, on fast machines as on slow ones."""
    begin = ["--prompt", "Once", "--temperature", 1, "--ignore_eos", "--seed", 3]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    often = ["--save_every", 4, "--max_tokens", 500]
    succeeded(decode(*begin, *often, "--save", undisturbed))
    moments = random.Random(0)
    for _ in range(10):
        there = any(killed.glob("at-*"))
        args = ["--resume", killed] if there else [*begin, "--save", killed]
        process = start(*args, *often, until=moments.randint(1, 60))
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert (killed / "text-0.txt").read_bytes() != (undisturbed / "text-0.txt").read_bytes()
    assert decode("--resume", killed, *often).returncode == 0
    assert (killed / "text-0.txt").read_bytes() == (undisturbed / "text-0.txt").read_bytes()
    # Nothing is left of the saves that were cut off.
    assert len(list(killed.iterdir())) == len(list(undisturbed.iterdir()))


# A cache with an end

FULL = ["--prompt", "Hi", "--ignore_eos", "--cache", "full:40"]
LASTED = (
    "decode: the cache of 40 tokens is full: it lasted for 40 (2 read, 38 written). Give --cache "
    "more room, or let --on_full=stream go on without end, forgetting the oldest tokens\n"
)


def test_a_full_cache_ends_the_text_and_says_how_long_it_lasted(decode, byte_lm, tmp_path):
    """Nothing that it wrote is lost, not even what might have become a stop string."""
    (expected,) = text(byte_lm, ["Hi"], 38, ignore_eos=True)
    stop = ["--stop", expected[-1] + "never this"]
    result = decode(*FULL, *stop, "--save", tmp_path / "s", "--max_tokens", 500)
    assert (result.returncode, result.stderr.decode()) == (2, LASTED)
    assert result.stdout.decode() == expected + "\n"
    assert (tmp_path / "s" / "text-0.txt").read_bytes().decode() == expected
    assert (tmp_path / "s" / "at-000000000000040").is_dir()
    again = decode("--resume", tmp_path / "s")
    assert again.returncode == 2 and again.stderr.decode().endswith(LASTED)
    assert (tmp_path / "s" / "text-0.txt").read_bytes().decode() == expected


def test_a_full_cache_is_an_event(decode):
    result = decode(*FULL, "--json", "--stats", "--steps_per_call", 16)
    assert (result.returncode, result.stderr.decode()) == (2, LASTED)
    *texts, end, stats = map(json.loads, result.stdout.splitlines())
    assert sum(len(event["tokens"]) for event in texts) == 38
    assert (end["event"], end["reason"]) == ("end", "cache_full")
    assert (stats["tokens_drawn"], stats["slots_filled"]) == (38, 40)


def test_each_row_of_a_batch_has_a_cache_to_fill(decode, byte_lm, tmp_path):
    """The first to be full waits for the others, and all of it is in the saved stream."""
    (tmp_path / "prompts").write_text("Hi\nHello, you\n")
    flags = ["--prompts_file", tmp_path / "prompts", *FULL[2:], "--save", tmp_path / "s"]
    result = decode(*flags, "--json")
    assert result.returncode == 2
    lasted = "it lasted for [0] 40 (2 read, 38 written); [1] 40 (10 read, 30 written). Give"
    assert lasted in result.stderr.decode()
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(e["row"], e["reason"]) for e in events if e["event"] == "end"] == [
        (1, "cache_full"),
        (0, "cache_full"),
    ]
    for row, (said, length) in enumerate([("Hi", 38), ("Hello, you", 30)]):
        (expected,) = text(byte_lm, [said], length, seed=row, ignore_eos=True)
        assert (tmp_path / "s" / f"text-{row}.txt").read_bytes().decode() == expected
    again = decode("--resume", tmp_path / "s")
    assert again.returncode == 2 and lasted in again.stderr.decode()


@pytest.mark.parametrize(
    ("most", "state"), [(10, "has no room for what comes next"), (0, "is full")]
)
def test_a_full_cache_ends_a_chat(decode, byte_lm, most, state):
    turn = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    read = len(byte_lm.tokenizer.encode(turn))
    flags = ["--chat", "--cache", f"full:{read + 15}", "--max_tokens", most, "--ignore_eos"]
    result = decode(*flags, stdin=b"Hello\nAnd you?\n")
    stream = Stream(byte_lm, cache=SinkRing(4, 1020), sampling=DEFAULTS, ignore_eos=True)
    stream.feed([turn])
    reply = "".join(piece for (piece,) in stream.pieces(most or 15))
    assert (result.returncode, result.stdout.decode()) == (2, reply + "\n")
    lasted = f"the cache of {read + 15} tokens {state}: it lasted for {read + (most or 15)} "
    assert lasted in result.stderr.decode()


def test_a_full_cache_goes_on_as_a_ring(decode, byte_lm, tmp_path):
    """The heads that stream from the start go on as they do."""
    pattern = np.array([[True, False], [False, False]])
    (tmp_path / "gates.tsv").write_text("0.9\t0.2\n0.1\t0.3\n")
    tail = HeadSplit(SinkRing(4, 36), SinkRing(2, 9, "absolute"), pattern)
    for spec, cache in {
        "full:40": SinkRing(4, 36),
        f"duo:{tmp_path / 'gates.tsv'}@0.75,2+9,40": tail,
    }.items():
        stream = Stream(byte_lm, cache=cache, sampling=DEFAULTS, ignore_eos=True)
        stream.feed(["Hi"])
        expected = "".join(piece for (piece,) in stream.pieces(100))
        flags = ["--cache", spec, "--on_full", "stream", "--ignore_eos", "--max_tokens", 100]
        said = succeeded(decode("--prompt", "Hi", *flags)).decode()
        assert said == expected + "\n"


# What it refuses


@pytest.fixture(scope="module")
def refusals(decode, tmp_path_factory):
    """All of them at once: each is mostly the start of Python."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "latin").write_bytes("Grüße".encode("latin-1"))
    (folder / "blank").write_text("\n \n")
    (folder / "empty").mkdir()
    three = folder / "three.tsv"
    three.write_text("0\t1\n" * 3)
    model = tiny_decoder(258, seed=1)
    orbax.save_model(folder / "other", model.config, model, byte_tokenizer())
    saved = folder / "saved"
    assert decode("--prompt", "Hi", "--max_tokens", 5, "--save", saved).returncode == 0
    commands = {
        "unknown model": ["--prompt", "Hi", "--model", "gpt-9"],
        "damaged model": ["--prompt", "Hi", "--model", folder / "empty"],
        "unknown cache": ["--prompt", "Hi", "--cache", "lru:9"],
        "no window": ["--prompt", "Hi", "--cache", "ring:4+0"],
        "no size": ["--prompt", "Hi", "--cache", "full"],
        "no pattern": ["--prompt", "Hi", "--cache", f"duo:{folder / 'absent.tsv'}@0.5,99"],
        "pattern of another model": ["--prompt", "Hi", "--cache", f"duo:{three}@0.5,99"],
        "prompt too long for the cache": ["--prompt", "Hi", "--cache", "full:1"],
        "too small to stream": ["--prompt", "Hi", "--cache", "full:4", "--on_full", "stream"],
        "max_tokens is no number": ["--prompt", "Hi", "--max_tokens", "many"],
        "negative temperature": ["--prompt", "Hi", "--temperature", -1],
        "negative max_tokens": ["--prompt", "Hi", "--max_tokens", -1],
        "negative seed": ["--prompt", "Hi", "--seed", -1],
        "no steps": ["--prompt", "Hi", "--steps_per_call", 0],
        "empty prompt": ["--prompt", ""],
        "nothing on stdin": [],
        "not UTF-8": ["--prompt_file", folder / "latin"],
        "missing file": ["--prompt_file", folder / "absent"],
        "no prompts": ["--prompts_file", folder / "blank"],
        "two prompts": ["--prompt", "Hi", "--prompt_file", folder / "latin"],
        "stray argument": ["--prompt", "Hi", "there"],
        "nothing to resume": ["--resume", folder / "empty"],
        "resume with a prompt": ["--resume", saved, "--prompt", "Hi"],
        "resume with other settings": [
            *("--resume", saved, "--cache", "ring:4+9", "--on_full", "stop", "--temperature", 0.8)
        ],
        "resume with another model": ["--resume", saved, "--model", folder / "other"],
        "folder in use": ["--prompt", "Hi", "--save", saved],
        "unwritable folder": ["--prompt", "Hi", "--save", folder / "latin" / "below"],
        "never saved": ["--prompt", "Hi", "--save", folder / "new", "--save_every", 0],
        "chat with save": ["--chat", "--save", folder / "new"],
    }
    before = sorted(str(path) for path in folder.rglob("*"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda args: decode(*args), commands.values())
        results = dict(zip(commands, found, strict=True))
    made = set(map(str, folder.rglob("*"))) - set(before)
    return results, made


@pytest.mark.parametrize(
    "name,message",
    {
        "unknown model": "no model at 'gpt-9': expected",
        "damaged model": "no model at",
        "unknown cache": "no cache policy 'lru:9': expected one of",
        "no window": "window must be ≥ 1, got 0",
        "no size": "cache policy 'full' must say how many tokens it holds: expected one of",
        "no pattern": "absent.tsv",
        "pattern of another model": "for 3 layers of 2 KV heads, this model has 2 of 2",
        "prompt too long for the cache": "the FullCache of 1 tokens is full: a row would hold 2",
        "too small to stream": "a full cache of 4 tokens is too small to go on",
        "max_tokens is no number": "--max_tokens=many",
        "negative temperature": "temperature must be ≥ 0, got -1.0",
        "negative max_tokens": "max_tokens must be ≥ 0",
        "negative seed": "seeds must be whole numbers in [0, 2³²)",
        "no steps": "steps_per_call must be ≥ 1, got 0",
        "empty prompt": "prompt 0 is empty",
        "nothing on stdin": "prompt 0 is empty",
        "not UTF-8": "latin is not UTF-8 (byte 2)",
        "missing file": "absent",
        "no prompts": "holds no prompt",
        "two prompts": "give one of --prompt, --prompt_file, not several",
        "stray argument": "unexpected argument 'there'",
        "nothing to resume": "there is no saved stream in",
        "resume with a prompt": "leave out --prompt",
        "resume with other settings": (
            "has other settings: --cache was ring:4+1020, now ring:4+9. "
        ),
        "resume with another model": "belongs to another model",
        "folder in use": "holds a saved stream already",
        "unwritable folder": "Not a directory",
        "never saved": "every must be ≥ 1",
        "chat with save": "--chat keeps no --save folder",
    }.items(),
)
def test_bad_input_ends_with_one_clear_line(refusals, name, message):
    result = refusals[0][name]
    assert (result.returncode, result.stdout) == (2, b"")
    line, *more = result.stderr.decode().splitlines()
    assert line.startswith("decode: ") and message in line
    assert not more or line.endswith("expected one of")  # the forms that a cache's text may have


def test_what_is_refused_leaves_nothing_behind(refusals):
    assert refusals[1] == set()
