"""What stages cost: as they were measured, scaled; or by arithmetic."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulation import Simulation
from models.sampling_config import MODELS
from pipeline.build import build
from pipeline.config import Config, load_config
from pipeline.cost import limits
from pipeline.cost.devices import DEVICES, UNKNOWN, Device, Fleet, parse_fleet
from pipeline.cost.estimate import (
    COMPILE_SECONDS,
    FP32_UTILISATION,
    MATMUL_SHARE,
    PART_SECONDS,
    Cost,
    PlanInput,
    amount,
    clip_size,
    cores_a_gpu,
    estimate,
    model_size,
    row_seconds,
    save,
    step_seconds,
)
from pipeline.cost.limits import lacking
from pipeline.cost.observed import Observation, pace, shape
from pipeline.cost.schedule import elapsed
from pipeline.cost.table import MONTH_S, cost_table, elapsed_between, remarks
from pipeline.data.neighbours.work import PAIR_SECONDS, ROW_SECONDS
from pipeline.errors import UserError
from pipeline.graph.resources import DECODERS, Machine
from pipeline.progress import duration
from pipeline.settings import Prices
from pipeline.store import open_store
from tests.pipeline.cost.asks import NANO, PAPER, ROOT, again, asked, paper

H100S = Fleet(64, "H100")


def measured(config: Config = NANO, rows: int = 320, **stages: Observation) -> PlanInput:
    """Returns an ask that has seen these, each with the shape of the configuration."""
    ask = asked(config, rows)
    seen = {name: [replace(one, shape=shape(name, ask.graph, ask.recipes))] for name, one in stages.items()}
    return replace(ask, seen=seen)


def test_nothing_made_yet_is_a_guess() -> None:
    for stage in build(NANO):
        cost = estimate(stage, asked())
        assert cost.basis == "guess"
        assert 0 <= cost.seconds < 3600
    few, many = (estimate("pairs", asked(NANO, rows)) for rows in (3200, 6400))
    assert many.seconds - many.startup == pytest.approx(2 * (few.seconds - few.startup))


def test_a_plan_for_another_machine_counts_the_cores_of_that_machine() -> None:
    for stage in ("samples", "evaluation", "decoder"):  # drawn, measured and trained in one process
        one, many = (estimate(stage, replace(asked(), machine=Machine(cpus))) for cpus in (1, 96))
        assert (one.cores, many.cores) == (1, 96)
        assert one.seconds - one.startup == pytest.approx(96 * (many.seconds - many.startup))


def test_what_was_measured_scales_with_rows_samples_and_workers() -> None:
    ask = measured(
        pairs=Observation(100, 15.0, 20.0, 2, {}, disk=900.0),
        decoder=Observation(NANO.decoder.samples / 2, 15.0, 10.0, 1, {}),
    )
    pairs = estimate("pairs", replace(ask, rows=250))
    assert (pairs.seconds, pairs.disk) == (pytest.approx(5.0 + 25.0), pytest.approx(2250))
    assert list(remarks({"pairs": pairs}, ask)) == ["measured and scaled: pairs"]
    four = load_config(ROOT / "configs/nano.yaml", ["run.pairs.workers=4"])
    assert estimate("pairs", replace(again(ask, four), rows=250)).seconds == pytest.approx(5.0 + 12.5)
    cost = estimate("decoder", ask)
    assert (cost.seconds, cost.startup, cost.basis) == (pytest.approx(25.0), pytest.approx(5.0), "measured")


def test_repeated_measurements_say_between_what_a_time_lies() -> None:
    """Two rounds of 100 and 300 rows, in which a row takes 0.1 to 0.2 s; a stage measured once says nothing."""
    ask = measured(pairs=Observation(100, 10.0, 10.0, 1, {}), curation=Observation(100, 1.0, 1.0, 1, {}))
    (one,) = ask.seen["pairs"]
    rounds = [
        replace(one, amount=n, seconds=s, work=s) for n, s in ((100, 10.0), (300, 50.0), (100, 20.0), (300, 40.0))
    ]
    config = load_config(ROOT / "configs/nano.yaml", ["run.pairs.workers=1", "run.curation.workers=1"])
    ask = replace(again(ask, config), rows=1000, seen=ask.seen | {"pairs": rounds})
    pairs, curation = estimate("pairs", ask), estimate("curation", ask)
    lines = sorted(pace([(a.amount, a), (b.amount, b)], 1000, 1)[1] for a in rounds[::2] for b in rounds[1::2])
    assert lines[0] < lines[-1] / 1.3
    assert pairs.between == (pytest.approx(lines[0]), pytest.approx(lines[-1]))
    assert pairs.seconds == pytest.approx((lines[1] + lines[2]) / 2)
    assert curation.between is None
    costs = {"pairs": pairs, "curation": curation}
    between = elapsed_between(costs, ask)
    assert between == (pytest.approx(lines[0] + curation.seconds), pytest.approx(lines[-1] + curation.seconds))
    head, *rows, whole = cost_table(costs, elapsed(costs, ask), Prices(), between)
    assert head.endswith("  least to most")
    assert [row.endswith(f" {duration(lines[0])} to {duration(lines[-1])}") for row in rows] == [True, False]
    assert whole.endswith(f" {duration(between[0])} to {duration(between[1])}")
    alone = {"curation": curation}
    assert elapsed_between(alone, ask) is None
    assert "least to most" not in next(cost_table(alone, 1.0, Prices(), None))


def test_another_model_is_a_guess_again() -> None:
    ask = measured(decoder=Observation(100, 10.0, 10.0, 1, {}), clip=Observation(100, 10.0, 10.0, 1, {}))
    wider = load_config(ROOT / "configs/nano.yaml", ["decoder.model.channels=64"])
    costs = {stage: estimate(stage, again(ask, wider)) for stage in ("decoder", "clip")}
    assert (costs["decoder"].basis, costs["clip"].basis) == ("guess", "measured")


def test_an_evaluation_scales_with_the_passes_that_it_makes() -> None:
    half = asked(load_config(ROOT / "configs/nano.yaml", ["evaluation.samples=2"]))
    passes = {"decoder": 1000.0, "upsampler_256": 10.0}
    operations = sum(n * model_size(NANO, name).forward for name, n in passes.items())
    ask = measured(evaluation=Observation(320, 60.0, 60.0, 1, {}, passes))
    assert estimate("evaluation", ask).seconds == pytest.approx(60 * amount("evaluation", ask) / operations)
    assert amount("evaluation", half) < amount("evaluation", asked())
    assert amount("evaluation", replace(ask, held_out=0.03)) < amount("evaluation", ask)  # 10 rows, not 32


# --- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ar_prior", "upsampler_1024"])
def test_a_training_on_gpus_is_its_arithmetic(stage: str) -> None:
    recipe, ask = getattr(PAPER, stage), asked(PAPER, 650_000_000, H100S)
    cost = estimate(stage, ask)
    counted = model_size(PAPER, stage)
    work = recipe.samples * counted.training
    assert cost.basis == "counted"
    size, every = save(stage, ask, 64)
    saves = 1 + size / 20e9 / every  # a GPU copies its state, as often as the interval says
    assert cost.seconds - cost.startup == pytest.approx(saves * work / (64 * DEVICES["H100"].peak * 0.3))
    compiling = counted.layers * COMPILE_SECONDS
    assert cost.startup == pytest.approx(60 + size / 1e9 + compiling)  # the last checkpoint is waited for
    eager = estimate(stage, again(ask, paper(f"run.{stage}.compile=false")))
    assert cost.seconds - eager.seconds == pytest.approx(compiling)
    assert (cost.gpus, cost.cores) == (64, 0)
    assert estimate(stage, replace(ask, rows=10)).seconds == cost.seconds  # samples count, not pairs
    half = estimate(stage, replace(ask, utilisation=0.15))
    assert half.seconds - half.startup == pytest.approx(2 * (cost.seconds - cost.startup))
    assert estimate(stage, replace(ask, fleet=Fleet(2048, "H100"))).gpus == min(2048, recipe.batch)  # a row for each


def test_large_checkpoints_are_written_less_often_and_sharded_ones_by_all() -> None:
    size, every = save("decoder", asked(paper("run.decoder.sharded=false")), 64)
    assert size == 16 * model_size(PAPER, "decoder").parameters
    assert every == pytest.approx(30 * size / 1e9)
    assert every > 60
    assert save("decoder", asked(NANO), 1)[1] == 60
    sharded = paper("run.decoder.sharded=true", "run.decoder.workers=64")
    size, every = size / 8, 30 * size / 8 / 1e9  # of 64 workers those of the first node save, which hold one copy
    assert save("decoder", asked(sharded, fleet=H100S), 64) == (size, every)
    assert save("decoder", asked(sharded, fleet=Fleet(64, "RTX 3060")), 64) == (size / 8, 60)  # over all nodes


def test_a_utilisation_that_was_measured_on_a_gpu_goes_before_the_assumed_one() -> None:
    one = Observation(100, 10.0, 10.0, 1, {}, device="cuda", utilisation=0.5)
    ask = replace(measured(PAPER, decoder=one), fleet=H100S)
    slow = replace(measured(PAPER, decoder=replace(one, device="cpu")), fleet=H100S)
    work = PAPER.decoder.samples * model_size(PAPER, "decoder").training
    for one_ask, share in ((ask, 0.5 * MATMUL_SHARE), (slow, 0.3)):
        cost = estimate("decoder", one_ask)
        assert cost.seconds - cost.startup == pytest.approx(work / (64 * DEVICES["H100"].peak * share), rel=0.01)


def test_what_a_gpu_took_says_nothing_of_a_machine_without_one() -> None:
    """Else days on a CPU would be planned as minutes on a GPU that is not there, and not be refused."""
    one = Observation(100, 10.0, 10.0, 1, {}, device="cuda")
    ask = measured(decoder=replace(one, device="cpu"))
    bases = [estimate("decoder", replace(ask, machine=Machine(8, gpus))).basis for gpus in (0, 1)]
    assert bases == ["measured", "counted"]  # nor the other way round
    ask = measured(decoder=one, embeddings=one, samples=replace(one, passes={"decoder": 250.0}))
    for stage in ("decoder", "embeddings", "samples"):
        assert estimate(stage, ask).basis == "measured"  # of a cluster that was not looked at
        here = estimate(stage, replace(ask, looked=True))
        assert (here.basis, here.gpus) == ("guess", 0)


def test_embeddings_on_gpus_wait_for_the_slower_of_encoding_and_decoding() -> None:
    ask = asked(PAPER, 10**9, H100S)
    clip = clip_size(PAPER.clip)
    encoding = (clip.image + clip.text) / (DEVICES["H100"].peak * ask.utilisation)
    cost = estimate("embeddings", ask)
    assert cost.seconds - cost.startup == pytest.approx(1e9 * encoding / 64, rel=0.35)  # cores are whole
    few = again(ask, paper("run.embeddings.decoders=12"))
    assert cores_a_gpu(few) < 12
    assert "Ray's driver" not in "\n".join(remarks({"embeddings": cost}, ask))
    faster = estimate("embeddings", few)
    assert faster.seconds - faster.startup == pytest.approx(1e9 * encoding / 64)
    assert faster.cores == 12 * 64
    exact = estimate("embeddings", again(ask, paper("embeddings.precision=fp32")))
    share = DEVICES["H100"].peak * ask.utilisation / (DEVICES["H100"].fp32 * FP32_UTILISATION)
    assert exact.seconds - exact.startup == pytest.approx(1e9 * encoding * share / 64, rel=0.01)


def test_ray_s_driver_bounds_the_embeddings_of_many_gpus_and_small_shards() -> None:
    ask = asked(paper("source.shard_rows=100"), 10**9, H100S)
    cost = estimate("embeddings", ask)
    assert cost.seconds - cost.startup == pytest.approx(1e9 * PART_SECONDS / 100)
    (said,) = [line for line in remarks({"embeddings": cost}, ask) if line.startswith("embeddings: ")]
    assert re.search(r"; Ray's driver hands on 6,250 images/s: \d GPUs would be as fast$", said)


def test_what_two_gpus_took_is_no_faster_on_64_than_the_hosts_are() -> None:
    """Ray's driver hands on parts to all encoders, and a host launches as many kernels for few rows as for many."""
    workers = ("run.embeddings.workers=64", "run.decoder.workers=64")
    config = load_config(ROOT / "configs/nano.yaml", ["source.shard_rows=100", "decoder.batch=64", *workers])
    seen = {name: Observation(1e4, 10.0, 20.0, 2, {}, device="cuda") for name in ("embeddings", "decoder")}
    many = replace(measured(config, 10**6, **seen), machine=Machine(512, 64, "NVIDIA H100", local=False))
    launching = config.decoder.samples / config.decoder.batch * step_seconds("decoder", many, 64)[1]
    for stage, scaled, least in (
        ("embeddings", 2e-3 * 10**6, 10**6 * PART_SECONDS / 100),
        ("decoder", 2e-3 * config.decoder.samples, launching),
    ):
        assert scaled / 64 < least < scaled / 2, stage
        cost = estimate(stage, many)
        assert (cost.basis, cost.seconds) == ("measured", pytest.approx(least))
    # Not slower than what was measured: a part took the driver less then.
    (one,) = many.seen["embeddings"]
    quick = replace(many, seen={"embeddings": [replace(one, seconds=1.0, work=2.0)]})
    assert estimate("embeddings", quick).seconds == pytest.approx(2e-4 * 10**6 / 2)


