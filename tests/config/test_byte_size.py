"""Sizes as people write them."""

import pytest

from gbla_rec.config import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80 gib", 80 * 2**30), ("1.5TB", 15 * 10**11), ("512B", 512), ("2KiB", 2048)]
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert parse_bytes(text, "--hbm") == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "-1GB", "80XB", "8e9B", ""])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"--hbm must be a number and a unit .* like 80GB, got"):
        parse_bytes(text, "--hbm")


@pytest.mark.parametrize("size", [0, 1, 999, 1_000, 123_456, 48 * 10**9, 999_999_999_999, -3 * 10**9, 10**18])
def test_a_printed_size_reads_back_to_three_digits(size: int) -> None:
    text = format_bytes(size)
    magnitude = parse_bytes(text.lstrip("-").replace(",", ""), "size") if size else 0
    assert abs(magnitude - abs(size)) <= 0.005 * abs(size)
    assert text.startswith("-") == (size < 0)
