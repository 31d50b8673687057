"""What the server does by itself: closes runs whose process is gone, and tells somebody of what went wrong.

Applied by `camera automations` and by `camera serve`, as often as one likes: an automation is found by its name.
"""

from datetime import timedelta
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from pydantic import SecretStr

SILENCE_SECONDS = 180
"""A run that says nothing for so long is taken for dead. `camera serve` has its workers' runs speak every 30 s; under a
worker that was started with Prefect's own setting, 180 s, healthy runs would be closed."""
START_SECONDS = 900
"""A run that a worker took and that does not begin within this time is taken for dead."""
NO_HEARTBEAT = "no sign of life"
"""How the message of a run begins that was closed for its silence."""
WEBHOOK = "camera-notify"
"""Name of the webhook block that notifications go through."""
_ENDS = {
    f"prefect.flow-run.{state}"
    for state in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed", "AwaitingRetry", "Scheduled")
}
_RUNS = ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"})
_OF_A_DEPLOYMENT = ResourceSpecification.model_validate({"prefect.resource.role": "deployment"})
_PAYLOAD = """\
{% set what = flow_run.name ~ " (" ~ flow.name ~ ") is " ~ flow_run.state.name -%}
{% set why = ": " ~ flow_run.state.message if flow_run.state.message else "" -%}
{"text": {{ (what ~ why) | tojson }}, "run": {{ flow_run.id | string | tojson }}, \
"flow": {{ flow.name | tojson }}, "state": {{ flow_run.state.name | tojson }}, "url": {{ (flow_run | ui_url) | tojson }}}"""


def closing_automations(
    silence_seconds: int = SILENCE_SECONDS, start_seconds: int = START_SECONDS
) -> list[AutomationCore]:
    """Automations that close runs whose process is gone, so that none stays Running or Pending for ever.

    Args:
        silence_seconds: without a heartbeat; more than twice the 30 s that runs under `camera serve` speak in.
        start_seconds: from Pending to Running.
    """
    return [
        AutomationCore(
            name="camera: close runs that show no sign of life",
            description=f"A run that sends no heartbeat for {silence_seconds} s was killed, or its host was.",
            trigger=EventTrigger(
                match=_RUNS,
                for_each={"prefect.resource.id"},
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *_ENDS},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=silence_seconds),
            ),
            actions=[
                ChangeFlowRunState(
                    name=None,
                    force=False,
                    state=StateType.CRASHED,
                    message=f"{NO_HEARTBEAT} for {silence_seconds} s: its process is gone",
                )
            ],
        ),
        AutomationCore(
            name="camera: close runs that never begin",
            description=f"A run that a worker took and that is not Running after {start_seconds} s died at its start.",
            trigger=EventTrigger(
                match=_RUNS,
                for_each={"prefect.resource.id"},
                after={"prefect.flow-run.Pending"},
                expect={"prefect.flow-run.Running", "prefect.flow-run.AwaitingConcurrencySlot", *_ENDS},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=start_seconds),
            ),
            actions=[
                ChangeFlowRunState(
                    name=None,
                    force=False,
                    state=StateType.CRASHED,
                    message=f"{NO_HEARTBEAT}: it did not begin within {start_seconds} s",
                )
            ],
        ),
    ]


def notifying_automations(webhook: UUID) -> list[AutomationCore]:
    """Automations that tell of runs that failed, crashed, ran out of time or are late; once for each run of a
    deployment, not for the runs inside it.

    Args:
        webhook: id of the block document to call.
    """
    told = {
        "camera: tell of failed runs": {"prefect.flow-run.Failed", "prefect.flow-run.TimedOut"},
        "camera: tell of crashed runs": {"prefect.flow-run.Crashed"},
        "camera: tell of late runs": {"prefect.flow-run.Late"},
    }
    return [
        AutomationCore(
            name=name,
            trigger=EventTrigger(
                match=_RUNS,
                match_related=_OF_A_DEPLOYMENT,
                for_each={"prefect.resource.id"},
                expect=events,
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[CallWebhook(block_document_id=webhook, payload=_PAYLOAD)],
        )
        for name, events in told.items()
    ]


def apply_automations(
    webhook_url: str | None = None,
    silence_seconds: int = SILENCE_SECONDS,
    start_seconds: int = START_SECONDS,
) -> list[str]:
    """Create or update all automations on the server in use; their names.

    Args:
        webhook_url: where notifications are POSTed as JSON with `text`, `run`, `flow`, `state` and `url`. None keeps
            the one that was given before; if none ever was, nobody is told.
        silence_seconds, start_seconds: see `closing_automations`.
    """
    automations = closing_automations(silence_seconds, start_seconds)
    with get_client(sync_client=True) as client:
        block = _webhook(webhook_url)
        if block is not None:
            automations += notifying_automations(block)
        for automation in automations:
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in automations]


def _webhook(url: str | None) -> UUID | None:
    if url is not None:
        block = Webhook(url=SecretStr(url), method="POST")
        return block.save(WEBHOOK, overwrite=True)  # type: ignore[return-value]  # sync outside of an event loop
    try:
        known = Webhook.load(WEBHOOK)
    except ValueError:  # Prefect's answer to a name it does not know
        return None
    return known._block_document_id  # type: ignore[union-attr]
