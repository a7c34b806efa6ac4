"""What decoding the images of a whole shard may cost."""

from pathlib import Path

import pytest

from pipeline.data.pairs import budget, packer
from pipeline.data.pairs.budget import FAIR, ORIGIN_S, SHARD_S, ShardDecoder
from pipeline.data.pairs.decoding import LONGEST, Decoding, ImageDecoder
from pipeline.data.pairs.image import MAX_PIXELS, StoredImage, Storing, prepare
from pipeline.data.source.retry import FINAL, gather
from pipeline.data.source.stage import scan
from tests.pipeline.data.bench import Bench, picture, write_list

STORING = Storing(64)
PIXELS = 1_000_000
ROWS = 1000


class Costly(ImageDecoder):
    """An image that is not honest takes all the time that it may take, and is as large as may be: no test can wait for
    real ones."""

    def __init__(self, pixels: int, *honest: bytes) -> None:
        super().__init__()
        self.pixels, self.honest, self.total, self.asked = pixels, honest, 0.0, 0

    def prepare(
        self, data: bytes, max_pixels: int, storing: Storing, work: Decoding | None = None, opacity: bool = False
    ) -> StoredImage | str:
        self.asked += 1
        if data in self.honest:
            return prepare(data, max_pixels, storing)
        work.pixels, work.seconds = self.pixels, work.limit.seconds(self.pixels)
        self.total += work.seconds
        return "decode_timeout"

    def start(self) -> None:
        pass


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
    assert found == sorted(found, key=str, reverse=True)


def test_many_shards_take_no_more_of_one_host_than_one() -> None:
    decoder, overdrawn = Costly(PIXELS), dict[str, float]()
    for i in range(ROWS):
        ShardDecoder(decoder, overdrawn).prepare("a.example", b"%d" % i, MAX_PIXELS, STORING)
    assert decoder.total <= ORIGIN_S + LONGEST.seconds(PIXELS) + ROWS * FAIR.seconds(PIXELS)
    before = decoder.total
    assert ShardDecoder(decoder, overdrawn).prepare("b.example", b"", MAX_PIXELS, STORING) == "decode_timeout"
    assert decoder.total - before == LONGEST.seconds(PIXELS)


def test_equal_bytes_are_decoded_once_as_long_as_they_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(i) for i in range(9)]
    decoder = Costly(PIXELS, *images)
    shard = ShardDecoder(decoder, {})
    found = [shard.prepare(f"{i}.example", images[0] if i % 2 else b"costly", PIXELS, STORING) for i in range(60)]
    assert [one if isinstance(one, str) else None for one in found] == ["decode_timeout", None] * 30
    assert decoder.asked == 2
    monkeypatch.setattr(budget, "REMEMBERED_BYTES", 3 * len(found[1].data))
    first = [shard.prepare("", image, PIXELS, STORING) for image in images]
    assert shard._size <= budget.REMEMBERED_BYTES
    assert [shard.prepare("", image, PIXELS, STORING) for image in images] == first
    assert decoder.asked > 2 + 9


def test_rows_whose_budget_is_spent_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In five shards of one worker."""
    bodies = {name: name.encode() for name in ("costly/0", "costly/1", "costly/3")}
    bodies |= {"costly/2": picture(2), "other/4": picture(4)}
    for name, data in bodies.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = write_list(tmp_path / "list.csv", [(f"file://{tmp_path}/{name}", "a picture") for name in sorted(bodies)])
    decoder = Costly(MAX_PIXELS, picture(2), picture(4))
    monkeypatch.setattr(packer, "shared_decoder", lambda: decoder)
    bench = Bench(tmp_path / "store", [source], source={"paths": [source], "shard_rows": 1})
    bench.make("source", "pairs")
    reasons = [row["reason"] for row in bench.rows("pairs")]
    assert reasons == ["decode_timeout", "budget_spent", None, "budget_spent", None]
    assert bench.made["pairs"].ledger.rejected == {"decode_timeout": 1, "budget_spent": 2}
    # Other images spent it, so another try may end otherwise.
    shards = scan(bench.config.source, bench.store, write=False).shards
    assert gather(bench.store, shards, bench.made["pairs"], frozenset({"budget_spent"}) - FINAL, [])[1] == 2
