"""Credentials of AWS that cannot be had, as botocore meets them: nothing here reaches AWS."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipeline.data.bench import Page, serving

LOGIN = """
[profile login]
sso_session = company
sso_account_id = 123456789012
sso_role_name = reader
[sso-session company]
sso_region = us-east-1
sso_start_url = https://company.awsapps.com/start
"""
REFUSED = Page(b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>", 403)
NEEDS = {
    "no login": "Error loading SSO Token: Token for company does not exist",
    "no profile": r"The config profile \(none\) could not be found",
    "no role": "AssumeRoleWithWebIdentity was answered AccessDenied",
}
"""What is lacking, and words of what is to be said of it."""


@contextmanager
def lacking(what: str, folder: Path) -> Iterator[None]:
    """Takes the keys out of the environment and puts in what cannot be used in their place."""
    (folder / "config").write_text(LOGIN)
    (folder / "token").write_text("a token of the cluster")
    with pytest.MonkeyPatch.context() as patch, serving({"/": REFUSED}) as address:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        if what == "no role":
            patch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
            patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
            patch.setenv("AWS_ENDPOINT_URL_STS", f"http://{address}")
        else:
            patch.setenv("AWS_PROFILE", what.removeprefix("no ").replace("profile", "none"))
        yield
