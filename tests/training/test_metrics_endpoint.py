"""The page for Prometheus: what it shows, who serves it, and what is refused."""

import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gbla_rec.training.metrics_endpoint import PORT_VARIABLE, MetricsEndpoint
from gbla_rec.training.progress import RunLog

RUN = Path("workspace/runs/shop/20260101T000000_000000Z")


@pytest.fixture
def port(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv(PORT_VARIABLE, str(number))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return number


def samples(port):
    page = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10).read().decode()
    return {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}


def values(port):
    return {name: sample.value for name, sample in samples(port).items() if name.startswith("gbla_rec_")}


@pytest.mark.parametrize("enabled", [True, False], ids=["first rank", "first process of another node"])
def test_the_page_shows_what_the_run_logged_last(port, tmp_path, enabled):
    for first_step in (0, 2):  # twice in a process: the port is free again
        with RunLog(tmp_path, num_steps=5, first_step=first_step, enabled=enabled) as log:
            assert "gbla_rec_step" not in values(port)
            for step, nll in ((first_step + 1, 3.5), (first_step + 2, 2.25)):
                log.validation(step, nll=nll, num_targets=11)
            found = values(port)
        assert (found["gbla_rec_num_steps"], found["gbla_rec_step"]) == (5, first_step + 2)
        assert (found["gbla_rec_validation_nll"], found["gbla_rec_validation_num_targets"]) == (2.25, 11)
        assert abs(found["gbla_rec_last_report_timestamp_seconds"] - time.time()) < 60


def test_the_page_names_the_run_and_keeps_the_last_report_of_each_kind(port, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    endpoint = MetricsEndpoint.from_environment(RUN, 5)
    assert samples(port)["gbla_rec_run_info"].labels == {"name": "shop", "started": RUN.name, "rank": "8"}
    assert samples(port)["process_resident_memory_bytes"].value > 0
    endpoint.report(3, "train", {"loss": 4.0})
    endpoint.report(4, "validation", {"nll": 2.0})
    assert [values(port)[f"gbla_rec_{name}"] for name in ("step", "train_loss", "validation_nll")] == [4, 4.0, 2.0]
    endpoint.close()


def test_only_the_first_process_of_a_node_serves_and_only_if_asked(port, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert MetricsEndpoint.from_environment(RUN, 5) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(PORT_VARIABLE, "")
    assert MetricsEndpoint.from_environment(RUN, 5) is None


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http", "9100 "])
def test_what_is_no_port_is_refused(port, monkeypatch, text):
    monkeypatch.setenv(PORT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{PORT_VARIABLE} must be a port"):
        MetricsEndpoint.from_environment(RUN, 5)


def test_a_port_in_use_is_refused_with_its_number(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(OSError, match=f"must be a free port of this node, got {port} .*; give another one"):
            MetricsEndpoint.from_environment(RUN, 5)


def test_without_the_extra_the_error_names_it(port, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gbla-rec\[metrics\]'"):
        MetricsEndpoint.from_environment(RUN, 5)
