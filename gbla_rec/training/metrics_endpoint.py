"""A page of the newest metrics for Prometheus, served by the first process of each node while it trains.

Every node serves, because torchrun may give rank 0 to any of them, and a scraper should find each of its targets up. The
port belongs to the launch and not to the run, hence an environment variable: a run can be resumed with another.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Gauge

PORT_VARIABLE = "GBLA_REC_METRICS_PORT"
"""Environment variable: the port, 1 to 65535; unset or empty: nothing is served."""
PREFIX = "gbla_rec"


class MetricsEndpoint:
    """``http://<any address of the node>:<port>/metrics`` in Prometheus' text format.

    ``gbla_rec_<kind>_<name>`` are the values of the last report of a kind (``train``, ``validation``), ``gbla_rec_step`` and
    ``gbla_rec_last_report_timestamp_seconds`` tell whether the run advances, ``process_*`` describe this process.
    """

    def __init__(self, port: int, run_dir: Path, num_steps: int) -> None:
        """Listen.

        Raises:
            ModuleNotFoundError: if prometheus_client is not installed; the message names the extra.
            OSError: if the port cannot be had; the message names it and the cure.
        """
        try:
            from prometheus_client import CollectorRegistry, Gauge, Info, ProcessCollector, start_http_server
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{PORT_VARIABLE}={port} needs the package prometheus-client; install it with: pip install 'gbla-rec[metrics]', "
                "or leave the variable (metrics_port under TorchX) out"
            ) from error
        self._gauge_type = Gauge
        # not the registry of the package: a process may train several runs
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        Info(f"{PREFIX}_run", "The run that this process trains.", registry=self._registry).info(
            {"name": run_dir.parent.name, "started": run_dir.name, "rank": os.environ.get("RANK", "0")}
        )
        self._gauges: dict[str, Gauge] = {}
        self._gauge("num_steps").set(num_steps)
        try:
            self._server, self._thread = start_http_server(port, registry=self._registry)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{PORT_VARIABLE} must be a free port of this node, got {port} ({error.strerror}); "
                "give another one (metrics_port under TorchX), or leave it out",
            ) from error

    @classmethod
    def from_environment(cls, run_dir: Path, num_steps: int) -> "MetricsEndpoint | None":
        """An endpoint on the port of ``GBLA_REC_METRICS_PORT``; None if it is not set, or for other than a node's first process.

        Raises:
            ValueError: if the variable is no port.
        """
        text = os.environ.get(PORT_VARIABLE, "")
        if not text or os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise ValueError(f"{PORT_VARIABLE} must be a port, 1 to 65535, got {text!r}")
        return cls(int(text), run_dir, num_steps)

    def report(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Show what was logged after ``step`` steps in place of the last report of this kind."""
        for name, value in values.items():
            self._gauge(f"{kind}_{name}").set(value)
        self._gauge("step").set(step)
        self._gauge("last_report_timestamp_seconds").set_to_current_time()

    def close(self) -> None:
        """Stop listening; the port is free afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> "Gauge":
        if name not in self._gauges:
            self._gauges[name] = self._gauge_type(f"{PREFIX}_{name}", f"{name} of gbla_rec.training.progress", registry=self._registry)
        return self._gauges[name]
