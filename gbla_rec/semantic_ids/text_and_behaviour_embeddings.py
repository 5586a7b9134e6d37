"""Item embeddings from text and behaviour together: the two vectors laid end to end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.behaviour_embeddings import BehaviourEmbedder
from gbla_rec.semantic_ids.text_encoders import TEXT_EMBEDDERS, TextEmbedder


@dataclass(frozen=True, eq=False)
class TextAndBehaviourEmbedder:
    """A text part of length 1 and a behaviour part of length ``behaviour_weight``, either zero where nothing is known.

    The whole is not scaled again, so an item without training events has exactly the text part of an item worded alike.

    Attributes:
        text: of width ``F_t``.
        behaviour: of width ``F_b``, from training events only.
        behaviour_weight: at least 0; squared distances of behaviour count its square times as much as those of text.
    """

    text: TextEmbedder
    behaviour: BehaviourEmbedder
    behaviour_weight: float

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``: ``(N, F_t + F_b)`` fp32."""
        weighted = np.float32(self.behaviour_weight) * self.behaviour.embed(dataset)
        return np.concatenate([self.text.embed(dataset), weighted], axis=1)

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``."""
        text = {"kind": type(self.text).__name__, **self.text.save(directory)}
        return {"text": text, "behaviour": self.behaviour.save(directory), "behaviour_weight": self.behaviour_weight}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "TextAndBehaviourEmbedder":
        """Read what ``save`` wrote."""
        kinds = {kind.__name__: kind for kind in TEXT_EMBEDDERS.values()}
        text = kinds[saved["text"]["kind"]].load(directory, saved["text"])
        return cls(text, BehaviourEmbedder.load(directory, saved["behaviour"]), saved["behaviour_weight"])
