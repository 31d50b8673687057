"""What is left to do for a shard when its bytes are written, done while the next one is packed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from camera.digests import digest_file
from camera.formats.quantized_model import ShardRecord, TensorRecord

Record = Callable[[ShardRecord, list[TensorRecord]], None]


class Finishing:
    """Makes shards durable, digests and records them, one after the other, in a thread beside the caller's.

    As a context manager it ends when the last shard is recorded, also where the caller was interrupted.
    """

    def __init__(self, record: Record) -> None:
        """Args:
        record: called with each finished shard and its tensors, in the caller's thread.
        """
        self._record = record
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finish-shard")
        self._pending: Future[tuple[ShardRecord, list[TensorRecord]]] | None = None

    def __enter__(self) -> "Finishing":
        return self

    def add(self, path: Path, written: ExitStack, records: list[TensorRecord]) -> None:
        """Finish a shard, when the one before is.

        Args:
            path: of the shard.
            written: makes it durable and gives it its name when it is closed; taken over.
            records: of its tensors.
        """
        self.wait()
        held = written.pop_all()

        def finish() -> tuple[ShardRecord, list[TensorRecord]]:
            held.close()
            return ShardRecord(file=path.name, size=path.stat().st_size, sha256=digest_file(path)), records

        self._pending = self._pool.submit(finish)

    def wait(self) -> None:
        """Return when all shards that were added are in place and recorded."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._record(*pending.result())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
