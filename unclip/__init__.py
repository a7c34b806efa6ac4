"""The public interface: what a program imports; everything else is private.

Nothing heavy is imported before a name is used, so ``import unclip`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.artifact import Artifact as Artifact
    from jobs.export import ExportResult as ExportResult
    from jobs.export import export as export
    from jobs.look import look as look
    from jobs.plan import RunPlan as RunPlan
    from jobs.run import RunResult as RunResult
    from jobs.run import StageDone as StageDone
    from pipeline.errors import CorruptObject as CorruptObject
    from pipeline.errors import UserError as UserError
    from pipeline.look.overview import Look as Look
    from pipeline.sampling.nearest import TrainingImage as TrainingImage
    from unclip.image import DrawnImage as DrawnImage
    from unclip.image import ImageLike as ImageLike
    from unclip.model import Model as Model
    from unclip.model import load as load
    from unclip.pairs import Pairs as Pairs
    from unclip.project import Project as Project
    from unclip.project import open as open
    from unclip.training import train as train

    __version__: str

_PLACES = {
    "Artifact": "jobs.artifact",
    "CorruptObject": "pipeline.errors",
    "DrawnImage": "unclip.image",
    "ExportResult": "jobs.export",
    "ImageLike": "unclip.image",
    "Look": "pipeline.look.overview",
    "Model": "unclip.model",
    "Pairs": "unclip.pairs",
    "Project": "unclip.project",
    "RunPlan": "jobs.plan",
    "RunResult": "jobs.run",
    "StageDone": "jobs.run",
    "TrainingImage": "pipeline.sampling.nearest",
    "UserError": "pipeline.errors",
    "export": "jobs.export",
    "load": "unclip.model",
    "look": "jobs.look",
    "open": "unclip.project",
    "train": "unclip.training",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("unclip-ray")
    if name not in _PLACES:
        raise AttributeError(f"module 'unclip' has no attribute {name!r}")
    try:
        import_module("jobs").hidden  # noqa: B018 - it has looked for packages that hide those of this project
    except (SystemExit, AttributeError):
        raise ImportError(
            "a package named models, pipeline or jobs in your folder hides the one that unclip needs; rename yours, or "
            "put it into a package of your own"
        ) from None
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
