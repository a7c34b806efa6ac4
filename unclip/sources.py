"""The parts of a source of your own; examples/add_source.py is a whole one."""

from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow, Source
from pipeline.errors import UserError

__all__ = ["ListReader", "ListRow", "Source", "SourceRecipe", "UserError"]
