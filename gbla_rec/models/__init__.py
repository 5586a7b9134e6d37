"""Tables, encoder, decoder, and the retriever that joins them."""

from gbla_rec.versions import check_versions

# before a module here imports torchrec: a mismatch would fail later, in the loader, without a cure
check_versions()
