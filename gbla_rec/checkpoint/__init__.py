"""The ranks of a run: process group, table sharding and its plans, memory; models saved and loaded by any number of ranks."""

from gbla_rec.versions import check_versions

# before a module here imports torchrec: a mismatch would fail later, in the loader, without a cure
check_versions()
