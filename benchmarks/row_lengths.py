"""The batches that GPU benchmarks run on: single rows, packed rows of one length, long-tailed and very short rows."""

# B rows, L tokens, T tokens of a row (docs/shapes.md)

import random
from dataclasses import dataclass

SINGLE_ROW_LENGTHS = (512, 1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ZIPF_ROWS, ZIPF_TOKENS = 256, 65536
SHORT_ROWS, SHORT_MEAN = 4096, 9


@dataclass(frozen=True)
class Case:
    """Row lengths with a name for tables."""

    name: str
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """``L``."""
        return sum(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether the rows are equally long, so that a dense peer can run them without padding."""
        return len(set(self.lengths)) == 1

    @property
    def is_single(self) -> bool:
        """Whether there is one row."""
        return len(self.lengths) == 1

    def without_rows_above(self, length: int) -> "Case":
        """The other rows, under the same name."""
        return Case(self.name, tuple(each for each in self.lengths if each <= length))


def uniform(num_rows: int, length: int) -> Case:
    """``num_rows`` rows of ``length`` tokens."""
    return Case(f"{num_rows} x {length}", (length,) * num_rows)


def one_token_less(num_rows: int, length: int) -> Case:
    """``uniform`` without one token of the first row: ragged as histories are that were cut at a maximum, none being longer."""
    return Case(f"{num_rows} x {length}, one token less", (length - 1, *[length] * (num_rows - 1)))


def one_token_moved(num_rows: int, length: int) -> Case:
    """``uniform`` but for one token that has moved from the first row to the last, which is then the only one above ``length``."""
    return Case(f"{num_rows} x {length}, one token moved", (length - 1, *[length] * (num_rows - 2), length + 1))


def zipf() -> Case:
    """Rows of length proportional to 1 / rank, in random order: the longest has a sixth of the tokens."""
    harmonic = sum(1 / rank for rank in range(1, ZIPF_ROWS + 1))
    lengths = [max(int(ZIPF_TOKENS / (harmonic * rank)), 1) for rank in range(1, ZIPF_ROWS + 1)]
    lengths[0] += ZIPF_TOKENS - sum(lengths)
    random.Random(0).shuffle(lengths)
    return Case(f"Zipf, {ZIPF_ROWS} rows, {ZIPF_TOKENS} tokens", tuple(lengths))


def short() -> Case:
    """Rows of 1 + a geometric number of tokens."""
    source = random.Random(0)
    lengths = []
    for _ in range(SHORT_ROWS):
        length = 1
        while source.random() > 1 / SHORT_MEAN:
            length += 1
        lengths.append(length)
    return Case(f"short, {SHORT_ROWS} rows, mean {sum(lengths) / SHORT_ROWS:.1f}", tuple(lengths))
