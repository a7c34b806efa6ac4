"""The parts of a network of your own in a decoder's place; examples/another_decoder.py is a whole one."""

from models.decoder import Decoder
from models.folder import KINDS, Kind
from models.image_configs import DecoderConfig
from models.nn.embedding import timestep_embedding
from pipeline.config import preset_config
from pipeline.training.tasks.decoder import DecoderTask

__all__ = ["KINDS", "Decoder", "DecoderConfig", "DecoderTask", "Kind", "preset_config", "timestep_embedding"]