def test_gpus_that_are_there_are_counted_as_those_that_are_asked_for() -> None:
    box = replace(asked(NANO, 10**6), machine=Machine(64, 8, "NVIDIA H100 80GB HBM3"))
    for stage in MODELS:
        assert estimate(stage, box) == estimate(stage, asked(NANO, 10**6, Fleet(8, "H100")))
    gpus = {stage: estimate(stage, box).gpus for stage in ("pairs", "embeddings", "samples", "evaluation")}
    assert gpus == {"pairs": 0, "embeddings": 8, "samples": 1, "evaluation": 1}
    cpu = load_config(ROOT / "configs/nano.yaml", ["run.decoder.device=cpu", "run.embeddings.gpus=0"])
    plain = again(box, cpu)
    assert [estimate(stage, plain).gpus for stage in ("decoder", "embeddings")] == [0, 0]


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("NVIDIA GeForce RTX 4090", DEVICES["RTX 4090"]), ("NVIDIA GeForce RTX 3060 Ti", DEVICES["RTX 3060"]),
        ("NVIDIA L4", DEVICES["L4"]), ("NVIDIA L40S", DEVICES["L40S"]), ("NVIDIA A100-SXM4-80GB", DEVICES["A100"]),
        ("Tesla T4", UNKNOWN), ("NVIDIA L40", UNKNOWN),
    ],
)  # fmt: skip
def test_the_gpu_of_a_machine_is_known_by_its_name(kind: str, device: Device) -> None:
    assert replace(asked(PAPER, 10), machine=Machine(8, 1, kind)).device == device


