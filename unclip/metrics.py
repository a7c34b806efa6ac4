"""The parts of a metric of your own; examples/add_metric.py is a whole one."""

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metric import DRAWERS, Metric
from pipeline.evaluate.rows import SplitRows
from pipeline.evaluate.subject import Subject

__all__ = ["DRAWERS", "Figure", "Metric", "SplitRows", "Subject"]
