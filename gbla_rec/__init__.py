"""Generative retrieval over very long user histories: TorchRec tables, a hybrid SA/GBLA encoder, a semantic-ID decoder."""

from gbla_rec.versions import check_versions

# before anything imports torchrec: a mismatch would fail later, in the loader, without a cure
check_versions()