@pytest.mark.parametrize("text", ["2xRTX 4090", "2xRTX4090", "2xrtx-4090", "2x4090", "2x NVIDIA GeForce RTX 4090"])
def test_a_kind_of_gpu_is_named_as_people_name_it(text: str) -> None:
    assert parse_fleet(text) == Fleet(2, "RTX 4090")


def test_no_more_cores_decode_than_a_stage_takes_or_has_rows_for() -> None:
    """Of a small list, of which one core of a busy machine was seen to decode 2 images a second."""
    slow = Observation(258, 200.0, 200.0, 1, {}, decode_seconds=129.0)
    for rows, taken in ((258, DECODERS), (5, 5), (0, 1)):
        ask = replace(measured(PAPER, pairs=slow), fleet=Fleet(8, "H100"), rows=rows)
        assert cores_a_gpu(ask) > 300
        cost = estimate("embeddings", ask)
        assert (cost.gpus, cost.cores) == (1, taken)  # one shard, and so one worker
        assert cost.seconds - cost.startup == pytest.approx(rows * 0.5 / taken)
        (said,) = [line for line in remarks({"embeddings": cost}, ask) if line.startswith("embeddings: ")]
        assert f" {taken} decoding core{'' if taken == 1 else 's'} for each encoder, which waits for them" in said


