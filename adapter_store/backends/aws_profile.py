"""What AWS's own files say of one profile: `~/.aws/credentials` and `~/.aws/config`.

obstore does not read them. The names are those of AWS's tools: AWS_PROFILE chooses the profile,
else it is `default`; AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE name other files.
"""

import os
from collections.abc import Mapping
from configparser import ConfigParser, Error
from pathlib import Path

from adapter_store.errors import BackendError
from adapter_store.text import shorten

# Of a profile: obstore's name, and the environment's names of the same.
_OPTIONS = {
    "aws_access_key_id": ("access_key_id", ()),
    "aws_secret_access_key": ("secret_access_key", ()),
    "aws_session_token": ("session_token", ()),
    "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
    "endpoint_url": (
        "endpoint",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    ),
}
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
# Credentials that the environment holds or leads to come first, as with AWS's tools.
_IN_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
# What a profile may have instead of keys, and what only AWS's tools can do.
_INDIRECT = ("role_arn", "sso_session", "sso_start_url", "credential_process", "login_session")


def profile_options(given: Mapping[str, str]) -> dict[str, str]:
    """Return what the profile adds to the options `given`, by obstore's names.

    Nothing of it stands against an option or a variable of the environment. Raises `BackendError`
    where AWS_PROFILE names a profile that is not there, a file cannot be read, or the profile's
    credentials are not plain keys.
    """
    name = os.environ.get("AWS_PROFILE")
    profile = _profile(name or "default")
    if profile is None:
        if name:
            files = " and ".join(str(path) for path in _files())
            raise BackendError(
                f"AWS_PROFILE names {shorten(name)}, which is not in {files}: "
                "name one that is, or unset it"
            )
        return {}
    has_keys = "access_key_id" in given or any(map(os.environ.get, _IN_ENVIRONMENT))
    indirect = [key for key in _INDIRECT if key in profile]
    if not has_keys and indirect and "aws_access_key_id" not in profile:
        raise BackendError(
            f"the AWS profile {shorten(name or 'default')} has {indirect[0]} instead of keys, "
            "which only AWS's own tools follow: run "
            "`aws configure export-credentials --format env` and set what it prints"
        )
    options = {}
    for key, (option, variables) in _OPTIONS.items():
        is_set = option in given or any(map(os.environ.get, variables))
        if key in profile and not is_set and not (has_keys and key in _KEYS):
            options[option] = profile[key]
    return options


def _files() -> tuple[Path, Path]:
    credentials = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    config = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    return Path(os.path.expanduser(credentials)), Path(os.path.expanduser(config))  # noqa: PTH111


def _profile(name: str) -> dict[str, str] | None:
    """Return the profile's settings of both files, those of the credentials file first."""
    found: dict[str, str] | None = None
    credentials, config = _files()
    in_config = name if name == "default" else f"profile {name}"
    for path, section in ((config, in_config), (credentials, name)):
        # Values may hold "%"; and a [default] must not be what all others fall back on.
        parser = ConfigParser(interpolation=None, default_section="")
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, Error) as error:
            # What the parser says may quote a line, which may be a secret.
            raise BackendError(
                f"cannot read AWS's file {path} ({type(error).__name__}): repair it, or name "
                "another with AWS_SHARED_CREDENTIALS_FILE or AWS_CONFIG_FILE"
            ) from None
        if parser.has_section(section):
            found = {**(found or {}), **parser[section]}
    return found
