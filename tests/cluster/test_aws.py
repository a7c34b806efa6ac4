"""cluster/aws.yaml: Ray accepts it, it publishes nothing, and what AWS has not on spot comes on demand. No AWS here."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.constants import AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

from cluster import spot

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster/aws.yaml").read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
TYPES: dict[str, dict[str, Any]] = CONFIG["available_node_types"]
NONE_LEFT = NodeLaunchException("InsufficientInstanceCapacity", "no such machine now", None)


def start_commands() -> list[str]:
    return [c for c in CONFIG["head_start_ray_commands"] + CONFIG["worker_start_ray_commands"] if "ray start" in c]


def test_ray_prepares_and_validates_it() -> None:
    prepared = prepare_config(yaml.safe_load(TEXT))
    validate_config(prepared)  # which holds it against Ray's schema
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"head_type": "head"})
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize("name", TYPES)
def test_aws_takes_what_a_machine_is_started_with(name: str) -> None:
    """By the model of EC2's interface that botocore has: names, types and nothing unknown."""
    asked = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    given = TYPES[name]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    if subnets := given.pop("SubnetIds", None):  # Ray's own word for several
        given["SubnetId"] = subnets[0]
    assert ParamValidator().validate(given, asked).generate_report() == ""
    assert "Unknown" in ParamValidator().validate(given | {"Subnet": "a"}, asked).generate_report()


def test_the_token_is_wanted_and_nothing_is_published() -> None:
    assert "-e RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert CONFIG["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    head, worker = start_commands()
    assert "--dashboard-host=127.0.0.1" in head
    assert "dashboard" not in worker
    assert "0.0.0.0" not in TEXT
    assert not [word for word in ("AUTH_TOKEN=", "AWS_SECRET", "AWS_ACCESS", "PRIVATE KEY") if word in TEXT]
    for kind in TYPES.values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert "IamInstanceProfile" in kind["node_config"]  # so that no key has to be anywhere


def test_every_spot_type_has_its_like_on_demand_and_the_head_is_none() -> None:
    spots = {name for name in TYPES if name.endswith(spot.SPOT)}
    assert spots == {"cpu-spot", "gpu-spot"}
    for name, kind in TYPES.items():
        assert (kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}) == (name in spots)
    for name in spots:
        twin, rare = TYPES[name.removesuffix(spot.SPOT)], TYPES[name]
        assert all(twin[field] == rare[field] for field in ("resources", "labels", "max_workers"))
        assert rare["node_config"]["InstanceType"] == twin["node_config"]["InstanceType"]
    assert CONFIG["head_node_type"] == "head"
    assert TYPES["head"]["resources"] == {"CPU": 0}


# --- what is launched -------------------------------------------------------------------------------------------------


def launched(demands: list[dict[str, float]], tracker: NodeProviderAvailabilityTracker) -> dict[str, int]:
    """What Ray's autoscaler launches for these demands, with our scorer."""
    types = prepare_config(yaml.safe_load(TEXT))["available_node_types"]
    scorer = partial(spot.score, node_availability_summary=tracker.summary())
    found, rest = get_nodes_for(types, {"head": 1}, "head", CONFIG["max_workers"], demands, utilization_scorer=scorer)
    assert not rest
    return dict(found)


def test_ray_takes_the_scorer_from_the_heads_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(word.split("=", 1) for word in start_commands()[0].split(" ray start ")[0].split())
    assert environment["RAY_enable_autoscaler_v2"] == "0"  # the second autoscaler asks for no scorer
    name = "RAY_AUTOSCALER_UTILIZATION_SCORER"
    monkeypatch.setenv(name, environment[name])
    scheduler = ResourceDemandScheduler(None, TYPES, CONFIG["max_workers"], "head", 1.0)
    assert scheduler.utilization_scorer is spot.score


def test_spot_comes_first_and_gpus_only_where_they_are_asked_for() -> None:
    tracker = NodeProviderAvailabilityTracker()
    assert launched([{"CPU": 1}] * 40, tracker) == {"cpu-spot": 3}
    assert launched([{"GPU": 1}] * 5, tracker) == {"gpu-spot": 2}
    assert launched([{"GPU": 1}] * 4 + [{"CPU": 1}] * 96, tracker) == {"gpu-spot": 1, "cpu-spot": 3}


def test_what_aws_has_not_on_spot_comes_on_demand_for_half_an_hour() -> None:
    now = time.time()
    tracker = NodeProviderAvailabilityTracker(timer=lambda: now)
    tracker.update_node_availability("gpu-spot", int(now), NONE_LEFT)
    assert launched([{"GPU": 1}] * 4, tracker) == {"gpu": 1}
    assert launched([{"CPU": 1}] * 16, tracker) == {"cpu-spot": 1}
    now += AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S + 1
    assert launched([{"GPU": 1}] * 4, tracker) == {"gpu-spot": 1}


def test_more_than_the_spot_machines_allowed_come_on_demand() -> None:
    most = TYPES["gpu-spot"]["max_workers"]
    assert launched([{"GPU": 4}] * (most + 2), NodeProviderAvailabilityTracker()) == {"gpu-spot": most, "gpu": 2}
