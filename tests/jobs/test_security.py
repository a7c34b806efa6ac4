"""The policies of docs/security.md, on a server that reads them as they stand there; and where secrets are not."""

import json
import os
import re
import secrets as random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.graph.records import RunRecord
from pipeline.release.pointer import read_releases, release_path
from pipeline.store import Store, check_conditions, open_store
from pipeline.store import s3 as store_s3
from pipeline.store.records import peek_record
from pipeline.upkeep.collect import collect
from pipeline.upkeep.repair import quarantine
from tests.chain import MICRO, ROOT, Finished, done, here, keys, refused, write_config, write_list
from tests.pipeline.data.bench import picture
from tests.seaweed import BUCKET, Identity, Server, serving
from tests.secrets import leaks, objects

PREFIX = "team/drawings"
PAGE = (ROOT / "docs/security.md").read_text().replace("BUCKET", BUCKET).replace("PREFIX", PREFIX)
READER, WRITER, RELEASER = (
    json.loads(text) for text in re.findall(r"^    \{.*?^    \}", PAGE, re.DOTALL | re.MULTILINE)
)
SECRETS = {name: f"{name}-{random.token_hex(12)}" for name in ("reader", "writer", "releaser", "header", "token")}
IDENTITIES = {
    "reader": Identity(SECRETS["reader"], (READER,)),
    "writer": Identity(SECRETS["writer"], (READER, WRITER)),
    "releaser": Identity(SECRETS["releaser"], (READER, RELEASER)),
}


KEEPING = """
import sys
from jobs.cli import main
from pipeline.graph.local_ray import PrivateFolder
PrivateFolder._remove = lambda folder: None
sys.exit(main())
"""


class Team:
    """A chain up to 64 px on S3 that the writer has made, with a private source and workers of Ray; others beside."""

    def __init__(self, server: Server, folder: Path, pictures: str):
        self.server, self.folder = server, folder
        self.url = f"s3://{BUCKET}/{PREFIX}"
        self.ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets in it must stay short
        private = {"http://drawings.test": "IMAGES_HEADERS"}
        run = MICRO["run"] | {"decoder": {"workers": 1}, "pairs": {"workers": 1, "headers": private}}
        lists = [write_list(folder / "list.csv", 30, 60), _foreign(folder / "foreign")]
        small = {"size": 64, "prior_steps": 2, "decoder_steps": 2}
        bundle = {"models": ["diffusion_prior", "decoder"], "sampling": small}
        self.config = write_config(folder, self.url, pictures, lists, run=run, bundle=bundle)
        self.made = self._run_and_keep_logs()

    def _run_and_keep_logs(self) -> Finished:
        """Run everything as the writer; Ray's logs, which go with their process, stay to be searched."""
        command = [sys.executable, "-c", KEEPING, "run", str(self.config)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.environment("writer")
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    def environment(self, who: str) -> dict[str, str]:
        return self.server.environment_of(who, SECRETS[who]) | {
            "RAY_TMPDIR": str(self.ray),
            "RAY_AUTH_TOKEN": SECRETS["token"],
            "IMAGES_HEADERS": f"X-Key: {SECRETS['header']}",
        }

    def unclip(self, who: str, *words: object) -> Finished:
        """Run a command as one of them."""
        return here(*words, env=self.environment(who))

    def refused(self, who: str, *words: object) -> str:
        """Run a command that must end with one line, which is returned, and leave the store as it was."""
        before = self.paths()
        process = self.unclip(who, *words)
        assert process.returncode == 2, process.stdout + process.stderr
        (line,) = process.stderr.splitlines()
        assert self.paths() == before
        return line

    def paths(self) -> list[str]:
        return [entry.path for entry in self.store("tester").list("")]

    def store(self, who: str) -> Store:
        """The store, as one of them; the server's own identity is the only one that is not theirs."""
        other = self.server.environment_of(who, SECRETS[who]) if who in SECRETS else self.server.environment
        with pytest.MonkeyPatch.context() as patch:
            for name, value in other.items():
                patch.setenv(name, value)
            store = open_store(self.url)
            store._client  # type: ignore[attr-defined] # noqa: B018 # is made now, with these
        return store


def _foreign(folder: Path) -> Path:
    """A folder of a stranger's, whose captions and images are links to what holds secrets."""
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "0.txt").write_text("an honest caption")
    (folder / "1.txt").symlink_to("/proc/self/environ")
    (folder.parent / "credentials").write_text("\n".join(SECRETS.values()))
    (folder / "2.txt").symlink_to("../credentials")
    (folder / "environ.png").symlink_to("/proc/self/environ")
    return folder


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with serving(tmp_path_factory.mktemp("identities"), IDENTITIES) as server:
        team = Team(server, folder, pictures)
        try:
            yield team
        finally:
            shutil.rmtree(team.ray, ignore_errors=True)


def test_a_writer_makes_everything(team: Team) -> None:
    assert "evaluation done" in done(team.made)
    assert {"bundle", "evaluation", "samples"} <= keys(team.store("reader")).keys()


def test_no_secret_is_in_the_store_the_output_or_a_log(team: Team) -> None:
    logs = [file for file in team.ray.rglob("*") if "logs" in file.parts and file.is_file()]
    assert any(file.name.startswith("worker") and file.stat().st_size for file in logs)
    said = [("stdout", team.made.stdout), ("stderr", team.made.stderr)]
    places = [*objects(team.store("reader")), team.folder / "out", team.ray, team.config, *said]
    assert leaks(places, SECRETS) == []


