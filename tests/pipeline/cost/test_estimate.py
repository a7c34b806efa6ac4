"""What stages cost: as they were measured, scaled; or by arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.bill import money, remarks, size, table
from pipeline.cost.estimate import (
    FP32_UTILISATION,
    MATMUL_SHARE,
    Ask,
    Cost,
    amount,
    cores_a_gpu,
    estimate,
    picture_bytes,
)
from pipeline.cost.fleet import DEVICES, Fleet
from pipeline.cost.flops import clip_size, model_size
from pipeline.cost.profile import Observation, Profile, shape
from pipeline.settings import Prices

ROOT = Path(__file__).parents[3]
NANO = load_config(ROOT / "configs/nano.yaml")
PAPER = load_config(ROOT / "configs/paper.yaml")
H100S = Fleet(64, "H100")
TRAININGS = ("ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")


def measured(config: object = NANO, rows: int = 320, **stages: Observation) -> Ask:
    """An ask whose profile has seen these, each with the shape of the configuration."""
    ask = Ask(config, rows)  # type: ignore[arg-type]
    seen = {name: [replace(one, shape=shape(name, ask.recipes))] for name, one in stages.items()}
    return replace(ask, profile=Profile(seen))


def test_nothing_made_yet_is_a_guess() -> None:
    for stage in build(NANO):
        cost = estimate(stage, Ask(NANO, 320))
        assert cost.basis == "guess"
        assert 0 <= cost.seconds < 3600
    few, many = (estimate("pairs", Ask(NANO, rows)) for rows in (3200, 6400))
    assert many.seconds - many.startup == pytest.approx(2 * (few.seconds - few.startup))


def test_what_was_measured_scales_with_rows_samples_and_workers() -> None:
    ask = measured(
        pairs=Observation(100, 15.0, 20.0, 2, {}), decoder=Observation(NANO.decoder.samples / 2, 15.0, 10.0, 1, {})
    )
    assert estimate("pairs", replace(ask, rows=250)).seconds == pytest.approx(5.0 + 25.0)
    four = load_config(ROOT / "configs/nano.yaml", ["run.pairs.workers=4"])
    assert estimate("pairs", replace(ask, rows=250, config=four)).seconds == pytest.approx(5.0 + 12.5)
    cost = estimate("decoder", ask)
    assert (cost.seconds, cost.startup, cost.basis) == (pytest.approx(25.0), pytest.approx(5.0), "measured")


def test_more_workers_than_shards_are_idle() -> None:
    config = load_config(ROOT / "configs/nano.yaml", ["run.pairs.workers=100"])
    assert estimate("pairs", Ask(config, 320)).cores == 4


def test_another_model_is_a_guess_again() -> None:
    ask = measured(decoder=Observation(100, 10.0, 10.0, 1, {}), clip=Observation(100, 10.0, 10.0, 1, {}))
    wider = load_config(ROOT / "configs/nano.yaml", ["decoder.model.channels=64"])
    costs = {stage: estimate(stage, replace(ask, config=wider)) for stage in ("decoder", "clip")}
    assert (costs["decoder"].basis, costs["clip"].basis) == ("guess", "measured")


def test_an_evaluation_scales_with_the_passes_that_it_makes() -> None:
    half = Ask(load_config(ROOT / "configs/nano.yaml", ["evaluation.prior_samples=8"]), 320)
    passes = {"decoder": 1000.0, "upsampler_256": 10.0}
    operations = sum(n * model_size(NANO, name).forward for name, n in passes.items())
    ask = measured(evaluation=Observation(320, 60.0, 60.0, 1, {}, passes, {"upsampler_1024": 2 / 320}))
    assert estimate("evaluation", ask).seconds == pytest.approx(60 * amount("evaluation", ask) / operations)
    assert amount("evaluation", half) < amount("evaluation", Ask(NANO, 320))
    assert amount("evaluation", ask) < amount("evaluation", Ask(NANO, 320))  # two rows of 1024 px, not 16


# --- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_training_on_gpus_is_its_arithmetic(stage: str) -> None:
    recipe, ask = getattr(PAPER, stage), Ask(PAPER, 650_000_000, fleet=H100S)
    cost = estimate(stage, ask)
    work = recipe.samples * model_size(PAPER, stage).training
    assert cost.basis == "counted"
    assert cost.seconds - cost.startup == pytest.approx(work / (64 * DEVICES["H100"].peak * 0.3))
    assert (cost.gpus, cost.cores) == (64, 0)
    assert estimate(stage, replace(ask, rows=10)).seconds == cost.seconds  # samples count, not pairs
    half = estimate(stage, replace(ask, utilisation=0.15))
    assert half.seconds - half.startup == pytest.approx(2 * (cost.seconds - cost.startup))
    assert estimate(stage, replace(ask, fleet=Fleet(128, "H100"))).gpus == 64  # as many as lanes


def test_a_utilisation_that_was_measured_on_a_gpu_goes_before_the_assumed_one() -> None:
    one = Observation(100, 10.0, 10.0, 1, {}, device="cuda", utilisation=0.5)
    ask = replace(measured(PAPER, decoder=one), fleet=H100S)
    slow = replace(measured(PAPER, decoder=replace(one, device="cpu")), fleet=H100S)
    work = PAPER.decoder.samples * model_size(PAPER, "decoder").training
    for asked, share in ((ask, 0.5 * MATMUL_SHARE), (slow, 0.3)):
        cost = estimate("decoder", asked)
        assert cost.seconds - cost.startup == pytest.approx(work / (64 * DEVICES["H100"].peak * share))


def test_embeddings_on_gpus_wait_for_the_slower_of_encoding_and_decoding() -> None:
    ask = Ask(PAPER, 10**9, fleet=H100S)
    clip = clip_size(PAPER.clip)
    encoding = (clip.image + clip.text) / (DEVICES["H100"].fp32 * FP32_UTILISATION)
    cost = estimate("embeddings", ask)
    assert cost.seconds - cost.startup == pytest.approx(1e9 * encoding / 64, rel=0.35)  # cores are whole
    few = replace(ask, config=load_config(ROOT / "configs/paper.yaml", ["run.embeddings.decoders=4"]))
    assert cores_a_gpu(few) < 4
    faster = estimate("embeddings", few)
    assert faster.seconds - faster.startup == pytest.approx(1e9 * encoding / 64)
    assert faster.cores == 4 * 64


def test_data_stages_grow_with_pairs_and_trainings_do_not() -> None:
    small, large = ({s: estimate(s, Ask(PAPER, n, fleet=H100S)) for s in build(PAPER)} for n in (10**7, 10**9))
    for stage in ("source", "pairs", "embeddings", "curation", "index", "codec"):
        assert large[stage].seconds > 20 * small[stage].seconds, stage
        assert large[stage].disk == pytest.approx(100 * small[stage].disk), stage
    assert all(large[stage] == small[stage] for stage in TRAININGS if stage != "ar_prior")


# --- bytes and money --------------------------------------------------------------------------------------------------


def test_a_training_stores_its_model_and_the_checkpoints_that_stay() -> None:
    parameters = model_size(NANO, "decoder").parameters
    assert estimate("decoder", Ask(NANO, 320)).disk == (4 + 2 * 16) * parameters
    kept = load_config(ROOT / "configs/nano.yaml", ["run.decoder.keep_checkpoints=5"])
    assert estimate("decoder", Ask(kept, 320)).disk == (4 + 5 * 16) * parameters


def test_bytes_and_requests_that_were_seen_scale_with_rows_and_shards() -> None:
    requests = {"GET": 40, "PUT": 12, "LIST": 4, "HEAD": 0, "bytes_read": 500.0, "bytes_written": 1000.0}
    ask = measured(pairs=Observation(80, 5.0, 5.0, 1, {}, shards=4, disk=900.0, requests=requests))
    cost = estimate("pairs", replace(ask, rows=800))  # in 10 shards
    assert (cost.gets, cost.puts) == (pytest.approx(100), pytest.approx(40))
    assert (cost.read, cost.disk) == (pytest.approx(5000), pytest.approx(9000))
    assert picture_bytes(ask) == pytest.approx(900 / 80)


def test_money() -> None:
    prices = Prices("EUR", core_hour=0.5, gpu_hour=3.0, put_1000=2.0, get_1000=1.0, egress_gb=0.25)
    cost = Cost(7200.0, cores=4, gpus=2, puts=500, gets=2000, read=8e9)
    assert money(cost, prices) == pytest.approx(2 * (4 * 0.5 + 2 * 3.0) + 1.0 + 2.0 + 2.0)
    assert money(cost, Prices()) == 0.0


def test_the_table_has_money_where_there_are_prices() -> None:
    costs = {"pairs": Cost(3600.0, 60.0, "guess", cores=2, disk=2e12), "decoder": Cost(1800.0, gpus=1)}
    free = list(table(costs, Prices()))
    assert [line.split()[0] for line in free] == ["stage", "pairs", "decoder", "all"]
    assert free[1].split()[1:7] == ["1", "h", "00", "min", "1", "min"]
    assert "USD" not in free[0]
    paid = list(table(costs, Prices("EUR", core_hour=1.0, gpu_hour=2.0, storage_tb_month=20.0)))
    assert paid[0].split()[-1] == "EUR"
    assert [line.split()[-1] for line in paid[1:4]] == ["2.00", "1.00", "3.00"]
    assert paid[4] == "storage: 40.00 EUR a month"


def test_sizes() -> None:
    assert [size(v) for v in (0, 999, 1000, 123_456, 2.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "2.5 GB",
        "3.0 PB",
    ]


def test_everything_assumed_is_said() -> None:
    ask = Ask(PAPER, 650_000_000, fleet=Fleet(8, "A100"))
    said = "\n".join(remarks({stage: estimate(stage, ask) for stage in build(PAPER)}, ask))
    assert "decoding cores for each encoder" in said
    assert "ar_prior: ahead reads" in said
    assert "set run.decoder.sharded" in said
    assert "one A100 reaches 30% of 312 TFLOP/s" in said
    assert "20 ms of a core to fetch a picture" in said
    for stage in build(PAPER):
        assert stage in said
    ask = measured(pairs=Observation(100, 15.0, 20.0, 2, {}))
    assert "to fetch a picture" not in "\n".join(remarks({"pairs": estimate("pairs", ask)}, ask))
