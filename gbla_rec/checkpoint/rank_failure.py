"""What an error on one rank means to the launcher and to the other ranks, and what a restart of all of them needs."""

import os

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

LOST_PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "recvBytes",
    "sendBytes",
)
"""What gloo, NCCL and the store say when the process at the other end is gone."""

SHARED_STORE_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def require_restartable() -> None:
    """Refuse restarts that would fail: a store which outlives the ranks gives restarted ones the addresses of the dead.

    Raises:
        ValueError: if torchrun may restart the ranks (``--max-restarts``) and keeps one store for all attempts, its default.
    """
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if max_restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"--max-restarts of torchrun must be 0 while restarted ranks would meet in the store of the ranks before, got {max_restarts}; "
            f"set {SHARED_STORE_SWITCH}=1 in the environment of torchrun"
        )


class LostRankError(ConnectionError):
    """Another rank is gone: its error, not this one, is the cause."""


def explain(error: BaseException) -> BaseException:
    """The error to show instead of ``error``: that another rank is gone, where ``error`` only follows from that.

    The error goes into torchelastic's error file too, so that the launcher's summary names the rank that failed first.
    """
    if _is_lost_peer(error):
        error = LostRankError("lost the connection to another rank, which failed or was ended; its own message says why")
    if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    return error


def _is_lost_peer(error: BaseException) -> bool:
    is_of_communication = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
    return is_of_communication and any(words in str(error) for words in LOST_PEER_WORDS)
