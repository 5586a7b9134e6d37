"""What ranks send each other for the tables: ids one way, rows back, gradients of rows in backward."""

from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from gbla_rec.config import Communication

ID_BYTES = 8
"""Table rows are asked for by int64 ids."""
ELEMENT_BYTES: dict[Communication, int] = {"fp32": 4, "bf16": 2}
"""Of a row or its gradient on the way."""


def codecs(communication: Communication) -> dict[str, QuantizedCommCodecs] | None:
    """TorchRec's registry of codecs for an ``EmbeddingCollectionSharder``; None leaves rows and gradients in fp32."""
    if communication == "fp32":
        return None
    # made here: TorchRec's own registry puts fp16 in place of bf16 on CPU, though gloo moves bf16
    config = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(config)}
