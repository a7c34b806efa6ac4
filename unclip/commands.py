"""The parts of a command of your own; examples/add_command.py is a whole one."""

from jobs.arguments import Command, Parser
from jobs.command_line import takes_config
from jobs.output import say

__all__ = ["Command", "Parser", "say", "takes_config"]
