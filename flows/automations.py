"""Automations of the Prefect server: close runs whose process is gone, and notify of runs that went wrong.

Applied by `camera automations` and by `camera serve`, as often as one likes: an automation is found by its name.
"""

from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

SILENCE_SECONDS = 180
"""A run that sends no heartbeat for so long is taken for dead. `camera serve` has its workers' runs send one every 30 s;
under a worker that was started with Prefect's own setting, 180 s, healthy runs would be closed."""
START_SECONDS = 900
"""A run that a worker took and that does not begin within this time is taken for dead."""
NO_HEARTBEAT = "no sign of life"
"""How the message of a run begins that was closed for its silence."""
WEBHOOK = "camera-notify"
"""Name of the webhook block that notifications go through."""
_RUN = "prefect.flow-run."
_Posture = Literal[Posture.Reactive, Posture.Proactive]
_ENDS = {
    f"{_RUN}{state}"
    for state in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed", "AwaitingRetry", "Scheduled")
}
_OF_A_DEPLOYMENT = ResourceSpecification.model_validate({"prefect.resource.role": "deployment"})
_NOTIFY_OF = {"failed": {"Failed", "TimedOut"}, "crashed": {"Crashed"}, "late": {"Late"}}
_PAYLOAD = """\
{% set what = flow_run.name ~ " (" ~ flow.name ~ ") is " ~ flow_run.state.name -%}
{% set why = ": " ~ flow_run.state.message if flow_run.state.message else "" -%}
{"text": {{ (what ~ why) | tojson }}, "run": {{ flow_run.id | string | tojson }}, \
"flow": {{ flow.name | tojson }}, "state": {{ flow_run.state.name | tojson }}, "url": {{ (flow_run | ui_url) | tojson }}}"""


def apply_automations(
    webhook_url: str | None = None,
    silence_seconds: int = SILENCE_SECONDS,
    start_seconds: int = START_SECONDS,
) -> list[str]:
    """Create or update all automations on the server in use; their names.

    Args:
        webhook_url: where notifications are POSTed as JSON with `text`, `run`, `flow`, `state` and `url`. None keeps
            the one that was given before; if none ever was, nobody is notified.
        silence_seconds: without a heartbeat; more than twice the 30 s that runs under `camera serve` send one in.
        start_seconds: from Pending to Running.
    """
    with get_client(sync_client=True) as client:
        webhook = _webhook(client, webhook_url)
        automations = [_closes_silent_runs(silence_seconds), _closes_unstarted_runs(start_seconds)]
        automations += [] if webhook is None else [_notifies(of, webhook) for of in _NOTIFY_OF]
        for automation in automations:
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in automations]


def _closes_silent_runs(seconds: int) -> AutomationCore:
    heartbeat = {f"{_RUN}heartbeat"}
    return AutomationCore(
        name="camera: close runs that show no sign of life",
        description=f"A run that sends no heartbeat for {seconds} s was killed, or its host was.",
        trigger=_trigger(after=heartbeat, expect=heartbeat | _ENDS, within=timedelta(seconds=seconds)),
        actions=[_crash(f"{NO_HEARTBEAT} for {seconds} s: its process is gone")],
    )


def _closes_unstarted_runs(seconds: int) -> AutomationCore:
    begun = {f"{_RUN}Running", f"{_RUN}AwaitingConcurrencySlot"}
    return AutomationCore(
        name="camera: close runs that never begin",
        description=f"A run that a worker took and that is not Running after {seconds} s died at its start.",
        trigger=_trigger(after={f"{_RUN}Pending"}, expect=begun | _ENDS, within=timedelta(seconds=seconds)),
        actions=[_crash(f"{NO_HEARTBEAT}: it did not begin within {seconds} s")],
    )


def _notifies(of: str, webhook: UUID) -> AutomationCore:
    """Once for each run of a deployment, not for the runs inside it."""
    events = {f"{_RUN}{state}" for state in _NOTIFY_OF[of]}
    return AutomationCore(
        name=f"camera: tell of {of} runs",
        trigger=_trigger(Posture.Reactive, match_related=_OF_A_DEPLOYMENT, expect=events),
        actions=[CallWebhook(block_document_id=webhook, payload=_PAYLOAD)],
    )


def _trigger(posture: _Posture = Posture.Proactive, **about: Any) -> EventTrigger:
    """A trigger for each flow run; a proactive one waits for an event that does not come."""
    runs = ResourceSpecification.model_validate({"prefect.resource.id": f"{_RUN}*"})
    return EventTrigger(match=runs, for_each={"prefect.resource.id"}, posture=posture, threshold=1, **about)


def _crash(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(name=None, force=False, state=StateType.CRASHED, message=message)


def _webhook(client: SyncPrefectClient, url: str | None) -> UUID | None:
    """The webhook block's id, with a new address if one is given; None if none ever was."""
    if url is not None:
        block = Webhook(url=SecretStr(url), method="POST")
        return block.save(WEBHOOK, overwrite=True)  # type: ignore[return-value]  # sync outside of an event loop
    try:
        return client.read_block_document_by_name(WEBHOOK, "webhook", include_secrets=False).id
    except ObjectNotFound:
        return None
