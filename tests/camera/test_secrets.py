"""Passwords and tokens are taken out of text, whatever their characters."""

import time

import pytest

from camera.secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:pw@host:5000/x", "at http://***@host:5000/x"),
        ("at https://token@host/x", "at https://***@host/x"),
        ("postgresql://mlflow:S3C/RETpw@127.0.0.1:9/db is away", "postgresql://***@127.0.0.1:9/db is away"),
        ("'http://mlflow:S3C@RETpw@127.0.0.1:9'", "'http://***@127.0.0.1:9'"),
        ("http://a:b%2Fc%40d@host/x", "http://***@host/x"),
        ("http://host:5000/a@b https://host:443/docs@v1", "http://host:5000/a@b https://host:443/docs@v1"),
        ("http://me:5000@host/a http://me:12x/y@host", "http://***@host/a http://***@host"),
        ("postgresql://me:5000/x@host/db", "postgresql://***@host/db"),
        ("https://me:" + "x" * 2000 + "@host/a", "https://***@host/a"),
        ("a://b:c@d://e:f@g://h", "a://***@g://h"),
        ("https://host/x?token=abc&a=b", "https://host/x?token=***&a=b"),
        ("https://host:5000/x and tiny@3", "https://host:5000/x and tiny@3"),
        ("file:///a/b@c https://host/docs@v1", "file:///a/b@c https://host/docs@v1"),
    ],
)
def test_a_url_is_shown_without_its_user_and_its_secrets(text: str, shown: str):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://mlflow:S3C/RETpw@127.0.0.1:9/db",
        "http://mlflow:S3C@RETpw@127.0.0.1:9",
        "http://mlflow:S3C%2FRETpw%40@127.0.0.1:9",
        "mysql+pymysql://mlflow:S3C?RET#pw@db/x",
        "https://S3C/RETpw@host/x",
    ],
)
def test_of_an_address_in_the_environment_the_password_is_hidden_alone_and_in_pieces(
    address: str, monkeypatch: pytest.MonkeyPatch
):
    from urllib.parse import quote, unquote

    monkeypatch.setenv("SOME_ADDRESS", address)
    secret = address.partition("://")[2].rpartition("@")[0].rpartition("mlflow:")[2]
    for form in (secret, unquote(secret), quote(secret, safe=""), secret.lower()):
        shown = without_secrets(f"no host {form!r}, database {form.rpartition('/')[2]}@127.0.0.1, port S3C")
        assert "retpw" not in shown.lower(), shown
        assert "s3c" not in shown.lower(), shown
    assert (
        without_secrets("mlflow of the camera is at 127.0.0.1:9") == "mlflow of the camera is at 127.0.0.1:9"
    )


@pytest.mark.parametrize(
    "name",
    [
        "MLFLOW_TRACKING_TOKEN",
        "PREFECT_API_AUTH_STRING",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "X_SECRET_KEY",
        "SSH_DEPLOY_KEY",
        "MY_SECRETS",
    ],
)
def test_secrets_that_variables_are_named_for_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "abc123def")
    assert without_secrets("it is abc123def.") == "it is ***."


def test_innocent_words_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@localhost/the")
    assert without_secrets("the mlflow database on localhost") == "the mlflow database on localhost"


@pytest.mark.parametrize("end", ["", " x", "@host"])
def test_time_grows_with_the_length_of_a_text_not_with_its_square(end: str):
    begun = time.process_time()
    without_secrets("no field 'text' (it has " + "a://b:" * 20_000 + end)
    assert time.process_time() - begun < 1
