"""The files of deploy/iam: what they grant on paper, and whether our own requests satisfy them as AWS would judge."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import botocore.handlers
import pytest

from common.cache.collect import collect
from common.cache.copying import copy
from common.cache.verify import verify
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.storage import Store
from tests.common.rows import make_plan, make_shard
from tests.deploy.identities import POLICIES, ROLES, Team, filled, make_team
from tests.deploy.rules import Request, allowed, as_list, request
from tests.s3_server import S3Server

BUCKET = "bucket"
RECORDS = ("plan.json", "commits/000000.json", "MANIFEST.json")
SHARD = "data/000000-0123456789abcdef.parquet"
PLACES = [
    f"{BUCKET}/opd{place}"
    for place in ("", "/run/scored", "/data", "/sft-data", "/metadata", "/commits", "/old-commits")
]
"""Where a dataset may lie, under names too that look like those of its own folders."""
KNOWN_KEYS = {"aws:SecureTransport", "s3:if-none-match", "s3:ObjectCreationOperation"}
"""Condition keys of our policies; the last two belong to `s3:PutObject` in AWS's Service Authorization Reference."""


def policy(name: str) -> Any:
    """A file of deploy/iam for `BUCKET`."""
    return json.loads(filled(name, BUCKET))


def and_anything_else(found: Any) -> dict[str, Any]:
    """The policy with everything granted that it does not deny."""
    return {"Statement": [*found["Statement"], {"Effect": "Allow", "Action": "*", "Resource": "*"}]}


def granted(name: str) -> set[str]:
    """All actions that a role's policy allows somewhere."""
    allows = [statement for statement in policy(name)["Statement"] if statement["Effect"] == "Allow"]
    return {action for statement in allows for action in as_list(statement["Action"])}


@pytest.mark.parametrize("file", sorted(POLICIES.glob("*.json")), ids=lambda file: file.stem)
def test_a_file_keeps_no_placeholder_once_it_is_filled_in(file: Path) -> None:
    text = filled(file.stem, BUCKET)

    assert "BUCKET" not in text and "PREFIX" not in text
    assert json.loads(text) != json.loads(file.read_text())


@pytest.mark.parametrize("name", [*ROLES, "bucket-policy"])
def test_a_policy_has_the_form_that_aws_asks_for(name: str) -> None:
    found = policy(name)
    sids = [statement["Sid"] for statement in found["Statement"]]

    assert found["Version"] == "2012-10-17"
    assert len(set(sids)) == len(sids) and all(sid.isalnum() for sid in sids)
    for statement in found["Statement"]:
        assert ("Principal" in statement) == (name == "bucket-policy")
        assert all(arn.startswith(f"arn:aws:s3:::{BUCKET}") for arn in as_list(statement["Resource"]))
        assert {key for keys in statement.get("Condition", {}).values() for key in keys} <= KNOWN_KEYS