def test_a_reader_reads(team: Team, tmp_path: Path) -> None:
    assert "stale" not in done(team.unclip("reader", "plan", team.config))
    (bundle,) = keys(team.store("reader"))["bundle"]
    assert re.search(r"(\d+) of \1 stages made", done(team.unclip("reader", "show", team.config)))
    assert f"bundle {bundle}" in done(team.unclip("reader", "show", team.config, bundle[:12]))
    page = tmp_path / "report.html"
    done(team.unclip("reader", "report", team.config, "--output", page))
    assert "samples" in page.read_text()
    shutil.copy(team.folder / "out/bundle.json", tmp_path)
    picture = done(team.unclip("reader", "sample", "a red heart", "--from", tmp_path)).strip()
    with Image.open(picture) as alone, Image.open(team.folder / "out/samples/0000.png") as made:
        assert list(alone.get_flattened_data()) == list(made.get_flattened_data())
    assert "nothing to do" in done(team.unclip("reader", "run", team.config))


def test_a_reader_cannot_write_and_is_told_so_in_one_line(team: Team) -> None:
    line = team.refused("reader", "run", team.config, "decoder.model.dropout=0.1")
    assert line.startswith(
        f"error: store {team.url}: AccessDenied: these credentials lack s3:PutObject for locks/probe-"
    )
    assert "docs/security.md" in line
    store = team.store("reader")
    (entry, *_) = store.list("artifacts/")
    for act in (
        lambda: store.create("blobs/aa/x", b"1"),
        lambda: store.swap(entry.path, entry.version, b"1"),
        lambda: store.create(entry.path, b"1"),
    ):
        with pytest.raises(UserError, match=r"these credentials lack s3:PutObject for (blobs/aa/x|artifacts/)"):
            act()
    with pytest.raises(UserError, match=r"lack s3:DeleteObject for .*artifacts/"):
        store.delete([entry.path])


def test_a_writer_cannot_move_a_release(team: Team) -> None:
    line = team.refused("writer", "release", "promote", team.config)
    assert f"AccessDenied: these credentials lack s3:PutObject for {release_path('micro')}" in line
    assert read_releases(team.store("reader"), "micro").current is None


def test_a_releaser_can_and_a_writer_cannot_delete_it(team: Team) -> None:
    assert "is the release" in done(team.unclip("releaser", "release", "promote", team.config))
    with pytest.raises(UserError, match=r"lack s3:DeleteObject for .*releases/micro\.json"):
        team.store("writer").delete([release_path("micro")])
    with pytest.raises(UserError, match="lack s3:PutObject for blobs/aa/x"):
        team.store("releaser").create("blobs/aa/x", b"1")
    assert read_releases(team.store("reader"), "micro").current is not None
    line = team.refused("writer", "release", "rollback", team.config)
    assert "no release exists before this one" in line


def test_a_writer_collects_garbage_and_uploads_in_parts(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = team.store("writer")
    check_conditions(store)
    monkeypatch.setattr(store_s3, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom(6 << 20))
    assert store.create("blobs/aa/large", tmp_path / "large")
    abandoned = store._client.create_multipart_upload(Bucket=BUCKET, Key=f"{PREFIX}/blobs/aa/other")  # type: ignore[attr-defined]
    assert abandoned["UploadId"]
    found = collect(store, keep_s=86_400, grace_s=0, now=time.time() + 60, delete=True)
    assert found.deleted["blobs"].objects >= 1
    assert found.abandoned == 1
    assert "blobs/aa/large" not in team.paths()


def test_a_writer_quarantines_damage_and_a_reader_is_told_what_is_lacking(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = team.store("writer"), team.store("reader")
    monkeypatch.setenv("AWS_ENDPOINT_URL", team.server.endpoint)  # for the second look's own connections
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    path = "runs/micro/19700101T000000.000000-damaged.json"
    writer.create(path, b"{")
    assert peek_record(reader, path, RunRecord) is None
    with pytest.raises(UserError, match=rf"lack s3:PutObject for damaged/{path}"):
        quarantine(reader, [path])
    assert path in team.paths()
    quarantine(writer, [path])
    assert path not in team.paths()
    (aside,) = (entry.path for entry in reader.list("damaged/"))
    assert reader.read(aside) == b"{"
    writer.delete([aside])


def test_others_of_the_bucket_are_out_of_reach(team: Team) -> None:
    team.store("tester")._client.put_object(Bucket=BUCKET, Key="others/x", Body=b"1")  # type: ignore[attr-defined]
    asked = [
        ("get_object", {"Key": "others/x"}),
        ("put_object", {"Key": "others/y", "Body": b"1"}),
        ("put_object", {"Key": f"{PREFIX}/y", "Body": b"1"}),
        ("delete_object", {"Key": "others/x"}),
        ("put_bucket_policy", {"Policy": json.dumps(READER)}),
    ]
    for who in IDENTITIES:
        client = team.store(who)._client  # type: ignore[attr-defined]
        for operation, words in asked:
            with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
                getattr(client, operation)(Bucket=BUCKET, **words)


def test_keys_in_the_address_of_a_store_are_refused_and_not_repeated(
    team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"s3://writer:{SECRETS['writer']}@{BUCKET}/{PREFIX}"
    process = refused("plan", team.config, f"store={address}", says="its URL contains credentials")
    assert SECRETS["writer"] not in process.stdout + process.stderr + caplog.text
