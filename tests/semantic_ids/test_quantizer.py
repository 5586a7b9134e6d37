"""Residual k-means: repeatable, never stopped by few or equal vectors, and each row's codes are its own."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gbla_rec.semantic_ids.quantizer import ResidualQuantizer, dedup_slots, default_codebook_width


def clustered(num_items: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((10, 12))
    return (centers[rng.integers(0, 10, num_items)] + 0.2 * rng.standard_normal((num_items, 12))).astype(np.float32)


def fit(vectors: NDArray[np.float32], width: int = 16, seed: int = 0) -> ResidualQuantizer:
    return ResidualQuantizer.fit(vectors, num_levels=3, width=width, iterations=8, seed=seed)


def test_the_same_seed_gives_the_same_codebooks_and_another_seed_others() -> None:
    vectors = clustered(400)
    first, second, other = fit(vectors), fit(vectors), fit(vectors, seed=1)
    assert all(np.array_equal(left, right) for left, right in zip(first.centroids, second.centroids, strict=True))
    assert not np.array_equal(first.centroids[0], other.centroids[0])


@given(num_items=st.integers(1, 40), num_distinct=st.integers(1, 40), width=st.integers(1, 24), num_zero=st.integers(0, 40))
@example(num_items=1, num_distinct=1, width=16, num_zero=1)
@example(num_items=17, num_distinct=17, width=16, num_zero=0)
@example(num_items=40, num_distinct=1, width=1, num_zero=0)
def test_few_equal_or_zero_vectors_are_quantised_like_any_other(num_items: int, num_distinct: int, width: int, num_zero: int) -> None:
    vectors = clustered(num_distinct)[np.arange(num_items) % num_distinct]
    vectors[:num_zero] = 0
    quantizer = fit(vectors, width)
    codes = quantizer.encode(vectors)
    assert codes.shape == (num_items, 3) and codes.min() >= 0 and codes.max() < width
    assert all(1 <= len(centroids) <= width and np.isfinite(centroids).all() for centroids in quantizer.centroids)
    # equal vectors get equal codes
    _, inverse = np.unique(vectors, axis=0, return_inverse=True)
    assert len(np.unique(np.column_stack([inverse, codes]), axis=0)) == inverse.max() + 1


def test_with_room_for_every_vector_one_level_says_all() -> None:
    vectors = clustered(30)
    quantizer = fit(vectors, width=32)
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes[:, 0])) == 30
    assert quantizer.residual_energy(vectors, codes) == [0.0, 0.0, 0.0]


def test_codes_are_the_nearest_centroids_of_what_is_left_over() -> None:
    vectors = clustered(200)
    quantizer = fit(vectors)
    codes, residual = quantizer.encode(vectors), vectors
    for level, centroids in enumerate(quantizer.centroids):
        distances = np.linalg.norm(residual[:, None, :].astype(np.float64) - centroids[None], axis=2)
        np.testing.assert_allclose(distances[np.arange(200), codes[:, level]], distances.min(axis=1), rtol=1e-9)
        residual = residual - centroids[codes[:, level]]
    energy = quantizer.residual_energy(vectors, codes)
    assert 1 > energy[0] > energy[1] > energy[2] > 0
    assert energy[2] == pytest.approx(float(np.square(residual).sum() / np.square(vectors).sum()), rel=1e-5)


def test_a_row_has_the_same_codes_alone_and_in_company() -> None:
    vectors = clustered(300)
    quantizer = fit(vectors)
    together = quantizer.encode(vectors)
    assert np.array_equal(np.concatenate([quantizer.encode(vectors[row : row + 1]) for row in range(300)]), together)
    assert quantizer.encode(vectors[:0]).shape == (0, 3)


def test_codebooks_survive_the_disk(tmp_path: Path) -> None:
    vectors = clustered(100)
    quantizer = fit(vectors)
    quantizer.save(tmp_path)
    assert np.array_equal(ResidualQuantizer.load(tmp_path, 3).encode(vectors), quantizer.encode(vectors))


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(n, 12\) like the codebooks, got \(5, 3\)"):
        fit(clustered(50)).encode(np.zeros((5, 3), dtype=np.float32))


@pytest.mark.parametrize(
    ("num_items", "min_width", "width"),
    [(1, 1, 2), (2, 1, 2), (3, 1, 4), (16, 1, 4), (17, 1, 8), (9_742, 1, 64), (4_194_304, 256, 256), (4_194_305, 256, 512), (10, 300, 300)],
)
def test_the_default_width_is_the_next_power_of_two_of_the_cube_root(num_items: int, min_width: int, width: int) -> None:
    assert default_codebook_width(num_items, min_width) == width


@given(prefixes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=40), width=st.integers(1, 6))
@example(prefixes=[], width=3)
def test_slots_count_up_within_a_prefix_and_start_again_when_full(prefixes: list[tuple[int, int]], width: int) -> None:
    slots = dedup_slots(np.array(prefixes, dtype=np.int64).reshape(-1, 2), width)
    assert slots.tolist() == [prefixes[:row].count(prefix) % width for row, prefix in enumerate(prefixes)]
