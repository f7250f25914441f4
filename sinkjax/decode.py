"""Streams text from a model: `python -m sinkjax.decode --prompt "Once upon a time"`.

On several hosts the same command runs on each, with the same prompts; one of them writes.
"""

import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from absl import app, flags

from sinkjax import mesh
from sinkjax.caches import CacheFull, Policy, without_end
from sinkjax.cli import cache_policy, define_cache_flag, define_model_flags, load_model, run
from sinkjax.streaming import Sampling, Stream
from sinkjax.streaming.snapshot import Recorder, Settings, resume, saved_settings
from sinkjax.streaming.stream import Output

FLAGS = flags.FLAGS
_CALLS_TO_ASK = 16  # calls of the step between which several processes ask for signals


def define_flags() -> None:
    define_model_flags()
    flags.DEFINE_string(
        "prompt", None, "The text to continue. Without one, standard input is read."
    )
    flags.DEFINE_string("prompt_file", None, "A UTF-8 file with the text to continue.")
    flags.DEFINE_string(
        "prompts_file", None, "A UTF-8 file of prompts, one a line: run as a batch."
    )
    flags.DEFINE_bool("chat", False, "Converse in the terminal, with the model's chat template.")
    define_cache_flag("ring:4+1020", "A ring writes for ever; for others, see --on_full.")
    flags.DEFINE_enum(
        "on_full",
        "stop",
        ["stop", "stream"],
        "When a full cache has no place left: stop, or go on as a ring of 4 sinks and the newest.",
    )
    flags.DEFINE_integer(
        "max_tokens", 0, "The most tokens to write (in a chat: a reply); 0: no end."
    )
    flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: off.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens that reach this probability.")
    flags.DEFINE_float("min_p", 0.05, "Draw from tokens this times as likely as the likeliest.")
    flags.DEFINE_float("repetition_penalty", 1.1, "Makes the newest 64 tokens less likely; 1: off.")
    flags.DEFINE_integer("seed", 0, "Of the random draws; row i of a batch draws with seed + i.")
    flags.DEFINE_multi_string("stop", [], "End before this string; may be given several times.")
    flags.DEFINE_integer("steps_per_call", 1, "Tokens per call of the compiled step.")
    flags.DEFINE_bool("ignore_eos", False, "Go on when the model ends its text.")
    flags.DEFINE_bool("stats", False, "Say at the end how fast it went and what was forgotten.")
    flags.DEFINE_bool("json", False, "Write events, one JSON object a line, instead of text.")
    flags.DEFINE_string("save", None, "A folder in which to keep the live stream.")
    flags.DEFINE_integer("save_every", 256, "Tokens between saves.")
    flags.DEFINE_string("resume", None, "Go on with the stream in this folder (and keep it there).")


class Printer:
    """Writes what rows give: text as it comes, a batch line by line, or JSON events."""

    def __init__(self, rows: int, as_json: bool):
        self.as_json = as_json
        self._lines = [""] * rows

    def event(self, kind: str, **values: Any) -> None:
        print(json.dumps({"event": kind, **values}, ensure_ascii=False), flush=True)

    def outputs(self, outputs: list[Output]) -> None:
        for row, out in enumerate(outputs):
            if self.as_json:
                if out.tokens or out.text:
                    self.event("text", row=row, text=out.text, tokens=list(out.tokens))
                if out.end:
                    self.event("end", row=row, reason=out.end)
            elif len(outputs) == 1:
                print(out.text, end="", flush=True)
            else:
                *whole, self._lines[row] = (self._lines[row] + out.text).split("\n")
                if out.end:
                    whole.append(self._lines[row])
                    self._lines[row] = ""
                for line in whole:
                    print(f"[{row}] {line}", flush=True)

    def finish(self) -> None:
        for row, line in enumerate(self._lines):
            if line:
                print(f"[{row}] {line}", flush=True)
        if not self.as_json and len(self._lines) == 1:
            print(flush=True)


