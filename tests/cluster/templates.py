"""Writes RayJobs of three kinds of stages to cluster/kuberay, as ``python -m tests.cluster.templates``."""

from pathlib import Path
from typing import Any

import yaml

from cluster.job import Job
from cluster.rayjob import render
from pipeline.config import make_config

FOLDER = Path(__file__).parents[2] / "cluster/kuberay"
KUBERNETES = {"image": "registry.example.org/unclip:0.1.0", "service_account": "unclip", "spot": True}
PAIRS = {"workers": 32, "nodes": {"pool": "cpu"}}
EMBEDDINGS = {
    "workers": 4, "gpus": 1, "nodes": {"pool": "gpu"}, "decoders": 6, "decoder_nodes": {"pool": "cpu"},
}  # fmt: skip
TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {  # the stage, and the settings under run:
    "data": ("pairs", {"kubernetes": KUBERNETES, "pairs": PAIRS}),
    "embeddings": ("embeddings", {"kubernetes": KUBERNETES, "embeddings": EMBEDDINGS}),
    "training": (
        "decoder",
        {
            "kubernetes": KUBERNETES | {"gpus": 8, "gpu_cpus": 96, "gpu_memory_gb": 900},
            "decoder": {"workers": 16, "device": "cuda"},
        },
    ),
}


def template(name: str) -> str:
    """The file ``name``: a remark with the settings, then the RayJob of that stage alone."""
    stage, run = TEMPLATES[name]
    config = make_config({"project": "birds", "store": "s3://BUCKET/birds", "source": {"paths": ["a.csv"]}, "run": run})
    command = ("python", "-m", "jobs.cli", "run", "project.yaml", f"--only={stage}")
    job = Job("unclip-birds-0123456789abcdef", command, {"AWS_REGION": "us-west-2"}, 1.0, 4096)
    settings = "".join(f"#   {line}\n" for line in yaml.safe_dump({"run": run}, sort_keys=False).splitlines())
    remark = f"# What unclip submit --to kuberay --only {stage} writes with these settings:\n{settings}"
    return remark + render(job, "s3://BUCKET/birds/packages/birds/PACKAGE.zip", config.run, [stage])


if __name__ == "__main__":
    for name in TEMPLATES:
        (FOLDER / f"{name}.yaml").write_text(template(name))
