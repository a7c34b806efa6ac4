"""Lists as captioners and caption data sets write them: no caption is lost in silence."""

from pathlib import Path

from pipeline.data.source.rows import read_captions
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import read_shards
from pipeline.ledger import Ledger
from tests.pipeline.data.bench import Bench, picture, write_list


def test_captions_beyond_the_limit_are_told_of_before_anything_is_made(tmp_path: Path) -> None:
    """Forty images, half of them with the captions of a captioner that describes everything."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.png").write_bytes(picture(i))
        (folder / f"{i:02d}.txt").write_text(f"thing {i}" if i % 2 else f"The image shows thing {i}. " * 60)
    bench = Bench(tmp_path / "store", [str(folder)])
    found, curation = scan(bench.config.source, bench.store, write=False), bench.graph["curation"]
    assert curation.warn is not None
    (said,) = curation.warn(curation, found)
    assert said.startswith("20 of 40 pairs have a first caption of more than 1,000 characters")


def test_a_list_with_a_row_for_each_caption_loses_none(tmp_path: Path) -> None:
    """A hundred rows of twenty images, as COCO and Flickr30k are exported."""
    rows = []
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        rows += [(f"{i}.png", f"thing {i} as person {person} sees it") for person in range(5)]
    bench = Bench(tmp_path / "store", [write_list(tmp_path / "list.csv", rows)])
    bench.make("source", "captions", "pairs")
    assert bench.made["pairs"].ledger == Ledger(kept=20)
    captions = [read_captions(bench.store, shard) for shard in read_shards(bench.store, bench.made["captions"])]
    assert [text for shard in captions for texts in shard.values() for text in texts] == [text for _, text in rows]