def test_a_plan_says_what_a_prior_costs_that_sampling_does_not_take() -> None:
    said = {}
    for name, overrides in {
        "plain": [],
        "priced": ["run.prices.gpu_hour=2", "run.prices.currency=CHF"],
        "ar": ["bundle.sampling.prior=ar"],
        "one": ["bundle.models=[diffusion_prior,decoder]", "bundle.sampling.size=64"],
    }.items():
        ask = asked(paper(*overrides), 10**6, H100S)
        costs = {stage: estimate(stage, ask) for stage in ("ar_prior", "diffusion_prior") if stage in ask.graph}
        said[name] = [line for line in remarks(costs, ask) if "sampling takes" in line]
    hours = 64 * estimate("ar_prior", asked(PAPER, 10**6, H100S)).seconds / 3600
    rest = "and sampling takes diffusion_prior; leave it out of bundle.models to save them"
    assert said["plain"] == [f"ar_prior takes {hours:,.0f} GPU hours, {rest}"]
    assert said["priced"] == [f"ar_prior takes {hours:,.0f} GPU hours, {2 * hours:,.2f} CHF, {rest}"]
    assert re.match(r"diffusion_prior takes [\d,]+ GPU hours, and sampling takes ar_prior;", *said["ar"])
    assert said["one"] == []
    here = asked(NANO)
    assert not [line for line in remarks({s: estimate(s, here) for s in here.graph}, here) if "sampling takes" in line]


