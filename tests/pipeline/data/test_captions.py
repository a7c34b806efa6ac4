"""Lists as captioners and caption data sets write them: what is left out is known before CLIP learns from it."""

from pathlib import Path

from pipeline.data.source.rows import read_captions
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import read_shards
from pipeline.ledger import Ledger
from pipeline.training.feed.tables import Tables
from tests.pipeline.data.bench import Bench, picture, write_list


def test_clip_learns_from_none_of_the_long_captions_and_they_are_counted_in_the_list(tmp_path: Path) -> None:
    """Forty images, half of them with the captions of a captioner that describes everything."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.png").write_bytes(picture(i))
        (folder / f"{i:02d}.txt").write_text(f"thing {i}" if i % 2 else f"The image shows thing {i}. " * 60)
    bench = Bench(tmp_path / "store", [str(folder)], source={"validation": 0.0, "test": 0.0})
    assert scan(bench.config.source, bench.store, write=False).captions_above(bench.config.curation.max_caption) == 20
    bench.make("source", "captions", "pairs", "filter")
    assert bench.made["filter"].ledger == Ledger(kept=20, rejected={"caption_too_long": 20})
    learned = Tables(bench.store, bench.made, ("tokens",), "train", 0).first(40)
    assert sorted(row.captions[0] for row in learned if row.captions) == sorted(f"thing {i}" for i in range(1, 40, 2))


def test_a_list_with_a_row_for_each_caption_loses_none(tmp_path: Path) -> None:
    """A hundred rows of twenty images, as COCO and Flickr30k are exported."""
    rows = []
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        rows += [(f"{i}.png", f"thing {i} as person {person} sees it") for person in range(5)]
    bench = Bench(tmp_path / "store", [write_list(tmp_path / "list.csv", rows)])
    bench.make("source", "captions", "pairs", "filter")
    assert bench.made["filter"].ledger == Ledger(kept=20)
    captions = [read_captions(bench.store, shard) for shard in read_shards(bench.store, bench.made["captions"])]
    said = [text for shard in captions for texts in shard.values() for text in texts]
    assert said == [caption for _, caption in rows]
