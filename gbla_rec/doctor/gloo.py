"""Whether two ranks on this machine can talk through gloo."""

import os
import socket
import tempfile
from pathlib import Path

from gbla_rec.doctor.finding import Finding, ok, problem
from gbla_rec.doctor.probe import TIMEOUT_S, ProbeError, outcome, start

NUM_RANKS = 2
GROUP_TIMEOUT_S = 30.0
"""For the ranks to find each other, once both have imported torch."""
VARIABLE = "GLOO_SOCKET_IFNAME"


def gloo() -> Finding:
    """Make a group of two processes and sum over it."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            store = str(Path(directory, "store"))
            ranks = [start("gloo", str(rank), str(NUM_RANKS), store, f"{GROUP_TIMEOUT_S:g}") for rank in range(NUM_RANKS)]
            errors = []
            for rank, process in enumerate(ranks):
                try:
                    outcome(process, TIMEOUT_S)
                except ProbeError as error:
                    errors.append(f"rank {rank}: {error}")
    except OSError as error:
        return problem("gloo", f"the ranks could not be started: {error}", "see that the temporary directory (TMPDIR) can be written")
    if errors:
        return problem("gloo", "; ".join(errors), gloo_cure())
    return ok("gloo", f"{NUM_RANKS} processes summed over {os.environ.get(VARIABLE) or 'the interface of the hostname'}")


def gloo_cure() -> str:
    """The likely reason, from the interfaces and the hostname of this machine."""
    names = [name for _, name in socket.if_nameindex()]
    chosen = os.environ.get(VARIABLE)
    if chosen and not set(chosen.split(",")) <= set(names):
        return f"{VARIABLE} must name an interface of this machine ({', '.join(names)}), got {chosen!r}: unset it, or name one of them"
    hostname = socket.gethostname()
    advice = f"export {VARIABLE}=lo for ranks on one machine, or the interface that the nodes share ({', '.join(names)})"
    try:
        address = socket.gethostbyname(hostname)
    except OSError:
        return f"the hostname {hostname!r} does not resolve: {advice}, or add it to /etc/hosts"
    return f"the hostname {hostname!r} resolves to {address}, which may be no address of this machine, or behind a firewall: {advice}"
