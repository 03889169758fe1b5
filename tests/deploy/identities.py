"""The identities of deploy/iam on a real S3 server: users of its IAM API, with the very policies that are shipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import botocore.session

from tests.s3_server import ADMIN, S3Server

POLICIES = Path(__file__).parents[2] / "deploy" / "iam"
ROLES = ("producer", "reader", "collector")
PREFIX = "opd"


@dataclass(frozen=True)
class Team:
    """A bucket of its own, and who may do what below its prefix."""

    server: S3Server
    bucket: str
    keys: Mapping[str, tuple[str, str]]
    """(access key, secret) of every role, the administrator `admin` included."""

    @property
    def url(self) -> str:
        """The prefix that the identities share."""
        return f"s3://{self.bucket}/{PREFIX}"

    def environment(self, role: str) -> dict[str, str]:
        """The variables that make a process this role."""
        return self.server.environment(self.keys[role])

    def client(self, role: str, service: str = "s3") -> Any:
        """A plain client of botocore, which does what it is told and retries nothing of ours."""
        return client(self.server, self.keys[role], service)


def client(server: S3Server, key: tuple[str, str], service: str) -> Any:
    """A botocore client of a service of the server, signing with `key`."""
    return botocore.session.get_session().create_client(
        service,
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=key[0],
        aws_secret_access_key=key[1],
    )


def filled(name: str, bucket: str) -> str:
    """The text of a file of deploy/iam, its placeholders filled in as the README says."""
    return (POLICIES / f"{name}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", PREFIX)


def make_team(server: S3Server) -> Team:
    """Create a bucket and a user for every role."""
    bucket = f"team-{uuid4().hex[:10]}"
    client(server, ADMIN, "s3").create_bucket(Bucket=bucket)
    iam = client(server, ADMIN, "iam")
    return Team(server, bucket, {"admin": ADMIN, **{role: _make_user(iam, role, bucket) for role in ROLES}})


def _make_user(iam: Any, role: str, bucket: str) -> tuple[str, str]:
    name = f"{bucket}-{role}"
    iam.create_user(UserName=name)
    policy = iam.create_policy(PolicyName=name, PolicyDocument=filled(role, bucket))["Policy"]["Arn"]
    iam.attach_user_policy(UserName=name, PolicyArn=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return key["AccessKeyId"], key["SecretAccessKey"]
