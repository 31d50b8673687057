"""Servers and workers: start, look, stop."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camera.cli.options import Json
from camera.cli.output import print_json, say
from flows.commands.shared import here

if TYPE_CHECKING:
    from flows.services import Services

Webhook = Annotated[
    str | None,
    typer.Option(
        metavar="URL|FILE",
        envvar="CAMERA_WEBHOOK",
        help="Where to tell of failed, crashed and late runs; kept for later calls, encrypted. A file that holds the URL, or the "
        "variable, shows it to nobody; an argument is for all users to read while this runs.",
        show_default=False,
    ),
]


def serve(
    pool: Annotated[
        list[str] | None,
        typer.Option(
            "--pool", help="A work pool to poll; may be repeated. The default is camera.", show_default=False
        ),
    ] = None,
    prefect_port: Annotated[
        int | None, typer.Option(help="The default is 4200, or the next that is free.", show_default=False)
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="The default is 5000, or the next that is free.", show_default=False)
    ] = None,
    webhook: Webhook = None,
    stop: Annotated[bool, typer.Option("--stop", help="End what was started, and only that.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Show what runs; exit code 1 if something does not.")
    ] = False,
    secret: Annotated[
        bool, typer.Option("--secret", help="Show user and password of both servers, as `user:password`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start a Prefect server, a worker and the MLflow UI on loopback, and deploy prefect.yaml.

    Give it again after a crash or a reboot: what runs is left alone, the rest is started, and runs that were killed
    go on from the store. With PREFECT_API_URL set only the worker is started, for a team's server.

    Both servers ask who you are: another user of this machine, or a page in your browser, gets nothing from them. Commands
    in this project know the secret.

    Examples: `camera serve`  `camera serve --status`  `camera serve --stop`  `camera serve --pool ascend`
    """
    from camera.errors import CameraError
    from flows.services import Services
    from tasks.project import Project

    project = Project.here()
    services = Services(project.home)
    if stop + status + secret > 1:
        raise CameraError("give one of --stop, --status and --secret")
    if secret:
        from flows.secret import project_secret

        say(project_secret(project.home))
        return
    if stop:
        with services.exclusive():
            stopped = services.stop()
        if as_json:
            print_json({"stopped": stopped})
        else:
            say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")
        return
    if status:
        _show(services, as_json)
        return
    from flows.secret import project_secret, secret_file
    from flows.serve import serve as run

    project.configure()
    served = run(
        project,
        pool or ["camera"],
        prefect_port,
        mlflow_port,
        _webhook_url(webhook),
        (lambda line: None) if as_json else say,
    )
    if as_json:
        print_json(served)
        return
    for name in served.recovered:
        say(f"scheduled again: {name}, whose process was killed")
    say(f"Prefect: {served.prefect}")
    say(f"MLflow:  {served.mlflow}")
    say(f"logs:    {services.folder}")
    if (kept := secret_file(project.home)).is_file():
        say(f"secret:  {kept}: the user is the part before the colon (Prefect's page wants all of it)")
    if not served.notifies:
        say("nobody is told of failed runs: give --webhook URL")
    say(f"To use this server from here: export PREFECT_API_URL={served.prefect}/api")
    if kept.is_file() and os.environ.get("PREFECT_API_AUTH_STRING") == project_secret(project.home):
        say('and from elsewhere also: export PREFECT_API_AUTH_STRING="$(camera serve --secret)"')


def _webhook_url(given: str | None) -> str | None:
    """The address itself, or what is in the file of this name."""
    from camera.errors import CameraError

    if given is None or "://" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CameraError(f"--webhook {given} is neither a URL nor a file that holds one: {error}") from None


def _show(services: "Services", as_json: bool) -> None:
    known = services.known()
    if as_json:
        print_json([{**asdict(service), "alive": service.alive} for service in known.values()])
    elif not known:
        say("nothing was started here; `camera serve` does")
    else:
        for service in known.values():
            state = f"pid {service.pid}" if service.alive else "DEAD"
            say(f"{service.name:<16}{state:<12}{service.url or service.log}")
    if not known or not all(service.alive for service in known.values()):
        raise typer.Exit(1)


def automations(webhook: Webhook = None, as_json: Json = False) -> None:
    """Create or update the server's automations: close dead runs, tell of failed, crashed and late ones.

    `camera serve` does this too. Needs PREFECT_API_URL.

    Example: `camera automations --webhook https://chat.example.org/hooks/abc`
    """
    from camera.errors import CameraError

    here()
    if "PREFECT_API_URL" not in os.environ:
        raise CameraError(
            "automations live on a Prefect server: set PREFECT_API_URL, or use `camera serve --webhook`"
        )
    from flows.automations import apply_automations
    from flows.local_api import check_api

    check_api()
    applied = apply_automations(_webhook_url(webhook))
    if as_json:
        print_json(applied)
        return
    for name in applied:
        say(name)
    if len(applied) == 2:
        say("nobody is told of failed runs: give --webhook URL")
