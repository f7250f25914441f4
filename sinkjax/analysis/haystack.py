"""Sentences hidden in a long text: what passkeys and needles are made of."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

NATO = (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()


def hide(
    hidden: Sequence[Sequence[int]],
    depths: Sequence[float | None],
    text: Int[np.ndarray, " N"],
    *,
    length: int,
    rng: np.random.Generator,
    start: Sequence[int] = (),
    end: Sequence[int] = (),
) -> tuple[Int32[np.ndarray, " length"], list[int]]:
    """A stretch from anywhere in a text with pieces hidden in it, of an exact length.

    Args:
        hidden: token ids of each piece.
        depths: of each piece, in [0, 1]: how much of the stretch comes before it; None: anywhere
            (pieces that may be anywhere keep their order).
        text: `[N]`, token ids.
        length: of the whole, in tokens.
        start, end: ids that come before and behind.

    Returns:
        The ids, and where in them each piece begins.

    Raises:
        ValueError: what is hidden is longer than the length leaves room for, or the text shorter.
    """
    room = length - len(start) - len(end) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(
            f"{length} tokens are {-room} too few for what is hidden in them and the questions: "
            "take a longer length, or fewer or shorter passkeys"
        )
    if room > len(text):
        raise ValueError(
            f"a length of {length} needs a text of {room} tokens, and it has {len(text)}: "
            "take a longer text, or more of its tokens"
        )
    begin = rng.integers(len(text) - room + 1)
    anywhere = iter(sorted(rng.integers(room + 1, size=list(depths).count(None)).tolist()))
    places = [next(anywhere) if depth is None else round(depth * room) for depth in depths]
    ids, done, starts = list(start), 0, [0] * len(hidden)
    for which in sorted(range(len(hidden)), key=places.__getitem__):
        ids += text[begin + done : begin + places[which]].tolist()
        done, starts[which] = places[which], len(ids)
        ids += hidden[which]
    ids += [*text[begin + done : begin + room].tolist(), *end]
    return np.asarray(ids, np.int32), starts
