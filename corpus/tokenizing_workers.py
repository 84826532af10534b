"""Worker processes that turn text into token ids; the results come in the order of the text."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from typing import Any

import numpy as np

from corpus.read_text import Text
from corpus.tokenizer import Tokenizer
from runtime.setting_fields import UserError

_encoder: tuple[Tokenizer, np.dtype[Any]]  # in a worker, set when that starts


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype[Any], parent: int) -> None:
    global _encoder
    _encoder = (tokenizer, dtype)
    if os.getpid() != parent:  # Ctrl-C is the parent's to handle, and no worker outlives it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _encode(piece: list[Text]) -> bytes:
    tokenizer, dtype = _encoder
    end = np.array([tokenizer.end_token], dtype).tobytes()
    return b"".join(
        (tokenizer.encode if t.starts_document else tokenizer.encode_rest)(t.text)
        .astype(dtype)
        .tobytes()
        + (end if t.ends_document else b"")
        for t in piece
    )


def _forking_is_safe() -> bool:
    """Whether processes can be forked: on Linux, unless this process has initialized CUDA, which
    does not work in a forked one. Looks at torch only if it is loaded already, since workers don't
    need it.
    """
    torch = sys.modules.get("torch")
    return sys.platform == "linux" and not (torch and torch.cuda.is_initialized())


def _pool(tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int) -> Executor:
    """The pool of workers that encode: forked processes, or threads where forking is not safe.
    Threads scaled worse when measured with bench.py prepare (1.5 against 1.9 times the speed of one
    process).
    """
    start = (tokenizer, dtype, os.getpid())
    if not _forking_is_safe():
        return ThreadPoolExecutor(workers, initializer=_start_worker, initargs=start)
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, fork, initializer=_start_worker, initargs=start)


def encode_in_order(
    pieces: Iterator[list[Text]], tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int
) -> Iterator[tuple[list[Text], bytes]]:
    """Encodes the pieces in parallel and yields each with the bytes of its ids, in the order of the
    pieces. Only about 2 x workers pieces are in memory. Raises UserError if a worker was killed.
    """
    with _pool(tokenizer, dtype, workers) as pool:
        waiting: deque[tuple[list[Text], Future[bytes]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(_work, piece)))
                if len(waiting) > 2 * workers:
                    first, ids = waiting.popleft()
                    yield first, ids.result()
            while waiting:
                first, ids = waiting.popleft()
                yield first, ids.result()
        except BrokenExecutor as reason:
            _unblock(pool)
            raise UserError(
                "a worker was killed, perhaps for want of memory; start again to continue, with "
                "fewer --workers"
            ) from reason
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _unblock(pool: Executor) -> None:
    """Lets a pool with a killed worker end: a pool of Python before 3.11.5 waits for ever if it was
    writing a piece of text for a worker, and nobody reads that pipe any more (CPython's issue
    94777). Later versions close the pipe themselves.
    """
    if sys.version_info < (3, 11, 5) and isinstance(pool, ProcessPoolExecutor):
        pool._call_queue._reader.close()  # type: ignore[attr-defined]


def _work(piece: list[Text]) -> bytes:
    return _encode(piece)
