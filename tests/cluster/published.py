"""KubeRay's published schema of a RayJob, in which Kubernetes' own of a pod stands.

``python -m tests.cluster.published FILE`` writes the excerpt of ``ray.io_rayjobs.yaml``, a CustomResourceDefinition of
KubeRay 1.7.0 (Apache License 2.0): all of version v1 but its status and the template of the submitter's pod.
"""

import gzip
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

EXCERPT = Path(__file__).with_name("rayjob-1.7.0.json.gz")


def excerpt(text: str) -> bytes:
    """The part of a CustomResourceDefinition that a RayJob of ours may touch."""
    [version] = [version for version in yaml.safe_load(text)["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"], schema["properties"]["spec"]["properties"]["submitterPodTemplate"]
    return gzip.compress(json.dumps(schema, separators=(",", ":"), sort_keys=True).encode(), mtime=0)


def strict(schema: Any) -> Any:
    """The schema as ``kubectl apply`` reads it: what it does not name is refused."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    open_ended = schema.keys() & {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}
    if isinstance(schema.get("properties"), dict) and not open_ended:
        found["additionalProperties"] = False
    return found


@cache
def _validator() -> jsonschema.protocols.Validator:
    schema = strict(json.loads(gzip.decompress(EXCERPT.read_bytes())))
    return jsonschema.validators.validator_for(schema)(schema)


def validate(rayjob: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for what a Kubernetes with KubeRay 1.7.0 would refuse."""
    _validator().validate(rayjob)


if __name__ == "__main__":
    EXCERPT.write_bytes(excerpt(Path(sys.argv[1]).read_text()))
