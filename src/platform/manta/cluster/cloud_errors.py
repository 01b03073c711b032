"""Errors of the clouds: their message, what it means, what to do.

The codes are those that the clouds document: EC2 API error codes, Compute Engine's
`RESOURCE_AVAILABILITY` and quota errors, Azure Resource Manager's allocation and quota errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from manta.errors import MantaError

MAX_LENGTH = 400
"""Characters of a cloud's message that are shown."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a message of a cloud means."""

    pattern: str
    what: str
    fix: str


_CAPACITY = "choose another zone, region or instance type, or ask again later"
_QUOTA = "ask the cloud for a higher quota, or lower max_workers and instance sizes"
_CREDENTIALS = "log in again on this machine, then repeat the command"

MEANINGS = (
    Meaning(
        pattern=r"Unable to locate credentials|NoCredentials|DefaultCredentialsError"
        r"|CredentialUnavailable|failed to retrieve a token|Please run 'az login'",
        what="this machine has no credentials for the cloud",
        fix="log in: `aws sso login` or `aws configure`, "
        "`gcloud auth application-default login`, `az login`",
    ),
    Meaning(
        pattern=r"ExpiredToken|RequestExpired|token (has )?expired|invalid_grant|RefreshError",
        what="the credentials have expired, or this machine's clock is wrong",
        fix=_CREDENTIALS,
    ),
    Meaning(
        pattern=r"AuthFailure|InvalidClientTokenId|SignatureDoesNotMatch|UnrecognizedClient"
        r"|ClientAuthenticationError",
        what="the cloud does not accept the credentials",
        fix=_CREDENTIALS,
    ),
    Meaning(
        pattern=r"UnauthorizedOperation|AccessDenied|AuthorizationFailed|PERMISSION_DENIED"
        r"|forbidden|Required '[\w.]+' permission",
        what="the credentials are good, and lack a permission that the message names",
        fix="have it granted to you, or to the role in the file",
    ),
    Meaning(
        pattern=r"VcpuLimitExceeded|\w*LimitExceeded|MaxSpotInstanceCountExceeded|QuotaExceeded"
        r"|QUOTA_EXCEEDED|Quota '[\w-]+' exceeded|quotaExceeded",
        what="the account's quota is used up",
        fix=_QUOTA,
    ),
    Meaning(
        pattern=r"InsufficientInstanceCapacity|InsufficientHostCapacity|Insufficient capacity"
        r"|ZONE_RESOURCE_POOL_EXHAUSTED|RESOURCE_POOL_EXHAUSTED|stockout|AllocationFailed"
        r"|OverconstrainedAllocation|SkuNotAvailable|SpotMaxPriceTooLow",
        what="the cloud has no such machine free there now",
        fix=_CAPACITY,
    ),
    Meaning(
        pattern=r"InvalidAMIID|InvalidKeyPair|InvalidSubnet|InvalidGroup|InvalidParameter"
        r"|ResourceNotFound|was not found|does not exist",
        what="the file names something that the cloud does not have",
        fix="compare the id in the message with the file",
    ),
    Meaning(
        pattern=r"EndpointConnectionError|Could not connect to the endpoint|Max retries exceeded"
        r"|Name or service not known|Temporary failure in name resolution|ServiceRequestError",
        what="the cloud's API cannot be reached from this machine",
        fix="check the network, proxy settings and the region",
    ),
)


def explained(what: str, output: str) -> MantaError:
    """An error that carries the cloud's message and, where it is known, what to do.

    Args:
        what: what failed, a few words.
        output: everything that Ray's launcher or provider printed.
    """
    for line in reversed(output.splitlines()):
        for meaning in MEANINGS:
            if re.search(meaning.pattern, line):
                return MantaError(f"{what}: {meaning.what}: {_shown(line)}", meaning.fix)
    lines = [line for line in output.splitlines() if line.strip()]
    return MantaError(f"{what}:\n" + "\n".join(map(_shown, lines[-15:])) if lines else what)


def _shown(line: str) -> str:
    text = "".join(char for char in line.strip() if char.isprintable())
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…"
