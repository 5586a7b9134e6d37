"""From an event log to a prepared dataset, and from there to deterministic global batches of histories."""

from gbla_rec.versions import check_versions

# before a module here imports torchrec: a mismatch would fail later, in the loader, without a cure
check_versions()
