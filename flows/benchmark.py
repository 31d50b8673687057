"""The Prefect flow `benchmark`: the benchmark stage of another host's run, on the host that has the device."""

from prefect import flow
from prefect.runtime import flow_run

from camera.devices import describe_device, resolve_device
from camera.errors import CameraError
from flows.device_limits import device_slots
from flows.listeners import LogListener
from flows.recovery import running_flow
from flows.remote import RemoteRequest
from tasks.run import perform_reporting
from tasks.stage import RunReferences
from tasks.stages.benchmark import STAGE
from tasks.store import Store


@flow(name="benchmark", persist_result=False)
def benchmark(request: RemoteRequest) -> str:
    """Perform one benchmark request on this host's device, into the store that the hosts share.

    Args:
        request: what the run that waits for it asks for.

    Returns:
        The key of the artifact.

    Raises:
        CameraError: if this host's device is another than the request names, or an input is not here.
    """
    with running_flow() as project:
        check_device(request)
        store = Store(project.store)
        restored = request.restored(STAGE, store, RunReferences(prefect_run=str(flow_run.id)))
        return perform_reporting(store, restored, LogListener(), device_slots)[0].key


def check_device(request: RemoteRequest) -> None:
    """Refuse to measure on another device than the one whose name the result will carry.

    Raises:
        CameraError: naming both.
    """
    wanted, device = request.facts["device_name"], str(request.options["benchmark"]["device"])
    name = describe_device(resolve_device(device))["name"]
    if name != wanted:
        raise CameraError(
            f"benchmark_host.device_name: this host's {device} is {name!r}, and the recipe says {wanted!r}"
        )