def test_what_runs_side_by_side_is_not_added_up() -> None:
    """DEMO's last five trainings have a thread each, of which NANO's have none."""
    demo = load_config(ROOT / "configs/demo.yaml")
    costs = {stage: Cost(100.0) for stage in build(NANO) if stage in build(PAPER)}
    apart = {stage: replace(cost, seconds=600.0 if stage == "decoder" else 100.0) for stage, cost in costs.items()}

    def hundreds(machine: Machine, config: Config = demo, fleet: Fleet | None = None) -> float:
        return elapsed(apart, replace(asked(config, fleet=fleet), machine=machine)) / 100

    one_after_another = 5 + len(costs)
    for machine, config, fleet in (
        (Machine(1), demo, None),
        (Machine(2), NANO, None),
        (Machine(2), demo, Fleet(8, "H100")),  # each training has 8 lanes
    ):
        assert hundreds(machine, config, fleet) == one_after_another
    assert hundreds(Machine(2)) == one_after_another - 4  # both priors and both upsamplers beside the decoder
    assert hundreds(Machine(4)) == one_after_another - 4
    workers = {stage: replace(getattr(PAPER.run, stage), workers=2, device="cpu") for stage in MODELS}
    cluster = replace(PAPER, run=replace(PAPER.run, **workers))
    assert hundreds(Machine(4, local=False), cluster) == one_after_another - 4
    assert hundreds(Machine(2, local=False, grows=True), cluster) == one_after_another - 4
    assert elapsed({}, asked()) == 0


def test_data_stages_grow_with_pairs_and_trainings_do_not() -> None:
    small, large = ({s: estimate(s, asked(NANO, n, H100S)) for s in build(NANO)} for n in (10**7, 10**9))
    for stage in ("source", "pairs", "embeddings", "curation", "index", "codec"):
        assert large[stage].seconds > 20 * small[stage].seconds, stage
        assert large[stage].disk == pytest.approx(100 * small[stage].disk), stage
    assert all(large[stage] == small[stage] for stage in MODELS)
    assert large["bundle"].seconds == 0  # it names models, and reads no row