class Timer:
    """Seconds to the first token of the newest prompt, and tokens per second after first ones."""

    def __init__(self):
        self._to_first, self._seconds, self._tokens = 0.0, 0.0, 0
        self.start()

    def start(self) -> None:
        """A prompt is about to be read."""
        self._from, self._waiting = time.perf_counter(), True

    def count(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        if self._waiting:
            self._to_first, self._waiting = now - self._from, False
        else:
            self._seconds += now - self._from
            self._tokens += sum(len(out.tokens) for out in outputs)
        self._from = now

    def stats(self) -> dict[str, float]:
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {
            "seconds_to_first_token": round(self._to_first, 3),
            "tokens_per_second": round(rate, 2),
        }


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM for the loop to see between two calls; a second one kills."""
    caught: list[int] = []

    def note(number: int, _frame) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_text(data: bytes, name: str) -> str:
    """Raises ValueError where the bytes are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from error


def read_text(path: str) -> str:
    return as_text(pathlib.Path(path).read_bytes(), path)


def prompts() -> list[str]:
    """The prompts that the flags name, the same on all hosts."""
    with mesh.together("reading the prompts"):
        texts = _prompts()
    mesh.agree("their prompts", "\n".join(map(repr, texts)))
    return texts


def _prompts() -> list[str]:
    named = [n for n in ("prompt", "prompt_file", "prompts_file") if FLAGS[n].value is not None]
    if len(named) > 1:
        raise app.UsageError(f"give one of {', '.join('--' + n for n in named)}, not several")
    if FLAGS.prompt is not None:
        return [FLAGS.prompt]
    if FLAGS.prompt_file is not None:
        return [read_text(FLAGS.prompt_file)]
    if FLAGS.prompts_file is not None:
        lines = [line for line in read_text(FLAGS.prompts_file).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{FLAGS.prompts_file} holds no prompt")
        return lines
    if sys.stdin.isatty():
        raise app.UsageError("give --prompt, --prompt_file, --prompts_file, or text on stdin")
    return [as_text(sys.stdin.buffer.read(), "standard input")]


def policy_from_flags() -> Policy:
    policy = cache_policy(FLAGS.cache)
    return without_end(policy) if FLAGS.on_full == "stream" else policy


def settings_from_flags(rows: int, cache: Policy) -> Settings:
    return Settings(
        cache=cache,
        sampling=Sampling(
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            min_p=FLAGS.min_p,
            repetition_penalty=FLAGS.repetition_penalty,
        ),
        seeds=tuple(FLAGS.seed + row for row in range(rows)),
        stop=tuple(FLAGS.stop),
        ignore_eos=FLAGS.ignore_eos,
        extra={
            name: FLAGS[name].value
            for name in ("model", "dtype", "weight_dtype", "cache", "on_full")
        },
    )


def start(timer: Timer) -> tuple[Stream, Recorder | None]:
    """A new stream that has read its prompt, or the one to resume."""
    if FLAGS.resume:
        resumed = _resumed()
        timer.start()
        return resumed
    texts = prompts()
    settings = settings_from_flags(len(texts), policy_from_flags())
    lm = load_model(settings.cache)
    stream = settings.new_stream(lm, steps_per_call=FLAGS.steps_per_call)
    recorder = None
    if FLAGS.save:
        recorder = Recorder(FLAGS.save, stream, every=FLAGS.save_every, extra=settings.extra)
    timer.start()
    stream.feed(texts)
    return stream, recorder


def _by_flag(settings: Settings) -> dict[str, Any]:
    """The settings under the names of the flags that set them."""
    values = settings.to_json()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {
        **{name: values["sampling"][name] for name in names},
        "seed": values["seeds"][0],
        "stop": values["stop"],
        "ignore_eos": values["ignore_eos"],
        **{
            name: values["extra"].get(name)
            for name in ("dtype", "weight_dtype", "cache", "on_full")
        },
    }


def _resumed() -> tuple[Stream, Recorder]:
    for name in ("prompt", "prompt_file", "prompts_file", "chat", "save"):
        if FLAGS[name].present:
            raise app.UsageError(f"--resume goes on with a saved stream: leave out --{name}")
    saved = saved_settings(FLAGS.resume)
    for name in ("model", "dtype", "weight_dtype"):
        if not FLAGS[name].present:
            FLAGS[name].value = saved.extra.get(name)
    # The texts of caches are compared: the file of a pattern is not needed any more.
    given = _by_flag(settings_from_flags(len(saved.seeds), saved.cache))
    differ = [
        f"--{name} was {kept}, now {given[name]}"
        for name, kept in _by_flag(saved).items()
        if FLAGS[name].present and given[name] != kept
    ]
    if differ:
        raise ValueError(
            f"the stream in {FLAGS.resume} has other settings: {'; '.join(differ)}. "
            "Leave these flags out, or start a new stream"
        )
    lm = load_model(saved.cache)
    stream = resume(FLAGS.resume, lm, steps_per_call=FLAGS.steps_per_call)
    if mesh.is_main():
        print(f"resumed after {stream.rows[0].tokens} tokens", file=sys.stderr)
    recorder = Recorder(
        FLAGS.resume, stream, every=FLAGS.save_every, extra=saved.extra, resumed=True
    )
    return stream, recorder


def write(
    stream: Stream, printer: Printer, timer: Timer, caught: list[int], recorder: Recorder | None
) -> None:
    """Runs the stream until it ends or a signal comes."""
    done = max(row.drawn for row in stream.rows)
    if FLAGS.max_tokens and done >= FLAGS.max_tokens:
        return
    left = FLAGS.max_tokens - done if FLAGS.max_tokens else 0
    closed = False
    for call, outputs in enumerate(stream.run(left), 1):
        timer.count(outputs)
        if recorder:  # first, so that what cannot be printed (a closed pipe) is kept
            recorder.record(outputs)
        try:
            printer.outputs(outputs)
        except BrokenPipeError:
            if not mesh.several():
                raise
            closed = True  # the others hear of it below
            sys.stdout = open(os.devnull, "w")
        if mesh.several() and call % _CALLS_TO_ASK:  # to ask takes as long as a small step
            continue
        if mesh.anywhere(closed or bool(caught)):
            return


def converse(stream: Stream, printer: Printer, timer: Timer) -> None:
    """A conversation: lines in, replies out, the cache kept between turns. Ctrl-C ends it."""
    tokenizer = stream.lm.tokenizer
    messages: list[dict[str, str]] = []
    seen = ""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        try:
            ids = tokenizer.next_turn(messages, seen=seen)
        except ValueError as error:
            # Some templates rewrite earlier turns: then what is remembered is not the conversation.
            print(f"(reading the conversation anew: {error})", file=sys.stderr)
            seen = ""
            stream.reset()
            ids = tokenizer.next_turn(messages, seen="")
        timer.start()
        stream.feed([ids])
        drawn: list[int] = []
        text = ""
        with signals() as caught:
            for outputs in stream.run(FLAGS.max_tokens):
                timer.count(outputs)
                printer.outputs(outputs)
                drawn += outputs[0].tokens
                text += outputs[0].text
                if caught:
                    return
        if not printer.as_json:
            print(flush=True)
        messages.append({"role": "assistant", "content": text})
        whole = tokenizer.apply_chat(messages[:-1])
        seen = whole + tokenizer.decode(drawn, skip_special=False)


def _how_long_it_lasted(stream: Stream) -> str:
    ends = [(i, row) for i, row in enumerate(stream.rows) if row.full]
    state = "is full"
    if not ends:  # what should be read next is too long
        ends, state = list(enumerate(stream.rows)), "has no room for what comes next"
    lasted = "; ".join(
        (f"[{i}] " if len(stream.rows) > 1 else "")
        + f"{row.tokens} ({row.fed} read, {row.drawn} written)"
        for i, row in ends
    )
    return (
        f"the cache of {stream.cache.limit} tokens {state}: it lasted for {lasted}. Give --cache "
        "more room, or let --on_full=stream go on without end, forgetting the oldest tokens"
    )


def main(argv: list[str]) -> None:
    if argv:
        raise app.UsageError(f"unexpected argument {argv[0]!r}")
    if FLAGS.max_tokens < 0:
        raise app.UsageError(f"--max_tokens must be ≥ 0 (0: no end), got {FLAGS.max_tokens}")
    if FLAGS.chat and (FLAGS.save or FLAGS.stop):
        raise app.UsageError("--chat keeps no --save folder and takes no --stop")
    if FLAGS.chat and mesh.several():
        raise app.UsageError("--chat talks to one process: run it on one host")
    timer = Timer()
    caught: list[int] = []
    full: CacheFull | None = None
    if FLAGS.chat:
        settings = settings_from_flags(1, policy_from_flags())
        stream = settings.new_stream(
            load_model(settings.cache), steps_per_call=FLAGS.steps_per_call
        )
        printer = Printer(1, FLAGS.json)
        try:
            converse(stream, printer, timer)
        except CacheFull as error:
            if stream.rows[0].full:  # in the midst of a reply
                printer.finish()
            full = error
    else:
        stream, recorder = start(timer)
        printer = Printer(len(stream.rows), FLAGS.json)
        with signals() as caught:
            try:
                write(stream, printer, timer, caught, recorder)
            except CacheFull as error:
                full = error
            finally:
                try:
                    printer.finish()
                finally:
                    if recorder:
                        recorder.close()
    if FLAGS.stats:
        stats = {**timer.stats(), **stream.stats()}
        if FLAGS.json:
            printer.event("stats", **stats)
        elif mesh.is_main():
            print(", ".join(f"{k} {v}" for k, v in stats.items()), file=sys.stderr)
    if full:
        raise ValueError(_how_long_it_lasted(stream)) from full
    # Ctrl-C is how a stream without end ends; SIGTERM is for whoever sent it to see.
    if signal.SIGTERM in caught:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    define_flags()
    run(main)
