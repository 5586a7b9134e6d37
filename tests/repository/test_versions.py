"""torch 2.(X+5) goes with torchrec and fbgemm-gpu 1.X, whatever build; everything else is refused with the cure."""

import importlib.metadata

import pytest

from gbla_rec.versions import check_versions


@pytest.fixture
def installed(monkeypatch):
    """Pretends that exactly these distributions are installed."""

    def pretend(**versions):
        def version(name):
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)
        check_versions.cache_clear()

    yield pretend
    monkeypatch.undo()
    check_versions.cache_clear()


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0+cpu", "fbgemm_gpu_cpu": "1.8.0"},
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"},
        {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm_gpu": "1.6.0+cu130"},
        {"torch": "2.12.1a0+git1234", "torchrec": "1.7.0", "fbgemm_gpu_cpu": "1.7.0"},
    ],
)
def test_matching_versions_pass(installed, versions):
    installed(**versions)
    check_versions()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (
            {"torch": "2.11.0+cu130", "torchrec": "1.8.0", "fbgemm_gpu": "1.6.0"},
            r"torchrec 1\.8\.0 .*torch 2\.11\.0\+cu130.*torchrec==1\.6",
        ),
        ({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.6.0"}, r"fbgemm-gpu 1\.6\.0 .*torch 2\.13\.0.*fbgemm-gpu==1\.8\.\*"),
        (
            {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0+cpu", "fbgemm_gpu_cpu": "1.7.0"},
            r"fbgemm-gpu-cpu 1\.7\.0 .*make install",
        ),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, r"fbgemm-gpu or fbgemm-gpu-cpu is not installed.*fbgemm-gpu==1\.8\.\*"),
        ({"torch": "2.13.0", "fbgemm_gpu": "1.8.0"}, r"torchrec is not installed"),
        ({"torchrec": "1.8.0"}, "torch is not installed"),
        ({"torch": "3.0.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"}, "major version 2"),
        ({"torch": "2.13.0", "torchrec": "unknown", "fbgemm_gpu": "1.8.0"}, "'unknown'"),
    ],
)
def test_mismatches_name_both_versions_and_the_cure(installed, versions, message):
    installed(**versions)
    with pytest.raises(ImportError, match=message):
        check_versions()


def test_the_installed_versions_match():
    check_versions.cache_clear()
    check_versions()