def test_curation_is_planned_by_the_constants_that_were_measured_as_a_simulation_counts_it() -> None:
    """Comparisons alone grow with the rows, beside them what a row takes."""
    known = json.loads((ROOT / "lab/billion.json").read_text())
    measured = [known["wide 50000"][name] for name in ("microseconds_a_row", "nanoseconds_a_pair")]
    assert measured == pytest.approx([1e6 * ROW_SECONDS, 1e9 * PAIR_SECONDS])
    config = paper("run.curation.workers=64")
    for rows in (10**6, 10**8, 650 * 10**6):
        cost = estimate("curation", asked(config, rows))
        assert cost.seconds - cost.startup == pytest.approx(Simulation(known).near_seconds(rows))
    off = paper("curation.near_duplicate=null", "curation.near_held_out=null", "run.curation.workers=64")
    plain = estimate("curation", asked(off, 10**8))
    assert plain.seconds - plain.startup == pytest.approx(10**8 * ROW_SECONDS / 64)


def test_a_row_of_the_index_takes_longer_the_more_lists_there_are() -> None:
    """As was measured with 1,024, 8,192 and 65,536 lists, within 1.4."""
    index = asked(paper())
    taken = [1e6 * row_seconds("index", rows, index) for rows in (10**6, 2**20 + 1, 2**26, 650 * 10**6)]
    assert taken == pytest.approx([16, 36, 70, 298], rel=0.4)


def test_a_list_is_read_by_as_many_workers_as_it_is_worth() -> None:
    """One file is read by one process, which a plan says beside the time of workers."""
    config = load_config(ROOT / "configs/nano.yaml", ["run.source.workers=8"])
    few, some, many = (asked(config, rows) for rows in (1000, 10**6, 10**9))
    assert [estimate("source", ask).cores for ask in (few, some, many)] == [1, 2, 8]
    said = [line for ask in (few, many) for line in remarks({"source": estimate("source", ask)}, ask)]
    assert [line for line in said if line.startswith("source: ")] == [
        "source: a list of many files, read by 8 workers; a list of one file takes 8 h 53 min"
    ]
    opened, stored = (estimate("source", replace(many, unread=rows)) for rows in (10**9, 0))
    assert (opened.cores, opened.seconds, stored.seconds) == (1, 10**9 * row_seconds("source", 10**9, many), 0)


# --- bytes and money --------------------------------------------------------------------------------------------------


def test_a_training_stores_its_model_and_the_checkpoints_that_stay() -> None:
    parameters = model_size(NANO, "decoder").parameters
    assert estimate("decoder", asked()).disk == (4 + 2 * 16) * parameters
    kept = load_config(ROOT / "configs/nano.yaml", ["run.decoder.keep_checkpoints=5"])
    assert estimate("decoder", asked(kept)).disk == (4 + 5 * 16) * parameters


def test_a_disk_that_is_too_small_is_told_of_before_anything_is_made(tmp_path: Path) -> None:
    """Of the store and of temporary files, which are one where they lie on one disk."""
    here, costs = asked(), {"source": Cost(1.0, disk=10.0), "pairs": Cost(1.0, disk=1e18), "bundle": Cost(1.0)}
    store, s3 = open_store(str(tmp_path / "not/there/yet")), open_store("s3://bucket/prefix")
    assert list(lacking({"source": costs["source"]}, here, store)) == []
    [lack] = {lack.what for lack in lacking(costs, here, store) if store.url in lack.what}
    assert re.search(
        rf"the store {store.url} is too small: about [\d,.]+ PB will be needed, and \S+ .B are free$", lack
    )
    [lack] = {lack.what for lack in lacking(costs, here, s3)}
    assert re.match(r"the disk of temporary files \(TMPDIR\) is too small: about [\d,.]+ PB", lack)
    elsewhere = replace(here, machine=Machine(4, local=False))
    assert [lack.what.startswith("the disk of the store") for lack in lacking(costs, elsewhere, store)] == [True]
    assert list(lacking(costs, elsewhere, s3)) == []
    assert list(lacking(costs, asked(fleet=H100S), store)) == []


