"""What a row of passkeys holds."""

import numpy as np
import pytest

from sinkjax.analysis.haystack import NATO
from sinkjax.training import PasskeyRows, Passkeys

HAY = np.full(1000, ord("~"), np.int32)
TASK = Passkeys(count=3, words=4)


def rows(task=TASK, hay=HAY, start=(1, 2)) -> PasskeyRows:
    return PasskeyRows(task, hay, lambda text: [ord(c) for c in text], start)


def told(ids) -> str:
    return "".join(chr(i) for i in ids)


@pytest.mark.parametrize("length", [512, 700, 1300])
def test_a_row(length):
    ids, answers = rows().row(length, [5, 7])
    assert ids.shape == answers.shape == (length,)
    assert (ids[:2] == [1, 2]).all()
    text = told(ids[2:])
    hay, *asked = text.split("\n\nQuestion: ")
    keys = [part.split(".\n\n")[0].split(": ") for part in hay.split("\n\nRemember pass key ")[1:]]
    assert [name for name, _ in keys] == ["number 1", "number 2", "number 3"]
    for (name, value), question in zip(keys, asked, strict=True):
        assert question == f"What is pass key {name}?\nAnswer: {value}"
        assert len(value.split()) == 4 and set(value.split()) <= set(NATO)
    # From the colon before each value to its last letter.
    assert told(ids[answers]) == "".join(f": {value}" for _, value in keys)
    said = sum(len(f"\n\nRemember pass key {n}: {v}.\n\n") for n, v in keys)
    assert hay.count("~") == len(hay) - said


def test_a_row_follows_from_its_seed():
    first, same, other = (rows().row(600, seed)[0] for seed in ([3, 1], [3, 1], [3, 2]))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    tokens, answers = rows().batch(2, 600, [3])
    np.testing.assert_array_equal(tokens[1], first)
    assert answers.shape == (2, 600)


def test_depths_and_haystacks_vary():
    hay = np.arange(10_000, 11_000)
    made = [rows(hay=hay).row(600, [seed])[0] for seed in range(40)]
    firsts = {int(ids[ids >= 10_000][0]) for ids in made}
    depths = [int(np.argmax(ids[2:] < 10_000)) for ids in made]
    assert len(firsts) > 30 and len(set(depths)) > 20


def test_wrong_rows():
    with pytest.raises(ValueError, match="200 tokens are .* too few for what is hidden"):
        rows().row(200, [0])
    with pytest.raises(
        ValueError, match="a length of .* needs a text of .* tokens, and it has 1000"
    ):
        rows().row(3000, [0])
    with pytest.raises(ValueError, match="passkeys need words ≥ 1, got 0"):
        Passkeys(words=0)
