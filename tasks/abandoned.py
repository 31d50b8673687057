"""MLflow runs that a kill left RUNNING: known by the process that had them, and closed by the next run on its host."""

import os
import platform
from typing import TYPE_CHECKING

from tasks.processes import birth

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PROCESS_TAG = "camera.process"
"""Tag of a run: host, pid and birth of the process that works on it."""


def this_process() -> str:
    """Host, pid and birth: another process that gets the same pid later is another."""
    return f"{platform.node()} {os.getpid()} {birth(os.getpid())}"


def close_abandoned(client: "MlflowClient", experiment_id: str) -> list[str]:
    """Close, as KILLED, the runs of an experiment whose process on this host is gone; their ids.

    The same recipe run again continues such a run and closes it; this is for those that nobody runs again, because
    their recipe or their sources changed. Of another host's processes nothing is known here, and nothing is done.
    """
    closed = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        if _is_gone(run.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(str(run.info.run_id))
    return closed


def _is_gone(process: str) -> bool:
    host, _, rest = process.partition(" ")
    pid, _, born = rest.partition(" ")
    return host == platform.node() and pid.isdecimal() and birth(int(pid)) != born