@pytest.mark.parametrize(
    ("workers", "rows", "shards"),
    [(4, 10**6, 4 * 8), (4, 10_000, 10), (0, 10**6, 1)],  # of 1,000 rows, of which a worker of Ray has eight
)
def test_temporary_files_are_those_of_all_shards_that_are_under_way(workers: int, rows: int, shards: int) -> None:
    """The images of each twice, as a spool and as the tar of it."""
    config = load_config(ROOT / "configs/nano.yaml", [f"run.pairs.workers={workers}", "source.shard_rows=1000"])
    cost = Cost(1.0, disk=rows * 1e3)
    assert limits._scratch("pairs", cost, asked(config, rows)) == pytest.approx(2 * shards * 1e6)


def test_the_table_has_money_where_there_are_prices() -> None:
    costs = {"pairs": Cost(3600.0, 60.0, "guess", cores=2, disk=2e12), "decoder": Cost(1800.0, gpus=1)}
    free = list(cost_table(costs, 4000.0, Prices()))
    assert [line.split()[0] for line in free] == ["stage", "pairs", "decoder", "all"]
    assert free[1].split()[1:7] == ["1", "h", "00", "min", "1", "min"]
    assert free[3].split()[1:7] == ["1", "h", "06", "min", "1", "min"]
    assert "USD" not in free[0]
    paid = list(cost_table(costs, 4000.0, Prices("EUR", core_hour=1.0, gpu_hour=2.0, storage_tb_month=20.0)))
    assert paid[0].split()[-1] == "EUR"
    assert [line.split()[-1] for line in paid[1:4]] == ["2.00", "1.00", "3.00"]
    assert paid[4] == "storage: 40.00 EUR a month"


# --- words of the command ---------------------------------------------------------------------------------------------


def test_other_words_are_refused() -> None:
    for text in ("", "64", "H100", "64H100", "-1xH100"):
        with pytest.raises(UserError, match=r"not a number of GPUs; write it as (64x|1x)H100$"):
            parse_fleet(text)
    for text in ("RTX 4090", "3060", "l4"):
        with pytest.raises(UserError, match=f"not a number of GPUs; write it as {shlex.quote(f'1x{text}')}$"):
            parse_fleet(text)
        assert parse_fleet(f"1x{text}").count == 1
    with pytest.raises(UserError, match="0xH100: name at least 1 GPU"):
        parse_fleet("0xH100")
    for text in ("Mac", "1xM3 Max", "1xmps", "apple"):
        with pytest.raises(UserError, match="Apple's GPUs are not used; leave it out"):
            parse_fleet(text)
    with pytest.raises(UserError, match="unknown kind T4; name the most similar of A100, H100, H200"):
        parse_fleet("64xT4")


def test_what_is_drawn_on_gpus_is_counted_in_the_precision_that_draws() -> None:
    configs = {kind: paper(f"bundle.sampling.precision={kind}") for kind in ("fp32", "bf16")}
    took = {kind: estimate("evaluation", asked(config, fleet=H100S)).seconds for kind, config in configs.items()}
    h100 = DEVICES["H100"]
    ratio = h100.peak * asked().utilisation / (h100.fp32 * FP32_UTILISATION)
    assert took["fp32"] / took["bf16"] == pytest.approx(ratio)
    assert estimate("evaluation", asked(PAPER, fleet=H100S)).seconds == took["fp32"]


def test_a_plan_of_years_says_what_would_take_a_month() -> None:
    said, longest = {}, {}
    for fleet in (Fleet(1, "RTX 4090"), H100S):
        ask = asked(PAPER, 10**6, fleet)
        costs = {stage: estimate(stage, ask) for stage in ("ar_prior", "decoder")}
        longest[fleet.name] = max(cost.seconds for cost in costs.values())
        said[fleet.name] = [line for line in remarks(costs, ask) if "would take a month" in line]
    assert said["H100"] == []
    gpus = int(re.search(r"about (\d+) RTX 4090", *said["RTX 4090"])[1])
    assert (gpus - 1) * MONTH_S < longest["RTX 4090"] <= gpus * MONTH_S