def test_the_roles_are_granted_this_and_no_more() -> None:
    assert granted("reader") == {"s3:ListBucket", "s3:GetObject"}
    assert granted("producer") == granted("reader") | {"s3:PutObject", "s3:AbortMultipartUpload"}
    assert granted("collector") == granted("reader") | {"s3:PutObject", "s3:DeleteObject"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload"])
def test_a_producer_writes_a_record_once_and_never_over_another(place: str, record: str, operation: str) -> None:
    assert allowed(policy("producer"), request(operation, f"{place}/{record}", create_only=True))
    assert not allowed(policy("producer"), request(operation, f"{place}/{record}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("record", RECORDS)
def test_the_bucket_refuses_to_overwrite_a_record_for_everyone(place: str, record: str) -> None:
    free = and_anything_else(policy("bucket-policy"))

    assert allowed(free, request("PutObject", f"{place}/{record}", create_only=True))
    assert not allowed(free, request("PutObject", f"{place}/{record}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [SHARD, "README.md", "create-only.probe"])
def test_what_is_no_record_may_be_written_again(place: str, name: str) -> None:
    for granting in (policy("producer"), and_anything_else(policy("bucket-policy"))):
        assert allowed(granting, request("PutObject", f"{place}/{name}"))


@pytest.mark.parametrize("role", ROLES)
def test_no_role_reaches_beyond_the_prefix(role: str) -> None:
    assert not any(
        allowed(policy(role), request(operation, path, create_only=True))
        for operation in ("GetObject", "PutObject", "DeleteObject")
        for path in (f"{BUCKET}/elsewhere/data/x", f"{BUCKET}/opdata/x", "other/opd/run/data/x", BUCKET)
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("record", [*RECORDS, "README.md"])
@pytest.mark.parametrize("role", ROLES)
def test_no_role_deletes_a_record(role: str, record: str, place: str) -> None:
    assert not allowed(policy(role), request("DeleteObject", f"{place}/{record}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("record", [*RECORDS, "README.md"])
def test_a_collector_deletes_no_record_even_when_it_is_granted_everything(record: str, place: str) -> None:
    assert not allowed(and_anything_else(policy("collector")), request("DeleteObject", f"{place}/{record}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [SHARD, "data/1234567-0123456789abcdef.parquet"])
def test_the_collector_alone_deletes_shards(place: str, name: str) -> None:
    shard = request("DeleteObject", f"{place}/{name}")

    assert [role for role in ROLES if allowed(policy(role), shard)] == ["collector"]


OTHERS = (
    "data/notes.txt",
    "data/notes.parquet",
    "data/.000000-0123456789abcdef.parquet.01234567.part",
    "raw-data/000000-0123456789abcdef.parquet",
    "create-only.probe",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OTHERS)
def test_the_collector_deletes_nothing_but_shards(place: str, name: str) -> None:
    assert not allowed(policy("collector"), request("DeleteObject", f"{place}/{name}"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("operation", ["PutObject", "DeleteObject"])
def test_the_collector_may_ask_every_dataset_for_the_time(place: str, operation: str) -> None:
    assert allowed(policy("collector"), request(operation, f"{place}/0123456789abcdef0123456789abcdef.clock"))


def test_the_lifecycle_forgets_unfinished_uploads_and_old_versions_and_nothing_current() -> None:
    rules = policy("bucket-lifecycle")["Rules"]
    said = [{key: value for key, value in rule.items() if key not in ("ID", "Status", "Filter")} for rule in rules]

    assert said == [
        {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}},
        {"NoncurrentVersionExpiration": {"NoncurrentDays": 30}},
    ]
    assert all(rule["Status"] == "Enabled" and rule["Filter"] == {"Prefix": "opd/"} for rule in rules)


@pytest.fixture(scope="module")
def team(s3_server: S3Server) -> Team:
    return make_team(s3_server)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Request]]:
    """The requests that any S3 client of this process sends, as a policy sees them."""
    seen: list[Request] = []

    def note(event_name: str, **event: Any) -> None:
        path = unquote(urlsplit(event["request"].url).path).strip("/")
        create_only = "If-None-Match" in event["request"].headers
        seen.append(request(event_name.rpartition(".")[2], path, create_only=create_only))

    handlers = [*botocore.handlers.BUILTIN_HANDLERS, ("before-send.s3", note)]
    monkeypatch.setattr(botocore.handlers, "BUILTIN_HANDLERS", handlers)
    yield seen


@pytest.mark.slow
def test_all_that_the_roles_ask_for_at_their_work_is_granted_on_aws(
    team: Team, sent: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, orphan = f"{team.url}/asked", f"data/000001-{'0' * 16}.parquet"

    def produce() -> None:
        writer = create_dataset(url, make_plan(3))
        for shard in writer.shards_left():
            writer.commit(shard, make_shard(shard))
        writer.finalize()
        create_dataset(url, make_plan(3)).finalize()  # a second worker joins, and finds all of it done
        copy(url, f"{url}-copied")
        Store(url).put(orphan, b"of a worker that was killed")

    def read() -> None:
        dataset = open_dataset(url)
        for shard in range(dataset.num_shards):
            dataset.read_shard(shard)
        assert verify(url, full=True).findings == ()

    def clear_up() -> None:
        assert [one.deleted for one in collect(url, older_than_s=0, delete=True)] == [1]

    asked: dict[str, set[Request]] = {}
    for role, work in (("producer", produce), ("reader", read), ("collector", clear_up)):
        for name, value in team.environment(role).items():
            monkeypatch.setenv(name, value)
        sent.clear()
        work()
        asked[role] = set(sent)
        granting = json.loads(filled(role, team.bucket))
        assert [one for one in asked[role] if not allowed(granting, one)] == []

    created = {
        one.resource.rpartition("/opd/asked")[2] for one in asked["producer"] if ("s3:if-none-match", "*") in one.keys
    }
    assert {f"{place}/{record}" for place in ("", "-copied") for record in RECORDS} < created
    deleted = {one.resource.rpartition("/asked/")[2] for one in asked["collector"] if one.action == "s3:DeleteObject"}
    assert deleted - {orphan} and all(re.fullmatch(r"[0-9a-f]{32}\.clock", name) for name in deleted - {orphan})
    assert orphan in deleted


@pytest.mark.slow
def test_a_bucket_takes_its_lifecycle_and_its_policy_and_then_speaks_tls_alone(s3_server: S3Server) -> None:
    team = make_team(s3_server)
    admin = team.client("admin")
    admin.put_object(Bucket=team.bucket, Key="opd/object", Body=b"data")
    lifecycle = json.loads(filled("bucket-lifecycle", team.bucket))

    admin.put_bucket_lifecycle_configuration(Bucket=team.bucket, LifecycleConfiguration=lifecycle)
    assert len(admin.get_bucket_lifecycle_configuration(Bucket=team.bucket)["Rules"]) == 2
    admin.put_bucket_policy(Bucket=team.bucket, Policy=filled("bucket-policy", team.bucket))
    with pytest.raises(admin.exceptions.ClientError, match="AccessDenied"):  # for the test server speaks plain HTTP
        admin.get_object(Bucket=team.bucket, Key="opd/object")
