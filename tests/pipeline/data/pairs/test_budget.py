"""What decoding the images of a whole shard may cost."""

from contextlib import closing
from pathlib import Path

import pytest

from pipeline.data.pairs import budget, packer
from pipeline.data.pairs.budget import FAIR, ORIGIN_S, SHARD_S, ShardDecoder
from pipeline.data.pairs.decoding import LONGEST, Decoding, ImageDecoder, TimeLimit
from pipeline.data.pairs.image import MAX_PIXELS, StoredImage, Storing
from pipeline.data.source.retry import FINAL, gather
from pipeline.data.source.stage import scan
from tests.pipeline.data.bench import Bench, Page, Pages, picture, serving, write_list
from tests.pipeline.data.pairs.test_decoding import with_word, wrapped

STORING = Storing(64)
PIXELS = 1_000_000
ROWS = 1000


class Costly(ImageDecoder):
    """Every image takes all the time that it may take, and is as large as may be: no test can wait for real ones."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels, self.total, self.asked = pixels, 0.0, 0

    def prepare(
        self, data: bytes, max_pixels: int, storing: Storing, work: Decoding | None = None
    ) -> StoredImage | str:
        work.pixels, work.seconds = self.pixels, work.limit.seconds(self.pixels)
        self.total += work.seconds
        self.asked += 1
        return "decode_timeout"


@pytest.mark.parametrize("hosts", [1, ROWS])
@pytest.mark.parametrize(("pixels", "hours"), [(PIXELS, 0.5), (MAX_PIXELS, 5.8)])
def test_a_thousand_rows_take_no_more_than_the_bound(hosts: int, pixels: int, hours: float) -> None:
    """Without it they took ROWS * LONGEST, 8.6 and 26 hours, whatever their hosts are called."""
    decoder = Costly(pixels)
    shard = ShardDecoder(decoder, {})
    found = [shard.prepare(f"{i % hosts}.example", b"%d" % i, MAX_PIXELS, STORING) for i in range(ROWS)]
    bound = SHARD_S + LONGEST.seconds(pixels) + ROWS * FAIR.seconds(pixels)
    assert decoder.asked == ROWS
    assert decoder.total <= bound <= 3600 * hours
    if hosts == 1:
        assert decoder.total <= ORIGIN_S + LONGEST.seconds(pixels) + ROWS * FAIR.seconds(pixels)
    assert set(found) == {"decode_timeout", "budget_spent"}
    assert found == sorted(found, reverse=True)


def test_many_shards_take_no_more_of_one_host_than_one() -> None:
    decoder, overdrawn = Costly(PIXELS), dict[str, float]()
    for i in range(ROWS):
        ShardDecoder(decoder, overdrawn).prepare("a.example", b"%d" % i, MAX_PIXELS, STORING)
    assert decoder.total <= ORIGIN_S + LONGEST.seconds(PIXELS) + ROWS * FAIR.seconds(PIXELS)
    before = decoder.total
    assert ShardDecoder(decoder, overdrawn).prepare("b.example", b"", MAX_PIXELS, STORING) == "decode_timeout"
    assert decoder.total - before == LONGEST.seconds(PIXELS)


def test_an_honest_image_of_any_host_is_decoded_when_the_budget_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ones: a child that spins until its limit of processor time ends it."""
    monkeypatch.setattr(budget, "LONGEST", TimeLimit(2.0, 1e-6))  # the system rounds up to seconds: 2 to 3
    monkeypatch.setattr(budget, "FAIR", TimeLimit(0.2, 1e-7))
    monkeypatch.setattr(budget, "SHARD_S", 3.2)
    with closing(wrapped(tmp_path)) as child:
        shard = ShardDecoder(child, {})

        def end(host: str, data: bytes) -> str:
            found = shard.prepare(host, data, PIXELS, STORING)
            return found if isinstance(found, str) else "kept"

        assert end("a", with_word("SPIN 0")) == "decode_timeout"
        assert end("b", with_word("SPIN 1")) == "decode_timeout"
        assert end("c", with_word("SPIN 2")) == "budget_spent"
        assert [end(host, picture(i)) for i, host in enumerate("abc")] == ["kept"] * 3


class Counting(ImageDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def prepare(
        self, data: bytes, max_pixels: int, storing: Storing, work: Decoding | None = None
    ) -> StoredImage | str:
        self.asked += 1
        return super().prepare(data, max_pixels, storing, work)


def test_equal_bytes_under_many_urls_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {f"/?{i}": Page(picture(0) if i % 2 else picture(1)[:-300]) for i in range(60)}
    with serving(Pages(pages)) as address, closing(Counting()) as decoder:
        monkeypatch.setattr(packer, "shared_decoder", lambda: decoder)
        source = write_list(tmp_path / "list.csv", [(f"http://{address}{path}", "a picture") for path in pages])
        allow = {"allow": ["127.0.0.0/8"]}
        bench = Bench(tmp_path / "store", [source], source={"paths": [source], "shard_rows": 60}, pairs=allow)
        bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == ["truncated", None] * 30
    assert len({row["sha256"] for row in bench.rows("pairs") if row["status"] == "kept"}) == 1
    assert decoder.asked == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Counting()) as decoder:
        shard = ShardDecoder(decoder, {})
        monkeypatch.setattr(budget, "REMEMBERED_BYTES", 3 * len(shard.prepare("", picture(0), PIXELS, STORING).data))
        first = [shard.prepare("", picture(i), PIXELS, STORING) for i in range(9)]
        assert shard._size <= budget.REMEMBERED_BYTES
        assert [shard.prepare("", picture(i), PIXELS, STORING) for i in range(9)] == first
        assert decoder.asked > 9


def test_rows_whose_budget_is_spent_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In five shards of one worker."""
    monkeypatch.setattr(budget, "LONGEST", TimeLimit(1.0, 1e-6))
    monkeypatch.setattr(budget, "FAIR", TimeLimit(0.2, 1e-7))
    monkeypatch.setattr(budget, "ORIGIN_S", 0.5)
    bodies = {
        "costly/0": with_word("SPIN 0"),
        "costly/1": with_word("SPIN 1"),
        "costly/2": picture(2),
        "costly/3": with_word("SPIN 1"),
        "other/4": picture(4),
    }
    for name, data in bodies.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = write_list(tmp_path / "list.csv", [(f"file://{tmp_path}/{name}", "a picture") for name in bodies])
    with closing(wrapped(tmp_path)) as child:
        monkeypatch.setattr(packer, "shared_decoder", lambda: child)
        bench = Bench(tmp_path / "store", [source], source={"paths": [source], "shard_rows": 1})
        bench.make("source", "pairs")
    reasons = [row["reason"] for row in bench.rows("pairs")]
    assert reasons == ["decode_timeout", "budget_spent", None, "budget_spent", None]
    assert bench.made["pairs"].ledger.rejected == {"decode_timeout": 1, "budget_spent": 2}
    # Other images spent it, so another try may end otherwise.
    shards = scan(bench.config.source, bench.store, write=False).shards
    assert gather(bench.store, shards, bench.made["pairs"], frozenset({"budget_spent"}) - FINAL, [])[1] == 2
